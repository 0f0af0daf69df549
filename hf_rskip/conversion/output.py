"""Where a converted checkpoint goes."""

import os
from pathlib import Path

from ..errors import UserError


def new_folder(path: str | os.PathLike) -> Path:
    """The path of a folder that is still to be created, or is empty.

    Raises:
        [`UserError`]: if there is a file, or a folder with something in it.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{str(path)!r} already exists and is not an empty folder")
    return path
