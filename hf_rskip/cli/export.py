"""`hf-rskip export`."""

import argparse

from .options import add_model_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes a trained model to a folder of ONNX graphs, in float32."""
    from ..conversion.onnx import export_onnx
    from ..conversion.output import new_folder
    from ..decoding.loading import classifies_images, load_image_classifier, load_model

    new_folder(args.output)
    load = load_image_classifier if classifies_images(args.model) else load_model
    model, processor = load(args.model)
    export_onnx(model.cpu().float(), processor, args.output)
