"""`hf-rskip train --accelerate_config ...`: the same command in several processes, started by accelerate."""

import argparse
import logging
import os
import signal
import sys
from importlib.resources import files
from pathlib import Path

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import UserError

PROFILES = ("ddp", "fsdp2", "cpu", "multi-node")


def launch(args: argparse.Namespace, given: dict[str, int | str], rest: list[str]) -> None:
    """Trains what the recipe says in the processes of an accelerate configuration.

    Signals reach the processes, which get 30 seconds to end. An error has been printed by the process that it met. This
    one exits with the code of the first to fail, or with 128 and the number of the signal that ended the run.

    Args:
        args: `accelerate_config`, a name of `PROFILES` or the path of a YAML, and what goes on to the processes:
            `config`, `import_module` and `debug`.
        given: the [`~hf_rskip.cli.train.LAUNCH_OPTIONS`] of the command line.
        rest: keys that override the recipe.

    Raises:
        [`UserError`]: if there is no such configuration, or it cannot be used with these options.
    """
    path = find_profile(args.accelerate_config)
    profile = _read_profile(path)
    machines = given.get("num_machines", profile.get("num_machines", 1))
    if given.get("num_processes", profile.get("num_processes", -1)) < 1:
        raise UserError(f"--accelerate_config {args.accelerate_config} needs --num_processes, that of all machines.")
    if machines > 1:
        for name in ("machine_rank", "main_process_ip"):
            if given.get(name, profile.get(name)) is None:
                raise UserError(f"--accelerate_config {args.accelerate_config} on {machines} machines needs --{name}.")
    words = ["train", args.config, *(f"--import_module={module}" for module in args.import_module)]
    words += ["--debug"] * args.debug + rest + ["--use_cpu", "true"] * bool(profile.get("use_cpu"))
    options = [f"--{name}={value}" for name, value in given.items()]
    command = launch_command_parser().parse_args([f"--config_file={path}", *options, "--module", __package__, *words])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failed process has printed it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, without its warning
    try:
        launch_command(command)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            raise UserError(f"Process {rank} was ended by {signal.Signals(-failure.exitcode).name}.") from None
        sys.exit(failure.exitcode)
    except (ValueError, AssertionError, ConnectionError) as error:
        raise UserError(" ".join(str(error).split())) from error


def find_profile(name: str) -> Path:
    """The file of a named profile, which in an installed package is inside it, or `name` itself, a path."""
    if name not in PROFILES:
        if not Path(name).is_file():
            raise UserError(f"--accelerate_config must be one of {', '.join(PROFILES)} or a YAML file, not {name!r}.")
        return Path(name)
    packaged = Path(str(files("hf_rskip").joinpath("accelerate_profiles", f"{name}.yaml")))
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml"


def _read_profile(path: Path) -> dict:
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(profile, dict) or "distributed_type" not in profile:
        raise UserError(f"{str(path)!r} is no configuration of accelerate: it has no distributed_type.")
    return profile
