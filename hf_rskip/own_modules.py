"""Imports modules of the user's own, which register residual kinds."""

import importlib
import os
import sys
from collections.abc import Iterable

from .errors import UserError


def import_modules(names: Iterable[str]) -> None:
    """Imports modules by name, those of the current folder too, where nothing that is installed has the name.

    Raises:
        [`UserError`]: if one cannot be imported.
    """
    folder = os.path.join(os.getcwd(), "")  # as no other entry is written
    sys.path.append(folder)
    try:
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(f"--import_module {name} cannot be imported: {error}.") from error
    finally:
        sys.path.remove(folder)
