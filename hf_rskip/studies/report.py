"""A study on paper: tables, the numbers behind them, and how to repeat it."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from ..recipe.parsing import read_yaml
from .cell import DIVERGED, FAILED, FINISHED
from .figure import draw_curves, draw_scores
from .grid_figure import draw_grid
from .results import N_SAMPLES, Difference, Group, Results
from .study import describe_setting, varying_keys

UNITS = {"bleu": "BLEU", "chrf": "chrF", "accuracy": "accuracy (%)"}
"""What tables call a metric, in points of 100."""


def write_report(results: Results, command: str) -> None:
    """Writes `report.md`, `results.csv`, `summary.csv` and the pictures to the folder of the study.

    Args:
        results: of all cells, run or not.
        command: that runs the study.
    """
    folder = results.study.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    _write_cells(results, folder / "results.csv")
    _write_groups(results, folder / "summary.csv")
    unit = UNITS[results.study.metric]
    pictures = {
        "Test scores": draw_scores(results, unit, folder / "scores.png"),
        "Learning curves": draw_curves(results, unit, folder / "curves.png"),
        "Scores over the grid": draw_grid(results, unit, folder / "grid.png"),
    }
    pictures = {title: path.name for title, path in pictures.items() if path is not None}
    (folder / "report.md").write_text(_describe(results, command, pictures), encoding="utf-8")


def format_tables(results: Results, every_setting: bool = True) -> str:
    """How much is done, and the tables, in Markdown: of each form at its best, and of every setting of a grid."""
    study = results.study
    states = Counter(result.state for result in results.cells)
    counts = [f"{states[state]} {state}" for state in (FINISHED, DIVERGED, FAILED, "not run") if states[state]]
    done = states[FINISHED] + states[DIVERGED]
    parts = [f"{done} of {len(results.cells)} cells: {', '.join(counts)}."]
    if len(study.settings) == 1:
        return "\n\n".join([*parts, _format_groups(results, results.groups), *_format_contrasts(results)])
    keys = varying_keys(study.settings)
    if len(keys) == 1:
        parts.append(f"Test {UNITS[study.metric]} by {keys[0]}, mean and standard deviation (*: does not train):")
        parts.append(_format_by_key(results, keys[0]))
    parts.append("Each form at its own best setting, by the mean validation score:")
    parts += [_format_best(results), *_format_contrasts(results)]
    for setting in study.settings if every_setting else ():
        groups = [group for group in results.groups if group.setting == setting]
        if any(group.of_state(FINISHED) or group.of_state(DIVERGED) for group in groups):
            parts += [f"At {', '.join(describe_setting(setting))}:", _format_groups(results, groups)]
    return "\n\n".join(parts)


def _format_by_key(results: Results, key: str) -> str:
    rows = []
    for form in results.study.forms:
        row = [_escape(form)]
        for group in results.groups:
            if group.form == form:
                score = _format(group.test_mean, ".2f") + (
                    f" ± {group.test_sd:.2f}" if group.test_sd is not None else ""
                )
                diverged = len(group.of_state(DIVERGED))
                mark = "*" if group.trains(results.study.trains_at) is False else ""
                row.append(", ".join(filter(None, [score, f"{diverged} diverged" if diverged else ""])) + mark)
        rows.append(row)
    return _format_table(["form", *(str(dict(point)[key]) for point in results.study.settings)], rows)


def _format_groups(results: Results, groups: Iterable[Group]) -> str:
    trains_at = results.study.trains_at
    trains = [] if trains_at is None else ["trains"]
    headers = ["form", "finished", *trains, *_score_headers(results), "parameters", "seconds"]
    rows = [
        [
            _escape(group.form),
            _format_states(group),
            *(f"{group.count_trained(trains_at)}/{len(group.results)}" for _ in trains),
            *_format_scores(group, results),
            _format(group.parameters, ","),
            _format(group.seconds, ",.0f"),
        ]
        for group in groups
    ]
    return _format_table(headers, rows)


def _format_best(results: Results) -> str:
    headers = ["form", "trains in", "best setting", "validation", "finished", *_score_headers(results), "parameters"]
    rows = []
    for best in results.best:
        row = [_escape(best.form), f"{best.trained} of {best.tried}"]
        if best.group is not None:
            row += [", ".join(describe_setting(best.group.setting)), _format(best.group.validation_mean, ".2f")]
            row += [_format_states(best.group), *_format_scores(best.group, results)]
            row.append(_format(best.group.parameters, ","))
        rows.append(row + [""] * (len(headers) - len(row)))
    return _format_table(headers, rows)


def _format_contrasts(results: Results) -> list[str]:
    if not results.contrasts:
        return []
    headers = ["form", "minus", *_difference_headers(results)]
    rows = [
        [_escape(part.form), _escape(part.rival), *_format_difference(part.difference)] for part in results.contrasts
    ]
    return ["Two forms with each other:", _format_table(headers, rows)]


def _score_headers(results: Results) -> list[str]:
    return [f"test {UNITS[results.study.metric]}", "sd", *_difference_headers(results)]


def _difference_headers(results: Results) -> list[str]:
    examples = "images" if results.study.metric == "accuracy" else "sentences"
    return ["difference", "95%", f"p {examples}", "p seeds"]


def _format_scores(group: Group, results: Results) -> list[str]:
    row = [_format(group.test_mean, ".2f"), _format(group.test_sd, ".2f")]
    if group.form == results.study.baseline and group.test_mean is not None:
        return [*row, "baseline", "", "", ""]
    return [*row, *_format_difference(group.difference)]


def _format_difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return [""] * 4
    low, high = difference.interval
    p_values = [_format_p(p) for p in (difference.p_bootstrap, difference.p_seeds)]
    return [f"{difference.score:+.2f}", f"[{low:+.2f}, {high:+.2f}]", *p_values]


def _format_states(group: Group) -> str:
    """`2/3, 1 diverged at step 7`."""
    parts = [f"{len(group.of_state(FINISHED))}/{len(group.results)}"]
    steps = sorted(result.record["step"] for result in group.of_state(DIVERGED))
    if steps:
        parts.append(f"{len(steps)} diverged at step {', '.join(map(str, steps))}")
    return ", ".join(parts)


def _format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _format_p(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else _format(p, ".3f")


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def _describe(results: Results, command: str, pictures: dict[str, str]) -> str:
    study = results.study
    records = [result.record for result in results.cells if result.state in (FINISHED, DIVERGED)]
    finished = [result for result in results.cells if result.state == FINISHED]
    name = study.path.absolute().parent.name if study.path.stem == "study" else study.path.stem
    parts = [f"# {name}", format_tables(results), _explain(results)]
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    facts = {"seeds": map(str, study.seeds), "device": (record["device"] for record in records)}
    if finished:
        signature = f"{study.metric}_signature"
        facts["signature"] = (f"`{result.record['test'].get(signature, 'top-1')}`" for result in finished)
    facts["versions"] = (", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records)
    facts["commit"] = (record["commit"] for record in records if record["commit"])
    dates = sorted(record["date"][:10] for record in records)
    facts["date"] = dict.fromkeys([*dates[:1], *dates[-1:]])
    lines = [f"- {name}: {'; '.join(values)}" for name, told in facts.items() if (values := dict.fromkeys(told))]
    parts += ["## How it was measured", "\n".join(lines)]
    problems = [
        f"- {result.cell}: {' '.join(result.record['message'].split())}"
        for result in results.cells
        if result.state in (DIVERGED, FAILED)
    ]
    if problems:
        parts += ["## Diverged and failed", "\n".join(problems)]
    parts += ["## Forms", _format_yaml(read_yaml(study.path, "study")["forms"])]
    keys = [cell.keys for cell in study.cells]
    common = {name: value for name, value in keys[0].items() if all(name in k and k[name] == value for k in keys)}
    parts += ["## Recipe", "What all cells have in common:", _format_yaml(common)]
    parts += ["## Commands", "All of it:", f"```bash\n{command}\n```"]
    commands = "\n".join(result.record["command"] for result in results.cells if "command" in result.record)
    if commands:
        summary = "Each cell alone, by its own recipe, which is whole:"
        parts += [f"<details><summary>{summary}</summary>", f"```bash\n{commands}\n```", "</details>"]
    return "\n\n".join(parts) + "\n"


def _explain(results: Results) -> str:
    study = results.study
    units = "test images" if study.metric == "accuracy" else "test sentences"
    text = (
        "Scores are means over the finished seeds, with the standard deviation of a sample. The difference is that to "
        f"{study.baseline}; its 95% interval and `p sentences` are of a paired bootstrap over {units} ({N_SAMPLES:,} "
        "resamples, the same for all forms and seeds, scores averaged over seeds; p is twice the smaller tail): "
        "whether these trained models would differ on other sentences. `p seeds` is of Welch's t-test over seeds: "
        "whether the forms would differ with other seeds, on this test set. Both are two-sided, and not corrected for "
        "the number of forms. Seconds are of training with its evaluations, without cells that were interrupted."
    )
    if study.metric == "accuracy":
        text = text.replace("`p sentences`", "`p images`").replace("other sentences", "other images")
    trains = "finishes"
    if study.trains_at is not None:
        trains += f" with a validation {UNITS[study.metric]} of at least {study.trains_at:g}"
        text += f" A cell trains if it {trains}."
    if len(study.settings) > 1:
        text += (
            f" A form trains in a setting if every cell that was run {trains}. Settings were chosen by validation "
            "(equal ones by chrF, then by loss), never by test scores; a diverged cell counts as 0 there. In the table "
            "of best settings, differences are to the baseline at its own best setting."
        )
    return text


def _format_yaml(values: dict) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()}\n```"


def _write_cells(results: Results, path: Path) -> None:
    """A row for each cell; scores in points of 100, which names of columns call percent where they are shares."""
    rows = []
    for result in results.cells:
        cell, record = result.cell, result.record
        row = {"cell": cell.number, "form": cell.form, **dict(cell.setting), "seed": cell.seed, "state": result.state}
        row |= {"step": record.get("step"), "message": record.get("message")}
        for name, value in record.get("test", {}).items():
            if isinstance(value, float):
                row[f"test_{_with_unit(name)}"] = 100 * value if name.endswith("accuracy") else value
        row[f"validation_{_with_unit(results.study.metric)}"] = result.validation
        row |= {name: record.get(name) for name in ("steps", "kept_step", "parameters", "seconds", "resumed")}
        row |= {name: record.get(name) for name in ("device", "commit", "date", "command")}
        row["versions"] = "; ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
        rows.append(row)
    _write_csv(path, rows)


def _with_unit(metric: str) -> str:
    return f"{metric}_percent" if metric.endswith("accuracy") else metric


def _write_groups(results: Results, path: Path) -> None:
    """A row for each form and setting; scores in points of 100."""
    rows = []
    for group in results.groups:
        row = {"form": group.form, **dict(group.setting), "metric": UNITS[results.study.metric]}
        row["cells"] = len(group.results)
        row |= {
            state.replace(" ", "_"): len(group.of_state(state)) for state in (FINISHED, DIVERGED, FAILED, "not run")
        }
        row |= {"test_mean": group.test_mean, "test_sd": group.test_sd, "validation_mean": group.validation_mean}
        row |= _flatten(group.difference)
        row |= {"parameters": group.parameters, "seconds": group.seconds}
        rows.append(row)
    _write_csv(path, rows)


def _flatten(difference: Difference | None) -> dict[str, float | None]:
    if difference is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "p_sentences", "p_seeds"))
    low, high = difference.interval
    return {
        "difference": difference.score,
        "difference_low": low,
        "difference_high": high,
        "p_sentences": difference.p_bootstrap,
        "p_seeds": difference.p_seeds,
    }


def _write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
