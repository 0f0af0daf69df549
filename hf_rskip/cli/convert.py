"""`hf-rskip convert`."""

import argparse

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("architecture", choices=["marian", "resnet"], help="what SOURCE is")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or Hub id of a checkpoint; for resnet also a file with a state dict of torchvision or timm",
    )
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument(
        "--skip_recursions", type=int, help="K of marian; more than 1 is for fine-tuning (default: 1, the same output)"
    )


def run(args: argparse.Namespace, rest: list[str]) -> None:
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
