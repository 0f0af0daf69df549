"""The pictures of probes: gradients, activations, angles, skip weights and gains by depth."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..picture import escape, save_figure
from .probe import SublayerProbe
from .table import ProbedModel

# Okabe and Ito (2008): told apart with any colour vision; markers and lines differ as well.
_COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_MARKERS = "osD^vPX"
_LINES = ["-", "--", ":"]
_MOST_LINES = 12
"""Of the steps of a training: others between them are left out of the picture."""
_STAGE = re.compile(r"\bstages\.(\d+)\.")
"""In the name of a skip connection of a ResNet."""


@dataclass(frozen=True)
class _Quantity:
    label: str
    value: Callable[[SublayerProbe], float]
    line: str
    """What a line of one model and seed shows."""
    span: float | None = None
    """Of a logarithmic axis at least, so that what is flat looks flat: its upper end over its lower. `None`: linear,
    from 0, or around 1 if that has a meaning."""
    quartiles: Callable[[SublayerProbe], tuple[float, float]] | None = None
    """Over positions; drawn where there is one line for a model only."""
    one: bool = False
    """Whether 1 has a meaning, and a line."""


_NORM, _MEAN = "norm over the batch", "mean over positions"
_PICTURES: dict[str, list[_Quantity]] = {
    "gradients": [
        _Quantity(
            "gradient norm at x,\nrelative to the top", lambda row: row.relative_gradient_norm_x, _NORM, 100, one=True
        ),
        _Quantity("gradient norm at x", lambda row: row.gradient_norm_x, _NORM, 100),
        _Quantity("gradient norm of the\nbranch's parameters", lambda row: row.gradient_norm_branch, _NORM, 100),
    ],
    "activations": [
        _Quantity("std of x", lambda row: row.std_x, _MEAN, 10, one=True),
        _Quantity("std of F", lambda row: row.std_branch, _MEAN, 10, one=True),
        _Quantity("std of y", lambda row: row.std_y, _MEAN, 10, one=True),
    ],
    "angle": [
        _Quantity(
            "angle between x and y (degrees)",
            lambda row: row.angle,
            "median over positions",
            quartiles=lambda row: (row.angle_q1, row.angle_q3),
        )
    ],
    "skip_weight": [
        _Quantity(
            "effective skip weight r",
            lambda row: row.skip_weight,
            "median over positions",
            4,
            quartiles=lambda row: (row.skip_weight_q1, row.skip_weight_q3),
            one=True,
        )
    ],
}


def draw_probes(probed: Sequence[ProbedModel], folder: str | Path) -> list[Path]:
    """Writes a PNG for each group of quantities, and returns their paths.

    Depth goes to the right, each stack has a panel. Where every model was probed at one step, a line is a model: the
    median over its seeds, with a band from the lowest to the highest, or for one seed, where there are quartiles over
    tokens, between these. Where one was probed at several steps, each model has panels of its own, with a line a step.
    """
    steps = {item.model: {other.step for other in probed if other.model == item.model} for item in probed}
    draw = _draw_courses if any(len(own) > 1 for own in steps.values()) else _draw_models
    paths = []
    for name, quantities in (_PICTURES | {"gains": _gain_quantities(probed)}).items():
        if quantities:
            paths.append(Path(folder, f"{name}.png"))
            draw(probed, quantities, paths[-1])
    return paths


def _gain_quantities(probed: Sequence[ProbedModel]) -> list[_Quantity]:
    most = max(len(row.gain_rms) for item in probed for row in item.sublayers)

    def gain(step: int) -> Callable[[SublayerProbe], float]:
        return lambda row: row.gain_rms[step] if step < len(row.gain_rms) else float("nan")

    line = "root mean square over features"
    return [_Quantity(f"gain of norm {step + 1}", gain(step), line, one=True) for step in range(most)]


def _grid(rows: int, columns: int, caption: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.2 * columns, 7), 1.6 + 2.6 * rows), layout="constrained")
    figure.suptitle(caption, fontsize="small")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")


def _finish(figure, grid, quantities: Sequence[_Quantity], panels: Sequence["_Panel"], path: Path) -> None:
    for row, quantity in zip(grid, quantities, strict=True):
        row[0].set_ylabel(quantity.label)
        values = np.concatenate([line.get_ydata() for axes in row for line in axes.get_lines()] or [[]])
        _scale(row[0], values[np.isfinite(values)], quantity)
        for axes in row:
            _note_what_is_missing(axes, quantity)
            axes.grid(alpha=0.3)
            if quantity.one:
                axes.axhline(1, color="gray", linewidth=0.8, zorder=1)
    for column, panel in zip(grid.T, panels, strict=True):
        column[0].set_title(panel.title, fontsize="medium")
        for axes in column:
            for end in panel.stage_ends:
                axes.axvline(end + 0.5, color="gray", linestyle="--", linewidth=0.8, zorder=1)
        column[-1].set_xlim(0.5, panel.size + 0.5)
        column[-1].set_xlabel(
            f"{panel.unit}, counted from the bottom" + " (dashed: next stage)" * bool(panel.stage_ends)
        )
        column[-1].xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def _scale(axes, values: np.ndarray, quantity: _Quantity) -> None:
    positive = values[values > 0]
    if quantity.span and positive.size and values.min() >= 0:
        _use_log_scale(axes, positive, quantity.span)
    elif not quantity.span and quantity.one:
        low, high = min(1, *values), max(1, *values)
        margin = max(0.05, 0.1 * (high - low))
        axes.set_ylim(low - margin, high + margin)
    elif not quantity.span:
        axes.set_ylim(bottom=0)


def _use_log_scale(axes, values: np.ndarray, span: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log", nonpositive="mask")
    margin = 1.15 * (values.max() / values.min()) ** 0.05
    lowest, highest = values.min() / margin, values.max() * margin
    missing = max(1, span / (highest / lowest)) ** 0.5
    lowest, highest = lowest / missing, highest * missing
    axes.set_ylim(lowest, highest)
    if highest / lowest < 1e4:  # else powers of ten are enough
        even = highest / lowest < 10
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]) if even else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _note_what_is_missing(axes, quantity: _Quantity) -> None:
    """What a logarithmic axis, or any, has no place for."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()] or [[]])
    notes = []
    if np.isinf(values).any():
        notes.append("infinite: F has no part in y" if quantity.quartiles else "some infinite")
    if quantity.span and axes.get_yscale() == "log" and (values == 0).any():
        notes.append("0 is not shown" if (values > 0).any() else "all 0")
    elif values.size and np.isnan(values).all():
        notes.append("not a number (0 / 0)" if quantity.one else "not a number")
    axes.text(0.5, 0.96, "; ".join(notes), transform=axes.transAxes, ha="center", va="top", fontsize="small")


