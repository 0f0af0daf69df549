"""Atomic replacement of files: a process that is killed leaves the old file or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_then_rename(path: str | Path, part: Path | None = None) -> Iterator[Path]:
    """Yields the path of a file to write, which is renamed to `path` if no error is raised.

    Args:
        path: of the file that is created or replaced.
        part: what is yielded, in the same folder; by default a hidden file of this process.
    """
    path = Path(path)
    part = part or path.with_name(f".{path.name}-{os.getpid()}")
    yield part
    part.replace(path)


def replace_text(path: str | Path, text: str) -> None:
    """Creates or replaces a UTF-8 file."""
    with write_then_rename(path) as part:
        part.write_text(text, encoding="utf-8")
