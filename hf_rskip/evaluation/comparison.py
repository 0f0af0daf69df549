"""Compares systems on a test set by paired bootstrap resampling and paired approximate randomisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF

from ..errors import UserError
from .bleu import create_bleu, describe_metric, scored_form
from .significance import (
    bootstrap_p_value,
    compute_scores,
    draw_resamples,
    percentile_interval,
    randomization_p_value,
    read_seed,
)

_N_SAMPLES = {"bs": 1_000, "ar": 10_000}


@dataclass(frozen=True)
class SystemDifference:
    """Difference between the corpus scores of a system and the baseline.

    Attributes:
        score: system minus baseline, in points of 100.
        interval: 95% of the bootstrap resamples, from the 2.5th to the 97.5th percentile.
        wins: fraction of the resamples in which the system's score is the higher one (Koehn, 2004).
        p_bootstrap, p_randomization: two-sided, of [`~hf_rskip.evaluation.significance`], which states the question of
            each; not corrected for the number of systems.
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
    differences: dict[str, SystemDifference]
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
    lowercase: bool = False,
) -> Comparison:
    """Compares translations of a test set with those of the first system, the baseline.

    Intervals are percentiles over the resamples of the bootstrap. The environment variable `SACREBLEU_SEED` seeds both
    tests.

    Args:
        sources, references: a sentence each.
        systems: at least two, from name to translations, a sentence each.
        n_samples: resamples of either test; by default 1,000 of the bootstrap and 10,000 of the randomisation.
        bleu_tokenize: sacreBLEU's `tokenize`.
        lowercase: whether case does not count.

    Raises:
        UserError: if a number of sentences is not that of the test set, or the seed or tokenizer does not exist.
    """
    for name, translations in systems.items():
        check_translations(name, translations, references)
    metrics = {"BLEU": create_bleu(bleu_tokenize, lowercase), "chrF": CHRF(lowercase=lowercase)}
    given = [list(text) for text in (references, *systems.values())]
    scored = scored_form(*given)
    normalized = scored != given
    n_samples = {test: n_samples or default for test, default in _N_SAMPLES.items()}
    weights = draw_resamples(len(references), n_samples["bs"])
    # By metric, for each system: statistics (sentences, statistics), corpus score, scores of resamples (resamples,).
    statistics, scores, resampled = {}, {}, {}
    for metric, scorer in metrics.items():
        counts = [np.array(scorer._extract_corpus_statistics(text, [scored[0]])) for text in scored[1:]]
        statistics[metric] = counts
        scores[metric] = [float(compute_scores(scorer, own.sum(0, keepdims=True))[0]) for own in counts]
        resampled[metric] = [compute_scores(scorer, weights @ own) for own in counts]

    def compare(metric: str, index: int) -> SystemDifference:
        counts = statistics[metric]
        samples = resampled[metric][index] - resampled[metric][0]
        return SystemDifference(
            score=scores[metric][index] - scores[metric][0],
            interval=percentile_interval(samples),
            wins=float((samples > 0).mean()),
            p_bootstrap=bootstrap_p_value(samples),
            p_randomization=randomization_p_value(metrics[metric], counts[0], counts[index], n_samples["ar"]),
        )

    compared = []
    for index, (name, translations) in enumerate(systems.items()):
        length, reference_length = statistics["BLEU"][index][:, :2].sum(0)
        compared.append(
            SystemScores(
                name,
                list(translations),
                scores={metric: scores[metric][index] for metric in metrics},
                intervals={metric: percentile_interval(resampled[metric][index]) for metric in metrics},
                differences={metric: compare(metric, index) for metric in metrics} if index else {},
                length_ratio=float(length / max(reference_length, 1)),
                sentence_chrf=compute_scores(metrics["chrF"], statistics["chrF"][index]),
            )
        )
    signatures = {
        metric: {
            test: describe_metric(scorer, normalized, seed=read_seed(), **{test: count})
            for test, count in n_samples.items()
        }
        for metric, scorer in metrics.items()
    }
    return Comparison(list(sources), list(references), compared, signatures)


def check_translations(name: str, translations: Sequence[str], references: Sequence[str]) -> None:
    """Raises a [`UserError`] unless there are as many translations as references."""
    if len(translations) != len(references):
        raise UserError(
            f"{name!r} has {len(translations):,} translations, but the test set {len(references):,} sentences."
        )
