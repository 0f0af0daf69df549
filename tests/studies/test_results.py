import csv
import itertools
import random

import numpy as np
import pytest
import sacrebleu
import yaml

from hf_rskip.errors import UserError
from hf_rskip.evaluation.predictions import write_predictions
from hf_rskip.studies.cell import write_result
from hf_rskip.studies.report import format_tables, write_report
from hf_rskip.studies.results import N_SAMPLES, gather_results, welch_test
from hf_rskip.studies.study import read_study


@pytest.fixture
def make_study(write_recipe, tmp_path):
    def make(**keys):
        path = tmp_path / "study.yaml"
        values = {"recipe": str(write_recipe()), "output_dir": str(tmp_path / "output"), "seeds": [1, 2, 3], **keys}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return read_study(path, [])

    return make


def finish(cell, bleu: float, curve: list[float], predictions=("a b c d",), references=("a b c d",)) -> None:
    """Leaves what a training leaves; the model that was kept is that of the best evaluation."""
    cell.folder.mkdir(parents=True)
    write_predictions(cell.folder, list(predictions), list(references))
    write_result(
        cell,
        state="finished",
        test={"bleu": bleu, "bleu_signature": "made up"},
        validation=[{"step": 100 * step, "bleu": value} for step, value in enumerate(curve, 1)],
        kept_step=100 * (1 + curve.index(max(curve))),
        steps=100 * len(curve),
        parameters=1_000_000,
        seconds=12.0,
        resumed=False,
        device="CPU",
        versions={"torch": "2"},
        commit=None,
        date="2026-01-01T00:00:00+00:00",
        command=f"hf-rskip train {cell.recipe_path}",
    )


def diverge(cell, step: int) -> None:
    cell.folder.mkdir(parents=True)
    about = {"device": "CPU", "versions": {"torch": "2"}, "commit": None, "date": "2026-01-01T00:00:00+00:00"}
    write_result(cell, state="diverged", step=step, message=f"Step {step}: the loss is nan", command="x", **about)


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
    difference = next(group for group in gather_results(study).groups if group.form == "b").difference

    rows = np.random.default_rng(12345).choice(len(references), size=(N_SAMPLES, len(references)), replace=True)[:40]
    samples = []
    for row in rows:
        resampled = [[references[index] for index in row]]
        scores = [score([system[index] for index in row], resampled).score for system in systems]
        samples.append((scores[2] + scores[3]) / 2 - (scores[0] + scores[1]) / 2)
    full = [score(system, [references]).score for system in systems]
    assert difference.score == pytest.approx((full[2] + full[3] - full[0] - full[1]) / 2)

    from hf_rskip.studies.results import _Bootstrap, _read

    bootstrap = _Bootstrap(study)
    cells = [_read(cell, metric) for cell in study.cells]
    ours = [bootstrap._resample(result)[:40] for result in cells]
    assert (ours[2] + ours[3] - ours[0] - ours[1]) / 2 == pytest.approx(np.array(samples))

    everything = [bootstrap._resample(result) for result in cells]
    samples = (everything[2] + everything[3] - everything[0] - everything[1]) / 2
    assert difference.interval == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    beyond = np.count_nonzero(abs(samples - samples.mean()) > abs(difference.score))
    assert difference.p_bootstrap == pytest.approx((beyond + 1) / (N_SAMPLES + 1))


def test_equal_systems_do_not_differ(make_study):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}})
    for cell in study.cells:
        finish(cell, 100.0, [50.0])
    difference = gather_results(study).groups[1].difference
    assert (difference.score, difference.interval, difference.p_bootstrap) == (0, (0, 0), 1)
    assert difference.p_seeds is None  # no variance


def test_systems_of_other_test_sets_are_refused(make_study):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, seeds=[1])
    finish(study.cells[0], 1.0, [1.0])
    finish(study.cells[1], 1.0, [1.0], references=["x y z w"])
    with pytest.raises(UserError, match="was tested on other data"):
        gather_results(study)


@pytest.mark.parametrize(
    "first, second", [([1.0, 2.0, 4.0], [3.0, 5.5, 5.0]), ([30.1, 30.4], [29.0, 29.3, 28.1, 29.9])]
)
def test_welch_by_integrating_the_density(first, second):
    errors = [np.var(sample, ddof=1) / len(sample) for sample in (first, second)]
    t = (np.mean(first) - np.mean(second)) / np.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (first, second), strict=True))
    # The density of t, up to its factor, over all of the axis by the substitution x = tan(u), and within -|t| to |t|.
    angles = np.linspace(-np.pi / 2, np.pi / 2, 2_000_001)[1:-1]
    x = np.tan(angles)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2) * (1 + x**2)
    outside = density[abs(x) > abs(t)].sum() / density.sum()
    assert welch_test(first, second) == pytest.approx(outside, abs=1e-5)


