"""Tests of a difference over seeds, and over seeds and sentences together, by integration and by simulation."""

import numpy as np
import pytest

from hf_rskip.evaluation.significance import clustered_error, correct_holm, draw_resamples, welch_error

SAMPLES = [([1.0, 2.0, 4.0], [3.0, 5.5, 5.0]), ([30.1, 30.4], [29.0, 29.3, 28.1, 29.9])]


def tails(t: float, freedom: float) -> float:
    """Of Student's t, by its density, up to its factor, over all of the axis by the substitution x = tan(u)."""
    x = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 2_000_001)[1:-1])
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2) * (1 + x**2)
    return density[abs(x) > abs(t)].sum() / density.sum()


@pytest.mark.parametrize("first, second", SAMPLES)
def test_welch_by_integrating_the_density(first, second):
    errors = [np.var(sample, ddof=1) / len(sample) for sample in (first, second)]
    difference = np.mean(first) - np.mean(second)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (first, second), strict=True))
    error = welch_error(first, second)
    expected = tails(difference / np.sqrt(sum(errors)), freedom)
    assert error.p_value(difference) == pytest.approx(expected, abs=1e-5)
    low, high = error.interval(difference, 1 - expected)  # ends at 0
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-4) and (low + high) / 2 == pytest.approx(difference)


def test_few_seeds_have_no_test():
    assert welch_error([1.0], [2.0, 3.0]) is None
    samples = np.random.default_rng(0).normal(size=(2, 3, 9))
    assert clustered_error([1.0, 4.0, 3.0], [2.0, 3.0, 5.0], *samples, 30) is not None
    assert clustered_error([1.0, 4.0], [2.0, 3.0, 5.0], samples[0, :2], samples[1], 30) is None


def test_no_variance_has_no_test():
    assert welch_error([1.0, 1.0], [2.0, 2.0]) is None
    assert clustered_error([1.0] * 3, [2.0] * 3, np.ones((3, 9)), np.ones((3, 9)), 30) is None


def test_the_error_over_seeds_and_sentences_by_its_parts():
    rng = np.random.default_rng(0)
    first, second = rng.normal(30, 1, (4, 50)), rng.normal(30, 2, (3, 50)) + rng.normal(0, 3, 50)
    scores = [[30.0, 31.0, 33.0, 30.5], [29.0, 32.0, 30.0]]
    seeds = [np.var(part, ddof=1) / len(part) for part in scores]
    sentences = np.var([first[:, b].mean() - second[:, b].mean() for b in range(50)], ddof=1)
    for side in (first, second):
        apart = [np.var([side[i, b] - side[:, b].mean() for b in range(50)], ddof=1) for i in range(len(side))]
        sentences -= np.mean(apart) * len(side) / (len(side) - 1) / len(side)  # as the mean takes a part of each seed
    error = clustered_error(*scores, first, second, 200)
    assert sentences > 0 and error.error == pytest.approx((sum(seeds) + sentences) ** 0.5)
    below = seeds[0] ** 2 / 3 + seeds[1] ** 2 / 2 + sentences**2 / 199
    assert error.freedom == pytest.approx((sum(seeds) + sentences) ** 2 / below)


SPREADS = {  # number of seeds; spread of seeds; of sentences, in common to the seeds of a form; of both together
    "all of them": (5, 0.5, 8, 7),
    "seeds": (5, 2, 3, 3),
    "sentences": (5, 0.1, 12, 2),
    "sentences with each seed": (5, 0.05, 2, 12),
    "unequal seeds": (5, (0.3, 1.2), 8, 7),
    "three seeds": (3, 0.5, 8, 7),
}


@pytest.mark.parametrize("count, seeds, sentences, each", SPREADS.values(), ids=SPREADS)
def test_the_interval_over_seeds_and_sentences_covers_the_true_difference(count, seeds, sentences, each):
    """In 95% of studies of two forms and 300 sentences, up to what 300 simulated studies leave to chance."""
    rng, weights = np.random.default_rng(0), draw_resamples(300, 1_000).T / 300
    spreads, covered, truth = np.broadcast_to(seeds, 2), 0, 0.7
    for _ in range(300):
        difficulty = rng.normal(30, 10, 300)
        forms = [
            difficulty + rng.normal(0, sentences / 2**0.5, 300) + rng.normal(0, spread, (count, 1)) + noise
            for spread, noise in zip(spreads, rng.normal(0, each, (2, count, 300)), strict=True)
        ]
        forms[0] += truth
        scores = [form.mean(1).tolist() for form in forms]
        error = clustered_error(*scores, *(form @ weights for form in forms), 300)
        low, high = error.interval(np.mean(scores[0]) - np.mean(scores[1]), 0.95)
        covered += low <= truth <= high
    assert 0.93 <= covered / 300 <= 0.97


def test_holm_by_hand():
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.9, None, 0.6]) == [1.0, None, 1.0]  # what is to come counts
    assert correct_holm([None, 0.02]) == [None, 0.04] and correct_holm([]) == []
