"""Results of a study: its cells by form and setting, and the differences between forms."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..evaluation.significance import correct_holm
from ..training.best_model import rank_scores
from .cell import DIVERGED, FINISHED, read_result
from .differences import Bootstrap, FormDifference
from .study import Cell, Setting, Study

_SCALES = {"accuracy": 100.0}
"""Factors from scores to points of 100."""


@dataclass(frozen=True)
class CellResult:
    """A cell and its result. Scores are in points of 100.

    Attributes:
        cell: of the study.
        state: `finished`, `diverged`, `failed` or `not run`.
        record: all of `result.json`; empty if there is none.
        test: score on the test split, of finished cells.
        validation: score of the model that was kept, of finished cells that were evaluated while they trained.
        kept: all validation scores of that model, as the training logged them; empty where there are none.
        curve: validation scores by step; with `average_checkpoints` the last one is that of the average.
    """

    cell: Cell
    state: str
    record: dict[str, Any]
    test: float | None
    validation: float | None
    kept: dict[str, float]
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Group:
    """The cells of one form at one setting, which differ by their seeds only.

    Attributes:
        form, setting: of the cells.
        results: of all cells, run or not.
    """

    form: str
    setting: Setting
    results: list[CellResult]

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
        """Mean validation score; a diverged cell counts as 0."""
        finished = [result.validation for result in self.of_state(FINISHED)]
        if not finished or None in finished:
            return None
        return _mean([*finished, *(0.0 for _ in self.of_state(DIVERGED))])

    def validation_rank(self, metric: str) -> tuple[float, ...]:
        """Mean ranks of the scores (see [`rank_scores`]), compared in their order; needs a `validation_mean`.

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
        """Whether all cells that were run have trained (see [`count_trained`]); `None` if none was run."""
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
    """A form over the whole grid, and at its best setting, by the mean validation scores (see [`choose_setting`]).

    Attributes:
        tuned: the cells at that setting by which it was chosen; `None` where it is not known (yet).
        group: the cells at that setting by which forms are compared, which in a study with `tune_seeds` are others.
        difference: to the baseline at its own best setting; `None` for the baseline, or where either has no score.
        settings_trained: in how many settings all cells that were run finished, and reached `trains_at`.
        settings_tried: in how many settings cells were run.
    """

    form: str
    tuned: Group | None
    group: Group | None
    difference: FormDifference | None
    settings_trained: int
    settings_tried: int


@dataclass(frozen=True)
class Contrast:
    """Two forms, each at its own best setting.

    Attributes:
        form, rival: their names.
        difference: form minus rival; `None` where either has no score.
        p_holm: that over seeds and sentences, by Holm's correction for all contrasts of the study.
        answer: `equivalent` if both train and the 90% interval over seeds and sentences lies within the study's margin,
            otherwise `different` if `p_holm` is below .05, otherwise `undecided`; `None` where they cannot be computed.
    """

    form: str
    rival: str
    difference: FormDifference | None
    p_holm: float | None
    answer: str | None


@dataclass(frozen=True)
class Results:
    """The results of a study so far.

    Attributes:
        study: whose results these are.
        cells: in the order of the study.
        groups: by setting, then by form; with `tune_seeds`, of the cells that tune.
        best: by form; without a grid, of the only setting.
        contrasts: in the order of the study.
    """

    study: Study
    cells: list[CellResult]
    groups: list[Group]
    best: list[Best]
    contrasts: list[Contrast]


