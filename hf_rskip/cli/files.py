"""Input and output files of commands: UTF-8, checked and opened before any work, written whole or not at all."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ..atomic import write_then_rename
from ..errors import UserError
from ..lines import decode_lines

_LINES_AT_ONCE = 10_000
_RESULTS = (
    *("*.json", "*.safetensors", "*.bin", "*.onnx*", "*.md", "*.csv", "*.png", "*.py", "index.html"),
    *("optimizer.pt", "scheduler.pt", "rng_state*.pth"),
)
"""Patterns of the names of files that training, export and push write beside [`~hf_rskip.manifest.MODEL_FILES`]."""


def check_output(output: str | None, inputs: Sequence[str | None]) -> None:
    """Raises a [`UserError`] if a file to be written is one of those to be read, or belongs to a model."""
    from ..manifest import MODEL_FILES

    if not output:
        return
    path = Path(output).resolve()
    is_ours = any(fnmatch(path.name, pattern) for pattern in (*MODEL_FILES, *_RESULTS))
    if is_ours and path.is_file() and path.with_name("config.json").exists():
        raise UserError(f"{output!r} is there already, in the folder of a model: choose another --output_file")
    for source in filter(None, inputs):
        if Path(source).resolve() == path:
            raise UserError(f"{source!r} cannot be both input and output")


def create_folder(path: str) -> Path:
    """Creates a folder unless it exists; raises a [`UserError`] if that fails."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path!r} cannot be a folder: {error.strerror}.") from error
    return folder


def open_file(path: str | Path, mode: str) -> BinaryIO:
    """Opens a file; raises a [`UserError`] where that fails."""
    try:
        return open(path, mode)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be opened: {error.strerror}") from error


@contextlib.contextmanager
def new_file(path: str | None) -> Iterator[BinaryIO]:
    """Opens a file that gets its name once it is complete; standard output without a path.

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
    part = Path(f"{path}.part")
    try:
        with write_then_rename(path, part), open_file(part, "wb") as file:
            yield file
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def write_lines(file: BinaryIO, sentences: list[str]) -> None:
    """Writes each sentence as one line; line feeds inside it become blanks."""
    file.writelines(sentence.replace("\n", " ").encode() + b"\n" for sentence in sentences)
    file.flush()


def read_lines(source: BinaryIO, name: str) -> Iterator[list[str]]:
    """Yields the lines of [`decode_lines`] in lists, so that a long file is never in memory as a whole."""
    lines = decode_lines(source, name)
    while some := list(islice(lines, _LINES_AT_ONCE)):
        yield some


def read_all_lines(path: str) -> list[str]:
    """Reads the lines of [`decode_lines`]."""
    with open_file(path, "rb") as file:
        return list(decode_lines(file, path))
