"""`hf-rskip average`."""

import argparse

from ..errors import UserError
from ..training.averaging import average_models, choose_checkpoints


def average(args: argparse.Namespace) -> None:
    """Writes the mean of checkpoints as a model."""
    if args.run is None:
        if args.last or args.best:
            raise UserError("`--last` and `--best` choose from the run that `--run` names")
        folders = args.checkpoints
    elif args.checkpoints or not (args.last or args.best):
        raise UserError("`--run` takes `--last N` or `--best N`, and no further checkpoints")
    else:
        folders = choose_checkpoints(args.run, args.last or args.best, "last" if args.last else "best")
        if not folders:
            raise UserError(f"{args.run!r} has no checkpoints{' with evaluations' if args.best else ''}")
    average_models(args.output, folders)
    print(f"{args.output}: the mean of {', '.join(map(str, folders))}")
