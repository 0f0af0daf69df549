"""Tests of a difference: over the sentences of a test set, over the seeds of trainings, and over both together.

All are two-sided. Two, for `compare` and `study`, answer questions about systems as they are, whatever another training
would give: the paired bootstrap whether the difference would keep its sign on other sentences like these, approximate
randomisation whether systems that are interchangeable would differ by so much. Two, for `study`, answer questions about
kinds of systems that were trained with several seeds: Welch's test whether they differ on these very sentences,
[`clustered_error`] whether they differ on others, too.

Reference: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004; Riezler and Maxwell,
"On Some Pitfalls in Automatic Evaluation and Significance Testing for MT", 2005 (the randomisation).
"""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpmath import betainc
from sacrebleu.metrics.base import Metric

from ..checks import parse_count

_ROUNDING = 1e-9
"""Above the rounding differences between sums in different orders."""


def read_seed() -> int:
    """sacreBLEU's seed, of the environment; it takes `none` and 0 for no seed at all, which no result should depend on.

    Raises:
        [`UserError`]: if it is no whole number of at least 1.
    """
    return parse_count("SACREBLEU_SEED", os.environ.get("SACREBLEU_SEED", "12345"))


def draw_resamples(sentences: int, n_samples: int) -> np.ndarray:
    """Counts of each sentence in each bootstrap resample, `(n_samples, sentences)`; sacreBLEU's resamples."""
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
    """Share of random assignments of sentences to two systems with which these differ as much or more.

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


@dataclass(frozen=True)
class StandardError:
    """Standard error of a difference of means, with degrees of freedom for a t-distribution.

    Attributes:
        error: in the unit of the scores; above 0.
        freedom: degrees of freedom.
    """

    error: float
    freedom: float

    def p_value(self, difference: float) -> float:
        """Two-sided, that the true difference is 0."""
        return _student_tails((difference / self.error) ** 2, self.freedom)

    def interval(self, difference: float, level: float) -> tuple[float, float]:
        """Around the difference; `level` is .95 for an interval of 95%."""
        nu, t, step = self.freedom, statistics.NormalDist().inv_cdf((1 + level) / 2), 1.0
        factor = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)
        while step > 1e-9 * t:  # Newton's method, from below, where it does not overshoot
            step = (_student_tails(t * t, nu) - (1 - level)) / (2 * factor * (1 + t * t / nu) ** (-(nu + 1) / 2))
            t += step
        return difference - t * self.error, difference + t * self.error


def _student_tails(t_squared: float, freedom: float) -> float:
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t_squared), regularized=True))


def welch_error(first: Sequence[float], second: Sequence[float]) -> StandardError | None:
    """Standard error of the difference between the means of two samples, such as scores over seeds.

    `None` where there is none: fewer than two values, or no variance in either sample.

    Reference: Welch, "The Generalization of 'Student's' Problem when Several Different Population Variances are
    Involved", Biometrika, 1947.
    """
    return None if min(len(first), len(second)) < 2 else _combine(_seed_variances(first, second))


def clustered_error(
    first: Sequence[float],
    second: Sequence[float],
    first_samples: np.ndarray,
    second_samples: np.ndarray,
    sentences: int,
) -> StandardError | None:
    """Standard error of the difference between mean scores of two systems, clustered by seed and by sentence.

    Sentences are resampled, with the seeds as they are; that seeds are resampled, too, needs no chance: the variance of
    their mean is known (with n - 1 for n, as a bootstrap of few seeds is too narrow). Every seed is tested on the same
    sentences, so that each of the two variances holds what seeds make of single sentences; resampling seeds within
    resampled sentences would count it three times. It is estimated from the resamples and counted once:

        variance = seeds + max(0, sentences - seeds x sentences)

    `None` with fewer than three seeds, as two too often agree by chance, or without any variance.

    Reference: Cameron, Gelbach and Miller, "Robust Inference With Multiway Clustering", Journal of Business and
    Economic Statistics, 2011 (the sum); Satterthwaite, "An Approximate Distribution of Estimates of Variance
    Components", Biometrics Bulletin, 1946 (the degrees of freedom).

    Args:
        first, second: scores of the seeds on the test set.
        first_samples, second_samples: of each seed on the same resamples of the test set, `(seeds, n_samples)`.
        sentences: of the test set.
    """
    if min(len(first), len(second)) < 3 or sentences < 2:
        return None
    common = np.var(first_samples.mean(0) - second_samples.mean(0), ddof=1)
    for samples in (first_samples, second_samples):
        own = np.var(samples - samples.mean(0), axis=1, ddof=1).sum() / (len(samples) - 1)
        common -= own / len(samples)
    return _combine([*_seed_variances(first, second), (max(0.0, float(common)), sentences - 1)])


def _seed_variances(*samples: Sequence[float]) -> list[tuple[float, int]]:
    """Variances of the means over seeds, with their degrees of freedom."""
    return [(statistics.variance(sample) / len(sample), len(sample) - 1) for sample in samples]


def _combine(parts: Sequence[tuple[float, int]]) -> StandardError | None:
    total = sum(variance for variance, _ in parts)
    if not total:
        return None
    return StandardError(total**0.5, total**2 / sum(variance**2 / freedom for variance, freedom in parts))


def correct_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for so many tests, of which those that are `None` are still to come and count as 1.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics,
    1979.
    """
    corrected, largest = [None] * len(p_values), 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[index] = largest
    return corrected
