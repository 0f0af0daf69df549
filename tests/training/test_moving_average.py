"""The moving average of a translation model, whose embeddings are tied, against numpy's over its steps."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForSeq2SeqLM

from hf_rskip.cli.main import main
from hf_rskip.training.averaging import MovingAverage

DECAY = 0.7


@pytest.fixture
def weights_of_steps(monkeypatch):
    """The weights after every step, as the Trainer leaves them."""
    on_step_end, weights = MovingAverage.on_step_end, []

    def record(self, *args, **kwargs):
        weights.append({name: value.numpy().copy() for name, value in self.model.state_dict().items()})
        on_step_end(self, *args, **kwargs)

    monkeypatch.setattr(MovingAverage, "on_step_end", record)
    return weights


def test_a_translation_model_ends_as_its_average(write_recipe, weights_of_steps, capfd):
    recipe = write_recipe(ema_decay=DECAY, num_train_epochs=1, load_best_model_at_end=False, generation_num_beams=2)
    assert main(["train", str(recipe), "--eval_strategy", "epoch"]) == 0, capfd.readouterr().err
    folder = recipe.parent / "output"
    saved, expected = load_file(folder / "model.safetensors"), weights_of_steps[0]
    for weights in weights_of_steps[1:]:
        expected = {name: DECAY * value + (1 - DECAY) * weights[name] for name, value in expected.items()}
    assert len(weights_of_steps) > 8 and saved.keys() < expected.keys(), "tied weights are saved once"
    for name, value in saved.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        if "embed" in name:
            assert np.abs(value - weights_of_steps[-1][name]).max() > 1e-3, "and not the last weights"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    # The scores of training are those of the average.
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    score = next(log["eval_chrf"] for log in reversed(history) if "eval_chrf" in log)
    data = yaml.safe_load(recipe.read_text())["dataset_name"]
    capfd.readouterr()
    assert main(["evaluate", str(folder), "--dataset_name", data, "--split", "validation"]) == 0
    assert json.loads(capfd.readouterr().out)["chrf"] == pytest.approx(score, abs=0.01) and score > 5


def test_it_goes_on_and_the_best_is_an_average(write_recipe, capfd):
    """Resumed from the middle, and with the best model at the end, whose checkpoint holds the average beside it."""
    recipe = write_recipe(ema_decay=DECAY, num_train_epochs=2, save_total_limit=100, num_beams=1)
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    folder, again = recipe.parent / "output", recipe.parent / "again"
    words = ["train", str(recipe), "--output_dir", str(again), "--resume_from_checkpoint", str(folder / "checkpoint-8")]
    assert main(words) == 0, capfd.readouterr().err
    saved, resumed = (load_file(path / "model.safetensors") for path in (folder, again))
    assert all(np.array_equal(value, resumed[name]) for name, value in saved.items())
    best = json.loads((folder / "trainer_state.json").read_text())["best_global_step"]
    average = load_file(folder / f"checkpoint-{best}" / "moving_average.safetensors")
    for name, value in saved.items():
        if f"module.{name}" in average:
            np.testing.assert_array_equal(value, average[f"module.{name}"], err_msg=name)


def test_two_averages_are_one_too_many(write_recipe, capfd):
    assert main(["train", str(write_recipe(ema_decay=0.9, average_checkpoints=2))]) == 2
    assert "ema_decay and average_checkpoints are two averages" in capfd.readouterr().err
