"""Accuracies against counting by hand."""

import numpy as np
import pytest
import torch

from hf_rskip.evaluation.image_metric import ImageClassificationMetric, rank_classes


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_accuracies(classes):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, classes)), rng.integers(0, classes, 50)
    better = [(row > row[label]).sum() for row, label in zip(logits, labels, strict=True)]
    scores = ImageClassificationMetric().compute(
        predictions=rank_classes(torch.tensor(logits)).tolist(), references=labels.tolist()
    )
    assert scores["accuracy"] == pytest.approx(np.mean([count == 0 for count in better]))
    if classes > 5:
        assert scores["top5_accuracy"] == pytest.approx(np.mean([count < 5 for count in better]))
    else:
        assert "top5_accuracy" not in scores, "it would always be 1"


def test_batches_add_up():
    metric = ImageClassificationMetric()
    metric.add_batch(predictions=[[0, 1], [1, 0]], references=[0, 0])
    metric.add_batch(predictions=[[1, 0]], references=[1])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
