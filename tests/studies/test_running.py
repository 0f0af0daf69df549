import csv
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock
from made_up_cells import finish

from hf_rskip.cli.main import main
from hf_rskip.studies.cell import read_result, write_result
from hf_rskip.studies.study import read_study
from hf_rskip.studies.study import write_recipe as write_cell_recipe

OWN_KIND = '''
import torch
from hf_rskip import SKIP_CONNECTIONS, SkipConnection, make_norm


class Halved(SkipConnection):
    """LN(x + F(x) / 2)."""

    def __init__(self, size, norm="layer_norm", eps=1e-5):
        super().__init__()
        self.norm = make_norm(norm, size, eps)

    def forward(self, x, branch, mask=None):
        return self.norm(x + branch / 2, mask)


SKIP_CONNECTIONS["halved"] = Halved
'''


def write_study(folder: Path, recipe: Path, **keys) -> Path:
    path = folder / "study.yaml"
    values = {"recipe": str(recipe), "output_dir": str(folder / "output"), "seeds": [1, 2], **keys}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def run_study(capsys):
    """Runs `hf-rskip study` in this process, whose fork server serves all tests; returns exit code and output."""

    def run(*words):
        code, captured = main(["study", *map(str, words)]), capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def read_results(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/result.json")}


@pytest.fixture(scope="module")
def small_study(run_cli, shadow_libraries, write_recipe, tmp_path_factory):
    """Two forms that train, a kind of the user's own, one that diverges and one that cannot start; two seeds."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "own_kind.py").write_text(OWN_KIND)
    forms = {
        "post-LN": {"skip_recursions": 1},
        "rSkip K=2": {"skip_recursions": 2},
        "halved": {"skip_type": "halved"},
        "diverging": {"learning_rate": 1e30, "warmup_steps": 0},
        "broken": {"dataset_name": str(folder)},
    }
    recipe = write_recipe(
        eval_strategy="epoch", save_strategy="epoch", num_train_epochs=2, early_stopping_patience=None
    )
    path = write_study(folder, recipe, forms=forms)
    result = run_cli("study", path, "--import_module", "own_kind", "--jobs", "2", cwd=shadow_libraries(folder))
    return folder, path, result


@pytest.mark.slow
def test_every_cell_leaves_a_result(small_study):
    folder, _, result = small_study
    assert result.code == 1
    # Of two at once, either may fail first.
    assert re.search(r"2 of 10 cells failed: broken, seed [12] \(failed: Dataset", result.err), result.err
    assert "Traceback" not in result.err
    results = read_results(folder / "output")
    assert {name: record["state"] for name, record in results.items()} == {
        f"{form}-seed-{seed}": state
        for form, state in {
            "post-LN": "finished",
            "rSkip-K-2": "finished",
            "halved": "finished",
            "diverging": "diverged",
            "broken": "failed",
        }.items()
        for seed in (1, 2)
    }
    record = results["rSkip-K-2-seed-1"]
    assert record["parameters"] > results["post-LN-seed-1"]["parameters"]  # norms of each step
    assert [entry["step"] for entry in record["validation"]] == [14, 28] and record["kept_step"] in (14, 28)
    assert results["diverging-seed-1"]["step"] == 2
    assert record["data"].keys() == {"train", "validation"} and record["data"] == results["halved-seed-2"]["data"]
    # Nothing large is left.
    assert not list((folder / "output").rglob("*.safetensors"))
    assert (folder / "output/cells/halved-seed-1/test_predictions.json").exists()


@pytest.mark.slow
def test_the_report_has_every_form(small_study):
    folder, path, result = small_study
    output = folder / "output"
    report = (output / "report.md").read_text()
    for text in (result.out, report):
        assert "8 of 10 cells: 6 finished, 2 diverged, 2 failed." in text
        assert "| halved " in text and "0/2, 2 diverged at step 2, 2" in text
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert [(row["form"], row["seed"]) for row in rows[:4]] == [
        ("post-LN", "1"), ("post-LN", "2"), ("rSkip K=2", "1"), ("rSkip K=2", "2")
    ]  # fmt: skip
    results = read_results(output)
    scores = [results[f"rSkip-K-2-seed-{seed}"]["test"]["bleu"] for seed in (1, 2)]
    (row,) = [row for row in csv.DictReader((output / "summary.csv").open()) if row["form"] == "rSkip K=2"]
    assert float(row["test_mean"]) == pytest.approx(sum(scores) / 2)
    assert float(row["test_sd"]) == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert f"hf-rskip study {shlex.quote(str(path))} --import_module=own_kind" in report
    recipe = output / "cells/rSkip-K-2-seed-1/recipe.yaml"
    assert f"hf-rskip train {shlex.quote(str(recipe))} --import_module own_kind\n" in report
    assert all((output / name).stat().st_size > 5_000 for name in ("scores.png", "curves.png"))


@pytest.mark.slow
def test_nothing_is_run_twice(small_study, run_cli, capsys):
    folder, path, _ = small_study
    kept = [path for path in (folder / "output/cells").glob("*/*") if "broken" not in str(path)]
    before = {path: path.stat().st_mtime_ns for path in kept}
    result = run_cli("study", path, "--import_module", "own_kind", cwd=folder)
    assert result.code == 1
    assert result.out.startswith(f"10 cells: 8 done before, 2 to run, 1 at a time; results in {folder}/output\n")
    told = [line for line in result.out.splitlines() if line.startswith("[")]
    assert [line[:32] for line in told] == [
        "[9 of 10] broken, seed 1: starts", "[9 of 10] broken, seed 1: failed",
        "[10 of 10] broken, seed 2: start", "[10 of 10] broken, seed 2: faile",
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert main(["study", str(path), "--dropout", "0.3"]) == 2
    assert "was run with dropout 0.1, not 0.3: remove it, or choose another output_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_study_goes_on(start_cli, warm_python, run_study, write_recipe, tmp_path):
    recipe = write_recipe(num_train_epochs=2, early_stopping_patience=None)
    path = write_study(tmp_path, recipe, forms={"post-LN": {"skip_recursions": 1}})
    cells = tmp_path / "output/cells"
    first, second = cells / "post-LN-seed-1", cells / "post-LN-seed-2"
    process = start_cli("study", path, python=[warm_python])
    wait_for(lambda: list(second.glob("run/checkpoint-8*")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = (first / "result.json").stat().st_mtime_ns
    (first / "run").mkdir(exist_ok=True)  # as a kill at the wrong moment leaves it
    result = run_study(path)
    assert result.code == 0, result.err
    assert (first / "result.json").stat().st_mtime_ns == before
    record = read_results(tmp_path / "output")["post-LN-seed-2"]
    assert record["resumed"] and record["steps"] == 28
    assert "resuming from" in (second / "log.txt").read_text()
    assert (first / "log.txt").read_text().count("model: ") == 1
    assert not (first / "run").exists()
    assert "[2 of 2] post-LN, seed 2: goes on\n" in result.out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process by /proc")
def test_a_killed_fork_server_is_one_sentence(start_cli, warm_python, write_recipe, tmp_path):
    path = write_study(tmp_path, write_recipe(num_train_epochs=500, early_stopping_patience=None), forms={"a": {}})
    tell_id = f"import os, runpy, sys\nopen({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))\ndel sys.argv[0]\n"
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = start_cli("study", path, python=[warm_python, "-c", tell_id + run])
    cell = tmp_path / "output/cells/a-seed-1"
    wait_for(lambda: list(cell.glob("run/checkpoint-*")))
    study = (tmp_path / "id").read_text()
    children = Path(f"/proc/{study}/task/{study}/children").read_text().split()
    (server,) = [pid for pid in children if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(server), signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert err.decode().splitlines()[-1].startswith("hf-rskip: error: The process that starts the cells was killed")
    wait_for(lambda: "stopped by SIGTERM after step" in (cell / "log.txt").read_text())
    assert not read_results(tmp_path / "output")


@pytest.mark.slow
def test_a_folder_with_a_blank_and_a_recipe_that_was_torn(run_study, write_recipe, tmp_path):
    """A version that wrote recipes in place could be killed while it did."""
    path = write_study(tmp_path, write_recipe(num_train_epochs=1), forms={"a": {}}, seeds=[1])
    folder = tmp_path / "out put"
    cell = folder / "cells/a-seed-1"
    cell.mkdir(parents=True)
    (cell / "recipe.yaml").write_text("dataset_name: x\noutp")
    result = run_study(path, "--output_dir", folder)
    assert result.code == 0, result.err
    assert f"hf-rskip train '{cell}/recipe.yaml'\n" in (folder / "report.md").read_text()
    assert not [name for name in os.listdir(cell) if name.startswith(".")]


@pytest.mark.parametrize("action", [(), ("--report",)])
def test_a_folder_that_cannot_be_made(run_study, write_recipe, tmp_path, action):
    path = write_study(tmp_path, write_recipe(), forms={"a": {}}, seeds=[1])
    (tmp_path / "file").touch()
    result = run_study(path, "--output_dir", tmp_path / "file", *action)
    assert result.code == 2 and result.out == ""
    assert result.err == f"hf-rskip: error: '{tmp_path}/file/cells' cannot be a folder: Not a directory.\n"


@pytest.mark.slow
def test_a_terminated_study_stops_its_cells(start_cli, warm_python, write_recipe, tmp_path):
    path = write_study(tmp_path, write_recipe(num_train_epochs=500, early_stopping_patience=None), forms={"a": {}})
    cell = tmp_path / "output/cells/a-seed-1"
    process = start_cli("study", path, python=[warm_python])
    wait_for(lambda: list(cell.glob("run/checkpoint-*")))
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143 and err.decode().startswith("hf-rskip: stopped by SIGTERM")
    assert "stopped by SIGTERM after step" in (cell / "log.txt").read_text()
    assert not read_results(tmp_path / "output")


def test_training_data_that_changed_between_two_cells(make_study, run_study):
    """An added form would be compared with those before it on other data; a form may have data of its own."""
    study = make_study(forms={"a": {}, "b": {}, "own": {"max_train_samples": 5}, "new": {}}, seeds=[1])
    for cell, train in zip(study.cells, (1, 2, 3), strict=False):
        finish(cell, 20.0, [1.0])
        write_result(cell, **read_result(cell), data={"train": train, "validation": 7})
    answer = run_study(study.path)  # which trains no further cell in vain
    assert not study.cells[-1].folder.exists()
    assert answer.code == 2 and re.search("The train data changed between .*a-seed-1' and .*b-seed-1', wh", answer.err)
    write_result(study.cells[1], **read_result(study.cells[1]) | {"data": {"train": 1, "validation": 7}})
    assert run_study(study.path, "--report").code == 0


@pytest.mark.slow
def test_a_cell_is_run_by_one_process(start_cli, warm_python, write_recipe, tmp_path, capsys):
    path = write_study(tmp_path, write_recipe(num_train_epochs=1), forms={"a": {}}, keep_models=True)
    other = start_cli("study", path, "--cell", "1", python=[warm_python])
    assert main(["study", str(path), "--cell", "1"]) == 0
    said = [other.communicate(timeout=600)[0].decode(), capsys.readouterr().out]
    assert other.returncode == 0
    cell = tmp_path / "output/cells/a-seed-1"
    assert (cell / "log.txt").read_text().count("model: ") == 1
    assert (cell / "run/model.safetensors").exists()
    assert any("finished, bleu" in text for text in said)

    def answer(*words):
        code, captured = main(["study", str(path), *words]), capsys.readouterr()
        return code, captured.out, captured.err

    listed = [line.split("\t") for line in answer("--list")[1].splitlines()]
    assert [line[2] for line in listed] == ["a, seed 1", "a, seed 2"]
    assert listed[0][1].startswith("finished, bleu")
    assert listed[1] == ["2", "not run", "a, seed 2", f"hf-rskip study {shlex.quote(str(path))} --cell=2"]
    code, out, _ = answer("--cell", "1")
    assert code == 0 and out.startswith("[1 of 2] a, seed 1: done before (finished, bleu ") and out.count("\n") == 1
    assert answer("--cell", "3") == (2, "", "hf-rskip: error: --cell 3: the study has 2 cells.\n")
    code, out, _ = answer("--report")
    assert code == 0 and "1 of 2 cells: 1 finished, 1 not run." in out
    theirs = read_study(path, ["--dropout", "0.5"]).cells[1]
    theirs.folder.mkdir()
    with FileLock(theirs.folder / "lock"):
        ours = start_cli("study", path, "--cell", "2", python=[warm_python])
        assert ours.stdout.readline().startswith(b"1 of 2 cells: 0 done before")
        write_cell_recipe(theirs)
        shutil.copy(cell / "result.json", theirs.folder)
    _, err = ours.communicate(timeout=600)
    assert ours.returncode == 2 and b"was run with dropout 0.5, not 0.1: remove it, or choose" in err


@pytest.mark.slow
def test_a_study_of_images(run_study, write_image_recipe, tmp_path):
    forms = {"plain": {"skip_type": "xskip", "skip_norm": "none"}, "rSkip": {"skip_type": "rskip"}}
    path = write_study(tmp_path, write_image_recipe(), forms=forms, seeds=[1])
    result = run_study(path, "--num_train_epochs", "1")
    assert result.code == 0, result.err
    assert "test accuracy (%)" in result.out
    record = read_results(tmp_path / "output")["rSkip-seed-1"]
    assert record["kept_step"] == record["steps"] == 9  # the last model, not the best
    predicted = json.loads((tmp_path / "output/cells/rSkip-seed-1/test_predictions.json").read_text())
    hits = [a == b for a, b in zip(predicted["predictions"], predicted["references"], strict=True)]
    assert len(hits) == 40 and sum(hits) / 40 == pytest.approx(record["test"]["accuracy"])


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_the_last_model_is_kept_where_the_best_was_not_saved(run_study, write_recipe, tmp_path):
    """Nothing is learned, so that the first evaluation stays the best; what is saved is the model after the second."""
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    recipe = write_recipe(**steps, learning_rate=0.0, early_stopping_patience=None)
    path = write_study(tmp_path, recipe, forms={"still": {}}, seeds=[1], metric="chrf")
    result = run_study(path)
    assert result.code == 0, result.err
    record = read_results(tmp_path / "output")["still-seed-1"]
    assert record["kept_step"] == 4
    assert (
        yaml.safe_load((tmp_path / "output/cells/still-seed-1/recipe.yaml").read_text())["metric_for_best_model"]
        == "chrf"
    )
