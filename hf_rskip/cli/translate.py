"""`hf-rskip translate`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from transformers.utils import CONFIG_NAME

from ..decoding.loading import load_ensemble
from ..decoding.translate import Hypothesis, translate, translate_n_best
from ..errors import UserError
from ..recipe.translation import GenerationArguments

_LINES_AT_ONCE = 10_000


def generation_kwargs(args: argparse.Namespace) -> dict:
    """What the command line says of generation, for `model.generate`; refuses what a recipe refuses."""
    names = ("num_beams", "length_penalty", "gnmt_length_penalty", "max_new_tokens", "max_len_a", "max_len_b")
    given = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    GenerationArguments(**given)
    return given


def translate_lines(args: argparse.Namespace) -> None:
    """Translates line by line: as many lines out as in, in their order, an empty one for an empty one.

    With `--n_best` so many lines each, in the form of Moses; sentences are numbered from 0.
    """
    check_output(args.output_file, [args.input_file])
    options, number = generation_kwargs(args), 0
    with contextlib.ExitStack() as files:
        # Only \n ends a line, so that the numbers of lines agree whatever else a sentence contains.
        source = files.enter_context(open_file(args.input_file, "rb")) if args.input_file else sys.stdin.buffer
        target = files.enter_context(new_file(args.output_file))
        model, tokenizer = load_ensemble([args.model, *args.ensemble])
        for lines in read_lines(source, args.input_file or "standard input"):
            if args.n_best:
                n_best = translate_n_best(model, tokenizer, lines, args.n_best, args.max_batch_tokens, **options)
                write_lines(target, [line for row, own in enumerate(n_best, number) for line in _n_best(row, own)])
                number += len(lines)
            else:
                write_lines(target, translate(model, tokenizer, lines, args.max_batch_tokens, **options))


def _n_best(number: int, hypotheses: list[Hypothesis]) -> list[str]:
    return [f"{number} ||| {text} ||| {score:.6f}" for text, score in hypotheses]


def check_output(output: str | None, inputs: Sequence[str | None]) -> None:
    """Raises a [`UserError`] if a file to be written is one of those to be read, or belongs to a model."""
    if output and os.path.isfile(output) and Path(output).resolve().with_name(CONFIG_NAME).exists():
        raise UserError(f"{output!r} is there already, in the folder of a model: choose another --output_file")
    for path in inputs:
        if output and path and Path(path).resolve() == Path(output).resolve():
            raise UserError(f"{path!r} cannot be both input and output")


def write_lines(file: BinaryIO, sentences: list[str]) -> None:
    """Writes a line each, whatever line breaks a sentence has inside."""
    file.writelines(sentence.replace("\n", " ").encode() + b"\n" for sentence in sentences)
    file.flush()


def open_file(path: str, mode: str) -> BinaryIO:
    """As `open`; raises a [`UserError`] where that fails."""
    try:
        return open(path, mode)
    except OSError as error:
        raise UserError(f"{path!r} cannot be opened: {error.strerror}") from error


@contextlib.contextmanager
def new_file(path: str | None) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written; standard output without a path.

    A failure leaves an older file as it was, and what was written so far in `PATH.part`.

    Raises:
        [`UserError`]: if it cannot be written.
    """
    if path is None:
        yield sys.stdout.buffer
        return
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device has no older content
        with open_file(path, "wb") as file:
            yield file
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{path!r} cannot be written to.")
    part = f"{path}.part"
    try:
        with open_file(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        if os.path.exists(part) and not os.path.getsize(part):
            os.unlink(part)


def read_lines(source: BinaryIO, name: str) -> Iterator[list[str]]:
    """The lines of UTF-8 text without their ends, many at once; `name` is for the [`UserError`] about what is not."""
    lines = []
    for number, line in enumerate(source, start=1):
        try:
            lines.append(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"Line {number} of {name} is not UTF-8") from error
        if len(lines) == _LINES_AT_ONCE:
            yield lines
            lines = []
    yield lines
