"""A study in two stages: a grid judged by validation, and the seeds at each form's own best setting."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from made_up_cells import diverge, finish

from hf_rskip.cli.main import main
from hf_rskip.errors import UserError
from hf_rskip.studies.differences import FormDifference
from hf_rskip.studies.grid_figure import _draw_lines
from hf_rskip.studies.report import format_tables, write_report
from hf_rskip.studies.results import _answer, gather_results
from hf_rskip.studies.study import read_study
from hf_rskip.studies.tuning import _sort, _step_beyond, advance

REFERENCES = ["the dog runs in the park .", "a cat sits here now .", "two men talk on a bench ."]


@pytest.fixture
def beginning(make_study):
    return make_study(
        forms={"a": {}, "b": {"dropout": 0.2}, "c": {"dropout": 0.3}},
        tune={"grid": {"learning_rate": [0.001, 0.002, 0.004]}, "seeds": [1]},
        seeds=[1, 2, 3],
        contrasts=[["b", "a"], ["c", "a"]],
        margin=0.5,
    )


def finish_stage(study, validation: dict) -> None:
    """By form and learning rate; `None` diverges. The test scores say the contrary, and `b` is the longer output."""
    for cell in study.cells:
        if cell.folder.exists():
            continue
        score = validation[cell.form, dict(cell.setting)["learning_rate"]]
        if score is None:
            diverge(cell, 7)
        else:
            cut = {"a": 3, "b": 1}[cell.form] + cell.seed
            finish(cell, 50 - score + cell.seed / 10, [1.0, score], [text[:-cut] for text in REFERENCES], REFERENCES)


SCORES = {("a", 0.001): 20.0, ("a", 0.002): 30.0, ("a", 0.004): 10.0}
SCORES |= {("b", 0.001): 20.0, ("b", 0.002): 30.0, ("b", 0.004): 35.0, ("b", 0.008): 36.0}
SCORES |= {("c", rate): None for rate in (0.001, 0.002, 0.004)}


def test_the_stages_one_after_the_other(beginning, tmp_path):
    study = advance(beginning)
    assert len(study.cells) == 9 and study.is_growing
    write_report(gather_results(study), "x")
    report = (tmp_path / "output/report.md").read_text()
    assert "Stage 1 is not complete: 9 of its cells are missing." in report and "| b      |       a |" in report

    finish_stage(study, SCORES)
    study = advance(beginning)
    assert [str(cell) for cell in study.cells[9:]] == ["b, learning_rate 0.008, seed 1"] and study.is_growing
    assert "b was best at the edge of the grid, so that learning_rate 0.008 is tried, too." in format_tables(
        gather_results(study)
    )

    finish_stage(study, SCORES)
    study = advance(beginning)
    assert not study.is_growing and study.chosen == {
        "a": (("learning_rate", 0.002),),
        "b": (("learning_rate", 0.008),),
        "c": None,
    }
    assert [cell.number for cell in study.cells] == list(range(1, 15))  # what has tuned with seed 1 is there
    assert [cell.folder.name for cell in study.cells[10:]] == [
        "a-learning_rate-0.002-seed-2",
        "a-learning_rate-0.002-seed-3",
        "b-learning_rate-0.008-seed-2",
        "b-learning_rate-0.008-seed-3",
    ]
    assert "It is not complete: 4 cells are missing" in format_tables(gather_results(study))

    finish_stage(study, SCORES)
    results = gather_results(advance(beginning))
    a, b, c = results.best
    assert (a.tuned.validation_mean, a.group.test_scores) == (30.0, [20.1, 20.2, 20.3])
    assert (b.tuned.validation_mean, b.group.test_scores, b.settings_trained, b.settings_tried) == (
        36.0,
        pytest.approx([14.1, 14.2, 14.3]),
        4,
        4,
    )
    assert (c.tuned, c.group, c.settings_trained, c.settings_tried) == (None, None, 0, 3)
    known, missing = results.contrasts
    assert known.difference.score == b.difference.score == pytest.approx(-6.0)
    assert known.p_holm == pytest.approx(2 * known.difference.p_both)  # of two contrasts, one of them never computed
    assert (missing.difference, missing.p_holm, missing.answer) == (None, None, None)

    write_report(results, "x")
    text = (tmp_path / "output/report.md").read_text()
    assert "learning_rate 0.008 is tried, too, and is the best: a better one may lie further." in text
    assert "| c      |      0 of 3 | none: nothing finished |" in text
    rows = list(csv.DictReader((tmp_path / "output/summary.csv").open()))
    chosen = [(row["form"], row["learning_rate"], row["validation_mean"]) for row in rows if row["chosen"] == "True"]
    assert chosen == [("a", "0.002", "30.0"), ("b", "0.008", "36.0")] * 2  # as it was tuned, and with all seeds
    rows = list(csv.DictReader((tmp_path / "output/contrasts.csv").open()))
    assert [(row["form"], row["minus"], row["margin"]) for row in rows] == [("b", "a", "0.5"), ("c", "a", "0.5")]
    assert all((tmp_path / "output" / name).stat().st_size > 5_000 for name in ("scores.png", "curves.png", "grid.png"))


@pytest.mark.parametrize(
    "key, values", [("dropout", [0.2, 0.6]), ("label_smoothing_factor", [0.1, 0.4]), ("d_model", [32, 8])]
)
def test_a_step_beyond_the_edge_that_no_recipe_can_have(make_study, key, values):
    """A dropout of 1.8, a smoothing of 1.6, and a width of 2 for four heads."""
    beginning = make_study(forms={"a": {}}, tune={"grid": {key: values}, "seeds": [1]}, seeds=[1, 2])
    for cell, score in zip(beginning.cells, (20.0, 30.0), strict=True):
        finish(cell, score, [score])
    study = advance(beginning)
    assert [str(cell) for cell in study.cells[2:]] == [f"a, {key} {values[1]}, seed 2"] and study.beyond == []
    assert f"a was best at the edge of the grid, beyond which {key} " in format_tables(gather_results(study))


def test_a_step_beyond_the_edge_without_the_module_of_a_residual_kind(make_study):
    tune = {"grid": {"dropout": [0.1, 0.2]}, "seeds": [1]}
    beginning = make_study(forms={"a": {"skip_type": "own_kind"}}, tune=tune)
    for cell, score in zip(beginning.cells, (20.0, 30.0), strict=True):
        finish(cell, score, [score])
    assert [str(cell) for cell in advance(beginning).cells[2:]] == ["a, dropout 0.4, seed 1"]


def test_a_tuning_seed_that_diverged_counts_as_0_in_table_and_picture(make_study):
    study = make_study(forms={"a": {}}, tune={"grid": {"learning_rate": [0.1, 0.2]}, "seeds": [1, 2]})
    for cell, score in zip(study.cells, (20.0, None, 30.0, 32.0), strict=True):
        diverge(cell, 7) if score is None else finish(cell, score, [score])
    results = gather_results(study)
    assert "| a      | 10.00, 1 diverged* | 31.00 |" in format_tables(results)
    (axes,) = _draw_lines(results, "BLEU", "learning_rate").axes
    assert axes.containers[0][0].get_ydata() == pytest.approx([10.0, 31.0])
    assert "mean over seeds, 0 for those that diverged" in axes.get_title().replace("\n", " ")


def test_cells_of_later_stages_by_number(beginning, capsys):
    assert main(["study", str(beginning.path), "--cell", "10"]) == 2
    assert capsys.readouterr().err == (
        "hf-rskip: error: --cell 10: the study has 9 cells so far: those that follow from them are known when they are "
        "done.\n"
    )
    finish_stage(beginning, SCORES)
    assert main(["study", str(beginning.path), "--list"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 10 and "b, learning_rate 0.008, seed 1\t" in said.out
    assert said.err == "Further cells are known when these are done.\n"


GRID = {"learning_rate": [0.001, 0.002]}


@pytest.mark.parametrize("keys", [{"tune": {"grid": GRID, "seeds": [1]}}, {"grid": GRID}, {"trains_at": 5}], ids=str)
def test_a_cell_without_the_validation_score_that_judges(make_study, keys):
    study = make_study(forms={"a": {}}, seeds=[1], **keys)
    for cell in study.cells:
        finish(cell, 20.0, [20.0])
    result = study.cells[0].folder / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"validation": []}))
    with pytest.raises(UserError, match=f"^a, .* no validation score of the .* by which {next(iter(keys))} could"):
        gather_results(advance(study))


@pytest.mark.parametrize(
    "values, best, further",
    [
        ([1e-3, 2e-3, 8e-3], 8e-3, [0.032]),
        ([1e-3, 2e-3, 8e-3], 1e-3, [5e-4]),
        ([8e-3, 1e-3, 2e-3], 2e-3, []),
        ([100, 400], 400, [1600]),
        ([1, 2], 1, []),  # no half layers
        ([0.0, 0.1, 0.2], 0.0, []),
        ([0.0, 0.1, 0.2], 0.2, [0.4]),
        (["layer_norm", "rms_norm"], "rms_norm", []),
        ([3e-3], 3e-3, []),
    ],
)
def test_one_step_beyond_the_edge(values, best, further):
    settings = [(("key", value), ("other", True)) for value in values]
    points = _step_beyond((("key", best), ("other", True)), settings)
    assert points == [(("key", value), ("other", True)) for value in further]


def test_numbers_are_sorted_and_words_are_not():
    settings = [(("n", n), ("word", word)) for n in (1, 2) for word in ("z", "a")]
    assert _sort([*settings, (("n", 0.5), ("word", "z"))]) == [(("n", 0.5), ("word", "z")), *settings]


@pytest.mark.parametrize(
    "interval_90, p_holm, answer",
    [
        ((-0.2, 0.4), 0.6, "equivalent"),
        ((0.1, 0.4), 0.01, "equivalent"),  # a difference too small to count
        ((0.1, 0.6), 0.01, "different"),
        ((0.1, 0.6), 0.06, "undecided"),
        ((-0.7, 0.1), 0.4, "undecided"),
    ],
)
def test_answers(interval_90, p_holm, answer):
    difference = FormDifference(0.0, (0, 0), 1.0, None, None, interval_90, p_holm)
    assert _answer(difference, p_holm, 0.5, train=True) == answer
    assert _answer(difference, p_holm, None, train=True) is _answer(None, None, 0.5, train=True) is None
    assert _answer(difference, p_holm, 0.5, train=False) == answer.replace(
        "equivalent", "different" if p_holm < 0.05 else "undecided"
    )


@pytest.mark.slow
def test_a_study_runs_through_its_stages(write_recipe, tmp_path, capsys):
    recipe = write_recipe(max_steps=2, eval_strategy="steps", eval_steps=2, save_steps=2, early_stopping_patience=None)
    values = {"recipe": str(recipe), "output_dir": str(tmp_path / "output"), "forms": {"a": {}}, "seeds": [1, 2]}
    values["tune"] = {"grid": {"learning_rate": [1e-3, 1e-2]}, "seeds": [1]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["study", str(path), "--metric_for_best_model", "loss"]) == 0
    said = capsys.readouterr().out
    assert "2 cells: 0 done before, 2 to run" in said and "3 cells: 2 done before, 1 to run" in said
    assert "4 cells: 3 done before, 1 to run" in said and "4 of 4 cells: 4 finished." in said
    study = advance(read_study(path, ["--metric_for_best_model", "loss"]))
    assert not study.is_growing and [cell.seed for cell in study.cells] == [1, 1, 1, 2]


@pytest.mark.parametrize("name", ["translation-converged", "multi30k-recursions"])
def test_the_report_of_a_study_is_made_of_its_evidence(name, tmp_path, monkeypatch):
    """From a clone: `hf-rskip study .../study.yaml --dataset_name FOLDER --report`, then copy what it has written."""
    folder = Path(__file__).parents[2] / "recipes/studies" / name
    monkeypatch.chdir(tmp_path)
    study = advance(read_study(folder / "study.yaml", ["--dataset_name", "FOLDER"]))
    write_report(gather_results(study), f"hf-rskip study recipes/studies/{name}/study.yaml --dataset_name FOLDER")
    for file in ("report.md", "results.csv", "summary.csv", "contrasts.csv"):
        assert (study.output_dir / file).read_text() == (folder / file).read_text()
