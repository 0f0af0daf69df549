"""Checkpoints on disk: written whole or not at all, and the one from which a killed run goes on."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import UserError

logger = logging.get_logger(__name__)

STAGING_NAME = ".incomplete"
"""The folder, in that of the run, for checkpoints that are being written or removed."""
_REPLACED_NAME = "replaced"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps."""
    return sorted(
        (path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.search(r"-\d+$", path.name)),
        key=checkpoint_step,
    )


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Gives a finished checkpoint its name, once all of it has reached the disk; one of that name is replaced."""
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if final.exists():
        _move_to(final.parent / STAGING_NAME / _REPLACED_NAME, final)
    staged.rename(final)
    _sync(final.parent)


def rotate_checkpoints(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Removes the oldest checkpoints beyond `limit`, but none of `keep`."""
    checkpoints = list_checkpoints(output_dir)
    keep = {path.name for path in keep}
    excess = 0 if limit is None or limit <= 0 else len(checkpoints) - max(limit, len(keep))
    remove_checkpoints(output_dir, [path for path in checkpoints if path.name not in keep][: max(0, excess)])


def remove_checkpoints(output_dir: Path, checkpoints: Iterable[Path]) -> None:
    """Takes checkpoints away, each at once, for [`clear_staging`] to delete.

    The function of Transformers that removes them may leave a part of one if it is killed.
    """
    for checkpoint in checkpoints:
        _move_to(output_dir / STAGING_NAME / "removed", checkpoint)


def clear_staging(output_dir: str | Path) -> None:
    """Deletes what has been removed, and what a killed run was writing; puts back what it was replacing."""
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

    With `resume_from_checkpoint="true"` it is the last complete checkpoint of `output_dir`; incomplete ones, left by a
    run killed while it saved, are removed. With a path it is that checkpoint.

    Raises:
        [`UserError`]: if the path is not a complete checkpoint, or if a fresh start would mix with an earlier run.
    """
    is_fresh = resume_from_checkpoint in (None, "") or str(resume_from_checkpoint).lower() == "false"
    # A fresh start that is about to be refused must not touch what another run may be writing at this moment.
    if not (is_fresh and list_checkpoints(output_dir)):
        clear_staging(output_dir)
    checkpoints = list_checkpoints(output_dir)
    if is_fresh:
        if any(Path(output_dir, name).exists() for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME)) and not checkpoints:
            raise UserError(
                f"{str(output_dir)!r} already holds a model: remove the folder, or choose another `output_dir`"
            )
        if checkpoints:
            raise UserError(
                f"{str(output_dir)!r} already holds {checkpoints[-1].name}: go on from it with "
                "`--resume_from_checkpoint true`, remove the folder, or choose another `output_dir`"
            )
        return None
    if str(resume_from_checkpoint).lower() == "true":
        while checkpoints and not _is_complete(checkpoints[-1]):
            logger.warning(f"Removing the incomplete {checkpoints[-1]}")
            shutil.rmtree(checkpoints.pop())
        checkpoint = checkpoints[-1] if checkpoints else None
        if checkpoint is None:
            logger.warning(f"There is no checkpoint to resume from in {str(output_dir)!r}: the run starts anew")
    else:
        checkpoint = Path(resume_from_checkpoint)
        if not _is_complete(checkpoint):
            raise UserError(f"{str(checkpoint)!r} is not a complete checkpoint")
    # Without one of these the Trainer goes on with a fresh one. Under FSDP and DeepSpeed they have longer names.
    for pattern in ("*model*", "*scheduler*", "rng_state*"):
        if checkpoint is not None and not any(checkpoint.glob(pattern)):
            raise UserError(f"{str(checkpoint)!r} cannot be resumed from: it has no {pattern.strip('*')}")
    return checkpoint


def read_step(checkpoint: Path) -> int:
    """After how many steps a checkpoint was saved."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def check_same_model(config: PreTrainedConfig, checkpoint: Path, fields: Iterable[str]) -> None:
    """A run must not go on as another model than it began; where the weights fit all the same, nobody would notice.

    Raises:
        [`UserError`]: if one of `fields` is another in the configuration of the checkpoint.
    """
    before = type(config).from_pretrained(checkpoint)
    for field in fields:
        old, new = getattr(before, field), getattr(config, field)
        if old != new:
            raise UserError(f"{checkpoint} was trained with {field} {old!r} and cannot go on with {new!r}.")


def _is_complete(checkpoint: Path) -> bool:
    # The Trainer writes its state last.
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
