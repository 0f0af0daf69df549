"""Do systems differ? Paired bootstrap resampling and paired approximate randomisation over a test set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from ..errors import UserError

_N_SAMPLES = {"bs": 1_000, "ar": 10_000}


@dataclass(frozen=True)
class Difference:
    """How a system's corpus score differs from the baseline's.

    Attributes:
        score: system minus baseline, in points of 100.
        interval: 95% of the bootstrap resamples, from the 2.5th to the 97.5th percentile.
        wins: fraction of the resamples in which the system's score is the higher one (Koehn, 2004).
        p_bootstrap, p_randomization: two-sided p-values by sacreBLEU; not corrected for the number of systems.
    """

    score: float
    interval: tuple[float, float]
    wins: float
    p_bootstrap: float
    p_randomization: float


@dataclass(frozen=True)
class SystemScores:
    """A system on the test set; dictionaries are by metric, `BLEU` and `chrF`.

    Attributes:
        name: what the system is called.
        translations: a sentence each.
        scores: corpus scores, 0 to 100.
        intervals: 95% of the bootstrap resamples of each.
        differences: to the baseline; empty for the baseline itself.
        length_ratio: tokens of the translations over tokens of the references.
        sentence_chrf: `(sentences,)`, chrF of each sentence, 0 to 100.
    """

    name: str
    translations: list[str]
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    differences: dict[str, Difference]
    length_ratio: float
    sentence_chrf: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Systems on one test set, the baseline first.

    Attributes:
        sources, references: of the test set.
        systems: the baseline, then the others.
        signatures: of sacreBLEU, by metric and test (`bs`, the bootstrap; `ar`, the randomisation), with the seed and
            the numbers of resamples.
    """

    sources: list[str]
    references: list[str]
    systems: list[SystemScores]
    signatures: dict[str, dict[str, str]]


def compare_systems(
    sources: Sequence[str],
    references: Sequence[str],
    systems: dict[str, Sequence[str]],
    n_samples: int | None = None,
    bleu_tokenize: str = "13a",
) -> Comparison:
    """Compares translations of a test set with those of the first system, the baseline.

    The p-values are those of sacreBLEU's `PairedTest`, except that a difference of exactly 0 has p = 1 here. The
    intervals are percentiles over the same resamples. The environment variable `SACREBLEU_SEED` seeds both.

    Args:
        sources, references: a sentence each.
        systems: at least two, from name to translations, a sentence each.
        n_samples: resamples of either test; by default 1,000 of the bootstrap and 10,000 of the randomisation.
        bleu_tokenize: sacreBLEU's `tokenize`.

    Raises:
        UserError: if there is one system only, a number of sentences is not that of the test set, or the seed or
            tokenizer does not exist.

    Reference: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004; Riezler and
    Maxwell, "On Some Pitfalls in Automatic Evaluation and Significance Testing for MT", 2005 (the randomisation).
    """
    if len(systems) < 2:
        raise UserError("A comparison needs at least two systems: the baseline, then what to compare with it.")
    for name, translations in systems.items():
        check_translations(name, translations, references)
    check_settings(bleu_tokenize)
    metrics = {"BLEU": create_bleu(bleu_tokenize), "chrF": CHRF()}
    p_values, signatures = _run_paired_tests(systems, references, metrics, n_samples)
    statistics = {
        metric: [
            np.array(scorer._extract_corpus_statistics(translations, [references])) for translations in systems.values()
        ]
        for metric, scorer in metrics.items()
    }
    weights = draw_resamples(len(references), n_samples or _N_SAMPLES["bs"])
    resampled = {
        metric: [compute_scores(scorer, weights @ counts) for counts in statistics[metric]]
        for metric, scorer in metrics.items()
    }
    compared = []
    for index, (name, translations) in enumerate(systems.items()):
        scores = {
            metric: float(compute_scores(scorer, statistics[metric][index].sum(0, keepdims=True))[0])
            for metric, scorer in metrics.items()
        }
        differences = {}
        if index:
            for metric, score in scores.items():
                difference = score - compared[0].scores[metric]
                samples = resampled[metric][index] - resampled[metric][0]
                # sacreBLEU counts the trials strictly beyond the difference: none where two systems are the same.
                p = [values[metric][index - 1] if difference else 1.0 for values in p_values.values()]
                differences[metric] = Difference(
                    difference, percentile_interval(samples), float((samples > 0).mean()), *p
                )
        length, reference_length = statistics["BLEU"][index][:, :2].sum(0)
        compared.append(
            SystemScores(
                name,
                list(translations),
                scores,
                {metric: percentile_interval(resampled[metric][index]) for metric in metrics},
                differences,
                length_ratio=float(length / max(reference_length, 1)),
                sentence_chrf=compute_scores(metrics["chrF"], statistics["chrF"][index]),
            )
        )
    return Comparison(list(sources), list(references), compared, signatures)


