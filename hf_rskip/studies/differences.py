"""Differences between the mean test scores of two forms, tested over sentences, over seeds, and over both."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF

from ..errors import UserError
from ..evaluation.bleu import create_bleu
from ..evaluation.predictions import PREDICTIONS_NAME, read_predictions
from ..evaluation.significance import (
    bootstrap_p_value,
    clustered_error,
    compute_scores,
    draw_resamples,
    percentile_interval,
    welch_error,
)
from .study import Cell, Study

N_SAMPLES = 1_000
"""Resamples of the bootstrap."""


@dataclass(frozen=True)
class FormDifference:
    """Difference between two forms, in points of 100; all p-values are two-sided.

    "Sentences" are images where a study classifies.

    Attributes:
        score: of the means over the finished seeds.
        interval_sentences: 95% of the bootstrap resamples of the test set, for these very trained models.
        p_sentences: of the bootstrap over the test set, for these very trained models.
        p_seeds: of Welch's t-test over seeds, for this very test set; `None` with fewer than two seeds.
        interval_both, interval_90: 95% and 90%, over seeds and sentences together; `None` as for `p_both`.
        p_both: over seeds and sentences together; `None` with fewer than three seeds of a form.
    """

    score: float
    interval_sentences: tuple[float, float]
    p_sentences: float
    p_seeds: float | None
    interval_both: tuple[float, float] | None
    interval_90: tuple[float, float] | None
    p_both: float | None


class Bootstrap:
    """One set of resamples of the test set for all cells, so that differences are paired."""

    def __init__(self, study: Study):
        self.study = study
        self._references: list | None = None
        self._samples: dict[int, np.ndarray] = {}

    def compare(self, form: Sequence[tuple[Cell, float]], rival: Sequence[tuple[Cell, float]]) -> FormDifference:
        """Form minus rival, each given by its finished cells and their test scores.

        Raises:
            [`UserError`]: if cells were tested on different data, or their predictions cannot be read.
        """
        scores = [[score for _, score in side] for side in (form, rival)]
        score = statistics.fmean(scores[0]) - statistics.fmean(scores[1])
        resampled = [np.stack([self._resample(cell) for cell, _ in side]) for side in (form, rival)]
        samples = resampled[0].mean(0) - resampled[1].mean(0)
        seeds, both = welch_error(*scores), clustered_error(*scores, *resampled, len(self._references))
        return FormDifference(
            score,
            percentile_interval(samples),
            bootstrap_p_value(samples),
            seeds and seeds.p_value(score),
            both and both.interval(score, 0.95),
            both and both.interval(score, 0.9),
            both and both.p_value(score),
        )

    def _resample(self, cell: Cell) -> np.ndarray:
        """The cell's score on each resample of the test set, `(N_SAMPLES,)`."""
        if cell.number not in self._samples:
            predictions, references = _read_predictions(cell)
            if self._references is None:
                self._references = references
                self._weights = draw_resamples(len(references), N_SAMPLES)
            elif references != self._references:
                raise UserError(f"{str(cell.folder)!r} was tested on other data than the cells before it.")
            self._samples[cell.number] = self._score(predictions, references)
        return self._samples[cell.number]

    def _score(self, predictions: list, references: list) -> np.ndarray:
        if self.study.metric == "accuracy":
            hits = np.asarray(predictions) == np.asarray(references)
            return 100 * (self._weights @ hits) / len(hits)
        metric = CHRF() if self.study.metric == "chrf" else create_bleu(self.study.bleu_tokenize)
        counts = np.array(metric._extract_corpus_statistics(predictions, [references]))
        return compute_scores(metric, self._weights @ counts)


def _read_predictions(cell: Cell) -> tuple[list, list]:
    path = cell.folder / PREDICTIONS_NAME
    try:
        predictions, references = read_predictions(path)
        if not len(predictions) == len(references) > 0:
            raise ValueError("it has not one prediction for each reference")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} does not hold the predictions of a cell ({type(error).__name__}: {error}): "
            f"remove {str(cell.folder)!r}, and the cell is run again."
        ) from error
    return predictions, references
