"""Figures of a grid: lines over one key, a heat map for each form over two."""

import textwrap
from pathlib import Path

import numpy as np

from ..picture import VERMILLION, escape, new_figure, save_figure
from .cell import DIVERGED, FINISHED
from .figure import arrange, make_panels, shorten, style_forms
from .results import Group, Results
from .study import varying_keys

_UNITS = {"learning_rate": "peak", "warmup_steps": "optimizer steps", "max_steps": "optimizer steps"}
_UNITS |= {"encoder_layers": "layers", "decoder_layers": "layers"}


def draw_grid(results: Results, unit: str, path: Path) -> Path | None:
    """Draws the scores of the forms over the grid; `None` without a grid, or where nothing was run."""
    if not any(group.of_state(FINISHED) or group.of_state(DIVERGED) for group in results.groups):
        return None
    keys = varying_keys(results.study.settings)
    if not keys:
        return None
    figure = _draw_lines(results, unit, keys[0]) if len(keys) == 1 else _draw_maps(results, unit, keys)
    return save_figure(figure, path)


def _label_axis(key: str) -> str:
    return f"{key} ({_UNITS[key]})" if key in _UNITS else key


def _label_value(value) -> str:
    return escape(f"{value:g}" if isinstance(value, float) else str(value))


def _explain(results: Results, width: float, *parts: str) -> str:
    """Explains the marks, wrapped to the width of the figure in inches."""
    trains_at = results.study.trains_at
    if trains_at is not None:
        parts = (*parts, f"training means a validation score of at least {trains_at:g} with every seed")
    return "\n".join(textwrap.wrap("; ".join(parts), int(12 * width)))


def _describe_mean(results: Results) -> str:
    has_diverged = any(group.of_state(DIVERGED) for group in results.groups)
    return "mean over seeds, 0 for those that diverged" if has_diverged else "mean of the seeds that finished"


# One key


def _draw_lines(results: Results, unit: str, key: str):
    """Test scores, or validation scores with `tune`, against the values of the key, evenly spaced."""
    study = results.study
    figure = new_figure(8.5, 4.6)
    axes = figure.subplots()
    tuned = study.tune_seeds is not None
    places = {str(setting): place for place, setting in enumerate(study.settings)}
    for number, (form, style) in enumerate(style_forms(study).items()):
        groups = [group for group in results.groups if group.form == form]
        x = np.array([places[str(group.setting)] for group in groups])
        x = x + 0.16 * ((number + 0.5) / len(study.forms) - 0.5)
        scores = np.array([group.validation_mean if tuned else group.test_mean for group in groups], dtype=float)
        spread = None if tuned else [group.test_sd or 0.0 for group in groups]
        axes.errorbar(x, scores, yerr=spread, **style, markersize=6, capsize=3, linewidth=1.3, label=shorten(form))
        hollow = [group.trains(study.trains_at) is False for group in groups]
        axes.plot(
            x[hollow], scores[hollow], **style | {"linestyle": "none"}, markersize=6, markerfacecolor="white", zorder=3
        )
        for place, group in zip(x, groups, strict=True):
            if group.of_state(DIVERGED):
                at = {"x": place, "y": 0.015, "transform": axes.get_xaxis_transform(), "ha": "center"}
                axes.text(**at, s=_count_diverged(group), color=style["color"], fontweight="bold", fontsize="small")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(study.settings)), [_label_value(dict(point)[key]) for point in study.settings])
    axes.set_xlim(-0.4, len(study.settings) - 0.6)
    axes.set_xlabel(_label_axis(key))
    axes.set_ylabel(f"{'validation' if tuned else 'test'} {unit}")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    said = (
        _describe_mean(results) if tuned else "mean and standard deviation over seeds",
        "hollow: does not train",
        "\u00d7: diverged",
    )
    axes.set_title(_explain(results, 6, *said), fontsize="small")
    return figure


def _count_diverged(group: Group) -> str:
    count = len(group.of_state(DIVERGED))
    return f"{count} \u00d7" if count > 1 else "\u00d7"


# Two keys or more


def _draw_maps(results: Results, unit: str, keys: list[str]):
    """Mean validation scores over the first two keys, on a common scale; the best over further keys."""
    study, (down, across) = results.study, keys[:2]
    values = {key: list({str(dict(point)[key]): dict(point)[key] for point in study.settings}.values()) for key in keys}
    places = {key: [str(value) for value in values[key]] for key in keys}
    shown: dict[str, dict[tuple[int, int], Group]] = {form: {} for form in study.forms}
    run = [group for group in results.groups if group.of_state(FINISHED) or group.of_state(DIVERGED)]
    for group in sorted(run, key=lambda group: -1.0 if group.validation_mean is None else group.validation_mean):
        point = dict(group.setting)
        place = places[down].index(str(point[down])), places[across].index(str(point[across]))
        shown[group.form][place] = group
    rows, columns = arrange(len(shown))
    size = 0.5 + 0.62 * len(values[across]), 0.5 + 0.42 * len(values[down])
    width = max(1.9 + size[0] * columns, 5)
    figure = new_figure(width, max(1.3 + size[1] * rows, 3))
    panels = make_panels(figure, len(shown))
    scores = [group.validation_mean for cells in shown.values() for group in cells.values()]
    scores = [score for score in scores if score is not None] or [0.0]  # all have diverged
    best = {item.form: item.tuned for item in results.best}
    for panel, (form, cells) in zip(panels, shown.items(), strict=True):
        table = np.full((len(values[down]), len(values[across])), np.nan)
        for place, group in cells.items():
            table[place] = group.validation_mean  # `None` becomes NaN
        image = panel.imshow(table, cmap="cividis", vmin=min(scores), vmax=max(scores), aspect="auto")
        for place, group in cells.items():
            _mark(panel, image, place, group, group.trains(study.trains_at), best[form])
        panel.set_title(shorten(form, 26), fontsize="medium")
        panel.set_xticks(range(len(values[across])), map(_label_value, values[across]), rotation=45)
        panel.set_yticks(range(len(values[down])), map(_label_value, values[down]))
    figure.supxlabel(_label_axis(across), fontsize="medium")
    figure.supylabel(_label_axis(down), fontsize="medium")
    figure.colorbar(image, ax=panels, label=f"validation {unit}")
    said = [_describe_mean(results), "frame: best setting", "hatched: does not train", "\u00d7: diverged"]
    if len(keys) > 2:
        said.append(f"the best over {', '.join(keys[2:])}")
    figure.suptitle(_explain(results, width, *said), fontsize="small")
    return figure


def _mark(panel, image, place: tuple[int, int], group: Group, trains: bool, best: Group | None) -> None:
    from matplotlib.patches import Rectangle

    row, column = place
    score = group.validation_mean
    lines = [] if score is None else [f"{score:.1f}"]
    lines += [_count_diverged(group)] if group.of_state(DIVERGED) else []
    background = (1, 1, 1, 1) if score is None else image.cmap(image.norm(score))
    is_dark = np.dot(background[:3], (0.299, 0.587, 0.114)) < 0.5
    corner = (column - 0.5, row - 0.5)
    if not trains:
        color = "gray" if score is None else "white" if is_dark else "black"
        panel.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=color, linewidth=0))
    if best is not None and best.setting == group.setting:
        panel.add_patch(
            Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=VERMILLION, linewidth=2)
        )
    box = {"facecolor": background, "edgecolor": "none", "pad": 1}
    color = "white" if is_dark else "black"
    panel.text(column, row, "\n".join(lines), ha="center", va="center", fontsize="small", color=color, bbox=box)
