"""Classifies a test set and scores it."""

import torch
from transformers import PreTrainedModel

from ..data.augmentation import normalize
from ..data.image_arguments import ImageDataArguments
from ..data.pixels import ImageTensors
from .image_metric import ImageClassificationMetric, rank_classes


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel, images: ImageTensors, data: ImageDataArguments, batch_size: int = 256
) -> dict[str, float]:
    """`accuracy` and `top5_accuracy` of a model, from 0 to 1.

    Args:
        model: in evaluation mode.
        images: as [`~hf_rskip.data.pixels.decode_images`] makes them.
        data: how they are normalised.
        batch_size: images at once.
    """
    ranked = []
    for batch in images.pixel_values.split(batch_size):
        pixel_values = normalize(batch.to(model.device), data.image_mean, data.image_std, dtype=model.dtype)
        ranked += rank_classes(model(pixel_values).logits).tolist()
    return ImageClassificationMetric().compute(predictions=ranked, references=images.labels)
