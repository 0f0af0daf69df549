"""Classifies a test set and scores it."""

from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.images.pixels import open_image
from .image_metric import ImageClassificationMetric, rank_classes


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: Dataset,
    name_row: Callable[[int], str],
    batch_size: int = 256,
) -> dict[str, float]:
    """Computes `accuracy` and, of more than five classes, `top5_accuracy` of a model, from 0 to 1.

    Args:
        model: in evaluation mode.
        processor: that of the model.
        dataset: a split of [`~hf_rskip.data.images.loading.load_image_dataset`].
        name_row: the beginning of a sentence about a row.
        batch_size: images at once.
    """
    metric = ImageClassificationMetric()
    for batch in dataset.iter(batch_size):
        images = [open_image(image, name_row(row)) for image, row in zip(batch["image"], batch["row"], strict=True)]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        metric.add_batch(predictions=rank_classes(model(pixel_values).logits).tolist(), references=batch["label"])
    return metric.compute()
