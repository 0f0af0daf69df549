"""`hf-rskip train`."""

import argparse

from ..training import image_classification, translation
from ..training.recipe import parse_recipe

_TRAIN = {"translation": translation.train, "image-classification": image_classification.train}


def train(args: argparse.Namespace, rest: list[str]) -> None:
    """Trains what the recipe says; `rest` are the keys that override it."""
    recipe = parse_recipe(args.config, rest)
    _TRAIN[recipe.task](recipe)
