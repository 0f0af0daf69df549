import csv
import itertools
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
import yaml
from made_up_cells import diverge, finish
from transformers import TrainerState

from hf_rskip import RSkipConfig
from hf_rskip.errors import UserError
from hf_rskip.recipe.parsing import parse_values
from hf_rskip.studies.cell import _describe_run, record
from hf_rskip.studies.differences import N_SAMPLES, Bootstrap
from hf_rskip.studies.grid_figure import _draw_lines, _draw_maps
from hf_rskip.studies.report import _explain, format_tables, write_report
from hf_rskip.studies.results import gather_results
from hf_rskip.studies.running import describe_state
from hf_rskip.studies.study import read_study, varying_keys
from hf_rskip.training.resuming import begin_record, write_record


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_bootstrap_is_that_of_sacrebleu_on_resampled_sentences(make_study, pairs, metric):
    rng = random.Random(0)
    references = [pair["de"] for pair in pairs["test"]]
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, seeds=[1, 2], metric=metric)
    score = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric]
    systems = []
    for cell in study.cells:
        words = [
            [word for word in text.split() if rng.random() < 0.8 + 0.1 * (cell.form == "b")] for text in references
        ]
        systems.append([" ".join(part) for part in words])
        finish(cell, score(systems[-1], [references]).score, [1.0], systems[-1], references)
        result = cell.folder / "result.json"
        result.write_text(result.read_text().replace('"bleu":', f'"{metric}":'))
    difference = gather_results(study).best[1].difference

    rows = np.random.default_rng(12345).choice(len(references), size=(N_SAMPLES, len(references)), replace=True)[:40]
    samples = []
    for row in rows:
        resampled = [[references[index] for index in row]]
        scores = [score([system[index] for index in row], resampled).score for system in systems]
        samples.append((scores[2] + scores[3]) / 2 - (scores[0] + scores[1]) / 2)
    full = [score(system, [references]).score for system in systems]
    assert difference.score == pytest.approx((full[2] + full[3] - full[0] - full[1]) / 2)

    bootstrap = Bootstrap(study)
    ours = [bootstrap._resample(cell)[:40] for cell in study.cells]
    assert (ours[2] + ours[3] - ours[0] - ours[1]) / 2 == pytest.approx(np.array(samples))

    everything = [bootstrap._resample(cell) for cell in study.cells]
    samples = (everything[2] + everything[3] - everything[0] - everything[1]) / 2
    assert difference.interval_sentences == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    tail = min(np.count_nonzero(samples <= 0), np.count_nonzero(samples >= 0))
    assert difference.p_sentences == pytest.approx(min(1, 2 * (tail + 1) / (N_SAMPLES + 1)))


@pytest.mark.parametrize("by", ["chrf", "loss"])
def test_equal_settings_are_told_apart(make_study, by):
    """As where BLEU is 0 for all of them; a cell that diverged is worse than any other."""
    study = make_study(forms={"a": {}}, grid={"learning_rate": [0.1, 0.2, 0.3]}, seeds=[1, 2])
    scores = {0.1: {"chrf": 30.0, "loss": 3.0}, 0.2: {"chrf": 30.0, "loss": 2.0}, 0.3: {"chrf": 30.0, "loss": 1.0}}
    if by == "chrf":
        scores[0.2] = {"chrf": 40.0, "loss": 9.0}
    for cell in study.cells:
        rate = dict(cell.setting)["learning_rate"]
        if (rate, cell.seed) == (0.3, 2):
            diverge(cell, 9)
            continue
        finish(cell, 0.0, [0.0])
        result = cell.folder / "result.json"
        record = json.loads(result.read_text())
        record["validation"][0] |= scores[rate]
        result.write_text(json.dumps(record))
    (best,) = gather_results(study).best
    assert dict(best.group.setting) == {"learning_rate": 0.2}


