"""What a study has found: its cells, gathered by form and setting, and how the forms differ from the baseline."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mpmath import betainc
from sacrebleu.metrics import CHRF
from sacrebleu.metrics.base import Metric

from ..errors import UserError
from ..evaluation.bleu import create_bleu
from ..evaluation.predictions import PREDICTIONS_NAME, read_predictions
from ..evaluation.significance import bootstrap_p_value, compute_scores, draw_resamples, percentile_interval
from ..training.best_model import rank_scores
from .cell import DIVERGED, FINISHED, read_result
from .study import Cell, Setting, Study

N_SAMPLES = 1_000
"""Resamples of the bootstrap."""
_SCALES = {"accuracy": 100.0}
"""To points of 100."""


@dataclass(frozen=True)
class CellResult:
    """A cell and what it has come to. Scores are in points of 100.

    Attributes:
        cell: of the study.
        state: `finished`, `diverged`, `failed` or `not run`.
        record: all of `result.json`; empty if there is none.
        test: score on the test split, of finished cells.
        validation: score of the model that was kept, of finished cells that were evaluated while they trained.
        kept: all validation scores of that model, as its training logged them; empty where there are none.
        curve: validation scores by step.
    """

    cell: Cell
    state: str
    record: dict[str, Any]
    test: float | None
    validation: float | None
    kept: dict[str, float]
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Difference:
    """How the mean score of a form differs from that of the baseline, in points of 100.

    Attributes:
        score: form minus baseline, each the mean over its finished seeds.
        interval: 95% of the bootstrap resamples of the test set, for these very trained models.
        p_bootstrap: two-sided, over test sentences or images, for these very trained models.
        p_seeds: two-sided, of Welch's t-test over seeds, for this very test set; `None` with fewer than two seeds.
    """

    score: float
    interval: tuple[float, float]
    p_bootstrap: float
    p_seeds: float | None


@dataclass(frozen=True)
class Group:
    """The cells of one form at one setting, which differ by their seeds only.

    Attributes:
        form, setting: of the cells.
        results: of all cells, run or not.
        difference: to the baseline at the same setting; `None` for the baseline, or where either has no score.
    """

    form: str
    setting: Setting
    results: list[CellResult]
    difference: Difference | None = None

    def of_state(self, state: str) -> list[CellResult]:
        return [result for result in self.results if result.state == state]

    @property
    def test_scores(self) -> list[float]:
        return [result.test for result in self.of_state(FINISHED)]

    @property
    def test_mean(self) -> float | None:
        return _mean(self.test_scores)

    @property
    def test_sd(self) -> float | None:
        """The standard deviation of a sample."""
        return statistics.stdev(self.test_scores) if len(self.test_scores) > 1 else None

    @property
    def validation_mean(self) -> float | None:
        """With 0 for what has diverged."""
        finished = [result.validation for result in self.of_state(FINISHED)]
        if not finished or None in finished:
            return None
        return _mean([*finished, *(0.0 for _ in self.of_state(DIVERGED))])

    def validation_rank(self, metric: str) -> tuple[float, ...]:
        """Where `validation_mean` is not `None`: means of the scores that compare settings, the first one deciding.

        What has diverged has scores of 0 and an infinite loss.
        """
        kept = [result.kept for result in self.of_state(FINISHED)]
        worst = {name: math.inf if name == "loss" else 0.0 for name in kept[0]}
        ranks = [rank_scores(scores, metric) for scores in [*kept, *(worst for _ in self.of_state(DIVERGED))]]
        return tuple(map(statistics.fmean, zip(*ranks, strict=True)))

    def count_trained(self, trains_at: float | None) -> int:
        """Cells that finished, with a validation score of at least `trains_at`, if that is given."""
        scores = [result.validation for result in self.of_state(FINISHED)]
        return sum(trains_at is None or (score is not None and score >= trains_at) for score in scores)

    def trains(self, trains_at: float | None) -> bool | None:
        """Whether all cells that were run did; `None` if none was."""
        tried = len(self.of_state(FINISHED)) + len(self.of_state(DIVERGED))
        return self.count_trained(trains_at) == tried if tried else None

    @property
    def seconds(self) -> float | None:
        """Mean time of a training, of those that were not interrupted."""
        return _mean([result.record["seconds"] for result in self.of_state(FINISHED) if not result.record["resumed"]])

    @property
    def parameters(self) -> int | None:
        return next((result.record["parameters"] for result in self.of_state(FINISHED)), None)


@dataclass(frozen=True)
class Best:
    """A form over the whole grid.

    Attributes:
        group: at the setting with the best mean validation score (of equal ones by chrF, then by loss), its difference
            being that to the baseline at the baseline's own best setting; `None` if there is no validation score.
        trained, tried: in how many settings all cells that were run finished, and reached `trains_at`; of how many.
    """

    form: str
    group: Group | None
    trained: int
    tried: int


@dataclass(frozen=True)
class Contrast:
    """Two forms, each at its own best setting.

    Attributes:
        form, rival: their names.
        difference: form minus rival; `None` where either has no score.
    """

    form: str
    rival: str
    difference: Difference | None


@dataclass(frozen=True)
class Results:
    """All that a study has found so far.

    Attributes:
        study: that it belongs to.
        cells: in the order of the study.
        groups: by setting, then by form.
        best: by form; without a grid, of the only setting.
        contrasts: those that the study names.
    """

    study: Study
    cells: list[CellResult]
    groups: list[Group]
    best: list[Best]
    contrasts: list[Contrast]


def gather_results(study: Study) -> Results:
    """Reads what the cells of a study have left, and compares the forms.

    Raises:
        [`UserError`]: if cells were tested on different data.
    """
    results = [_read(cell, study.metric) for cell in study.cells]
    by_place: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        by_place.setdefault((str(result.cell.setting), result.cell.form), []).append(result)
    bootstrap = _Bootstrap(study)

    def group(form: str, setting: Setting, rival: Setting) -> Group:
        members, others = by_place[str(setting), form], by_place[str(rival), study.baseline]
        difference = None if members is others else bootstrap.compare(members, others)
        return Group(form, setting, members, difference)

    groups = [group(form, setting, setting) for setting in study.settings for form in study.forms]
    best_settings = {form: _choose_setting(form, groups, study.metric) for form in study.forms}
    rival = best_settings[study.baseline]
    best = []
    for form, setting in best_settings.items():
        own = [part for part in groups if part.form == form]
        outcomes = [part.trains(study.trains_at) for part in own]
        chosen = None
        if setting is not None:
            chosen = (
                Group(form, setting, by_place[str(setting), form]) if rival is None else group(form, setting, rival)
            )
        best.append(Best(form, chosen, outcomes.count(True), len(outcomes) - outcomes.count(None)))
    contrasts = []
    for pair in study.contrasts:
        sides = [by_place.get((str(best_settings[form]), form), []) for form in pair]
        contrasts.append(Contrast(*pair, bootstrap.compare(*sides)))
    return Results(study, results, groups, best, contrasts)


def _read(cell: Cell, metric: str) -> CellResult:
    record = read_result(cell) or {}
    state, scale = record.get("state", "not run"), _SCALES.get(metric, 1.0)
    if state != FINISHED:
        return CellResult(cell, state, record, None, None, {}, [])
    try:
        curve = [(entry["step"], scale * entry[metric]) for entry in record["validation"] if metric in entry]
        kept = {entry["step"]: entry for entry in record["validation"]}.get(record["kept_step"], {})
        test = scale * record["test"][metric]
    except (KeyError, TypeError) as error:
        path = str(cell.folder / "result.json")
        raise UserError(f"{path!r} has no proper scores of {metric}: remove it, and the cell is run again.") from error
    return CellResult(cell, state, record, test, dict(curve).get(record["kept_step"]), kept, curve)


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


def _choose_setting(form: str, groups: Sequence[Group], metric: str) -> Setting | None:
    own = [group for group in groups if group.form == form]
    scored = [group for group in own if group.validation_mean is not None]
    if len(own) == 1:
        return own[0].setting
    return max(scored, key=lambda group: group.validation_rank(metric)).setting if scored else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def welch_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p-value of Welch's t-test for the means of two samples.

    `None` where there is no such test: fewer than two values, or no variance in either sample.

    Reference: Welch, "The Generalization of 'Student's' Problem when Several Different Population Variances are
    Involved", Biometrika, 1947.
    """
    if min(len(first), len(second)) < 2:
        return None
    errors = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    if not sum(errors):
        return None
    t = (statistics.fmean(first) - statistics.fmean(second)) / sum(errors) ** 0.5
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, (first, second), strict=True)
    )
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


