"""Checks of user input, and hints at the nearest known word."""

import difflib
from collections.abc import Iterable

from .errors import UserError


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises a [`UserError`] that names `name` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def parse_count(name: str, word: str) -> int:
    """Parses a whole number of at least 1; raises a [`UserError`] that names `name` if `word` is none."""
    count = int(word) if word.isdecimal() else word
    check_count(name, count)
    return count


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """End of a message, "; did you mean ...?", with `prefix` and the nearest of `known`; empty if none is near."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