@pytest.mark.parametrize("metric, ties", [("bleu", "chrF, then by loss"), ("chrf", "loss"), ("accuracy", "loss")])
def test_the_report_says_what_breaks_ties(make_study, metric, ties):
    results = gather_results(make_study(forms={"a": {}}, grid={"learning_rate": [0.1, 0.2]}))
    text = _explain(replace(results, study=replace(results.study, metric=metric)))
    assert f"chosen by validation (equal ones by {ties}), never by test scores" in text


def test_equal_systems_do_not_differ(make_study):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}})
    for cell in study.cells:
        finish(cell, 100.0, [50.0])
    difference = gather_results(study).best[1].difference
    assert (difference.score, difference.interval_sentences, difference.p_sentences) == (0, (0, 0), 1)
    assert difference.p_seeds is None  # no variance


def test_systems_of_other_test_sets_are_refused(make_study):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, seeds=[1])
    finish(study.cells[0], 1.0, [1.0])
    finish(study.cells[1], 1.0, [1.0], references=["x y z w"])
    with pytest.raises(UserError, match="was tested on other data"):
        gather_results(study)


def test_the_best_setting_is_chosen_by_validation(make_study):
    rates = [0.1, 0.2, 0.4]
    study = make_study(
        forms={"a": {}, "b": {"dropout": 0.2}},
        grid={"learning_rate": rates},
        seeds=[1, 2],
        trains_at=5,
        contrasts=[["a", "b"]],
    )
    validation = {("a", 0.1): 20.0, ("a", 0.2): 30.0, ("a", 0.4): 4.0, ("b", 0.1): 25.0, ("b", 0.2): 6.0}
    for cell in study.cells:
        rate = dict(cell.setting)["learning_rate"]
        if (cell.form, rate) == ("b", 0.4):
            if cell.seed == 1:
                diverge(cell, 7)
            else:
                finish(cell, 80.0, [45.0])  # half of it diverged: 22.5 on average
        else:
            best = validation[cell.form, rate]
            finish(cell, 50.0 - best, [best / 2, best, best - 1])  # the test score says the contrary
    results = gather_results(study)
    a, b = results.best
    assert (dict(a.group.setting), a.group.validation_mean, a.settings_trained, a.settings_tried) == (
        {"learning_rate": 0.2},
        30.0,
        2,
        3,
    )
    assert (dict(b.group.setting), b.group.validation_mean, b.settings_trained, b.settings_tried) == (
        {"learning_rate": 0.1},
        25.0,
        2,
        3,
    )
    assert a.difference is None and b.difference.score == pytest.approx(25.0 - 20.0)
    (contrast,) = results.contrasts
    assert (contrast.form, contrast.rival) == ("a", "b") and contrast.difference.score == pytest.approx(20.0 - 25.0)
    text = format_tables(results)
    assert text.startswith("12 of 12 cells: 11 finished, 1 diverged.")
    assert "| b      | 25.00 ± 0.00 | 44.00 ± 0.00 | 80.00, 1 diverged* |" in text
    assert "| b      |      2 of 3 | learning_rate 0.1 |             25.00 |" in text
    assert re.search(r"^\| b +\| +2/2 \| +2/2 \| +25.00 \| +0.00 \| +\+5.00 \|", text, re.MULTILINE)
    assert re.search(r"^\| a +\| +b \| +-5.00 \|", text, re.MULTILINE)


@pytest.mark.parametrize("trains_at, answer", [(None, "equivalent"), (0.5, "undecided")])
def test_forms_that_do_not_train_are_not_equivalent(make_study, trains_at, answer):
    forms = {"a": {}, "b": {"dropout": 0.2}}
    study = make_study(forms=forms, contrasts=[["a", "b"]], margin=0.5, trains_at=trains_at)
    for cell in study.cells:
        score = 0.1 + 0.01 * cell.seed
        finish(cell, score, [score], ["x", "a b c d"], ["a b c d", "a b c d"])
    results = gather_results(study)
    assert results.contrasts[0].answer == answer


