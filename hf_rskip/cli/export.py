"""`hf-rskip export`."""

import argparse

from transformers import AutoModelForImageClassification

from ..conversion.onnx import export_onnx
from ..conversion.output import new_folder
from ..decoding.loading import load_complete, load_model
from ..models import RSkipResNetConfig
from .evaluate import load_config
from .evaluate_images import load_image_processor


def export(args: argparse.Namespace) -> None:
    """Writes a trained model to a folder of ONNX graphs, in float32."""
    new_folder(args.output)
    if load_config(args.model).model_type == RSkipResNetConfig.model_type:
        model = load_complete(AutoModelForImageClassification, args.model)
        processor = load_image_processor(args.model)
    else:
        model, processor = load_model(args.model)
    export_onnx(model.cpu().float(), processor, args.output)
