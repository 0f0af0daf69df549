"""The figures of probes: gradients, activations, angles, skip weights and gains by depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..picture import escape, new_figure, save_figure, style
from .probe import SublayerProbe
from .table import ProbedModel

_MOST_LINES = 12
"""Largest number of training steps in a figure."""

Columns = dict[str, list[tuple[ProbedModel, list[SublayerProbe]]]]
"""The columns of a figure by title: one stack of some models each."""


@dataclass(frozen=True)
class _Quantity:
    label: str
    name: str
    """Name of the field of [`SublayerProbe`]."""
    line: str
    """Meaning of the line of one model and seed."""
    span: float | None = None
    """Least ratio of upper to lower end of a logarithmic axis, so that flat lines look flat. `None`: linear,
    from 0, or around 1 if that has a meaning."""
    has_quartiles: bool = False
    """Whether there are quartiles over positions; drawn where a model has one line only."""
    one: bool = False
    """Whether 1 has a meaning, and a line."""
    index: int | None = None
    """Index of the norm, where the field has a number for each."""

    def value(self, row: SublayerProbe) -> float:
        value = getattr(row, self.name)
        if self.index is None:
            return value
        return value[self.index] if self.index < len(value) else float("nan")

    def quartiles(self, row: SublayerProbe) -> tuple[float, float]:
        return getattr(row, f"{self.name}_q1"), getattr(row, f"{self.name}_q3")


_NORM, _MEAN, _MEDIAN = "norm over the batch", "mean over positions", "median over positions"
_PICTURES: dict[str, list[_Quantity]] = {
    "gradients": [
        _Quantity("gradient norm at x,\nrelative to the top", "relative_gradient_norm_x", _NORM, 100, one=True),
        _Quantity("gradient norm at x", "gradient_norm_x", _NORM, 100),
        _Quantity("gradient norm of the\nbranch's parameters", "gradient_norm_branch", _NORM, 100),
    ],
    "activations": [
        _Quantity("std of x", "std_x", _MEAN, 10, one=True),
        _Quantity("std of F", "std_branch", _MEAN, 10, one=True),
        _Quantity("std of y", "std_y", _MEAN, 10, one=True),
    ],
    "angle": [_Quantity("angle between x and y (degrees)", "angle", _MEDIAN, has_quartiles=True)],
    "skip_weight": [
        _Quantity("effective skip weight r", "skip_weight", _MEDIAN, 4, has_quartiles=True, one=True),
    ],
}


def draw_probes(probed: Sequence[ProbedModel], folder: str | Path) -> list[Path]:
    """Writes a PNG for each group of quantities, and returns their paths.

    Depth goes to the right, each stack has a panel. Where every model was probed at one step, a line is a model: the
    median over its seeds, with a band from the lowest to the highest, or for one seed, where there are quartiles over
    tokens, between these. Where one was probed at several steps, each model has panels of its own, with a line a step.
    """
    models = {item.model for item in probed}
    is_course = len({(item.model, item.step) for item in probed}) > len(models)
    columns: Columns = {}
    for item in probed:
        prefix = f"{escape(item.model)}: " if is_course and len(models) > 1 else ""
        for name, stack in item.stacks().items():
            columns.setdefault(prefix + name, []).append((item, stack))
    draw = _draw_steps if is_course else _draw_models
    paths = []
    for name, quantities in (_PICTURES | {"gains": _gain_quantities(probed)}).items():
        if quantities:
            figure = new_figure(max(5.2 * len(columns), 7), 1.6 + 2.6 * len(quantities))
            grid = figure.subplots(len(quantities), len(columns), squeeze=False, sharex="col", sharey="row")
            draw(figure, grid, quantities, columns)
            _finish(grid, quantities, columns)
            paths.append(save_figure(figure, Path(folder, f"{name}.png")))
    return paths


def _gain_quantities(probed: Sequence[ProbedModel]) -> list[_Quantity]:
    most = max(len(row.gain_rms) for item in probed for row in item.sublayers)
    line = "root mean square over features"
    return [_Quantity(f"gain of norm {i + 1}", "gain_rms", line, one=True, index=i) for i in range(most)]


def _draw_models(figure, grid, quantities: Sequence[_Quantity], columns: Columns) -> None:
    """Models side by side, with a legend."""
    models = list(dict.fromkeys(item.model for stacks in columns.values() for item, _ in stacks))
    most_seeds = 1
    for row, quantity in zip(grid, quantities, strict=True):
        for axes, stacks in zip(row, columns.values(), strict=True):
            for index, model in enumerate(models):
                seeds = [stack for item, stack in stacks if item.model == model]
                most_seeds = max(most_seeds, len(seeds))
                if seeds:
                    _draw_model(axes, quantity, seeds, model, index)
    if most_seeds > 1:
        caption = f"{quantities[0].line}; line: median over seeds, shade: lowest to highest seed"
    else:
        caption = f"line: {quantities[0].line}" + "; shade: between their quartiles" * quantities[0].has_quartiles
    figure.suptitle(caption, fontsize="small")
    if len(models) > 1:
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)


def _draw_model(axes, quantity: _Quantity, seeds: list[list[SublayerProbe]], model: str, index: int) -> None:
    values = np.array([[quantity.value(row) for row in stack] for stack in seeds], dtype=float)
    depth = np.arange(1, values.shape[1] + 1)
    every = max(1, len(depth) // 8)
    color = style(index)["color"]
    axes.plot(
        depth,
        np.median(values, axis=0),
        **style(index),
        markersize=4,
        markevery=(index % every, every),  # so that coinciding lines are visible
        linewidth=1.3,
        label=escape(model),
    )
    if len(seeds) > 1:
        axes.fill_between(depth, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    elif quantity.has_quartiles:
        band = np.array([quantity.quartiles(row) for row in seeds[0]])
        axes.fill_between(depth, *band.T, where=np.isfinite(band).all(1), color=color, alpha=0.15, linewidth=0)


def _draw_steps(figure, grid, quantities: Sequence[_Quantity], columns: Columns) -> None:
    """A line for each step of a training, coloured by step."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = max(item.step or 0 for stacks in columns.values() for item, _ in stacks)
    colors = ScalarMappable(Normalize(0, max(last, 1)), colormaps["cividis"])
    figure.suptitle(f"line: {quantities[0].line}, after a step of the training", fontsize="small")
    for row, quantity in zip(grid, quantities, strict=True):
        for axes, stacks in zip(row, columns.values(), strict=True):
            steps = sorted(stacks, key=lambda pair: pair[0].step or 0)
            for index in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_LINES)).round().astype(int)):
                item, stack = steps[index]
                values = np.array([quantity.value(row) for row in stack], dtype=float)
                color = colors.to_rgba(item.step or 0)
                axes.plot(np.arange(1, len(values) + 1), values, color=color, marker="o", markersize=3, linewidth=1.3)
    figure.colorbar(colors, ax=grid, label="training step", aspect=30)


