"""The comparison of systems, against a bootstrap and a randomisation written here from their formulas."""

import itertools
import math
import unicodedata
from collections import Counter

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from hf_rskip.errors import UserError
from hf_rskip.evaluation.comparison import compare_systems
from hf_rskip.evaluation.significance import (
    bootstrap_p_value,
    compute_scores,
    draw_resamples,
    randomization_p_value,
)

N_SAMPLES = 400


@pytest.fixture(autouse=True)
def default_seed(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)


def make_systems(sentences: int, noise: dict[str, float], seed: int = 0) -> tuple[list[str], dict[str, list[str]]]:
    """References of 6 to 20 words, and systems that get each word wrong with a probability."""
    rng = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(60)]
    references = [[words[i] for i in rng.integers(0, 60, rng.integers(6, 21))] for _ in range(sentences)]

    def translate(rate):
        for reference in references:
            changed = [words[rng.integers(0, 60)] if rng.random() < rate else word for word in reference]
            yield " ".join(word for word in changed if rng.random() > rate / 4)

    return [" ".join(words) for words in references], {name: list(translate(rate)) for name, rate in noise.items()}


def ngram_statistics(prediction, reference, orders, keep_lengths) -> list[int]:
    """Lengths if wanted, then matches, n-grams of the prediction and n-grams of the reference, by order."""
    sides = [
        [Counter(tuple(side[i : i + order]) for i in range(len(side) - order + 1)) for order in orders]
        for side in (prediction, reference)
    ]
    matches = [(left & right).total() for left, right in zip(*sides, strict=True)]
    totals = [count.total() for side in sides for count in side]
    return [len(prediction), len(reference)] * keep_lengths + matches + totals


def bleu_statistics(predictions, references) -> np.ndarray:
    pairs = zip(predictions, references, strict=True)
    return np.array([ngram_statistics(a.split(), b.split(), range(1, 5), True) for a, b in pairs])


def bleu(total: np.ndarray) -> float:
    """Papineni et al. (2002); an order without a match counts as half, a quarter, ... of one (mteval's smoothing)."""
    length, target, *counts = total.tolist()
    half, logs = 1.0, 0.0
    for matches, ngrams in zip(counts[:4], counts[4:8], strict=True):
        if not matches:
            half /= 2
        logs += math.log((matches or half) / ngrams) / 4
    return 100 * math.exp(logs + min(0, 1 - target / length))


def chrf_statistics(predictions, references) -> np.ndarray:
    pairs = zip(predictions, references, strict=True)
    return np.array([ngram_statistics(*("".join(s.split()) for s in pair), range(1, 7), False) for pair in pairs])


def chrf(total: np.ndarray) -> float:
    """Popovic (2015): F2 of the averages over n-grams of 1 to 6 characters, without spaces."""
    matches, left, right = total.reshape(3, 6)
    precision, recall = (matches / left).mean(), (matches / right).mean()
    return 100 * 5 * precision * recall / (4 * precision + recall)