def test_cells_that_train_are_counted_without_a_grid(make_study):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, trains_at=12)
    for cell, best in zip(study.cells, [11.9, 12.0, 13.0, 20.0, 20.0, None], strict=True):
        diverge(cell, 4) if best is None else finish(cell, best, [best])
    rows = [line.split("|") for line in format_tables(gather_results(study)).splitlines() if "|" in line]
    assert [row[3].strip() for row in rows if ":" not in row[3]] == ["trains", "2/3", "2/3"]


def depth_study(make_study):
    """Six forms over a grid of one key; the last diverges at its end, the first stays below `trains_at`."""
    forms = {f"form {number}": {"dropout": number / 10} for number in range(6)}
    study = make_study(forms=forms, grid={"encoder_layers": [1, 2, 3]}, seeds=[1, 2], trains_at=12)
    for cell in study.cells:
        layers, number = dict(cell.setting)["encoder_layers"], list(study.forms).index(cell.form)
        if (number, layers, cell.seed) == (5, 3, 2):
            diverge(cell, 9)
        else:
            finish(cell, score := 10.0 + 10 * number + layers + cell.seed / 10 - (number == 0) * 5, [score])
    return gather_results(study)


def test_a_grid_of_one_key_is_a_table_and_lines(make_study, tmp_path):
    results = depth_study(make_study)
    text = format_tables(results)
    assert "Test BLEU by encoder_layers, mean and standard deviation (*: does not train):" in text
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| form")]
    assert rows[0] == ["form", "1", "2", "3"]
    assert rows[1] == ["form 0", "6.15 ± 0.07*", "7.15 ± 0.07*", "8.15 ± 0.07*"]
    assert rows[2] == ["form 1", "21.15 ± 0.07", "22.15 ± 0.07", "23.15 ± 0.07"]
    assert rows[6] == ["form 5", "61.15 ± 0.07", "62.15 ± 0.07", "63.10, 1 diverged*"]
    (axes,) = _draw_lines(results, "BLEU", "encoder_layers").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("encoder_layers (layers)", "test BLEU")
    for form, container in zip(results.study.forms, axes.containers, strict=True):
        means = [group.test_mean for group in results.groups if group.form == form]
        assert container[0].get_ydata() == pytest.approx(means)
    assert [text.get_text() for text in axes.texts] == ["\u00d7"]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [3, 0, 0, 0, 0, 1]


def test_maps_mark_the_best_and_what_does_not_train(make_study, tmp_path):
    grid = {"learning_rate": [1e-3, 1e-2], "warmup_steps": [5, 10], "max_grad_norm": [1.0]}
    forms = {f"form {number}": {"dropout": number / 10} for number in range(5)}  # less than two rows of panels
    study = make_study(forms=forms, grid=grid, seeds=[1], trains_at=12)
    for cell in study.cells:
        point = dict(cell.setting)
        if point["learning_rate"] == 1e-2 and point["warmup_steps"] == 5:
            diverge(cell, 9)
        else:
            finish(cell, score := 11.0 + 1000 * point["learning_rate"] - point["warmup_steps"] / 5, [score])
    results = gather_results(study)
    *panels, bar = _draw_maps(results, "BLEU", ["learning_rate", "warmup_steps"]).axes
    assert [panel.get_title() for panel in panels] == list(forms) and bar.get_ylabel() == "validation BLEU"
    limits = {panel.get_images()[0].get_clim() for panel in panels}
    assert limits == {(10.0, 19.0)}  # one scale
    for panel in panels:
        texts = {text.get_position(): text.get_text() for text in panel.texts}
        assert texts == {(0, 0): "11.0", (1, 0): "10.0", (0, 1): "\u00d7", (1, 1): "19.0"}
        hatched = sorted(patch.get_xy() for patch in panel.patches if patch.get_hatch())
        framed = [patch.get_xy() for patch in panel.patches if not patch.get_hatch()]
        assert hatched == [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5)] and framed == [(0.54, 0.54)]
    assert varying_keys(study.settings) == ["learning_rate", "warmup_steps"]


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_does_not_have(make_study, tmp_path, caplog):
    study = make_study(forms={"残差接続": {}, "잔차 K=2": {"dropout": 0.2}}, seeds=[1])
    for cell in study.cells:
        finish(cell, 20.0, [10.0, 20.0])
    write_report(gather_results(study), "hf-rskip study study.yaml")
    assert (tmp_path / "output/scores.png").stat().st_size > 5_000
    assert "残差接続" in (tmp_path / "output/report.md").read_text() and not caplog.records


