"""The report of a study: tables, their numbers as CSVs, and the commands that repeat it."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from ..recipe.parsing import read_yaml
from .cell import DIVERGED, FAILED, FINISHED
from .differences import N_SAMPLES, FormDifference
from .figure import draw_courses, draw_curves, draw_scores
from .grid_figure import draw_grid
from .results import Group, Results
from .study import Study, describe_setting, varying_keys

UNITS = {"bleu": "BLEU", "chrf": "chrF", "accuracy": "accuracy (%)"}
"""Names of the metrics in tables, in points of 100."""


def write_report(results: Results, command: str, modules: Sequence[str] = ()) -> None:
    """Writes `report.md`, the numbers behind it as CSVs, and the pictures to the folder of the study.

    Args:
        results: of all cells, run or not.
        command: that runs the study.
        modules: that it imports first.
    """
    folder = results.study.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("contrasts.csv", "scores.png", "curves.png", "grid.png", "courses.png"):
        (folder / name).unlink(missing_ok=True)  # of an earlier report, if this one has none
    _write_cells(results, modules, folder / "results.csv")
    _write_groups(results, folder / "summary.csv")
    if results.contrasts:
        _write_contrasts(results, folder / "contrasts.csv")
    unit = UNITS[results.study.metric]
    pictures = {
        "Test scores": draw_scores(results, unit, folder / "scores.png"),
        "Learning curves": draw_curves(results, unit, folder / "curves.png"),
        "Scores over the grid": draw_grid(results, unit, folder / "grid.png"),
        "Skip connections in the course of training": draw_courses(results, folder / "courses.png"),
    }
    pictures = {title: path.name for title, path in pictures.items() if path is not None}
    (folder / "report.md").write_text(_describe(results, command, modules, pictures), encoding="utf-8")


def format_tables(results: Results) -> str:
    """Formats progress and tables in Markdown: of a grid, of the settings chosen from it, of scores and contrasts."""
    study = results.study
    tunes = study.tune_seeds is not None
    states = Counter(result.state for result in results.cells)
    counts = [f"{states[state]} {state}" for state in (FINISHED, DIVERGED, FAILED, "not run") if states[state]]
    done, missing = states[FINISHED] + states[DIVERGED], states[FAILED] + states["not run"]
    parts = [f"{done} of {len(results.cells)} cells: {', '.join(counts)}."]
    seeds = ", ".join(map(str, study.seeds))
    if tunes:
        keys, tune_seeds = ", ".join(varying_keys(study.settings)), ", ".join(map(str, study.tune_seeds))
        parts.append(f"Stage 1: {keys} of each form, chosen by validation (seed {tune_seeds}).")
    parts += _format_by_key(results)
    for form, point in study.beyond:
        is_best = study.chosen is not None and study.chosen[form] == point
        end = ", and is the best: a better one may lie further" if is_best else ""
        parts.append(
            f"{_escape(form)} was best at the edge of the grid, so that {describe_setting(point)} is tried, too{end}."
        )
    for form, point in study.impossible:
        parts.append(
            f"{_escape(form)} was best at the edge of the grid, beyond which {describe_setting(point)} is not possible."
        )
    if study.is_growing:
        parts.append(
            f"Stage 1 is not complete: {missing} of its cells are missing. Then each form is trained with the seeds "
            f"{seeds} at its own best setting, and the contrasts are computed."
        )
    else:
        if study.judge in ("tune", "grid"):
            parts.append(_format_choice(results))
            parts.append(f"{'Stage 2: each' if tunes else 'Each'} form at its own best setting (seeds {seeds}).")
        if tunes and missing:
            parts.append(
                f"It is not complete: {missing} cells are missing, and what follows is of those that are there."
            )
        parts.append(_format_scores(results))
    return "\n\n".join([*parts, *_format_contrasts(results)])


def _format_choice(results: Results) -> str:
    rows = []
    for best in results.best:
        setting, score = "none: nothing finished", None
        if best.tuned is not None:
            setting, score = describe_setting(best.tuned.setting), best.tuned.validation_mean
        row = {
            "form": _escape(best.form),
            "trains in": f"{best.settings_trained} of {best.settings_tried}",
            "best setting": setting,
        }
        rows.append(row | {f"validation {UNITS[results.study.metric]}": _format(score, ".2f")})
    return _format_table(rows)


def _format_by_key(results: Results) -> list[str]:
    """A table of scores by the value of the varying key; nothing unless exactly one varies."""
    study = results.study
    keys = varying_keys(study.settings)
    if len(keys) != 1:
        return []
    tuned = study.tune_seeds is not None
    said = "Validation" if tuned else "Test"
    spread = "mean" if tuned else "mean and standard deviation"
    by_place = {(group.form, str(group.setting)): group for group in results.groups}
    rows = []
    for form in study.forms:
        row = {"form": _escape(form)}
        for setting in study.settings:
            group = by_place.get((form, str(setting)))
            row[str(dict(setting)[keys[0]])] = _format_score(group, study.trains_at, tuned)
        rows.append(row)
    return [f"{said} {UNITS[study.metric]} by {keys[0]}, {spread} (*: does not train):", _format_table(rows)]


def _format_score(group: Group | None, trains_at: float | None, tuned: bool) -> str:
    if group is None:
        return ""
    score = _format(group.validation_mean if tuned else group.test_mean, ".2f")
    if group.test_sd is not None and not tuned:
        score += f" ± {group.test_sd:.2f}"
    diverged = len(group.of_state(DIVERGED))
    mark = "*" if group.trains(trains_at) is False else ""
    return ", ".join(filter(None, [score, f"{diverged} diverged" if diverged else ""])) + mark


def _format_scores(results: Results) -> str:
    """A table of the forms, each at its own best setting."""
    study, rows = results.study, []
    for best in results.best:
        group = best.group
        if group is None:
            continue
        row = {"form": _escape(best.form), "finished": _format_states(group)}
        if study.trains_at is not None:
            row["trains"] = f"{group.count_trained(study.trains_at)}/{len(group.results)}"
        row |= {f"test {UNITS[study.metric]}": _format(group.test_mean, ".2f"), "sd": _format(group.test_sd, ".2f")}
        row |= _format_difference(best.difference, study)
        if best.form == study.baseline and group.test_mean is not None:
            row["difference"] = "baseline"
        rows.append(row | {"parameters": _format(group.parameters, ","), "seconds": _format(group.seconds, ",.0f")})
    return _format_table(rows)


def _format_contrasts(results: Results) -> list[str]:
    rows = []
    for part in results.contrasts:
        row = {"form": _escape(part.form), "minus": _escape(part.rival)}
        row |= _format_difference(part.difference, results.study) | {"p Holm": _format_p(part.p_holm)}
        if results.study.margin is not None:
            interval = part.difference and part.difference.interval_90
            row |= {"90% both": _format_interval(interval), "answer": part.answer or ""}
        rows.append(row)
    return ["Two forms with each other:", _format_table(rows)] if rows else []


def _format_difference(difference: FormDifference | None, study: Study) -> dict[str, str]:
    examples = "images" if study.metric == "accuracy" else "sentences"
    headers = ["difference", f"95% {examples}", f"p {examples}", "p seeds", "95% both", "p both"]
    if difference is None:
        return dict.fromkeys(headers, "")
    texts = [
        f"{difference.score:+.2f}",
        _format_interval(difference.interval_sentences),
        _format_p(difference.p_sentences),
        _format_p(difference.p_seeds),
        _format_interval(difference.interval_both),
        _format_p(difference.p_both),
    ]
    return dict(zip(headers, texts, strict=True))


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _format_states(group: Group) -> str:
    """`2/3, 1 diverged at step 7`."""
    parts = [f"{len(group.of_state(FINISHED))}/{len(group.results)}"]
    steps = sorted(result.record["step"] for result in group.of_state(DIVERGED))
    if steps:
        parts.append(f"{len(steps)} diverged at step {', '.join(map(str, steps))}")
    return ", ".join(parts)


def _format_table(rows: list[dict[str, str]]) -> str:
    """Formats rows, which map headers to texts, as Markdown."""
    columns = dict.fromkeys(header for row in rows for header in row)
    align = ["left" if header == "form" else "right" for header in columns]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=align)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _format_p(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else _format(p, ".3f")


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def _describe(results: Results, command: str, modules: Sequence[str], pictures: dict[str, str]) -> str:
    study = results.study
    records = [result.record for result in results.cells if result.state in (FINISHED, DIVERGED)]
    finished = [result for result in results.cells if result.state == FINISHED]
    name = study.path.absolute().parent.name if study.path.stem == "study" else study.path.stem
    parts = [f"# {name}", format_tables(results), _explain(results)]
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    if any(cell.keys.get("average_checkpoints") for cell in study.cells):
        parts.append("The last point of a learning curve is of averaged checkpoints, the others are of single models.")
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
    commands = "\n".join(result.cell.command(modules) for result in results.cells if result.record)
    if commands:
        summary = "Each cell alone, by its own recipe, which is whole:"
        parts += [f"<details><summary>{summary}</summary>", f"```bash\n{commands}\n```", "</details>"]
    return "\n\n".join(parts) + "\n"


def _explain(results: Results) -> str:
    study, trains = results.study, "finishes"
    if study.trains_at is not None:
        trains += f" with a validation {UNITS[study.metric]} of at least {study.trains_at:g}"
    one, units = ("images", "test images") if study.metric == "accuracy" else ("sentences", "test sentences")
    lines = [
        "Scores are means over the finished seeds, with the standard deviation of a sample. Differences are to "
        f"{study.baseline}, or of the contrasts that the study names. Which p-value answers which question (all are "
        "two-sided):\n",
        f"- `p {one}`: would these trained models differ on other {one}? By a paired bootstrap over the {units} "
        f"({N_SAMPLES:,} resamples, the same for all cells; scores averaged over seeds; twice the smaller tail), like "
        f"`95% {one}`. It says nothing of other seeds: however small it is, training again may turn the sign.",
        "- `p seeds`: would the forms differ with other seeds, on this very test set? By Welch's t-test over seeds, "
        "which takes those of two forms as unrelated.",
        f"- `p both`: would the forms differ with other seeds and on other {one}? By the variance over both, from at "
        "least three seeds of each form and the same resamples, and a t-distribution, like `95% both`. It is the one "
        "for a claim about forms.",
    ]
    if study.contrasts:
        lines.append(
            f"- `p Holm`: `p both`, corrected for all {len(study.contrasts)} contrasts by Holm's procedure. No other "
            "p-value is corrected."
        )
    if study.margin is not None:
        lines.append(
            f"- `answer`: `equivalent` if every cell of the two forms {trains} and the 90% interval over both "
            f"lies within ±{study.margin:g}, which the study names as its margin (two one-sided tests at 5%, not "
            "corrected); otherwise `different` if `p Holm` is below .05; otherwise `undecided`, which says neither."
        )
    lines.append("\nSeconds are of training with its evaluations, without cells that were interrupted.")
    if study.trains_at is not None:
        lines[-1] += f" A cell trains if it {trains}."
    if len(study.settings) > 1:
        ties = "chrF, then by loss" if study.metric == "bleu" else "loss"
        lines[-1] += (
            f" A form trains in a setting if every cell that was run {trains}. Settings were chosen by validation "
            f"(equal ones by {ties}), never by test scores; a diverged cell counts as 0 there. "
            "Differences are between forms at their own best settings."
        )
    if study.tune_seeds is not None:
        lines[-1] += (
            " A cell that has tuned is not trained again: where its seed is one of the second stage, it counts there."
        )
    return "\n".join(lines)


def _format_yaml(values: dict) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()}\n```"


def _write_cells(results: Results, modules: Sequence[str], path: Path) -> None:
    """A row for each cell; scores in points of 100, with `_percent` in the column name of an accuracy."""
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
        row |= {name: record.get(name) for name in ("device", "commit", "date")}
        row["command"] = cell.command(modules) if record else None
        row["versions"] = "; ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
        rows.append(row)
    _write_csv(path, rows)


def _with_unit(metric: str) -> str:
    return f"{metric}_percent" if metric.endswith("accuracy") else metric


def _write_groups(results: Results, path: Path) -> None:
    """A row for each form and setting, with `tune` for each stage; scores in points of 100.

    Differences are those between forms at their own best settings.
    """
    study, best = results.study, {best.form: best for best in results.best}
    tunes = study.tune_seeds is not None
    groups = []
    for group in results.groups:
        is_chosen = group is best[group.form].tuned
        stage = {"stage": 1} if tunes else {}
        stage |= {"chosen": is_chosen} if study.judge in ("tune", "grid") else {}
        groups.append((stage, group, best[group.form].difference if is_chosen and not tunes else None))
    if tunes:
        groups += [({"stage": 2, "chosen": True}, best.group, best.difference) for best in results.best if best.group]
    rows = []
    for stage, group, difference in groups:
        row = {**stage, "form": group.form, **dict(group.setting), "metric": UNITS[results.study.metric]}
        row["cells"] = len(group.results)
        row |= {
            state.replace(" ", "_"): len(group.of_state(state)) for state in (FINISHED, DIVERGED, FAILED, "not run")
        }
        row |= {"test_mean": group.test_mean, "test_sd": group.test_sd, "validation_mean": group.validation_mean}
        row |= _flatten(difference)
        row |= {"parameters": group.parameters, "seconds": group.seconds}
        rows.append(row)
    _write_csv(path, rows)


def _write_contrasts(results: Results, path: Path) -> None:
    rows = [
        {"form": part.form, "minus": part.rival, "metric": UNITS[results.study.metric], **_flatten(part.difference)}
        | {"p_holm": part.p_holm, "margin": results.study.margin, "answer": part.answer}
        for part in results.contrasts
    ]
    _write_csv(path, rows)


def _flatten(difference: FormDifference | None) -> dict[str, float | None]:
    """The values of a difference by column name."""
    row: dict[str, float | None] = {"difference": difference and difference.score}
    for name in ("interval_sentences", "p_sentences", "p_seeds", "interval_both", "interval_90", "p_both"):
        value = difference and getattr(difference, name)
        if name.startswith("interval"):
            row |= dict(zip((f"{name}_low", f"{name}_high"), value or (None, None), strict=True))
        else:
            row[name] = value
    return row


def _write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:  # sums differ in their last digits from one processor to another
            writer.writerow({name: float(f"{x:.10g}") if isinstance(x, float) else x for name, x in row.items()})