def _values(quantity: _Quantity, stack: Sequence[SublayerProbe]) -> np.ndarray:
    return np.array([quantity.value(row) for row in stack], dtype=float)


@dataclass(frozen=True)
class _Panel:
    """A column of a picture."""

    title: str
    unit: str
    """What is counted from the left to the right."""
    size: int
    stage_ends: list[int]
    """The last block of each stage but the last one; of a ResNet, where all that are shown have the same."""


def _describe_panel(probed: Sequence[ProbedModel], name: str, prefix: str = "") -> _Panel:
    """Of the stack of that name of these models."""
    stacks = [item.stacks()[name] for item in probed if name in item.stacks()]
    stages = [[_STAGE.search(row.name) for row in stack] for stack in stacks]
    are_blocks = [all(found) for found in stages]
    ends = [
        [depth for depth, (one, other) in enumerate(pairwise(found), 1) if one[1] != other[1]] if blocks else []
        for found, blocks in zip(stages, are_blocks, strict=True)
    ]
    unit = "residual block" if all(are_blocks) else "sublayer or residual block" if any(are_blocks) else "sublayer"
    same = all(own == ends[0] and len(stack) == len(stacks[0]) for own, stack in zip(ends, stacks, strict=True))
    return _Panel(
        prefix + ("ResNet" if all(are_blocks) else name), unit, max(map(len, stacks)), ends[0] if same else []
    )


