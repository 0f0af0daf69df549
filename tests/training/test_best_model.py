"""The order of evaluations; how a training uses it is in `test_trainer.py`."""

import itertools
import math

import pytest

from hf_rskip.training.best_model import rank_scores

WORST_FIRST = {
    "bleu": [
        {"bleu": 0.0, "chrf": 33.0, "loss": 1.0},
        {"bleu": 0.0, "chrf": 93.0, "loss": math.nan},
        {"bleu": 0.0, "chrf": 93.0, "loss": 2.0},
        {"bleu": 0.0, "chrf": 93.0, "loss": 1.0},
        {"bleu": 0.1, "chrf": 5.0, "loss": 9.0},
    ],
    "accuracy": [
        {"accuracy": 0.5, "top5_accuracy": 1.0, "loss": 2.0},
        {"accuracy": 0.5, "top5_accuracy": 0.9, "loss": 1.0},
        {"accuracy": 0.6, "top5_accuracy": 0.9, "loss": 3.0},
    ],
    "top5_accuracy": [
        {"accuracy": 0.5, "top5_accuracy": 0.9, "loss": 1.0},
        {"accuracy": 0.6, "top5_accuracy": 0.9, "loss": 2.0},
    ],
    "loss": [{"bleu": 5.0, "chrf": 9.0, "loss": 2.0}, {"chrf": 5.0, "loss": 1.0}, {"chrf": 6.0, "loss": 1.0}],
}


@pytest.mark.parametrize("metric", WORST_FIRST)
@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_the_order(metric, prefix):
    logs = [{f"{prefix}{name}": value for name, value in scores.items()} for scores in WORST_FIRST[metric]]
    ranks = [rank_scores({**log, "step": 4, "epoch": 1.0}, f"{prefix}{metric}") for log in logs]
    assert all(worse < better for worse, better in itertools.pairwise(ranks))
