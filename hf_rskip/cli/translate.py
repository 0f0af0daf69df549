"""`hf-rskip translate`."""

import argparse
import contextlib
import sys

from .files import check_output, new_file, open_file, read_lines, write_lines
from .options import add_decoding_arguments, add_model_argument, count, decoding_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input_file", help="UTF-8 text, a sentence a line (default: standard input)")
    parser.add_argument("--output_file", help="default: standard output")
    parser.add_argument(
        "--n_best", type=count, metavar="N", help="N lines a sentence: `number ||| translation ||| score`"
    )
    add_decoding_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Translates line by line: one output line for each input line, in order; empty lines stay empty.

    With `--n_best` so many lines each, in the form of Moses; sentences are numbered from 0.
    """
    from ..decoding.loading import load_ensemble
    from ..decoding.translate import translate, translate_n_best

    check_output(args.output_file, [args.input_file])
    options, number = decoding_kwargs(args), 0
    with contextlib.ExitStack() as files:
        source = files.enter_context(open_file(args.input_file, "rb")) if args.input_file else sys.stdin.buffer
        target = files.enter_context(new_file(args.output_file))
        model, tokenizer = load_ensemble([args.model, *args.ensemble])
        for lines in read_lines(source, args.input_file or "standard input"):
            if not args.n_best:
                write_lines(target, translate(model, tokenizer, lines, **options))
                continue
            n_best = translate_n_best(model, tokenizer, lines, args.n_best, **options)
            for row, hypotheses in enumerate(n_best, number):
                write_lines(target, [f"{row} ||| {text} ||| {score:.6f}" for text, score in hypotheses])
            number += len(lines)