def gather_results(study: Study) -> Results:
    """Reads the results of the cells of a study, and compares the forms.

    Raises:
        [`UserError`]: if cells were tested on different data, or one has no validation score that is needed.
    """
    results = [_read(cell, study) for cell in study.cells]
    groups = _make_groups(study, results, study.tune_seeds or study.seeds)
    if study.tune_seeds is None:
        chosen = {form: choose_setting(form, groups, study.metric) for form in study.forms}
    else:
        chosen = study.chosen or dict.fromkeys(study.forms)
    last_stage = _make_groups(study, results, study.seeds)
    compared = {form: _find(last_stage, form, setting) for form, setting in chosen.items()}
    bootstrap = Bootstrap(study)

    def compare(form: str, rival: str) -> FormDifference | None:
        sides = [group.of_state(FINISHED) if group else [] for group in (compared[form], compared[rival])]
        cells = [[(result.cell, result.test) for result in side] for side in sides]
        return bootstrap.compare(*cells) if all(cells) else None

    best = []
    for form, setting in chosen.items():
        outcomes = [group.trains(study.trains_at) for group in groups if group.form == form]
        difference = None if form == study.baseline else compare(form, study.baseline)
        trained, tried = outcomes.count(True), len(outcomes) - outcomes.count(None)
        best.append(Best(form, _find(groups, form, setting), compared[form], difference, trained, tried))
    differences = [compare(form, rival) for form, rival in study.contrasts]
    corrected = correct_holm([part and part.p_both for part in differences])
    contrasts = []
    for pair, difference, p_holm in zip(study.contrasts, differences, corrected, strict=True):
        train = all(compared[form] and compared[form].trains(study.trains_at) for form in pair)
        contrasts.append(Contrast(*pair, difference, p_holm, _answer(difference, p_holm, study.margin, train)))
    return Results(study, results, groups, best, contrasts)


def gather_tuning(study: Study) -> list[Group]:
    """The cells of a study's grid, with the seeds that tune."""
    return _make_groups(study, [_read(cell, study) for cell in study.cells], study.tune_seeds)


def choose_setting(form: str, groups: Sequence[Group], metric: str) -> Setting | None:
    """The setting of a form with the best validation scores (see [`Group.validation_rank`]); `None` without any."""
    own = [group for group in groups if group.form == form]
    scored = [group for group in own if group.validation_mean is not None]
    if len(own) == 1:
        return own[0].setting
    return max(scored, key=lambda group: group.validation_rank(metric)).setting if scored else None


def _find(groups: Sequence[Group], form: str, setting: Setting | None) -> Group | None:
    return next((group for group in groups if (group.form, group.setting) == (form, setting)), None)


def _make_groups(study: Study, results: Sequence[CellResult], seeds: Sequence[int]) -> list[Group]:
    groups = []
    for setting, form in itertools.product(study.settings, study.forms):
        own = [part for part in results if (part.cell.form, part.cell.setting) == (form, setting)]
        own = [part for part in own if part.cell.seed in seeds]
        groups += [Group(form, setting, own)] if own else []
    return groups


def _answer(difference: FormDifference | None, p_holm: float | None, margin: float | None, train: bool) -> str | None:
    if margin is None or p_holm is None:
        return None
    low, high = difference.interval_90
    if train and -margin < low and high < margin:
        return "equivalent"
    return "different" if p_holm < 0.05 else "undecided"


def _read(cell: Cell, study: Study) -> CellResult:
    record, metric = read_result(cell) or {}, study.metric
    state, scale = record.get("state", "not run"), _SCALES.get(metric, 1.0)
    if state != FINISHED:
        return CellResult(cell, state, record, None, None, {}, [])
    try:
        by_step = {entry["step"]: entry for entry in record["validation"]}  # of an average, in place of the last model
        curve = [(step, scale * entry[metric]) for step, entry in by_step.items() if metric in entry]
        kept, test = by_step.get(record["kept_step"], {}), scale * record["test"][metric]
    except (KeyError, TypeError) as error:
        path = str(cell.folder / "result.json")
        raise UserError(f"{path!r} has no proper scores of {metric}: remove it, and the cell is run again.") from error
    validation = dict(curve).get(record["kept_step"])
    if validation is None and study.judge:
        raise UserError(
            f"{cell} has no validation score of the model that was kept, by which {study.judge} could judge: let the "
            "last step be one that is evaluated."
        )
    return CellResult(cell, state, record, test, validation, kept, curve)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
