"""Top-1 and top-5 accuracy: of a model, and as a metric of `evaluate` that needs no network."""

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.images.pixels import open_image


def rank_classes(logits: torch.Tensor) -> torch.Tensor:
    """Returns the five best classes of each image, best first, or the best alone of at most five classes.

    Args:
        logits: `(batch, classes)`.

    Returns:
        `(batch, 5)` or `(batch, 1)`.
    """
    return logits.topk(5 if logits.shape[-1] > 5 else 1).indices


class ImageClassificationMetric(evaluate.Metric):
    """Top-1 and top-5 accuracy.

    `compute(predictions=[...], references=[...])` takes the classes of each image, best first, and the right one, and
    returns `accuracy` and, if there are at least five classes of each, `top5_accuracy`, from 0 to 1.

    Example:

    ```python
    >>> from hf_rskip.evaluation.image_metric import ImageClassificationMetric

    >>> ImageClassificationMetric().compute(predictions=[[3, 1, 0, 2, 5], [2, 0, 1, 5, 3]], references=[3, 1])
    {'accuracy': 0.5, 'top5_accuracy': 1.0}

    ```
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The fraction of images whose class is the best guess, or among the five best.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        scores = {"accuracy": float(hits[:, 0].mean())}
        return scores | ({"top5_accuracy": float(hits[:, :5].any(1).mean())} if hits.shape[1] >= 5 else {})


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
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
