"""`hf-rskip convert`."""

import argparse

from ..conversion.marian import convert_marian_checkpoint


def convert(args: argparse.Namespace) -> None:
    """Writes a checkpoint of another architecture as a model of this package."""
    convert_marian_checkpoint(args.source, args.output, args.skip_recursions)
    print(f"{args.output}: rskip, K = {args.skip_recursions}")
