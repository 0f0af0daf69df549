"""Trains what a recipe says."""

from . import image_classification, translation
from .recipe import Recipe

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train_recipe(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe's task: see `train` of [`translation`] and [`image_classification`]."""
    return _TRAIN[recipe.task](recipe)
