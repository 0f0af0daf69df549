"""A loss that is no number, or jumps, stops the run before its update, and the batch is named."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_rskip.cli.main import main
from hf_rskip.training.checkpoints import list_checkpoints


@pytest.fixture
def spoil(monkeypatch):
    """Multiplies the loss of a step, counted from 1; returns what its batches held."""

    def spoil_step(step, factor):
        compute_loss, batches = Trainer.compute_loss, []

        def spoiled(self, model, inputs, *args, **kwargs):
            inputs = dict(inputs)
            loss = compute_loss(self, model, dict(inputs), *args, **kwargs)
            if model.training and self.state.global_step + 1 == step:
                batches.append(inputs)
                return loss * factor
            return loss

        monkeypatch.setattr(Trainer, "compute_loss", spoiled)
        return batches

    return spoil_step


@pytest.mark.parametrize("factor", [float("nan"), float("inf")], ids=str)
def test_translation(factor, write_recipe, spoil, pairs, capfd):
    """The checkpoint before is there, and that of the step is not, though it was due."""
    recipe = write_recipe(num_train_epochs=1, save_steps=4, eval_steps=4)
    batches = spoil(8, factor)
    assert main(["train", str(recipe)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.match(rf"hf-rskip: error: Step 8: the loss is {factor}; the update was not made, ", error), error
    (batch,) = batches
    count, *lengths, first = re.search(
        r"batch: (\d+) pairs of (\d+) to (\d+) source tokens and (\d+) to (\d+) target tokens, the first '(.*)'", error
    ).groups()
    assert int(count) == len(batch["labels"])
    source, target = batch["attention_mask"].sum(1), (batch["labels"] != -100).sum(1)
    assert list(map(int, lengths)) == [int(source.min()), int(source.max()), int(target.min()), int(target.max())]
    assert first in {pair["en"] for pair in pairs["train"]}
    folder = recipe.parent / "output"
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4"]
    assert all(value.isfinite().all() for value in load_file(folder / "checkpoint-4" / "model.safetensors").values())
    assert not (folder / "model.safetensors").exists()


def test_images(write_image_recipe, spoil, capfd):
    recipe = write_image_recipe(num_train_epochs=1)
    batches = spoil(5, float("nan"))
    assert main(["train", str(recipe)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "Step 5: the loss is nan" in error
    rows = [int(row) for row in re.search(r"batch: rows (.*) of the training split", error)[1].split(", ")]
    assert len(set(rows)) == 32 and max(rows) < 320
    assert [row % 4 for row in rows] == batches[0]["labels"].tolist()  # as the colours of the tiny images alternate


@pytest.mark.parametrize(("factor", "code"), [(100.0, 2), (1.5, 0)], ids=str)
def test_a_jump(factor, code, write_image_recipe, spoil, capfd):
    """More than ten times the median of the five losses before."""
    recipe = write_image_recipe(num_train_epochs=1, loss_spike_factor=10, loss_spike_window=5)
    spoil(8, factor)
    assert main(["train", str(recipe)]) == code
    error = capfd.readouterr().err
    assert (code == 0) == ("Step 8" not in error)
    assert code == 0 or re.search(
        r"Step 8: the loss is [\d.]+ where the median of the 5 steps before is [\d.]+;", error
    )


def test_a_jump_is_let_pass_unless_asked_for(write_image_recipe, spoil, capfd):
    spoil(8, 100.0)
    assert main(["train", str(write_image_recipe(num_train_epochs=1))]) == 0, capfd.readouterr().err


def test_one_batch_of_several_is_named(write_image_recipe, spoil, capfd, monkeypatch):
    """With gradient accumulation, the loss of the second batch alone is no number."""
    recipe = write_image_recipe(num_train_epochs=1, gradient_accumulation_steps=2, per_device_train_batch_size=8)
    training_step = Trainer.training_step
    calls = []

    def second_is_nan(self, model, inputs, *args, **kwargs):
        loss = training_step(self, model, inputs, *args, **kwargs)
        calls.append(inputs["row"].tolist())
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(Trainer, "training_step", second_is_nan)
    assert main(["train", str(recipe)]) == 2
    error = capfd.readouterr().err
    assert f"batch: rows {', '.join(map(str, calls[3]))} of the training split.\n" in error
    assert torch.tensor(calls).shape == (4, 8)


@pytest.mark.parametrize("save", [True, False], ids=["with a checkpoint", "without"])
@pytest.mark.parametrize("images", [False, True], ids=["translation", "images"])
def test_weights_of_the_last_update_that_are_not_finite_are_not_saved(
    images, save, write_recipe, write_image_recipe, capfd
):
    """The second of two updates is far too large, and no loss comes after it."""
    kept = {} if save else {"save_strategy": "no", "load_best_model_at_end": False}
    huge = {"learning_rate": 3e38, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "max_steps": 2}
    huge |= {"eval_steps": 2, "save_steps": 2, "weight_decay": 10.0, **kept}
    recipe = (write_image_recipe if images else write_recipe)(**huge)
    assert main(["train", str(recipe)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"hf-rskip: error: Step 2: after the update weights are not finite, such as \S+; they", error), (
        error
    )
    assert not [*recipe.parent.glob("output/*.safetensors"), *recipe.parent.glob("output/checkpoint-*")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_spike_factor": 1.0}, "loss_spike_factor must be above 1, not 1.0"),
        ({"loss_spike_window": 0}, "loss_spike_window must be a whole number of at least 1, not 0"),
    ],
)
def test_keys_that_do_not_fit(changes, message, write_image_recipe, capfd):
    assert main(["train", str(write_image_recipe(**changes))]) == 2
    assert message in capfd.readouterr().err
