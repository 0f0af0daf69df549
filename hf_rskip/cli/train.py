"""`hf-rskip train`."""

import argparse
import sys

from accelerate import PartialState

from ..errors import UserError
from ..training.recipe import parse_recipe
from ..training.train import train_recipe
from .launch import LAUNCH_OPTIONS, launch


def train(args: argparse.Namespace, rest: list[str]) -> None:
    """Trains what the recipe says, here or in the processes that it launches; `rest` are the keys that override it."""
    if args.accelerate_config is not None:
        modules = [f"--import_module={module}" for module in args.import_module]
        code = launch(args, ["train", args.config, *modules, *["--debug"] * args.debug, *rest])
        if code:
            sys.exit(code)
        return
    for name in LAUNCH_OPTIONS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} needs --accelerate_config.")
    train_recipe(parse_recipe(args.config, rest))
    PartialState().destroy_process_group()  # threads of gloo that outlive the interpreter abort the process
