"""The figure of a comparison: changes of single sentences, and scores by source length."""

from pathlib import Path

import numpy as np

from ..picture import escape, new_figure, save_figure, style
from .comparison import Comparison

_LENGTH_BINS = 6


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Writes a PNG.

    On the left, for each system, the histogram of how the chrF of sentences differs from the baseline's; sentences of
    equal score are counted in the title instead. On the right, for groups of about equally many sentences by source
    length, the mean chrF of a sentence and its 95% interval (1.96 standard errors).
    """
    others = comparison.systems[1:]
    figure = new_figure(10, max(4.2, 0.6 + 1.9 * len(others)))
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.add_gridspec(len(others), 2)
    _draw_changes([figure.add_subplot(grid[row, 0]) for row in range(len(others))], comparison)
    _draw_lengths(figure.add_subplot(grid[:, 1]), comparison)
    save_figure(figure, Path(path))


def _draw_changes(rows: list, comparison: Comparison) -> None:
    baseline, *others = comparison.systems
    changes = [system.sentence_chrf - baseline.sentence_chrf for system in others]
    limit = max(1.0, max(np.abs(change).max() for change in changes))
    # An even number of bins, so that none holds both better and worse sentences.
    edges = np.linspace(-limit, limit, 2 * int(np.clip(np.sqrt(len(changes[0])) / 2, 5, 20)) + 1)
    for index, (axes, system, change) in enumerate(zip(rows, others, changes, strict=True), start=1):
        axes.hist(change[change != 0], edges, color=style(index)["color"], alpha=0.75)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(change.mean(), color="black", linestyle="--", linewidth=1.2, label=f"mean {change.mean():+.2f}")
        axes.set_title(
            f"{_shorten(system.name)}: {(change > 0).mean():.0%} better, {(change < 0).mean():.0%} worse, "
            f"{(change == 0).mean():.0%} equal (not drawn)",
            fontsize="medium",
        )
        axes.set_ylabel("sentences")
        axes.set_xlim(-limit, limit)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.margins(y=0.3)  # room for the legend
        axes.legend(loc="upper left", frameon=False)
    rows[-1].set_xlabel(f"difference to {_shorten(baseline.name)} (chrF points of a sentence)")


def _draw_lengths(axes, comparison: Comparison) -> None:
    lengths = np.array([len(source) for source in comparison.sources])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_BINS + 1)[1:-1]))
    groups = np.digitize(lengths, edges)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    centers = np.array([lengths[group].mean() for group in members])
    # Side by side, so that error bars do not cover each other.
    step = (np.ptp(centers) or 1) / 80
    for index, system in enumerate(comparison.systems):
        scores = [system.sentence_chrf[group] for group in members]
        means = [score.mean() for score in scores]
        errors = [1.96 * score.std(ddof=1) / len(score) ** 0.5 if len(score) > 1 else np.nan for score in scores]
        errors = np.minimum([errors, errors], [means, np.subtract(100, means)])  # scores go from 0 to 100
        shift = (index - (len(comparison.systems) - 1) / 2) * step
        label = _shorten(system.name) + (" (baseline)" if index == 0 else "")
        axes.errorbar(centers + shift, means, errors, **style(index), markersize=5, capsize=3, label=label)
    axes.set_title("By source length", fontsize="medium")
    axes.set_xlabel("source length (characters)")
    axes.set_ylabel("chrF of a sentence (mean, 95% interval)")
    axes.grid(alpha=0.3)
    axes.legend()


def _shorten(name: str, length: int = 30) -> str:
    return escape(name if len(name) <= length else f"...{name[3 - length :]}")
