"""Trains what a recipe says."""

import errno
import resource
from contextlib import nullcontext

import torch
from safetensors import SafetensorError
from transformers import Trainer

from ..errors import UserError
from ..manifest import check_model
from . import image_classification, translation
from .arguments import CommonTrainingArguments
from .output_lock import locked
from .recipe import Recipe

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`].

    Raises:
        [`UserError`]: also if another run is writing into the recipe's `output_dir`, or it cannot be written into, if
            there is no such optimizer, if too few files may be open, and if the disk is full.
    """
    _check_optimizer(recipe.training)
    _check_file_handles(recipe.training.dataloader_num_workers)
    if recipe.training.model_name_or_path:
        check_model(recipe.training.model_name_or_path)
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


def _check_optimizer(training: CommonTrainingArguments) -> None:
    """Makes the optimizer, of one number: its own checks come before the data is read."""
    if training.optim_target_modules or "lomo" in str(training.optim):  # those want the model
        return
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer([torch.nn.Parameter(torch.zeros(1))], **options)
    except Exception as error:  # of any package
        name = getattr(training.optim, "value", training.optim)
        arguments = f" with optim_args {training.optim_args!r}" if training.optim_args else ""
        raise UserError(f"optim {name!r} cannot be made{arguments}: {' '.join(str(error).split())}") from error


def _check_file_handles(workers: int) -> None:
    allowed, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 64 + 32 * workers
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise UserError(
            f"A training with dataloader_num_workers {workers} may need {needed} open files, and {allowed} are "
            f"allowed: raise the limit by `ulimit -n {needed}`"
        )
