"""Tells paths from ids on the Hub."""

import os
from collections.abc import Callable, Sequence
from pathlib import PurePath

from ..errors import UserError

_SUFFIXES = {".bin", ".csv", ".json", ".model", ".onnx", ".pt", ".pth", ".safetensors", ".spm", ".txt", ".yaml", ".yml"}


def is_path(name: str) -> bool:
    """Whether `name` can only mean a path: there is something, its parent exists, or an id on the Hub looks different.

    An id is `name` or `user/name`, and may contain dots, but ends in no suffix of a file.
    """
    return (
        os.path.exists(name)
        or os.path.isdir(os.path.dirname(name))
        or name.startswith((".", "~", "/"))
        or name.count("/") > 1
        or PurePath(name).suffix in _SUFFIXES
    )


def check_different(names: Sequence[str]) -> None:
    """Raises a [`UserError`] if one of the paths and ids is given twice, also by another path."""
    seen = set()
    for name in names:
        real = os.path.realpath(name) if os.path.exists(name) else name
        if real in seen:
            raise UserError(f"{name!r} is given twice.")
        seen.add(real)


def short_names(names: Sequence[str], shorten: Callable[[str], str]) -> dict[str, str]:
    """Each of the paths and ids shortened, or all as they are where two would be the same; see [`check_different`]."""
    check_different(names)
    short = list(map(shorten, names))
    return dict(zip(names, short if len(set(short)) == len(short) else names, strict=True))


def check_name(name: str, what: str) -> None:
    """Raises a [`UserError`] if `name` is a path at which there is no `what`, so that the Hub is not asked for it."""
    if not os.path.exists(name) and is_path(name):
        raise UserError(f"There is no {what} {name!r}: no such file or folder.")
