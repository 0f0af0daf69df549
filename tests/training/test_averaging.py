"""The mean of checkpoints, as a command and at the end of a training, against numpy's over their files."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainerState

from hf_rskip.cli.main import main
from hf_rskip.training.averaging import choose_checkpoints
from hf_rskip.training.checkpoints import list_checkpoints
from hf_rskip.training.resuming import write_record


def assert_mean(folder, checkpoints):
    weights = load_file(folder / "model.safetensors")
    parts = [load_file(path / "model.safetensors") for path in checkpoints]
    assert all(part.keys() == weights.keys() for part in parts)
    for name, value in weights.items():
        if value.dtype == np.float32:
            expected = np.mean([part[name].astype(np.longdouble) for part in parts], axis=0).astype(np.float32)
        else:
            expected = parts[-1][name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def numbered(run, *steps):
    return [run / f"checkpoint-{step}" for step in steps]


# The command


@pytest.fixture(scope="module")
def run(write_recipe):
    """A run that keeps all its checkpoints, with its evaluations of the loss."""
    recipe = write_recipe(save_total_limit=100, num_train_epochs=2, metric_for_best_model="loss", num_beams=1)
    assert main(["train", str(recipe)]) == 0
    return recipe.parent / "output"


def test_the_command(run, tmp_path, capfd):
    output, parts = tmp_path / "mean", numbered(run, 8, 16, 20)
    assert main(["average", *map(str, [*parts, output])]) == 0, capfd.readouterr().err
    assert_mean(output, parts)
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not names & {"trainer_state.json", "optimizer.pt", "training_args.bin"}
    model, info = AutoModelForSeq2SeqLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    inputs = AutoTokenizer.from_pretrained(output)("the cat sees a mouse .", return_tensors="pt")
    assert model.generate(**inputs).shape[1] > 3
    assert main(["average", *map(str, [*parts, output])]) == 2
    assert "already exists" in capfd.readouterr().err


def test_the_last_and_the_best_of_a_run(run, tmp_path, capfd):
    assert main(["average", "--run", str(run), "--last", "3", str(tmp_path / "last")]) == 0, capfd.readouterr().err
    assert_mean(tmp_path / "last", list_checkpoints(run)[-3:])
    assert main(["average", str(tmp_path / "best"), "--run", str(run), "--best", "3"]) == 0, capfd.readouterr().err
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = {log["step"]: log["eval_loss"] for log in history if "eval_loss" in log}
    best = sorted(sorted(losses, key=losses.get)[:3])
    assert_mean(tmp_path / "best", numbered(run, *best))


def test_the_best_are_by_the_metric_of_the_recipe_not_by_an_equal_value(tmp_path):
    """Top-5 accuracies, of which the best equals an accuracy."""
    top5 = {4: 0.9, 8: 1.0, 12: 0.8}
    logs = [{"step": step, "eval_loss": 1.0, "eval_accuracy": 1.0, "eval_top5_accuracy": top5[step]} for step in top5]
    for step in top5:
        numbered(tmp_path, step)[0].mkdir()
        write_record(
            numbered(tmp_path, step)[0],
            {"values": {"metric_for_best_model": "eval_top5_accuracy"}, "resumed": []},
            step,
        )
        state = TrainerState(log_history=logs, best_global_step=8, best_metric=1.0, global_step=step)
        state.save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    assert choose_checkpoints(tmp_path, 2, "best") == numbered(tmp_path, 4, 8)


def test_half_precision_is_accumulated_in_double(run, tmp_path):
    folders = []
    for number, path in enumerate(numbered(run, 8, 16, 20)):
        folders.append(tmp_path / str(number))
        shutil.copytree(path, folders[-1], ignore=shutil.ignore_patterns("manifest.json"))
        weights = load_file(folders[-1] / "model.safetensors")
        save_file(
            {name: value.astype(np.float16) for name, value in weights.items()}, folders[-1] / "model.safetensors"
        )
    assert main(["average", *map(str, folders), str(tmp_path / "mean")]) == 0
    weights, *parts = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mean", *folders))
    for name, value in weights.items():
        expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0).astype(np.float16)
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "is not a safetensors file"),
        (lambda folder: edit(folder / "config.json", dropout=0.7), "has dropout 0.7, but"),
        (lambda folder: edit(folder / "tokenizer.json", version="2.0"), "has another tokenizer than"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has another tokenizer than"),
        (lambda folder: lose_a_tensor(folder / "model.safetensors"), "has other weights than"),
        (lambda folder: spoil_a_tensor(folder / "model.safetensors"), "The mean of model.decoder"),
    ],
)
def test_what_cannot_be_averaged(change, message, run, tmp_path, capfd):
    first, second = numbered(run, 8, 16)
    shutil.copytree(second, tmp_path / "second", ignore=shutil.ignore_patterns("manifest.json"))
    change(tmp_path / "second")
    assert main(["average", str(first), str(tmp_path / "second"), str(tmp_path / "mean")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "mean").exists()


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lose_a_tensor(path):
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)


def spoil_a_tensor(path):
    weights = load_file(path)
    next(value for name, value in sorted(weights.items()) if name.startswith("model.decoder")).flat[0] = np.inf
    save_file(weights, path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to average"),
        (["--last", "2", "a"], "choose from the run that `--run` names"),
        (["--run", "a"], "takes `--last N` or `--best N`"),
        (["--run", "no_such", "--best", "2"], "'no_such' has 0 checkpoints with evaluations, fewer than 2"),
    ],
)
def test_what_cannot_be_asked(words, message, tmp_path, capfd):
    assert main(["average", *words, str(tmp_path / "mean")]) == 2
    assert message in capfd.readouterr().err


# At the end of a training


@pytest.mark.parametrize("by", ["last", "best"])
def test_a_translation_model_ends_as_the_mean(by, write_recipe, capfd):
    recipe = write_recipe(average_checkpoints=3, average_checkpoints_by=by, num_train_epochs=2, num_beams=1)
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    run = recipe.parent / "output"
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    *logs, _ = [log for log in history if "eval_bleu" in log]  # the last is of the mean
    scores = {log["step"]: (log["eval_bleu"], log["eval_chrf"], -log["eval_loss"]) for log in logs}
    steps = sorted(scores, key=lambda step: (scores[step], step))[-3:] if by == "best" else list(scores)[-3:]
    assert_mean(run, numbered(run, *sorted(steps)))
    assert len(list_checkpoints(run)) <= 4, "those of the mean, and the last or the best"
    names = ", ".join(f"checkpoint-{step}" for step in sorted(steps))
    assert f"the model is the mean of {names}" in capfd.readouterr().out
    # What is scored is what is saved.
    results = json.loads((run / "all_results.json").read_text())
    data = yaml.safe_load(recipe.read_text())["dataset_name"]
    assert main(["evaluate", str(run), "--dataset_name", data]) == 0
    assert json.loads(capfd.readouterr().out)["chrf"] == pytest.approx(results["test_chrf"], abs=0.01)


def test_a_resnet_ends_as_the_mean_whatever_interrupts_it(write_image_recipe, monkeypatch, capfd):
    """Its running statistics are averaged too. A checkpoint that SIGTERM asks for is not of the mean."""
    changes = {"average_checkpoints": 2, "skip_norm": "batch_norm", "save_total_limit": 1, "num_train_epochs": 2}
    whole, stopped = write_image_recipe(**changes), write_image_recipe(**changes)
    assert main(["train", str(whole)]) == 0, capfd.readouterr().err
    folder = whole.parent / "output"
    assert_mean(folder, numbered(folder, 15, 18))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert any("running_var" in name for name in model.state_dict())

    training_step = Trainer.training_step

    def step_under_fire(self, *args, **kwargs):
        if self.state.global_step + 1 == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step_under_fire)
    assert main(["train", str(stopped)]) == 143
    output = stopped.parent / "output"
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-12", "checkpoint-15", "checkpoint-17"]
    assert main(["train", str(stopped), "--resume_from_checkpoint", "true"]) == 0, capfd.readouterr().err
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-15", "checkpoint-18"]
    ours, expected = (load_file(path / "model.safetensors") for path in (output, folder))
    assert all(np.array_equal(ours[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_checkpoints": 0}, "average_checkpoints must be a whole number of at least 1, not 0"),
        ({"average_checkpoints": 2, "save_strategy": "no"}, "average_checkpoints needs checkpoints"),
        (
            {"average_checkpoints": 2, "average_checkpoints_by": "best", "eval_strategy": "no", "eval_steps": None},
            "average_checkpoints_by best needs evaluations",
        ),
    ],
)
def test_keys_that_do_not_fit(changes, message, write_image_recipe, capfd):
    assert main(["train", str(write_image_recipe(**changes))]) == 2
    assert message in capfd.readouterr().err
