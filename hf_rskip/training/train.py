"""Trains what a recipe says."""

import errno
from contextlib import nullcontext

from safetensors import SafetensorError

from ..errors import UserError
from . import image_classification, translation
from .output_lock import locked
from .recipe import Recipe

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`].

    Raises:
        [`UserError`]: if another run is writing into the recipe's `output_dir`, too, or the disk is full.
    """
    with locked(recipe.training.output_dir) if recipe.training.process_index == 0 else nullcontext():
        try:
            return _TRAIN[recipe.task](recipe)
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
