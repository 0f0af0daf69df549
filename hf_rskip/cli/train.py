"""`hf-rskip train`."""

import argparse
import sys

from ..errors import UserError


def train(args: argparse.Namespace, rest: list[str]) -> None:
    """Trains what the recipe says, here or in the processes that it launches; `rest` are the keys that override it."""
    if args.accelerate_config is not None:
        from .launch import launch

        modules = [f"--import_module={module}" for module in args.import_module]
        code = launch(args, ["train", args.config, *modules, *["--debug"] * args.debug, *rest])
        if code:
            sys.exit(code)
        return
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} needs --accelerate_config.")
    from ..training import image_classification, translation
    from ..training.recipe import parse_recipe

    recipe = parse_recipe(args.config, rest)
    {"translation": translation.train, "image-classification": image_classification.train}[recipe.task](recipe)
