"""Checkpoints on disk: published when complete, rotated, checked, and found for resuming."""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import UserError
from ..manifest import MANIFEST_NAME, check_manifest, read_json, unreadable, write_manifest

logger = logging.get_logger(__name__)

STAGING_NAME = ".incomplete"
"""The folder, in that of the run, for checkpoints that are being written or removed."""
_REPLACED_NAME = "replaced"
_KINDS = {"model": "*model*", "optimizer": "*optim*", "scheduler": "*scheduler*", "rng_state": "rng_state*"}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists the checkpoints of a run in the order of their steps; raises a [`UserError`] if it cannot be read."""
    names = [name for name in _list_names(output_dir) if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    return sorted((Path(output_dir, name) for name in names), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Writes the manifest of a complete checkpoint, syncs it and renames it to `final`, replacing an older one."""
    write_manifest(staged)
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if final.exists():
        _move_to(final.parent / STAGING_NAME / _REPLACED_NAME, final)
    staged.rename(final)
    _sync(final.parent)


def rotate_checkpoints(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Removes the oldest checkpoints beyond `limit`, but none of `keep`, and no folder that only has such a name."""
    checkpoints = [path for path in list_checkpoints(output_dir) if (path / TRAINER_STATE_NAME).exists()]
    keep = {path.name for path in keep}
    excess = 0 if limit is None or limit <= 0 else len(checkpoints) - max(limit, len(keep))
    remove_checkpoints(output_dir, [path for path in checkpoints if path.name not in keep][: max(0, excess)])


def remove_checkpoints(output_dir: Path, checkpoints: Iterable[Path]) -> None:
    """Moves checkpoints, each in one step, to where [`clear_staging`] deletes them.

    The function of Transformers that removes them may leave a part of one if it is killed.
    """
    for checkpoint in checkpoints:
        _move_to(output_dir / STAGING_NAME / "removed", checkpoint)


def clear_staging(output_dir: str | Path) -> None:
    """Deletes removed and incomplete checkpoints, and restores those that a killed run was replacing."""
    staging = Path(output_dir, STAGING_NAME)
    for checkpoint in list_checkpoints(staging / _REPLACED_NAME):
        if not Path(output_dir, checkpoint.name).exists():
            checkpoint.rename(Path(output_dir, checkpoint.name))
    shutil.rmtree(staging, ignore_errors=True)


def _move_to(folder: Path, checkpoint: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / checkpoint.name, ignore_errors=True)
    checkpoint.rename(folder / checkpoint.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from, or `None` for a fresh start.

    With `resume_from_checkpoint="true"` it is the last checkpoint of `output_dir`, with a path it is that checkpoint.
    All its files must be as they were written; one without a manifest, from an earlier version, is taken with a warning
    if no kind of file is missing. Nothing is removed but what the program itself left under [`STAGING_NAME`].

    Raises:
        [`UserError`]: if the checkpoint cannot be gone on from: names the file, and the newest one that is whole; if a
            folder has the name of a checkpoint and is none; or if a fresh start would mix with an earlier run or
            replace its model.
    """
    value = str(resume_from_checkpoint or "false").lower()
    is_fresh, is_last = value == "false", value == "true"
    # A refused fresh start must not remove files that another run may be writing.
    if not (is_fresh and list_checkpoints(output_dir)):
        clear_staging(output_dir)
    checkpoints = list_checkpoints(output_dir)
    names = (CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if (is_fresh or is_last) and not checkpoints and any(Path(output_dir, name).exists() for name in names):
        raise UserError(
            f"{str(output_dir)!r} already holds a model, and no checkpoint to go on from: remove the folder, or choose "
            "another `output_dir`"
        )
    if is_fresh and checkpoints:
        raise UserError(
            f"{str(output_dir)!r} already holds {checkpoints[-1].name}: go on from it with "
            "`--resume_from_checkpoint true`, remove the folder, or choose another `output_dir`"
        )
    if is_fresh:
        return None
    for path in checkpoints:
        if not {TRAINER_STATE_NAME, MANIFEST_NAME} & set(_list_names(path)):
            raise UserError(f"{str(path)!r} has the name of a checkpoint, but no {TRAINER_STATE_NAME}: move it away")
    if not is_last:
        checkpoint = Path(resume_from_checkpoint)
    elif checkpoints:
        checkpoint = checkpoints[-1]
    else:
        logger.warning(f"There is no checkpoint to resume from in {str(output_dir)!r}: the run starts anew")
        return None
    try:
        if not _check_whole(checkpoint):
            logger.warning(
                f"{checkpoint} has no {MANIFEST_NAME}: that its files are as they were written is not checked"
            )
    except UserError as error:
        whole = next((path for path in reversed(checkpoints) if path != checkpoint and _is_whole(path)), None)
        advice = "no other checkpoint is whole" if whole is None else f"go on with `--resume_from_checkpoint {whole}`"
        raise UserError(f"{str(checkpoint)!r} cannot be resumed from: {error}; {advice}") from error
    return checkpoint


def _check_whole(checkpoint: Path) -> bool:
    """Checks the files of a checkpoint; returns whether it has a manifest."""
    has_manifest = check_manifest(checkpoint)
    read_state(checkpoint)
    # The Trainer would replace a missing one by a fresh one. Under FSDP the names are longer.
    for kind, pattern in _KINDS.items():
        if not any(checkpoint.rglob(pattern)):
            raise UserError(f"it has no {kind}")
    return has_manifest


def _is_whole(checkpoint: Path) -> bool:
    try:
        _check_whole(checkpoint)
    except UserError:
        return False
    return True


def read_state(checkpoint: Path) -> dict:
    """Reads `trainer_state.json` of a checkpoint; raises a [`UserError`] unless it is the state of a Trainer."""
    path = checkpoint / TRAINER_STATE_NAME
    state = read_json(path)
    if "global_step" not in state:
        raise UserError(f"{str(path)!r} is not the state of a training")
    return state


def _list_names(folder: str | Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