def test_one_seed_has_no_test():
    assert welch_test([1.0], [2.0, 3.0]) is None


def test_the_best_setting_is_chosen_by_validation(make_study):
    rates = [0.1, 0.2, 0.4]
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}}, grid={"learning_rate": rates}, seeds=[1, 2], trains_at=5)
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
    assert (dict(a.group.setting), a.group.validation_mean, a.trained, a.tried) == ({"learning_rate": 0.2}, 30.0, 2, 3)
    assert (dict(b.group.setting), b.group.validation_mean, b.trained, b.tried) == ({"learning_rate": 0.1}, 25.0, 2, 3)
    assert a.group.difference is None and b.group.difference.score == pytest.approx(25.0 - 20.0)
    same_setting = [group for group in results.groups if group.form == "b"][0]
    assert same_setting.difference.score == pytest.approx(25.0 - 30.0)
    text = format_tables(results)
    assert text.startswith("12 of 12 cells: 11 finished, 1 diverged.")
    assert "1/2, 1 diverged at step 7" in text and "2 of 3" in text


def test_a_report_of_what_is_there(make_study, tmp_path):
    """Twenty forms on a grid of four settings, partly run."""
    rng = random.Random(1)
    forms = {f"form {number} | with a name": {"dropout": number / 100} for number in range(20)}
    grid = {"learning_rate": [1e-3, 4e-3], "warmup_steps": [100, 400]}
    study = make_study(forms=forms, grid=grid, seeds=[1, 2])
    for cell in itertools.islice(study.cells, 155):
        rate = dict(cell.setting)["learning_rate"]
        if rate == 4e-3 and rng.random() < 0.4:
            diverge(cell, rng.randrange(1000))
        else:
            best = rng.gauss(30, 1) + 1000 * rate
            finish(cell, best + rng.gauss(0, 0.3), [best * (1 - 0.8**step) for step in range(1, 12)])
    write_report(gather_results(study), "hf-rskip study study.yaml")
    output = tmp_path / "output"
    report = (output / "report.md").read_text()
    assert report.startswith(f"# {study.path.parent.name}\n\n155 of 160 cells: ") and "5 not run" in report
    assert "```bash\nhf-rskip study study.yaml\n```" in report and "`made up`" in report
    for name in ("scores.png", "curves.png", "grid.png"):
        assert f"]({name})" in report and (output / name).stat().st_size > 20_000
    assert len(list(csv.DictReader((output / "results.csv").open()))) == 160
    rows = list(csv.DictReader((output / "summary.csv").open()))
    assert len(rows) == 80 and rows[0]["learning_rate"] == "0.001" and rows[0]["p_seeds"] == ""


def test_a_grid_of_values_that_are_no_numbers(make_study, tmp_path):
    """Mappings, words and nulls; cells of equal values are told apart by what they are."""
    decays = [{"min_lr": 1e-4}, {"min_lr": 1e-3}]
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
    write_report(gather_results(study), "hf-rskip study study.yaml")
    assert "4 of 4 cells: 4 diverged." in (tmp_path / "output/report.md").read_text()
    assert (tmp_path / "output/grid.png").exists() and not (tmp_path / "output/scores.png").exists()


@pytest.mark.parametrize("text", ["", '{"state": "fini', "[]", '{"state": "odd"}'])
def test_a_result_that_is_none(make_study, text):
    study = make_study(forms={"a": {}}, seeds=[1])
    finish(study.cells[0], 20.0, [1.0])
    (study.cells[0].folder / "result.json").write_text(text)
    with pytest.raises(UserError, match="a-seed-1/result.json' is not the result of a cell: remove it"):
        gather_results(study)


def test_nothing_run_yet(make_study, tmp_path):
    study = make_study(forms={"a": {}, "b": {"dropout": 0.2}})
    write_report(gather_results(study), "hf-rskip study study.yaml")
    assert "0 of 6 cells: 6 not run." in (tmp_path / "output/report.md").read_text()
    assert not list((tmp_path / "output").glob("*.png"))
