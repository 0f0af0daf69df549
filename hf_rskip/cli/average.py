"""`hf-rskip average`."""

import argparse

from ..errors import UserError
from .options import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="folders of models of one configuration")
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument("--run", metavar="FOLDER", help="output_dir of a training, in place of its checkpoints")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--last", type=count, metavar="N", help="its last so many checkpoints")
    number.add_argument("--best", type=count, metavar="N", help="those that it evaluated as best")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes the mean of checkpoints as a model."""
    from ..training.averaging import average_models, choose_checkpoints

    if args.run is None:
        if args.last or args.best:
            raise UserError("`--last` and `--best` choose from the run that `--run` names")
        folders = args.checkpoints
    elif args.checkpoints or not (args.last or args.best):
        raise UserError("`--run` takes `--last N` or `--best N`, and no further checkpoints")
    else:
        asked = args.last or args.best
        folders = choose_checkpoints(args.run, asked, "last" if args.last else "best")
        if len(folders) < asked:
            evaluated = " with evaluations" if args.best else ""
            raise UserError(f"{args.run!r} has {len(folders)} checkpoints{evaluated}, fewer than {asked}")
    average_models(args.output, folders)
    print(f"{args.output}: the mean of {', '.join(map(str, folders))}")
