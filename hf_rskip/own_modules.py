"""Imports modules of the user's own, which register residual kinds."""

import importlib
import os
import sys
from collections.abc import Iterable


def import_modules(names: Iterable[str]) -> None:
    """Imports modules by name, those of the current folder too, where nothing that is installed has the name."""
    folder = os.path.join(os.getcwd(), "")  # as no other entry is written
    sys.path.append(folder)
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        sys.path.remove(folder)
