"""`hf-rskip export`."""

import argparse

from ..conversion.onnx import export_onnx
from ..decoding.loading import load_model


def export(args: argparse.Namespace) -> None:
    """Writes a trained model to a folder of ONNX graphs, in float32."""
    model, tokenizer = load_model(args.model)
    export_onnx(model.cpu().float(), tokenizer, args.output)
