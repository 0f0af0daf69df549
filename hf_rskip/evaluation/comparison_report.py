"""Report of a comparison: tables, the sentences that changed most, and all numbers."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tabulate import tabulate

from .comparison import Comparison, SystemScores
from .comparison_figure import draw_comparison

_EXAMPLES = 5
_TESTS = {"bs": "paired bootstrap", "ar": "paired approximate randomisation"}


QUESTIONS = (
    "p boot. (paired bootstrap, twice the smaller tail): would the difference of these systems change its sign on "
    "other sentences like these? p rand. (paired approximate randomisation): would systems that are interchangeable "
    "differ by as much? Both are two-sided, not corrected for the number of systems, and say nothing about other "
    "trainings."
)
"""The questions that the p-values answer."""


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes `comparison.md`, `comparison.json`, `sentences.csv` and `comparison.png` to an existing folder."""
    (folder / "comparison.md").write_text(_describe(comparison), encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(_summarize(comparison), indent=2) + "\n", encoding="utf-8")
    _write_sentences(comparison, folder / "sentences.csv")
    draw_comparison(comparison, folder / "comparison.png")


def format_table(comparison: Comparison) -> str:
    """Formats the corpus scores as a Markdown table, a row for each metric and system."""
    headers = ["metric", "system", "score", "95%", "difference", "95%", "wins", "p boot.", "p rand.", "length"]
    rows = []
    for metric in comparison.signatures:
        for system in comparison.systems:
            row = [metric, system.name.replace("|", "\\|"), f"{system.scores[metric]:.2f}"]
            row.append(_format_interval(system.intervals[metric]))
            if difference := system.differences.get(metric):
                row += [f"{difference.score:+.2f}", _format_interval(difference.interval, "+")]
                row += [f"{difference.wins:.1%}"]
                row += [f"{p:.4f}" for p in (difference.p_bootstrap, difference.p_randomization)]
            else:
                row += ["baseline", "", "", "", ""]
            rows.append([*row, f"{system.length_ratio:.3f}"])
    numbers = ["right"] * (len(headers) - 2)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=["left", "left", *numbers])


def format_signatures(comparison: Comparison) -> list[str]:
    """Returns a line for each metric and test."""
    return [
        f"{metric}, {_TESTS[test]}: `{signature}`"
        for metric, signatures in comparison.signatures.items()
        for test, signature in signatures.items()
    ]


def _format_interval(interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def _describe(comparison: Comparison) -> str:
    baseline, *others = comparison.systems
    parts = [
        f"# {' and '.join(system.name for system in others)} against {baseline.name}",
        f"{len(comparison.references):,} sentences.",
        format_table(comparison),
        "Scores are points of 100. 95% is the interval between the 2.5th and the 97.5th percentile of the bootstrap "
        "resamples; wins, the share of them in which the system is the better one; length, tokens of the translations "
        f"over those of the references. {QUESTIONS}",
        "\n".join(f"- {line}" for line in format_signatures(comparison)),
        "![Changes of single sentences, and scores by source length](comparison.png)",
        "## Sentences",
        "By chrF of the sentence, as BLEU of a sentence says little. All of them stand in `sentences.csv`.",
    ]
    for system in others:
        change = system.sentence_chrf - baseline.sentence_chrf
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        equal = len(change) - better - worse
        parts.append(f"### {system.name}")
        parts.append(f"{better:,} better, {worse:,} worse, {equal:,} equal; {change.mean():+.2f} chrF on average.")
        order = np.argsort(change, kind="stable")
        for title, chosen in (
            ("Most better", [index for index in order[::-1][:_EXAMPLES] if change[index] > 0]),
            ("Most worse", [index for index in order[:_EXAMPLES] if change[index] < 0]),
        ):
            if chosen:
                parts.append(f"#### {title}")
                parts += [_format_example(comparison, system, index, change[index]) for index in chosen]
    return "\n\n".join(parts) + "\n"


def _format_example(comparison: Comparison, system: SystemScores, index: int, change: float) -> str:
    """Formats a sentence as an indented block, where nothing is markup."""
    baseline = comparison.systems[0]
    lines = {
        "source": comparison.sources[index],
        "reference": comparison.references[index],
        baseline.name: f"{baseline.translations[index]}  ({baseline.sentence_chrf[index]:.1f})",
        system.name: f"{system.translations[index]}  ({system.sentence_chrf[index]:.1f})",
    }
    width = max(map(len, lines))
    block = [f"    {name:{width}}  {' '.join(text.split())}" for name, text in lines.items()]
    return "\n".join([f"Sentence {index + 1}, {change:+.1f} chrF:", "", *block])


def _summarize(comparison: Comparison) -> dict:
    """Returns all numbers but those of single sentences."""
    systems = [asdict(system) for system in comparison.systems]
    for system in systems:
        del system["translations"], system["sentence_chrf"]
    return {"sentences": len(comparison.references), "signatures": comparison.signatures, "systems": systems}


def _write_sentences(comparison: Comparison, path: Path) -> None:
    """Writes a CSV with a row for each sentence."""
    baseline = comparison.systems[0]
    columns = {"sentence": range(1, len(comparison.references) + 1)}
    columns |= {"source": comparison.sources, "reference": comparison.references}
    for system in comparison.systems:
        columns[f"{system.name} translation"] = system.translations
        columns[f"{system.name} chrF"] = system.sentence_chrf
        if system is not baseline:
            columns[f"{system.name} difference"] = system.sentence_chrf - baseline.sentence_chrf
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
