"""`hf-rskip train`."""

import argparse

from accelerate import PartialState

from ..errors import UserError
from ..recipe.parsing import parse_recipe
from .launch import LAUNCH_OPTIONS


def train(args: argparse.Namespace, rest: list[str]) -> None:
    """Trains what the recipe says, in this process; `rest` are the keys that override it."""
    for name in LAUNCH_OPTIONS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} needs --accelerate_config.")
    recipe = parse_recipe(args.config, rest)
    from ..training.train import train as train_recipe  # what trains takes longer to import than a recipe to check

    train_recipe(recipe)
    PartialState().destroy_process_group()  # threads of gloo that outlive the interpreter abort the process
