"""`hf-rskip train`."""

import argparse

from ..errors import UserError
from .options import count

LAUNCH_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
"""Options of `accelerate launch` that differ between machines; they override the profile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="flat YAML of training keys")
    launcher = parser.add_argument_group("several processes (as `accelerate launch`; given by it or by the profile)")
    launcher.add_argument(
        "--accelerate_config", metavar="PROFILE", help="ddp, fsdp2, cpu, multi-node, or a YAML of `accelerate config`"
    )
    launcher.add_argument("--num_processes", type=count, metavar="N", help="of all machines together")
    launcher.add_argument("--num_machines", type=count, metavar="N")
    launcher.add_argument("--machine_rank", type=int, metavar="R", help="of this machine, from 0")
    launcher.add_argument("--main_process_ip", metavar="IP", help="address of the machine of rank 0")
    launcher.add_argument("--main_process_port", type=int, metavar="PORT")
    parser.usage = "hf-rskip train CONFIG.yaml [--accelerate_config PROFILE --num_processes N] [--key value ...]"
    parser.epilog = (
        "Keys on the command line override those of the file. `hf-rskip keys` prints them all with their defaults, "
        "`hf-rskip keys image-classification` those of the other task."
    )


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Trains what the recipe says; `rest` are the keys that override it."""
    given = {name: value for name in LAUNCH_OPTIONS if (value := getattr(args, name)) is not None}
    if args.accelerate_config is not None:
        from .launch import launch

        launch(args, given, rest)
        return
    if given:
        raise UserError(f"--{next(iter(given))} needs --accelerate_config.")
    from accelerate import PartialState

    from ..recipe.parsing import parse_recipe

    recipe = parse_recipe(args.config, rest)
    from ..training.train import train  # slow to import: after the recipe is checked

    train(recipe)
    PartialState().destroy_process_group()  # else threads of gloo can abort the process at exit
