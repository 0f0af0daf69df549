"""Trains what a recipe says."""

from contextlib import nullcontext

from ..manifest import check_model
from . import image_classification, translation
from .output_lock import locked
from .recipe import Recipe

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train_recipe(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`].

    Raises:
        [`UserError`]: if another run is writing into the recipe's `output_dir`, too.
    """
    if recipe.training.model_name_or_path:
        check_model(recipe.training.model_name_or_path)
    with locked(recipe.training.output_dir) if recipe.training.process_index == 0 else nullcontext():
        return _TRAIN[recipe.task](recipe)