def _stack_names(probed: Sequence[ProbedModel]) -> list[str]:
    return list(dict.fromkeys(name for item in probed for name in item.stacks()))


# Models side by side


def _draw_models(probed: Sequence[ProbedModel], quantities: Sequence[_Quantity], path: Path) -> None:
    stacks, models = _stack_names(probed), list(dict.fromkeys(item.model for item in probed))
    by_model = [[item for item in probed if item.model == model] for model in models]
    figure, grid = _grid(len(quantities), len(stacks), _explain(quantities[0], max(map(len, by_model))))
    for row, quantity in zip(grid, quantities, strict=True):
        for axes, stack in zip(row, stacks, strict=True):
            for index, items in enumerate(by_model):
                seeds = [item.stacks()[stack] for item in items if stack in item.stacks()]
                if seeds:
                    _draw_model(axes, quantity, seeds, models[index], index)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if len(models) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    _finish(figure, grid, quantities, [_describe_panel(probed, name) for name in stacks], path)


def _explain(quantity: _Quantity, most_seeds: int) -> str:
    """What line and shade are; the quantities of a picture have that in common."""
    if most_seeds > 1:
        return f"{quantity.line}; line: median over seeds, shade: lowest to highest seed"
    return f"line: {quantity.line}" + ("; shade: between their quartiles" if quantity.quartiles else "")


def _draw_model(axes, quantity: _Quantity, seeds: list[list[SublayerProbe]], model: str, index: int) -> None:
    values = np.array([_values(quantity, stack) for stack in seeds])
    depth = np.arange(1, values.shape[1] + 1)
    every = max(1, len(depth) // 8)
    style = {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index // len(_COLORS) % len(_LINES)],
    }
    axes.plot(
        depth,
        np.median(values, axis=0),
        **style,
        markersize=4,
        markevery=(index % every, every),  # so that lines that coincide are seen
        linewidth=1.3,
        label=escape(model),
    )
    if len(seeds) > 1:
        axes.fill_between(depth, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    elif quantity.quartiles:
        band = np.array([quantity.quartiles(row) for row in seeds[0]])
        axes.fill_between(depth, *band.T, where=np.isfinite(band).all(1), color=style["color"], alpha=0.15, linewidth=0)


# A training, step by step


def _draw_courses(probed: Sequence[ProbedModel], quantities: Sequence[_Quantity], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels = [
        (model, stack)
        for model in dict.fromkeys(item.model for item in probed)
        for stack in _stack_names([item for item in probed if item.model == model])
    ]
    last = max(item.step or 0 for item in probed)
    colors = ScalarMappable(Normalize(0, max(last, 1)), colormaps["cividis"])
    figure, grid = _grid(len(quantities), len(panels), f"line: {quantities[0].line}, after a step of the training")
    for row, quantity in zip(grid, quantities, strict=True):
        for axes, (model, stack) in zip(row, panels, strict=True):
            course = sorted((item for item in probed if item.model == model), key=lambda item: item.step or 0)
            chosen = np.unique(np.linspace(0, len(course) - 1, min(len(course), _MOST_LINES)).round().astype(int))
            for item in (course[index] for index in chosen):
                values = _values(quantity, item.stacks()[stack])
                color = colors.to_rgba(item.step or 0)
                axes.plot(np.arange(1, len(values) + 1), values, color=color, marker="o", markersize=3, linewidth=1.3)
    figure.colorbar(colors, ax=grid, label="training step", aspect=30)
    many = len({model for model, _ in panels}) > 1
    described = [
        _describe_panel([item for item in probed if item.model == model], stack, f"{escape(model)}: " * many)
        for model, stack in panels
    ]
    _finish(figure, grid, quantities, described, path)
