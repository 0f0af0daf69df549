"""Trains what a recipe says."""

from contextlib import nullcontext

from . import image_classification, translation
from .output_lock import locked
from .recipe import Recipe
from .resuming import finished_results

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train_recipe(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`].

    Raises:
        [`UserError`]: if another run is writing into the recipe's `output_dir`, too.
    """
    with locked(recipe.training.output_dir) if recipe.training.process_index == 0 else nullcontext():
        results = finished_results(recipe)
        return _TRAIN[recipe.task](recipe) if results is None else results
