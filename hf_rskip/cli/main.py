"""Entry point of `hf-rskip`: table of commands, and one-sentence errors."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from ..checks import did_you_mean
from ..errors import Preempted, UserError

COMMANDS = {
    "train": "train a model from a recipe",
    "study": "train forms of a model with several seeds, and compare them",
    "evaluate": "score a model on a dataset: sacreBLEU, or accuracy",
    "compare": "test whether translations differ, by paired resampling",
    "translate": "translate lines of text",
    "score": "print the log-probabilities of given translations",
    "attention": "draw what a translation attends to",
    "probe": "measure what skip connections do, and draw it",
    "keys": "print the keys of a recipe with their defaults",
    "convert": "turn a MarianMT or ResNet checkpoint into one of ours, or one of ours into post-LN",
    "export": "write a model for ONNX, CTranslate2, Marian or a browser",
    "average": "average checkpoints into one model",
    "push": "send a trained model to the Hugging Face Hub",
    "env": "print versions and devices, for a bug report",
}
"""Help of each command; its module has `add_arguments` and `run`, and `run` does the slow imports."""
_WITH_KEYS = ("train", "study", "probe")
"""Commands whose remaining words are keys of recipes."""


def _module(command: str) -> ModuleType:
    return import_module(f".{command}", __package__)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-rskip", description="Transformers with recursive skip connections: train, evaluate, translate, share."
    )
    parser.add_argument("--version", action="version", version=f"hf-rskip {version('hf_rskip')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.add_argument(
            "--import_module",
            action="append",
            default=[],
            help="import this first (the current folder is searched last)",
        )
        _module(name).add_arguments(subparser)
        subparser.set_defaults(parser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-rskip`; returns its exit code: 0, or 2 after one sentence on standard error.

    Training that was stopped by SIGTERM returns 143, by Ctrl-C 130.
    """
    args, rest = _create_parser().parse_known_args(argv)
    if rest and args.command not in _WITH_KEYS:
        options = re.findall(r"--(\w[\w-]*)", args.parser.format_usage())
        hint = did_you_mean(rest[0].split("=")[0].lstrip("-"), options, "--")
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    try:
        if getattr(args, "accelerate_config", None) is None:  # otherwise the launched processes do it
            _start(args.import_module)
        _module(args.command).run(args, rest)
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    except Preempted as stop:
        return _end(stop.exit_code, str(stop))
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
            return 2
        message = " ".join(str(error).split())
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message} (`--debug` shows where)"
        elif not message.endswith((".", "?")):
            message += "."
        return _end(2, f"error: {message}")
    return 0


def _start(modules: list[str]) -> None:
    """Imports and configures the libraries; done after parsing, so that `--help` is quick."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # No warning of leaked semaphores, such as the lock of tqdm, behind the one sentence of a process that was ended.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    from transformers.utils import logging

    from .. import kernels  # noqa: F401  also registers the Auto classes; the package leaves it to the command line
    from ..own_modules import import_modules

    logging.disable_progress_bar()
    import_modules(modules)


def _end(code: int, message: str) -> int:
    """Prints why the command ends early, unless another process of torchrun has: later errors follow from the first.

    Returns:
        `code`.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if error_file:
            Path(error_file).parents[1].joinpath("said").touch(exist_ok=False)
    except FileExistsError:
        return code
    except OSError:
        pass
    print(f"hf-rskip: {message}", file=sys.stderr)
    return code