def test_accuracy_is_in_percent_everywhere(write_image_recipe, tmp_path):
    path = tmp_path / "study.yaml"
    keys = {
        "recipe": str(write_image_recipe()),
        "output_dir": str(tmp_path / "output"),
        "seeds": [1],
        "forms": {"a": {}},
    }
    path.write_text(yaml.safe_dump(keys))
    study = read_study(path, [])
    (cell,) = study.cells
    finish(cell, 0.0, [0.0], [1, 1, 0, 1], [1, 1, 1, 1])
    result = cell.folder / "result.json"
    result.write_text(result.read_text().replace('"bleu": 0.0', '"accuracy": 0.75'))
    assert describe_state(cell) == "finished, accuracy 75%, 12 s"
    results = gather_results(study)
    write_report(results, "x")
    assert "test accuracy (%)" in format_tables(results) and "75.00" in format_tables(results)
    (row,) = csv.DictReader((tmp_path / "output/results.csv").open())
    assert (row["test_accuracy_percent"], row["validation_accuracy_percent"]) == ("75.0", "75.0")
    (row,) = csv.DictReader((tmp_path / "output/summary.csv").open())
    assert (row["metric"], row["test_mean"]) == ("accuracy (%)", "75.0")


def test_a_report_of_what_is_there(make_study, tmp_path):
    """Twelve forms on a grid of four settings, partly run."""
    rng = random.Random(1)
    forms = {f"form {number} | with a name": {"dropout": number / 100} for number in range(12)}
    grid = {"learning_rate": [1e-3, 4e-3], "warmup_steps": [100, 400]}
    study = make_study(forms=forms, grid=grid, seeds=[1, 2])
    for cell in itertools.islice(study.cells, 91):
        rate = dict(cell.setting)["learning_rate"]
        if rate == 4e-3 and rng.random() < 0.4:
            diverge(cell, rng.randrange(1000))
        else:
            best = rng.gauss(30, 1) + 1000 * rate
            finish(cell, best + rng.gauss(0, 0.3), [best * (1 - 0.8**step) for step in range(1, 12)])
    write_report(gather_results(study), "hf-rskip study study.yaml")
    output = tmp_path / "output"
    report = (output / "report.md").read_text()
    assert report.startswith(f"# {study.path.parent.name}\n\n91 of 96 cells: ") and "5 not run" in report
    assert "```bash\nhf-rskip study study.yaml\n```" in report and "`made up`" in report
    for name in ("scores.png", "curves.png", "grid.png"):
        assert f"]({name})" in report and (output / name).stat().st_size > 20_000
    assert len(list(csv.DictReader((output / "results.csv").open()))) == 96
    rows = list(csv.DictReader((output / "summary.csv").open()))
    assert len(rows) == 48 and rows[0]["learning_rate"] == "0.001" and rows[0]["p_seeds"] == ""
    compared = [row["chosen"] for row in rows if row["difference"]]
    assert compared == ["True"] * 11  # each form at its best setting, but the baseline


def test_a_grid_of_values_that_are_no_numbers(make_study, tmp_path):
    """Mappings, words and nulls; cells of equal values are told apart by what they are."""
    decays = [{"timescale": 100}, {"timescale": 1000}]
    grid = {"lr_scheduler_kwargs": decays, "lowercase": [True, False], "early_stopping_patience": [None, 1]}
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, grid=grid, seeds=[1])
    for cell in study.cells:
        finish(cell, 20.0 + cell.number, [float(cell.number)])
    results = gather_results(study)
    assert [len(group.results) for group in results.groups] == [1] * 16
    assert dict(results.best[1].group.setting) == {name: values[-1] for name, values in grid.items()}
    write_report(results, "hf-rskip study study.yaml")
    assert (tmp_path / "output/grid.png").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_grid_on_which_everything_diverged(make_study, tmp_path):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, grid={"learning_rate": [1, 2]}, seeds=[1])
    for cell in study.cells:
        diverge(cell, 3)
    stale = [tmp_path / "output" / name for name in ("scores.png", "contrasts.csv")]  # of an earlier report
    for path in stale:
        path.touch()
    write_report(gather_results(study), "hf-rskip study study.yaml")
    assert "4 of 4 cells: 4 diverged." in (tmp_path / "output/report.md").read_text()
    assert (tmp_path / "output/grid.png").exists() and not any(path.exists() for path in stale)


