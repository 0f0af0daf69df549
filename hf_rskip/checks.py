"""Checks and hints for what a user gives."""

import difflib
from collections.abc import Iterable

from .errors import UserError


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises a [`UserError`] that names `name` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def parse_count(name: str, word: str) -> int:
    """The whole number of at least 1 that `word` spells; raises a [`UserError`] that names `name` if it spells none."""
    count = int(word) if word.isdecimal() else word
    check_count(name, count)
    return count


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message: "; did you mean `prefix` and the nearest of `known`?", or nothing if none is near."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
