"""`hf-rskip export`."""

import argparse
from importlib import import_module
from typing import NamedTuple

from ..errors import UserError
from .options import add_model_argument


class _Format(NamedTuple):
    writer: str
    """Module and function of `hf_rskip.conversion`: called with model, tokenizer or image processor, and folder."""
    content: str
    """What it writes, for the last line of output."""
    quantizations: tuple[str, ...] = ()
    """Values of its keyword `quantization`."""
    for_images: bool = False


FORMATS = {
    "onnx": _Format("onnx.export_onnx", "graphs, configurations and preprocessing", ("int8",), for_images=True),
    "ctranslate2": _Format(
        "ctranslate2.export_ctranslate2",
        "model, vocabulary, configurations and tokenizer",
        ("int8", "int8_float32", "int16", "float16", "bfloat16"),
    ),
    "marian": _Format("marian.export_marian", "model, configurations and tokenizer"),
    "transformers.js": _Format(
        "transformers_js.export_transformers_js", "graphs, configurations, tokenizer and index.html"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    choices = "; ".join(f"{name}: {', '.join(each.quantizations) or 'none'}" for name, each in FORMATS.items())
    parser.add_argument("--quantization", help=f"how weights are stored (default: float32); {choices}")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes a trained model to a folder that other software runs."""
    from ..conversion.output import new_folder
    from ..decoding.loading import classifies_images, load_image_classifier, load_model
    from ..manifest import write_manifest

    chosen, options = FORMATS[args.format], {}
    if args.quantization is not None:
        if not chosen.quantizations:
            raise UserError(f"--quantization has no effect with --format {args.format}: leave it out.")
        if args.quantization not in chosen.quantizations:
            allowed = ", ".join(chosen.quantizations)
            raise UserError(f"--quantization of --format {args.format} is one of {allowed}, not {args.quantization!r}.")
        options["quantization"] = args.quantization
    folder = new_folder(args.output)
    of_images = chosen.for_images and classifies_images(args.model)
    model, processor = (load_image_classifier if of_images else load_model)(args.model)
    module, _, writer = chosen.writer.partition(".")
    export = getattr(import_module(f"hf_rskip.conversion.{module}"), writer)
    export(model.cpu().float(), processor, folder, **options)
    write_manifest(folder)
    print(f"{chosen.content}: {folder}")