METRICS = {"BLEU": (bleu_statistics, bleu), "chrF": (chrf_statistics, chrf)}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", ["12345", "7"])
def test_equals_the_formulas_on_the_same_resamples(monkeypatch, metric, seed):
    monkeypatch.setenv("SACREBLEU_SEED", seed)
    references, systems = make_systems(40, {"A": 0.22, "B": 0.2, "C": 0.3})
    comparison = compare_systems(references, references, systems, n_samples=N_SAMPLES, bleu_tokenize="none")
    extract, score = METRICS[metric]
    statistics = {name: extract(translations, references) for name, translations in systems.items()}
    drawn = np.random.default_rng(int(seed)).choice(40, (N_SAMPLES, 40))
    resampled = {name: np.array([score(rows[draw].sum(0)) for draw in drawn]) for name, rows in statistics.items()}
    swaps = np.random.default_rng(int(seed)).integers(2, size=(N_SAMPLES, 40), dtype=bool)
    for system in comparison.systems:
        assert system.scores[metric] == pytest.approx(score(statistics[system.name].sum(0)), abs=1e-9)
        assert system.intervals[metric] == pytest.approx(np.percentile(resampled[system.name], [2.5, 97.5]), abs=1e-9)
    for system in comparison.systems[1:]:
        found = system.differences[metric]
        real = score(statistics[system.name].sum(0)) - score(statistics["A"].sum(0))
        samples = resampled[system.name] - resampled["A"]
        assert found.score == pytest.approx(real, abs=1e-9)
        assert found.interval == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=1e-9)
        assert found.wins == (samples > 0).mean()
        tail = min((samples <= 0).sum(), (samples >= 0).sum())
        assert found.p_bootstrap == pytest.approx(min(1, 2 * (tail + 1) / (N_SAMPLES + 1)))
        first, second = (
            np.where(swap[:, :, None], statistics["A"], statistics[system.name]).sum(1) for swap in (swaps, ~swaps)
        )
        shuffled = np.array([abs(score(a) - score(b)) for a, b in zip(first, second, strict=True)])
        # Sums of floats in another order.
        beyond = (shuffled >= abs(real) - 1e-9).sum()
        assert found.p_randomization == pytest.approx((beyond + 1) / (N_SAMPLES + 1))


def test_randomisation_approaches_the_exact_test():
    """All 2^9 ways to exchange translations, against 10,000 drawn ones."""
    references, systems = make_systems(9, {"A": 0.3, "B": 0.28}, seed=2)
    extract, score = METRICS["chrF"]
    a, b = (extract(translations, references) for translations in systems.values())
    real = abs(score(a.sum(0)) - score(b.sum(0)))
    exact = np.mean(
        [
            abs(score(np.where(swap, a, b).sum(0)) - score(np.where(swap, b, a).sum(0))) >= real - 1e-9
            for swap in (np.array(bits)[:, None] for bits in itertools.product([False, True], repeat=9))
        ]
    )
    comparison = compare_systems(references, references, systems, n_samples=10_000, bleu_tokenize="none")
    found = comparison.systems[1].differences["chrF"].p_randomization
    assert 0.01 < exact < 0.5 and found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_the_same_system_does_not_differ():
    references, systems = make_systems(30, {"A": 0.3})
    comparison = compare_systems(references, references, {**systems, "B": list(systems["A"])}, n_samples=50)
    for difference in comparison.systems[1].differences.values():
        assert (difference.score, difference.interval, difference.wins) == (0, (0, 0), 0)
        assert (difference.p_bootstrap, difference.p_randomization) == (1, 1)
    assert comparison.systems[0].differences == {}


def test_a_clear_difference_and_its_direction():
    references, systems = make_systems(80, {"bad": 0.5, "good": 0.1, "worse": 0.9})
    comparison = compare_systems(references, references, systems, n_samples=200)
    _, good, worse = comparison.systems
    for metric in METRICS:
        better, lower = good.differences[metric], worse.differences[metric]
        assert better.interval[0] > 0 and better.wins == 1
        assert lower.interval[1] < 0 and lower.wins == 0
        for difference in (better, lower):
            # The least that 200 resamples can give, of two tails and of absolute values.
            assert difference.p_bootstrap == pytest.approx(2 / 201)
            assert difference.p_randomization == pytest.approx(1 / 201)
    assert good.sentence_chrf.mean() > comparison.systems[0].sentence_chrf.mean() > worse.sentence_chrf.mean()


