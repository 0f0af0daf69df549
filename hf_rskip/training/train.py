"""Trains what a recipe says."""

import errno
import resource
from contextlib import nullcontext

from safetensors import SafetensorError

from ..errors import UserError
from ..manifest import check_model
from . import image_classification, translation
from .output_lock import locked
from .recipe import Recipe, check_configuration
from .resuming import finished_results

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`].

    Raises:
        [`UserError`]: also if another run is writing into the recipe's `output_dir`, or it cannot be written into, if
            too few files may be open, and if the disk is full.
    """
    _check_file_handles(recipe.training.dataloader_num_workers)
    if recipe.training.model_name_or_path:
        check_model(recipe.training.model_name_or_path)
    check_configuration(recipe)
    with locked(recipe.training.output_dir) if recipe.training.process_index == 0 else nullcontext():
        try:
            results = finished_results(recipe)
            return _TRAIN[recipe.task](recipe) if results is None else results
        except (OSError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise UserError(
                f"The disk is full ({error}): with space again, go on with `--resume_from_checkpoint true`."
            ) from error


def _is_full(error: Exception) -> bool:
    """Of safetensors there is the text only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def _check_file_handles(workers: int) -> None:
    allowed, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 64 + 32 * workers
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise UserError(
            f"A training with dataloader_num_workers {workers} may need {needed} open files, and {allowed} are "
            f"allowed: raise the limit by `ulimit -n {needed}`"
        )
