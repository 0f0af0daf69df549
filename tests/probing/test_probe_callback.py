"""Probes in the course of a training: they change nothing of it, and go on where it goes on."""

import shutil

import pytest
import yaml

from hf_rskip.cli import main
from hf_rskip.probing.table import read_table


def train(capsys, path, *words):
    assert main(["train", str(path), *words]) == 0, capsys.readouterr().err
    return path.parent / "output"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["translation", "images"])
def test_a_probed_training_ends_with_the_same_weights_and_goes_on_with_the_same_table(
    task, write_recipe, write_image_recipe, capsys
):
    # Dropout, stochastic depth and crops draw; batch norms have running statistics.
    write = write_recipe if task == "translation" else write_image_recipe
    changes = {"skip_norm": "batch_norm", "num_train_epochs": None, "max_steps": 12, "save_total_limit": 9}
    plain = train(capsys, write(**changes))
    recipe = write(**changes, probe_steps=2)
    probed = train(capsys, recipe)
    weights = (probed / "model.safetensors").read_bytes()
    assert weights == (plain / "model.safetensors").read_bytes()
    assert not (plain / "probe.csv").exists()

    whole = (probed / "probe.csv").read_text()
    table = read_table(probed / "probe.csv")
    assert [item.step for item in table] == list(range(0, 13, 2))
    assert {item.model for item in table} == {"output"} and {item.seed for item in table} == {3}
    assert table[0].sublayers[0].gain_rms == (1.0, 1.0) != table[-1].sublayers[0].gain_rms
    smoothing = 0.1 if task == "translation" else 0.0
    assert table[-1].sublayers[0].loss < table[0].sublayers[0].loss + smoothing

    # Killed after step 10, of which no checkpoint was written, and while a row was being written.
    for name in ("model.safetensors", "config.json", "recipe.json"):
        (probed / name).unlink()
    last = yaml.safe_load(recipe.read_text())["save_steps"] * 2
    for checkpoint in probed.glob("checkpoint-*"):
        if int(checkpoint.name[11:]) > last:
            shutil.rmtree(checkpoint)
    (probed / "probe.csv").write_text(whole[:-30])
    train(capsys, recipe, "--resume_from_checkpoint", "true")
    assert (probed / "probe.csv").read_text() == whole
    assert (probed / "model.safetensors").read_bytes() == weights


def test_probe_steps_must_be_a_count(write_recipe, capfd):
    assert main(["train", str(write_recipe(probe_steps=0))]) == 2
    assert capfd.readouterr().err == "hf-rskip: error: probe_steps must be a whole number of at least 1, not 0.\n"