class _Bootstrap:
    """Paired bootstrap over the test set: one set of resamples for all cells, whose scores are averaged over seeds."""

    def __init__(self, study: Study):
        self.study = study
        self._references: list | None = None
        self._samples: dict[int, np.ndarray] = {}

    def compare(self, form: Sequence[CellResult], baseline: Sequence[CellResult]) -> Difference | None:
        """`None` if either has no finished cell."""
        sides = [[result for result in side if result.state == FINISHED] for side in (form, baseline)]
        if not all(sides):
            return None
        scores = [[result.test for result in side] for side in sides]
        difference = statistics.fmean(scores[0]) - statistics.fmean(scores[1])
        resampled = [np.mean([self._resample(result) for result in side], axis=0) for side in sides]
        samples = resampled[0] - resampled[1]
        return Difference(difference, percentile_interval(samples), bootstrap_p_value(samples), welch_test(*scores))

    def _resample(self, result: CellResult) -> np.ndarray:
        """The cell's score on each resample of the test set, `(N_SAMPLES,)`."""
        if result.cell.number not in self._samples:
            predictions, references = _read_predictions(result.cell)
            if self._references is None:
                self._references = references
                self._weights = draw_resamples(len(references), N_SAMPLES)
            elif references != self._references:
                raise UserError(f"{str(result.cell.folder)!r} was tested on other data than the cells before it.")
            self._samples[result.cell.number] = self._score(predictions, references)
        return self._samples[result.cell.number]

    def _score(self, predictions: list, references: list) -> np.ndarray:
        if self.study.metric == "accuracy":
            hits = np.asarray(predictions) == np.asarray(references)
            return 100 * (self._weights @ hits) / len(hits)
        metric = self._scorer
        return compute_scores(metric, self._weights @ np.array(metric._extract_corpus_statistics(predictions, None)))

    @cached_property
    def _scorer(self) -> Metric:
        if self.study.metric == "chrf":
            return CHRF(references=[self._references])
        return create_bleu(self.study.bleu_tokenize, references=self._references)
