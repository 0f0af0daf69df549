"""`torch_compile: true` with token-budget batches: few graphs for many shapes, and the same training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from transformers import AutoModelForSeq2SeqLM

from hf_rskip.cli.main import main
from hf_rskip.training.trainer import RSkipTrainer

STEPS = 16


@pytest.fixture
def train(write_recipe, monkeypatch, capfd):
    """Trains; returns the folder, the losses, and the shapes of the batches."""
    shapes = []
    training_step = RSkipTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        shapes.append((*inputs["input_ids"].shape, inputs["labels"].shape[1]))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RSkipTrainer, "training_step", step)

    def train(**changes):
        shapes.clear()
        fixed = {"max_steps": STEPS, "logging_steps": 1, "eval_steps": 8, "save_steps": 8, "dropout": 0.0}
        fixed |= {"encoder_layers": 1, "decoder_layers": 1}  # or it compiles for minutes
        # With a learning rate of 1e-2 differences of rounding have grown to 1.4e-5 after 30 steps.
        fixed |= {"learning_rate": "1e-3", "adam_epsilon": 1e-3, "per_device_train_batch_tokens": 256}
        recipe = write_recipe(**fixed, **changes)
        assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
        folder = recipe.parent / "output"
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return folder, [entry["loss"] for entry in history if "loss" in entry], set(shapes)

    return train


def check_same(folder, losses, eager, expected):
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == STEPS
    checkpoint = folder / f"checkpoint-{STEPS}"
    weights, of_eager = (load_file(path / "model.safetensors") for path in (checkpoint, eager))
    assert weights.keys() == of_eager.keys()
    AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    scores, of_eager = (json.loads((path / "test_results.json").read_text()) for path in (folder, eager))
    assert scores == of_eager


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_the_same(train, monkeypatch):
    """Graphs are counted without Inductor, which takes up to half a minute a graph; it gets one, and no vectors."""
    eager, expected, _ = train(pad_to_multiple_of=2)
    # Beyond the limit of recompilations a graph would be run eagerly, with a warning at most.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.compiler.reset()
        counters.clear()
        folder, losses, shapes = train(pad_to_multiple_of=2, torch_compile_backend="eager")
        assert len(shapes) > 10
        assert not counters["graph_break"] and 2 <= counters["stats"]["unique_graphs"] <= 4
        check_same(folder, losses, eager, expected)
        torch.compiler.reset()
        counters.clear()
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
        # It would begin anew for the first number that it cannot make a tensor.
        monkeypatch.setattr(torch._dynamo.config, "specialize_float", True)
        with inductor_config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):
            folder, losses, _ = train(pad_to_multiple_of=2, torch_compile=True)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
        check_same(folder, losses, eager, expected)
