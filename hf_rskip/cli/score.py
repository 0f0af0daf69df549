"""`hf-rskip score`."""

import argparse
import math
import sys

from .files import check_output, new_file, write_lines
from .options import add_corpus_arguments, add_model_argument, count

_COLUMNS = ("log_probability", "token_count", "token_log_probabilities", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_corpus_arguments(parser, parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--max_samples", type=count, help="only the first so many sentences")
    parser.add_argument("--ensemble", nargs="+", default=[], metavar="MODEL", help="average probabilities with these")
    parser.add_argument("--per_token", action="store_true", help="add every token and its log-probability")
    parser.add_argument("--output_file", help="default: standard output")
    parser.add_argument("--max_batch_tokens", type=count, default=4096, help="padded tokens a batch")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes the names of the columns and a line a pair, between tabs: the sum and the number of tokens, and if asked
    the log-probability of each token and the tokens themselves, between blanks.

    The perplexity of all pairs goes to standard error.
    """
    check_output(args.output_file, args.test_files or ())
    with new_file(args.output_file) as file:
        write_lines(file, _score_lines(args))


def _score_lines(args: argparse.Namespace) -> list[str]:
    from transformers import AutoModelForSeq2SeqLM

    from ..decoding.loading import load_config, load_ensemble
    from ..decoding.score import score
    from .corpus import find_languages, load_test_set

    config = load_config(args.model, AutoModelForSeq2SeqLM)
    is_silent = getattr(config, "source_lang", None) is None  # as that of a MarianMT checkpoint; files do without
    languages = find_languages(args, {} if args.test_files and is_silent else {args.model: config})
    sources, targets = load_test_set(args, *languages, args.max_samples)
    model, tokenizer = load_ensemble([args.model, *args.ensemble])
    log_probs = score(model, tokenizer, sources, targets, args.max_batch_tokens)
    lines = ["\t".join(_COLUMNS if args.per_token else _COLUMNS[:2])]
    for values, target in zip(log_probs, targets, strict=True):
        row = [f"{sum(values):.6f}", str(len(values))]
        if args.per_token:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text_target=target).input_ids)
            row += [" ".join(f"{value:.6f}" for value in values), " ".join(tokens)]
        lines.append("\t".join(row))
    total, number = sum(map(sum, log_probs)), sum(map(len, log_probs))
    print(f"perplexity: {math.exp(-total / number):.4f} over {number:,} tokens", file=sys.stderr)
    return lines
