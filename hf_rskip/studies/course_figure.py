"""The picture of skip connections in the course of training, from the probes of a study's cells."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..picture import new_figure, save_figure
from ..probing.callback import TABLE_NAME
from ..probing.table import ProbedModel, gradient_ratio, read_table
from .cell import FINISHED
from .figure import shorten, style_forms
from .results import Results

_QUANTITIES: dict[str, Callable[[list], float]] = {
    "effective weight of x\n(median over sublayers)": lambda stack: np.median([row.skip_weight for row in stack]),
    "angle between x and y\n(degrees, median over sublayers)": lambda stack: np.median([row.angle for row in stack]),
    "gradient norm,\nbottom over top of the stack": gradient_ratio,
}


def draw_courses(results: Results, path: Path) -> Path | None:
    """A line for each form, at its best setting: effective weight, angle and gradient norm by step and stack.

    It is of the first seed that was probed; `None` where none was.
    """
    courses = {best.form: _read_course(best.group) for best in results.best if best.group is not None}
    courses = {form: course for form, course in courses.items() if len(course) > 1}
    if not courses:
        return None
    stacks = list(dict.fromkeys(name for course in courses.values() for item in course for name in item.stacks()))
    figure = new_figure(2.2 + 3.2 * len(stacks), 0.8 + 2.1 * len(_QUANTITIES))
    panels = figure.subplots(len(_QUANTITIES), len(stacks), sharex=True, sharey="row", squeeze=False)
    styles = style_forms(results.study)
    for row, (label, measure) in zip(panels, _QUANTITIES.items(), strict=True):
        row[0].set_ylabel(label, fontsize="small")
        for axes, stack in zip(row, stacks, strict=True):
            for form, course in courses.items():
                points = [(item.step, measure(item.stacks()[stack])) for item in course if stack in item.stacks()]
                axes.plot(*zip(*points, strict=True), **styles[form], markersize=3, linewidth=1.2, label=shorten(form))
            axes.grid(alpha=0.3)
        if measure is gradient_ratio:
            row[0].set_yscale("log")
        else:
            row[0].set_ylim(bottom=0)
    for axes, stack in zip(panels[0], stacks, strict=True):
        axes.set_title(stack, fontsize="medium")
    figure.supxlabel("optimizer step (one seed of each form, at its best setting)", fontsize="medium")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    return save_figure(figure, path)


def _read_course(group) -> list[ProbedModel]:
    paths = [result.cell.folder / TABLE_NAME for result in group.of_state(FINISHED)]
    return next((read_table(path) for path in paths if path.exists()), [])
