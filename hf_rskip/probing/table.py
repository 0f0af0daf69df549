"""Probes of several models and steps as one table, `probe.csv`, and their summary in Markdown."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tabulate import tabulate

from ..atomic import write_then_rename
from ..errors import UserError
from .probe import SublayerProbe

_KEYS = ["model", "seed", "step"]
_COLUMNS = [*_KEYS, *(part.name for part in fields(SublayerProbe))]


@dataclass(frozen=True)
class ProbedModel:
    """All sublayers of a model at one moment."""

    model: str
    """Its name in tables and figures."""
    seed: int | None
    """Seed of the initialisation; `None` for a trained model."""
    step: int | None
    """Training step; 0 at initialisation, `None` if unknown."""
    sublayers: list[SublayerProbe]

    def stacks(self) -> dict[str, list[SublayerProbe]]:
        """Returns the sublayers of each stack from the bottom to the top, without skip connections around a layer."""
        stacks: dict[str, list[SublayerProbe]] = {}
        for row in self.sublayers:
            if not row.name.endswith("layer_skip"):
                stacks.setdefault(row.stack, []).append(row)
        return stacks


def gradient_ratio(stack: Sequence[SublayerProbe]) -> float:
    """Returns the gradient norm at the input of a stack's first sublayer over that at the output of its last."""
    return stack[0].relative_gradient_norm_x


def gradient_growth(stack: Sequence[SublayerProbe]) -> float:
    """Returns the factor by which the gradient norm grows with each sublayer on its way down (below 1: it shrinks).

    A regression of the logarithm of the norms at the inputs of the sublayers, and at the output of the last, on depth;
    NaN where one of them is not a positive number.
    """
    norms = np.array([*(row.gradient_norm_x for row in stack), stack[-1].gradient_norm_y])
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        return float("nan")
    return float(np.exp(-np.polyfit(np.arange(len(norms)), np.log(norms), 1)[0]))


def median_skip_weight(stack: Sequence[SublayerProbe]) -> float:
    """Returns the median of the effective skip weights over the sublayers that have one; NaN where none has."""
    weights = [row.skip_weight for row in stack if not math.isnan(row.skip_weight)]
    return float(np.median(weights)) if weights else math.nan


def write_table(probed: Iterable[ProbedModel], path: str | Path, append: bool = False) -> None:
    """Writes a CSV with a row for each sublayer; unknown values are empty, several gains are separated by blanks."""
    with open(path, "a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not append:
            writer.writerow(_COLUMNS)
        for item in probed:
            for row in item.sublayers:
                values = [item.model, item.seed, item.step, *asdict(row).values()]
                writer.writerow([_as_text(value) for value in values])


def read_table(path: str | Path) -> list[ProbedModel]:
    """Reads a table of [`write_table`], without a model that was written in part.

    Raises:
        [`UserError`]: if the file is not such a table, or has no model that was written as a whole.
    """
    probed = _read(path)
    if not probed:
        raise UserError(f"{str(path)!r} has no probes in it.")
    return probed


def _read(path: str | Path) -> list[ProbedModel]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise UserError(f"{str(path)!r} is not a table of `hf-rskip probe`: its columns are others.")
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}.") from error
    if rows and None in rows[-1].values():
        cut = [rows[-1][key] for key in _KEYS]
        rows = [row for row in rows if [row[key] for key in _KEYS] != cut]
    probed: dict[tuple, list[SublayerProbe]] = {}
    try:
        for row in rows:
            key = (row["model"], *(int(row[name]) if row[name] else None for name in _KEYS[1:]))
            values = {part.name: _from_text(row[part.name], part.type) for part in fields(SublayerProbe)}
            probed.setdefault(key, []).append(SublayerProbe(**values))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a table of `hf-rskip probe`: {error}.") from error
    return [ProbedModel(*key, sublayers) for key, sublayers in probed.items()]


def truncate_table(path: str | Path, last_step: int) -> None:
    """Removes the rows after a step from a table, atomically; writes an empty table if there is none."""
    probed = _read(path) if Path(path).exists() else []
    with write_then_rename(path) as part:
        write_table([item for item in probed if item.step is not None and item.step <= last_step], part)


def format_summary(probed: Iterable[ProbedModel]) -> str:
    """Formats a Markdown table with a row for each stack, and explains values that are not numbers."""
    rows, notes = [], {}
    for item in probed:
        for name, stack in item.stacks().items():
            no_gradient = not any(row.gradient_norm_x or row.gradient_norm_y for row in stack)
            if any(math.isinf(row.skip_weight) for row in stack):
                notes["inf"] = "skip weight inf: F has no part in y, as where ReZero multiplies it by 0 at first."
            if no_gradient:
                notes["0 / 0"] = (
                    "0 / 0: the loss does not depend on the stack, whose gradients are 0, as those of an encoder where "
                    "the decoder's cross-attention is multiplied by 0."
                )
            growth, weight = gradient_growth(stack), median_skip_weight(stack)
            rows.append(
                {
                    "model": item.model,
                    "seed": item.seed,
                    "step": item.step,
                    "stack": name,
                    "sublayers": len(stack),
                    "gradient, bottom / top": "0 / 0" if no_gradient else f"{gradient_ratio(stack):.3g}",
                    "factor a sublayer": "" if math.isnan(growth) else f"{growth:.4f}",
                    "std x": f"{stack[0].std_x:.3g}",
                    "std y": f"{stack[-1].std_y:.3g}",
                    "angle": f"{np.median([row.angle for row in stack]):.1f}°",
                    "skip weight": "" if math.isnan(weight) else f"{weight:.3g}",
                }
            )
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)] if rows else []
    table = tabulate([[row[key] for key in columns] for row in rows], columns, tablefmt="github", disable_numparse=True)
    return "\n\n".join([table, *notes.values()])


def _as_text(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_as_text, value))
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else str(value)


def _from_text(text: str, kind: type):
    return tuple(map(float, text.split())) if kind == tuple[float, ...] else kind(text)
