"""The figures of a study: scores with their spread, learning curves, and probes in the course of training."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np

from ..picture import BLACK, BLUE, escape, new_figure, save_figure, style
from ..probing.callback import TABLE_NAME
from ..probing.table import ProbedModel, gradient_ratio, median_skip_weight, read_table
from .cell import DIVERGED, FINISHED
from .results import Group, Results
from .study import Study

_QUANTITIES: dict[str, Callable[[list], float]] = {
    "effective weight of x\n(median over sublayers)": median_skip_weight,
    "angle between x and y\n(degrees, median over sublayers)": lambda stack: np.median([row.angle for row in stack]),
    "gradient norm,\nbottom over top of the stack": gradient_ratio,
}


def draw_scores(results: Results, unit: str, path: Path) -> Path | None:
    """A row for each form, at its best setting: the seeds, their mean and standard deviation."""
    groups = [best.group for best in results.best if best.group is not None and best.group.test_scores]
    if not groups:
        return None
    figure = new_figure(7, 1.2 + (0.36 if len(results.study.settings) == 1 else 0.5) * len(groups))
    axes = figure.subplots()
    for row, group in enumerate(groups):
        color = BLACK if group.form == results.study.baseline else BLUE
        axes.errorbar(
            group.test_mean, row, xerr=group.test_sd, color=color, marker="D", markersize=6, capsize=4, zorder=2
        )
        scores = group.test_scores
        axes.scatter(scores, [row - 0.22] * len(scores), s=22, facecolors="none", edgecolors=color, zorder=3)
        if group.form == results.study.baseline:
            axes.axvline(group.test_mean, color=BLACK, linestyle="--", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(groups)), [_label(group, results) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    figure.supxlabel(f"test {unit} (diamonds: mean and standard deviation; circles: seeds)", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    return save_figure(figure, path)


def draw_curves(results: Results, unit: str, path: Path) -> Path | None:
    """A panel for each form, at its best setting: validation score by step, mean and range over the seeds.

    Of a grid, the panel names the setting. The baseline is in all panels, at its own best one. Where seeds were
    evaluated at different steps, as early stopping leaves it, the mean is of those that were.
    """
    curves = {best.form: _average_curves(best.group) for best in results.best if best.group is not None}
    curves = {form: curve for form, curve in curves.items() if curve}
    if not curves:
        return None
    rows, columns = arrange(len(curves))
    settings = {best.form: _setting_lines(best.group, 40) for best in results.best if best.group is not None}
    figure = new_figure(1 + 2.6 * columns, 0.7 + (2.1 + 0.16 * max(map(len, settings.values()))) * rows)
    baseline = results.study.baseline
    for panel, (form, curve) in zip(make_panels(figure, len(curves)), curves.items(), strict=True):
        if baseline in curves and form != baseline:
            panel.plot(*_mean_line(curves[baseline]), color=BLACK, linestyle="--", linewidth=1)
        steps = sorted(curve)
        color, marker = (BLACK, "o") if form == baseline else (BLUE, "D")
        low, high = ([bound(curve[step]) for step in steps] for bound in (min, max))
        panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        marked = max(1, len(steps) // 8)
        panel.plot(*_mean_line(curve), color=color, marker=marker, markersize=4, markevery=marked)
        panel.set_title(
            "\n".join([shorten(form, 34), *settings[form]]), fontsize="small" if settings[form] else "medium"
        )
        panel.grid(alpha=0.3)
    figure.supxlabel(f"optimizer step (mean and range over seeds; dashed: {shorten(baseline)})", fontsize="medium")
    figure.supylabel(f"validation {unit}", fontsize="medium")
    return save_figure(figure, path)


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


def _average_curves(group: Group) -> dict[int, list[float]]:
    """The scores of the seeds by step."""
    curves: dict[int, list[float]] = {}
    for result in group.of_state(FINISHED):
        for step, score in result.curve:
            curves.setdefault(step, []).append(score)
    return curves


def _mean_line(curve: dict[int, list[float]]) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [fmean(curve[step]) for step in steps]


def _label(group: Group, results: Results) -> str:
    notes = [f"{len(group.of_state(DIVERGED))} diverged"] if group.of_state(DIVERGED) else []
    if group.form == results.study.baseline:
        notes.insert(0, "baseline")
    label = shorten(group.form, 40) + (f" ({', '.join(notes)})" if notes else "")
    return "\n".join([label, *_setting_lines(group, 44)])


def _setting_lines(group: Group, width: int) -> list[str]:
    """The setting, wrapped to `width` characters, no line break between a key and its value."""
    pairs = [f"{key} {value}".replace(" ", "\xa0") for key, value in group.setting]
    return [escape(line.replace("\xa0", " ")) for line in textwrap.wrap(", ".join(pairs), width)]


def arrange(count: int) -> tuple[int, int]:
    """Number of rows and columns for `count` panels, at most four in a row."""
    rows = math.ceil(count / 4)
    return rows, math.ceil(count / rows)


def make_panels(figure, count: int) -> list:
    """Creates panels with shared axes, row by row."""
    rows, columns = arrange(count)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[count:]:
        panel.remove()
    for panel in panels.flat[max(0, count - columns) : count]:
        panel.tick_params(labelbottom=True)  # the lowest panel of its column
    return list(panels.flat[:count])


def style_forms(study: Study) -> dict[str, dict[str, str]]:
    """Colour, marker and line of each form, where all are in one panel; the baseline is black."""
    others = [form for form in study.forms if form != study.baseline]
    return {form: style(0 if form == study.baseline else 1 + others.index(form)) for form in study.forms}


def shorten(name: str, length: int = 30) -> str:
    """Truncates a name to `length` characters and escapes it for matplotlib."""
    return escape(name if len(name) <= length else f"{name[: length - 3]}...")
