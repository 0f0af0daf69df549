"""The pictures of a study: scores with their spread, learning curves, and maps of the grid."""

import math
from pathlib import Path
from statistics import fmean

import numpy as np

from .cell import DIVERGED, FINISHED
from .results import Group, Results

# Okabe and Ito (2008): told apart with any colour vision. The baseline is black; other forms differ by panel or row.
_BLACK, _BLUE, _VERMILLION = "#000000", "#0072B2", "#D55E00"


def draw_scores(results: Results, unit: str, path: Path) -> Path | None:
    """A row for each form, at its best setting: the seeds, their mean and standard deviation."""
    groups = [best.group for best in results.best if best.group is not None and best.group.test_scores]
    if not groups:
        return None
    figure = _new_figure(7, 1.2 + 0.36 * len(groups))
    axes = figure.subplots()
    for row, group in enumerate(groups):
        color = _BLACK if group.form == results.study.baseline else _BLUE
        axes.errorbar(
            group.test_mean, row, xerr=group.test_sd, color=color, marker="D", markersize=6, capsize=4, zorder=2
        )
        scores = group.test_scores
        axes.scatter(scores, [row - 0.22] * len(scores), s=22, facecolors="none", edgecolors=color, zorder=3)
        if group.form == results.study.baseline:
            axes.axvline(group.test_mean, color=_BLACK, linestyle="--", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(groups)), [_label(group, results) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    figure.supxlabel(f"test {unit} (diamonds: mean and standard deviation; circles: seeds)", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def draw_curves(results: Results, unit: str, path: Path) -> Path | None:
    """A panel for each form, at its best setting: validation score by step, mean and range over the seeds.

    The baseline is in all panels. Where seeds were evaluated at different steps, as early stopping leaves it, the mean
    is of those that were.
    """
    curves = {best.form: _average_curves(best.group) for best in results.best if best.group is not None}
    curves = {form: curve for form, curve in curves.items() if curve}
    if not curves:
        return None
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _new_figure(1 + 2.6 * columns, 0.7 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    baseline = results.study.baseline
    for panel, (form, curve) in zip(panels, curves.items(), strict=False):
        if baseline in curves and form != baseline:
            panel.plot(*_mean_line(curves[baseline]), color=_BLACK, linestyle="--", linewidth=1)
        steps = sorted(curve)
        color, marker = (_BLACK, "o") if form == baseline else (_BLUE, "D")
        low, high = ([bound(curve[step]) for step in steps] for bound in (min, max))
        panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        marked = max(1, len(steps) // 8)
        panel.plot(*_mean_line(curve), color=color, marker=marker, markersize=4, markevery=marked)
        panel.set_title(_shorten(form, 34), fontsize="medium")
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(curves) :]:
        panel.remove()
    figure.supxlabel(f"optimizer step (mean and range over seeds; dashed: {_shorten(baseline)})", fontsize="medium")
    figure.supylabel(f"validation {unit}", fontsize="medium")
    return _save(figure, path)


def draw_grid(results: Results, unit: str, path: Path) -> Path | None:
    """A heat map for each form over the first two keys of the grid: mean validation score of what finished.

    Where cells diverged, it says how many. With more keys, the best over the others is shown; with one, there is one
    row.
    """
    study = results.study
    if len(study.settings) == 1:
        return None
    names = [key for key, _ in study.settings[0]]
    across, down = names[-1], names[-2] if len(names) > 1 else None
    if len(names) > 2:
        across, down = names[1], names[0]
    x_values, y_values = (
        [*dict.fromkeys(str(dict(point).get(key)) for point in study.settings)] for key in (across, down)
    )
    maps = {form: np.full((len(y_values), len(x_values)), np.nan) for form in study.forms}
    notes = {form: {} for form in study.forms}
    for group in results.groups:
        point = dict(group.setting)
        place = y_values.index(str(point.get(down))), x_values.index(str(point[across]))
        scores = [result.validation for result in group.of_state(FINISHED) if result.validation is not None]
        if scores:
            maps[group.form][place] = np.nanmax([maps[group.form][place], fmean(scores)])
        if group.of_state(DIVERGED):
            before = notes[group.form].get(place, 0)
            notes[group.form][place] = before + len(group.of_state(DIVERGED))
    if all(np.isnan(values).all() for values in maps.values()) and not any(notes.values()):
        return None
    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    width, height = 0.9 + 0.62 * len(x_values), 0.8 + 0.42 * len(y_values)
    figure = _new_figure(1.2 + width * columns, 0.5 + height * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shown = [value for value in np.ravel([*maps.values()]) if not np.isnan(value)] or [0.0]  # 0: all have diverged
    lowest, highest = min(shown), max(shown)
    for panel, (form, values) in zip(panels.flat, maps.items(), strict=False):
        image = panel.imshow(values, cmap="cividis", vmin=lowest, vmax=highest, aspect="auto")
        _annotate(panel, values, notes[form], (lowest + highest) / 2)
        panel.set_title(_shorten(form, 26), fontsize="medium")
        panel.set_xticks(range(len(x_values)), x_values, rotation=45)
        panel.set_yticks(range(len(y_values)), y_values if down else [""])
    for panel in list(panels.flat)[len(maps) :]:
        panel.remove()
    figure.supxlabel(f"{across} (mean of the seeds that finished)", fontsize="medium")
    if down:
        figure.supylabel(down, fontsize="medium")
    figure.colorbar(image, ax=panels, label=f"validation {unit} (\u00d7: diverged)")
    return _save(figure, path)


def _annotate(panel, values: np.ndarray, diverged: dict[tuple[int, int], int], middle: float) -> None:
    for place in np.ndindex(values.shape):
        value, count = values[place], diverged.get(place, 0)
        lines = [] if np.isnan(value) else [f"{value:.1f}"]
        if count:
            lines.append(f"{count} \u00d7" if lines or count > 1 else "\u00d7")
        color = _VERMILLION if np.isnan(value) else "black" if value > middle else "white"
        panel.text(place[1], place[0], "\n".join(lines), ha="center", va="center", fontsize="small", color=color)


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
    return _shorten(group.form, 40) + (f" ({', '.join(notes)})" if notes else "")


def _new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> Path:
    # Without the time and version, so that the same study draws the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _shorten(name: str, length: int = 30) -> str:
    # A dollar sign starts a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= length else f"{name[: length - 3]}..."