@pytest.mark.parametrize("scorer", [BLEU(tokenize="none", force=True), CHRF()], ids=["BLEU", "chrF"])
def test_the_null_and_the_alternative(scorer):
    """At .05, 3% to 7% of comparisons are significant if each sentence is of either system by chance, and most if the
    systems differ."""
    references, systems = make_systems(120, {"A": 0.25, "B": 0.25, "better": 0.2}, seed=4)
    a, b, better = (np.array(scorer._extract_corpus_statistics(system, [references])) for system in systems.values())
    weights, rng = draw_resamples(120, 79), np.random.default_rng(0)

    def p_values(first, second):
        samples = compute_scores(scorer, weights @ first) - compute_scores(scorer, weights @ second)
        return bootstrap_p_value(samples), randomization_p_value(scorer, first, second, 79)

    swaps = rng.integers(2, size=(300, 120, 1), dtype=bool)
    rejected = np.mean([np.array(p_values(np.where(swap, a, b), np.where(swap, b, a))) <= 0.05 for swap in swaps], 0)
    assert all(0.03 <= rate <= 0.07 for rate in rejected), rejected
    assert max(p_values(a, better)) <= 0.05


def test_one_sentence_does_not_tell_systems_apart():
    references, systems = make_systems(40, {"A": 0.2})
    systems["B"] = [references[0], *systems["A"][1:]]
    comparison = compare_systems(references, references, systems, n_samples=200)
    for difference in comparison.systems[1].differences.values():
        assert difference.score > 0 and difference.p_bootstrap > 0.3 and difference.p_randomization == 1


def test_both_sides_are_compared_in_one_form():
    references, systems = make_systems(20, {"A": 0.2, "B": 0.3})
    references, *systems = ([text.replace("w1", "Ä") for text in texts] for texts in (references, *systems.values()))
    systems = dict(zip("AB", systems, strict=True))
    plain = compare_systems(references, references, systems, n_samples=20)
    decomposed = [unicodedata.normalize("NFD", text) for text in references]
    other = compare_systems(references, decomposed, systems, n_samples=20)
    lowered = {name: [text.lower() for text in texts] for name, texts in systems.items()}
    uncased = compare_systems(references, decomposed, lowered, n_samples=20, lowercase=True)
    assert [system.scores for system in other.systems] == [system.scores for system in plain.systems]
    assert [system.scores for system in uncased.systems] == [system.scores for system in plain.systems]
    assert "unicode" not in plain.signatures["chrF"]["ar"] and "|unicode:nfc|" in other.signatures["chrF"]["ar"]
    assert "|case:lc|" in uncased.signatures["BLEU"]["bs"] and "|case:mixed|" in other.signatures["BLEU"]["bs"]


def test_sentences_and_lengths():
    references, systems = make_systems(12, {"A": 0.3, "B": 0.3})
    systems["B"][3] = ""
    comparison = compare_systems(references, references, systems, n_samples=20)
    assert comparison.references == references
    for system in comparison.systems:
        expected = [CHRF().sentence_score(a, [b]).score for a, b in zip(system.translations, references, strict=True)]
        assert system.sentence_chrf == pytest.approx(expected)
        words = [sum(len(sentence.split()) for sentence in side) for side in (system.translations, references)]
        assert system.length_ratio == pytest.approx(words[0] / words[1])


def test_default_numbers_of_resamples_stand_in_the_signatures():
    references, systems = make_systems(3, {"A": 0.3, "B": 0.3})
    signatures = compare_systems(references, references, systems).signatures
    assert signatures.keys() == METRICS.keys()
    for signature in signatures.values():
        assert "|bs:1000|seed:12345|" in signature["bs"] and "|ar:10000|seed:12345|" in signature["ar"]


@pytest.mark.parametrize("seed", ["none", "0", "-1", "1.5", ""])
def test_a_seed_that_is_none(monkeypatch, seed):
    monkeypatch.setenv("SACREBLEU_SEED", seed)
    with pytest.raises(UserError, match="SACREBLEU_SEED must be a whole number"):
        compare_systems(["a"], ["a"], {"A": ["a"], "B": ["b"]})


def test_mistakes():
    with pytest.raises(UserError, match="'B' has 2 translations, but the test set 1 sentences"):
        compare_systems(["a"], ["a"], {"A": ["a"], "B": ["a", "b"]})
    with pytest.raises(UserError, match="'no_such' is not to be had from sacreBLEU"):
        compare_systems(["a"], ["a"], {"A": ["a"], "B": ["b"]}, bleu_tokenize="no_such")
