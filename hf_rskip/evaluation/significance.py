"""Paired tests over a test set, for `compare` and `study`: bootstrap resampling and approximate randomisation.

Both are two-sided, and answer two questions about systems as they are, whatever another training would give:
the bootstrap whether the difference would keep its sign on other sentences like these, the randomisation whether
systems that are interchangeable would differ by so much.

Reference: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004; Riezler and Maxwell,
"On Some Pitfalls in Automatic Evaluation and Significance Testing for MT", 2005 (the randomisation).
"""

import os

import numpy as np
from sacrebleu.metrics.base import Metric

from ..checks import parse_count

_ROUNDING = 1e-9
"""Sums of floats in another order differ by less."""


def read_seed() -> int:
    """sacreBLEU's seed, of the environment; it takes `none` and 0 for no seed at all, which no result should depend on.

    Raises:
        [`UserError`]: if it is no whole number of at least 1.
    """
    return parse_count("SACREBLEU_SEED", os.environ.get("SACREBLEU_SEED", "12345"))


def draw_resamples(sentences: int, n_samples: int) -> np.ndarray:
    """How often each sentence stands in each bootstrap resample, `(n_samples, sentences)`; sacreBLEU's resamples."""
    drawn = np.random.default_rng(read_seed()).choice(sentences, size=(n_samples, sentences), replace=True)
    return np.stack([np.bincount(row, minlength=sentences) for row in drawn])


def compute_scores(metric: Metric, statistics: np.ndarray) -> np.ndarray:
    """The score of each row of sufficient statistics, 0 to 100."""
    return np.array([metric._compute_score_from_stats(row).score for row in statistics])


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """From the 2.5th to the 97.5th percentile."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_p_value(samples: np.ndarray) -> float:
    """Twice the smaller tail: that of the resamples in which the difference is not above 0, or not below.

    sacreBLEU's own p-value of the bootstrap is not two-sided: where the systems are interchangeable, it is below .05
    in 10% of comparisons.

    Args:
        samples: the difference of the systems on each resample.
    """
    tail = min((samples <= _ROUNDING).sum(), (samples >= -_ROUNDING).sum())
    return min(1.0, 2 * (float(tail) + 1) / (len(samples) + 1))


def randomization_p_value(metric: Metric, first: np.ndarray, second: np.ndarray, n_samples: int) -> float:
    """How often systems differ by as much or more when each sentence goes to either of them by chance.

    sacreBLEU's own p-value leaves out the trials that differ by as much, so that systems which differ in a single
    sentence would be told apart.

    Args:
        metric: of the statistics.
        first, second: sufficient statistics of the systems, `(sentences, statistics)`.
        n_samples: trials; sacreBLEU's.
    """
    swaps = np.random.default_rng(read_seed()).integers(2, size=(n_samples, len(first)), dtype=bool)
    mixed, total = swaps @ (first - second) + second.sum(0), first.sum(0) + second.sum(0)
    shuffled = compute_scores(metric, mixed) - compute_scores(metric, total - mixed)
    real, other = compute_scores(metric, np.stack([first.sum(0), second.sum(0)]))
    beyond = (np.abs(shuffled) >= abs(real - other) - _ROUNDING).sum()
    return (float(beyond) + 1) / (n_samples + 1)
