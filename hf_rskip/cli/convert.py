"""`hf-rskip convert`."""

import argparse

from ..errors import UserError


def convert(args: argparse.Namespace) -> None:
    """Writes a checkpoint of another architecture as a model of this package."""
    if args.architecture == "marian":
        from ..conversion.marian import convert_marian_checkpoint

        recursions = 1 if args.skip_recursions is None else args.skip_recursions
        convert_marian_checkpoint(args.source, args.output, recursions)
        print(f"{args.output}: rskip, K = {recursions}")
        return
    from ..conversion.resnet import convert_resnet_checkpoint

    if args.skip_recursions is not None:
        raise UserError("`--skip_recursions` is for marian: a ResNet is converted with the plain sums that it has")
    convert_resnet_checkpoint(args.source, args.output)
    print(f"{args.output}: xskip, no norm")
