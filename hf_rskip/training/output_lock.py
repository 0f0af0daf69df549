"""Locks the folder of a run: two runs would overwrite and remove each other's checkpoints."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK_NAME = ".lock"
"""The empty file, in the folder of a run, that the run holds locked; beside a run's files it stays."""


@contextmanager
def locked(output_dir: str | Path) -> Iterator[None]:
    """Creates and locks the folder of a run; the lock ends with the process at the latest.

    Where the file system has no locks nobody is kept out.

    Raises:
        [`UserError`]: if another process is in it, or it cannot be created or written into.
    """
    path = Path(output_dir, LOCK_NAME)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        file = path.open("wb")
    except OSError as error:
        raise UserError(f"output_dir {str(output_dir)!r} cannot be written into: {error.strerror}.") from error
    with file:
        try:
            # A lock of this process alone: with `flock`, its workers would hold it too, and outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"Another run is writing into {str(output_dir)!r}: wait for its end, or choose another `output_dir`"
            ) from None
        except OSError:
            pass
        try:
            yield
        finally:
            if list(path.parent.iterdir()) == [path]:
                path.unlink()
