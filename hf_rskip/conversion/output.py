"""Checks the output folder of a conversion."""

import os
from pathlib import Path

from ..errors import UserError


def new_folder(path: str | os.PathLike) -> Path:
    """The path of a folder that is still to be created, or is empty.

    Raises:
        [`UserError`]: if there is a file, or a folder with something in it, or none can be created.
    """
    path = Path(path)
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if parent != path and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"{str(path)!r} cannot be created: {str(parent)!r} is no folder that can be written into")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{str(path)!r} already exists and is not an empty folder")
    return path
