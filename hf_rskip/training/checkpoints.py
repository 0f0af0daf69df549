"""Finding the checkpoint from which a killed run goes on."""

import json
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import UserError

logger = logging.get_logger(__name__)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from, or `None` for a fresh start.

    With `resume_from_checkpoint="true"` it is the last complete checkpoint of `output_dir`; incomplete ones, left by a
    run killed while it saved, are removed. With a path it is that checkpoint.

    Raises:
        [`UserError`]: if the path is not a complete checkpoint, or if a fresh start would mix with an earlier run.
    """
    checkpoints = sorted(
        (path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.search(r"-\d+$", path.name)),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    if resume_from_checkpoint in (None, "") or str(resume_from_checkpoint).lower() == "false":
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


def _is_complete(checkpoint: Path) -> bool:
    # The Trainer writes its state last.
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