def check_settings(bleu_tokenize: str) -> None:
    """Raises the [`UserError`] of [`compare_systems`] about the tokenizer or the seed."""
    create_bleu(bleu_tokenize)
    _read_seed()


def check_translations(name: str, translations: Sequence[str], references: Sequence[str]) -> None:
    """Raises a [`UserError`] unless there are as many translations as references."""
    if len(translations) != len(references):
        raise UserError(
            f"{name!r} has {len(translations):,} translations, but the test set {len(references):,} sentences."
        )


def create_bleu(tokenize: str, references: Sequence[str] | None = None) -> BLEU:
    """sacreBLEU's BLEU, which looks at `references` once only if they are given here."""
    try:
        # Not forced, it warns of text that looks tokenized, once a test and system.
        return BLEU(tokenize=tokenize, force=True, references=None if references is None else [references])
    # An unknown name, a package that is not installed, a model that cannot be downloaded.
    except (KeyError, ValueError, ImportError, RuntimeError, OSError) as error:
        raise UserError(f"The tokenizer {tokenize!r} is not to be had from sacreBLEU.") from error


def _read_seed() -> int:
    """sacreBLEU's seed; it takes `none` and 0 for no seed at all, which no result should depend on."""
    seed = os.environ.get("SACREBLEU_SEED", "12345")
    if not seed.isdecimal() or int(seed) == 0:
        raise UserError(f"SACREBLEU_SEED must be a whole number of at least 1, not {seed!r}.")
    return int(seed)


def _run_paired_tests(
    systems: dict[str, Sequence[str]], references: Sequence[str], metrics: dict[str, Metric], n_samples: int | None
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, str]]]:
    """p-values by test, metric and system (without the baseline), and the signatures by metric and test."""
    p_values, signatures = {}, {metric: {} for metric in metrics}
    for test in ("bs", "ar"):
        described, results = PairedTest(
            list(systems.items()), metrics, [references], test_type=test, n_samples=n_samples or _N_SAMPLES[test]
        )()
        # sacreBLEU names the results in its own way, chrF2 for one, but in our order.
        p_values[test] = {
            metric: [result.p_value for result in results[name][1:]]
            for metric, name in zip(metrics, described, strict=True)
        }
        for metric, signature in zip(metrics, described.values(), strict=True):
            signatures[metric][test] = str(signature)
    return p_values, signatures


def draw_resamples(sentences: int, n_samples: int) -> np.ndarray:
    """How often each sentence stands in each bootstrap resample, `(n_samples, sentences)`; sacreBLEU's resamples."""
    drawn = np.random.default_rng(_read_seed()).choice(sentences, size=(n_samples, sentences), replace=True)
    return np.stack([np.bincount(row, minlength=sentences) for row in drawn])


def compute_scores(metric: Metric, statistics: np.ndarray) -> np.ndarray:
    """The score of each row of sufficient statistics, 0 to 100."""
    return np.array([metric._compute_score_from_stats(row).score for row in statistics])


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """From the 2.5th to the 97.5th percentile."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