@pytest.mark.parametrize("text", ["", '{"state": "fini', "[]", '{"state": "odd"}', '{"state": []}'])
def test_a_result_that_is_none(make_study, text):
    study = make_study(forms={"a": {}}, seeds=[1])
    finish(study.cells[0], 20.0, [1.0])
    (study.cells[0].folder / "result.json").write_text(text)
    with pytest.raises(UserError, match="a-seed-1/result.json' is not the result of a cell .*: remove it"):
        gather_results(study)


@pytest.mark.parametrize("name", ["test", "kept_step", "versions"])
@pytest.mark.parametrize(
    "change", [lambda result, name: result.pop(name), lambda result, name: result.update({name: "x"})]
)
def test_a_result_that_lacks_something(make_study, name, change):
    study = make_study(forms={"a": {}}, seeds=[1])
    finish(study.cells[0], 20.0, [1.0])
    path = study.cells[0].folder / "result.json"
    result = json.loads(path.read_text())
    change(result, name)
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=f"result.json' is not the result of a cell .it has no proper {name}.:"):
        gather_results(study)


def test_a_result_without_the_metric(make_study):
    study = make_study(forms={"a": {}}, seeds=[1], metric="chrf")
    finish(study.cells[0], 20.0, [1.0])
    with pytest.raises(UserError, match="result.json' has no proper scores of chrf: remove it"):
        gather_results(study)


@pytest.mark.parametrize("text", ["", '{"predictions": ["a"', '{"predictions": ["a"]}', "[1]", None])
def test_predictions_that_are_torn(make_study, text):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, seeds=[1])
    for cell in study.cells:
        finish(cell, 20.0, [1.0])
    path = study.cells[1].folder / "test_predictions.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="b-seed-1/test_predictions.json' does not hold the predictions of a cell"):
        gather_results(study)


def test_nothing_run_yet(make_study, tmp_path):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}})
    write_report(gather_results(study), "hf-rskip study study.yaml")
    assert "0 of 6 cells: 6 not run." in (tmp_path / "output/report.md").read_text()
    assert not list((tmp_path / "output").glob("*.png"))


def test_a_cell_of_an_average_has_its_scores(make_study):
    """The mean of checkpoints is evaluated after the last step, whichever was the best."""
    study = make_study(forms={"a": {"average_checkpoints": 2}}, seeds=[1])
    (cell,) = study.cells
    recipe = parse_values(cell.keys, [], "cell")
    RSkipConfig(architectures=["RSkipForConditionalGeneration"]).save_pretrained(cell.run_folder)
    scores = [{"step": step, "eval_loss": 2.0, "eval_bleu": bleu} for step, bleu in ((4, 30.0), (8, 20.0), (8, 25.0))]
    state = TrainerState(global_step=8, log_history=scores, best_model_checkpoint=str(cell.run_folder / "checkpoint-4"))
    state.save_to_json(str(cell.run_folder / "trainer_state.json"))
    write_record(cell.run_folder, {**begin_record(recipe, None), "data": {"train": 5}}, 8)
    outcome = _describe_run(recipe, {"train_runtime": 1.0, "test_bleu": 26.0})
    assert outcome["data"] == {"train": 5}
    record(cell, None, {"state": "finished", "resumed": False, "device": "CPU", "versions": {}, **outcome})
    (result,) = gather_results(study).cells
    assert (result.validation, result.curve) == (25.0, [(4, 30.0), (8, 25.0)])
