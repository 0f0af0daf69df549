"""Top-1 and top-5 accuracy as a metric of `evaluate` that needs no network."""

import datasets
import evaluate
import numpy as np
import torch


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