def _finish(grid, quantities: Sequence[_Quantity], columns: Columns) -> None:
    """Scales and labels the axes."""
    for row, quantity in zip(grid, quantities, strict=True):
        row[0].set_ylabel(quantity.label)
        values = np.concatenate([line.get_ydata() for axes in row for line in axes.get_lines()] or [[]])
        _scale(row[0], values[np.isfinite(values)], quantity)
        for axes in row:
            _note_what_is_missing(axes, quantity)
            axes.grid(alpha=0.3)
            if quantity.one:
                axes.axhline(1, color="gray", linewidth=0.8, zorder=1)
    for column, (title, stacks) in zip(grid.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlim(0.5, max(len(stack) for _, stack in stacks) + 0.5)
        column[-1].set_xlabel("sublayer, counted from the bottom")
        column[-1].xaxis.get_major_locator().set_params(integer=True)


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
    if highest / lowest < 1e4:  # powers of ten are enough for wider axes
        even = highest / lowest < 10
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]) if even else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _note_what_is_missing(axes, quantity: _Quantity) -> None:
    """Notes values that are not shown: infinite, NaN, or 0 on a logarithmic axis."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()] or [[]])
    notes = []
    if np.isinf(values).any():
        notes.append("infinite: F has no part in y" if quantity.has_quartiles else "some infinite")
    if quantity.span and axes.get_yscale() == "log" and (values == 0).any():
        notes.append("0 is not shown" if (values > 0).any() else "all 0")
    elif values.size and np.isnan(values).all():
        notes.append("not a number (0 / 0)" if quantity.one else "not a number")
    axes.text(0.5, 0.96, "; ".join(notes), transform=axes.transAxes, ha="center", va="top", fontsize="small")
