"""The stages of a study with `tune`: the grid, a point beyond its edge where that is best, and the seeds at the best.

A cell is known when the results that it follows from are there. The order of cells, and with it their numbers, follows
from the study and those results alone, so that any machine finds the same ones.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..errors import UserError
from ..recipe.parsing import check_configuration, parse_values
from .cell import is_done
from .evidence import restore_cells
from .results import choose_setting, gather_tuning
from .study import Setting, Study, add_cells


def advance(study: Study) -> Study:
    """Adds the cells of all stages that follow from the results so far, and restores results from the evidence.

    Args:
        study: of [`read_study`].

    Raises:
        [`UserError`]: if the evidence does not fit, or a cell that tunes has no validation score.
    """
    restore_cells(study)
    if study.tune_seeds is None or not all(map(is_done, study.cells)):
        return study
    best = _choose(study)
    beyond, impossible = [], []
    for form, setting in best.items():
        for point in _step_beyond(setting, study.settings):
            (beyond if _is_possible(study, form, setting, point) else impossible).append((form, point))
    study = add_cells(study, ((form, point, seed) for form, point in beyond for seed in study.tune_seeds))
    settings = _sort([*study.settings, *(point for _, point in beyond)])
    study = replace(study, settings=settings, beyond=beyond, impossible=impossible)
    restore_cells(study)
    if not all(map(is_done, study.cells)):
        return study
    chosen = _choose(study)
    points = ((form, setting, seed) for form, setting in chosen.items() if setting is not None for seed in study.seeds)
    study = replace(add_cells(study, points), chosen=chosen)
    restore_cells(study)
    return study


def _step_beyond(setting: Setting | None, settings: Sequence[Setting]) -> list[Setting]:
    """Settings one step beyond each value that is the lowest or highest of several positive numbers.

    The step is by the ratio of the value to its neighbour; the other values stay.
    """
    points = []
    for index, (key, value) in enumerate(setting or ()):
        values = _numbers(settings, key)
        if len(values) < 2 or value not in (values[0], values[-1]):
            continue
        neighbour = values[1] if value == values[0] else values[-2]
        if min(value, neighbour) <= 0:
            continue
        further = float(f"{value * value / neighbour:.6g}")
        further = round(further) if isinstance(value, int) else further
        if further not in (0, value):
            points.append((*setting[:index], (key, further), *setting[index + 1 :]))
    return points


def _is_possible(study: Study, form: str, setting: Setting, point: Setting) -> bool:
    """Whether a recipe and a model can have a point; so, too, where those of the setting cannot be made here either."""

    def is_refused(values: Setting) -> bool:
        keys = {key: value for key, value in {**study.forms[form], **dict(values)}.items() if value is not None}
        try:
            check_configuration(parse_values(keys, [], str(study.path)))
        except UserError:
            return True
        return False

    return not is_refused(point) or is_refused(setting)


def _choose(study: Study) -> dict[str, Setting | None]:
    groups = gather_tuning(study)
    return {form: choose_setting(form, groups, study.metric) for form in study.forms}


def _numbers(settings: Sequence[Setting], key: str) -> list[float]:
    """The values of a key in order; none where one is not a number."""
    values = [dict(setting)[key] for setting in settings]
    return sorted(set(values)) if all(type(value) in (int, float) for value in values) else []


def _sort(settings: list[Setting]) -> list[Setting]:
    """Sorts settings without duplicates: numbers by value, other values in the order given."""
    unique = list({str(setting): setting for setting in settings}.values())
    orders = {key: _numbers(unique, key) or [dict(setting)[key] for setting in unique] for key, _ in unique[0]}
    return sorted(unique, key=lambda setting: [orders[key].index(value) for key, value in setting])
