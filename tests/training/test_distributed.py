"""Whole runs in several processes, launched by the command line: the same curve, the same weights, and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from hf_rskip.cli.launch import PROFILES, find_profile
from hf_rskip.cli.main import main
from hf_rskip.recipe import training as arguments
from hf_rskip.training.averaging import average_weights

STEPS = 24


@pytest.fixture(scope="module")
def write(write_recipe):
    """Recipes of a step budget, without dropout. With a large epsilon Adam does not turn zero gradients, of which
    rounding alone is left, into whole steps; a small `max_grad_norm` makes every step a clipped one."""

    def write(**changes):
        fixed = {
            "dropout": 0.0,
            "adam_epsilon": 1e-3,
            "max_grad_norm": 0.5,
            "global_batch_tokens": 512,
            "per_device_train_batch_tokens": 512,
            "max_steps": STEPS,
            "logging_steps": 1,
            "eval_steps": 12,
            "save_steps": 8,
            "average_checkpoints": 2,
            "early_stopping_patience": None,
            "load_best_model_at_end": False,
            "num_beams": 1,
        }
        return write_recipe(**fixed | changes)

    return write


@pytest.fixture(scope="module")
def train(write, run_cli):
    """Trains with launcher options, or in this process; returns what the folder holds afterwards."""

    def train(*options, recipe=None, **changes):
        recipe, said = recipe or write(**changes), ""
        if "--accelerate_config" in options:
            result = run_cli("train", recipe, *options)
            assert result.code == 0, result.err
            said = result.out
        else:
            assert main(["train", str(recipe), *options]) == 0
        folder = recipe.parent / "output"
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return SimpleNamespace(
            recipe=recipe,
            folder=folder,
            out=said,
            curve={key: [entry[key] for entry in history if key in entry] for key in ("loss", "grad_norm")},
            weights=load_file(folder / "model.safetensors"),
            scores=json.loads((folder / "test_results.json").read_text()),
        )

    return train


@pytest.fixture(scope="module")
def alone(train):
    return train()


def check_same(run, alone):
    for key, values in alone.curve.items():
        assert run.curve[key] == pytest.approx(values, rel=1e-5), key
    assert len(run.curve["loss"]) == STEPS
    assert run.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=1e-5)
    assert run.scores == alone.scores


def launcher(profile, count):
    return "--accelerate_config", profile, "--num_processes", count


def test_accumulation_gives_the_same_curve(alone, train):
    assert max(alone.curve["grad_norm"]) > 0.5, "clipped"
    check_same(train(per_device_train_batch_tokens=200), alone)


def module_for(recipe, source):
    """An environment in which `--import_module beside` runs this in every process."""
    (recipe.parent / "beside.py").write_text(textwrap.dedent(source))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(recipe.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    }


# Hard, after the next checkpoint.
STOP = """
    import os
    from hf_rskip.training.trainer import RSkipTrainer
    save = RSkipTrainer._save_checkpoint
    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.accelerator.wait_for_everyone()
        os._exit(9)
    RSkipTrainer._save_checkpoint = save_and_stop
"""


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(alone, train, write, run_cli):
    """On one until step 8 of an epoch of 14, on two until 16, which is in the next epoch, and on one to the end."""
    recipe = write()
    resume = ("--resume_from_checkpoint", "true")
    for options in ((), (*launcher("cpu", 2), *resume)):
        words = ("train", recipe, *options, "--import_module", "beside")
        assert run_cli(*words, environment=module_for(recipe, STOP)).code == 9
    check_same(train(*resume, recipe=recipe), alone)


# Every process leaves its number, and looks for no libraries in the current folder.
NUMBER = """
    import os, sys
    from pathlib import Path
    assert os.getcwd() not in sys.path
    Path(__file__).with_name(f"process-{os.getpid()}").touch()
"""
WAIT = """
    import time
    from hf_rskip.training.trainer import RSkipTrainer
    step = RSkipTrainer.training_step
    def step_under_fire(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 5:
            Path(__file__).with_name("waiting").touch()
            while not self.stop._received:
                time.sleep(0.01)
        return step(self, *args, **kwargs)
    RSkipTrainer.training_step = step_under_fire
"""


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def running(recipe):
    """The processes that have left their numbers beside the recipe, and which of them are running."""
    numbers = [path.name.partition("-")[2] for path in recipe.parent.glob("process-*")]
    return len(numbers), [number for number in numbers if os.path.exists(f"/proc/{number}")]


@pytest.mark.slow
def test_sigterm_in_two_processes_changes_nothing(train, write, start_cli, warm_python, tmp_path):
    """In the middle of an epoch, with dropout, whose random numbers each process has of its own."""
    short = {"dropout": 0.1, "max_steps": 8, "eval_steps": 4, "save_steps": 4}
    whole = train(*launcher("cpu", 2), **short)
    recipe = write(**short)
    words = ("train", recipe, *launcher("cpu", 2), "--import_module", "beside")
    environment = module_for(recipe, NUMBER + WAIT)
    process = start_cli(*words, python=[warm_python], environment=environment, cwd=tmp_path)
    wait_for((recipe.parent / "waiting").exists, process)
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, error
    assert "stopped by SIGTERM after step 6" in error and "Traceback" not in error
    assert running(recipe) == (2, [])
    run = train(*launcher("cpu", 2), "--resume_from_checkpoint", "true", recipe=recipe)
    assert run.curve == whole.curve
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in run.weights.items())
    assert run.scores == whole.scores


@pytest.mark.slow
def test_a_sharded_run_that_goes_on_gives_the_same_curve(alone, train, write, run_cli, capfd):
    """On three processes, which share rows of weights, and batches, unevenly; it ends with the mean of checkpoints."""
    recipe = write()
    words = ("train", recipe, *launcher("fsdp2", 3), "--import_module", "beside")
    stopped = run_cli(*words, environment=module_for(recipe, STOP))
    assert stopped.code == 9, stopped.err
    checkpoint = recipe.parent / "output" / "checkpoint-8"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file(), "sharded, and not DDP"
    assert main(["train", str(recipe), "--resume_from_checkpoint", "true"]) == 2
    assert "was saved under FSDP" in capfd.readouterr().err
    run = train(*launcher("fsdp2", 3), "--resume_from_checkpoint", "true", recipe=recipe)
    check_same(run, alone)
    assert run.out.count("parameters, vocabulary of") == 1
    model = AutoModelForSeq2SeqLM.from_pretrained(run.folder)
    assert sum(weight.numel() for weight in model.parameters()) == sum(map(torch.numel, alone.weights.values()))
    checkpoints = [run.folder / f"checkpoint-{step}" for step in (16, 24)]
    expected, last = average_weights(checkpoints), load_file(checkpoints[-1] / "model.safetensors")
    assert run.weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in run.weights.items())
    assert not any(torch.equal(weight, last[name]) for name, weight in run.weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps 3 cannot be set with global_batch_tokens"),
        ({"pad_to_multiple_of": 5}, "pad_to_multiple_of 5 must divide max_position_embeddings 64"),
        ({"global_batch_tokens": 0}, "global_batch_tokens must be a whole number of at least 1"),
        ({"global_batch_tokens": 20}, "more than the batch budget of 20"),
    ],
)
def test_a_plan_that_cannot_be(changes, message, write, capfd):
    assert main(["train", str(write(**changes))]) == 2
    assert message in capfd.readouterr().err


def test_padding_to_multiples_does_not_change_the_loss(write):
    """One step of the whole corpus."""
    recipe = write(
        pad_to_multiple_of=32,
        global_batch_tokens=100_000,
        per_device_train_batch_tokens=100_000,
        max_steps=1,
        eval_strategy="no",
        save_strategy="no",
        average_checkpoints=None,
    )
    losses = []
    for multiple in (1, 32):
        output = recipe.parent / f"output-{multiple}"
        words = ["--pad_to_multiple_of", str(multiple), "--output_dir", str(output)]
        assert main(["train", str(recipe), *words]) == 0
        losses.append(json.loads((output / "trainer_state.json").read_text())["log_history"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# The launcher


@pytest.mark.parametrize(
    ("profile", "changes", "message"),
    [
        ("cpu", {"dataset_name": "no/such"}, "hf-rskip: error: Dataset 'no/such' cannot be loaded"),
        (
            "fsdp2",
            {"ema_decay": 0.9, "average_checkpoints": None},
            "hf-rskip: error: ema_decay does not go with FSDP: average_checkpoints does.",
        ),
    ],
)
def test_an_error_is_said_once(profile, changes, message, write, run_cli):
    result = run_cli("train", write(**changes), *launcher(profile, 2))
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(message)


@pytest.mark.slow
def test_two_machines(write, start_cli, warm_python, alone):
    """Both of them this one."""
    recipe = write(use_cpu=True, max_steps=2, eval_strategy="no", save_strategy="no", average_checkpoints=None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("train", recipe, *launcher("multi-node", 2), "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [start_cli(*words, "--machine_rank", rank, python=[warm_python]) for rank in (0, 1)]
    errors = [machine.communicate(timeout=200)[1].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    state = json.loads((recipe.parent / "output" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses == pytest.approx(alone.curve["loss"][:2], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accelerate_config", "no_such"), "must be one of ddp, fsdp2, cpu, multi-node or a YAML file"),
        (("--accelerate_config", "cpu"), "needs --num_processes"),
        (("--num_processes", "2"), "--num_processes needs --accelerate_config"),
        (("--accelerate_config", "multi-node", "--num_processes", "2"), "on 2 machines needs --machine_rank"),
    ],
)
def test_a_launch_that_cannot_be(words, message, write, capfd):
    assert main(["train", str(write()), *words]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(write, start_cli, warm_python, tmp_path):
    recipe = write(
        max_steps=100_000,
        eval_strategy="no",
        save_strategy="no",
        average_checkpoints=None,
        predict_with_generate=False,
        metric_for_best_model="loss",
    )
    log = tmp_path / "log"
    words = ("train", recipe, *launcher("cpu", 2), "--import_module", "beside")
    with open(log, "wb") as file:
        streams = {"stdout": file, "stderr": file}
        process = start_cli(*words, python=[warm_python], environment=module_for(recipe, NUMBER), **streams)
        wait_for(lambda: re.search(rb"step \d+ of", log.read_bytes()), process)
        count, numbers = running(recipe)
        assert len(numbers) == count == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    assert running(recipe) == (2, [])
    assert "Traceback" not in log.read_text()


def test_accelerate_launch_is_the_same_command(write, warm_python, alone):
    """And a profile is a file that accelerate reads."""
    recipe = write(max_steps=1, eval_strategy="no", save_strategy="no", average_checkpoints=None)
    command = ["accelerate.commands.launch", "--config_file", str(find_profile("cpu")), "--num_processes", "2"]
    words = ["-m", "hf_rskip.cli", "train", str(recipe), "--use_cpu", "true"]
    result = subprocess.run([warm_python, "-m", *command, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert all(find_profile(name).is_file() for name in PROFILES)
    state = json.loads((recipe.parent / "output" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(alone.curve["loss"][0], rel=1e-5)


def test_tensorboard(write, monkeypatch, capfd):
    from hf_rskip.cli.main import main

    quick = {"report_to": "tensorboard", "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    quick |= {"average_checkpoints": None}
    pytest.importorskip("tensorboard")
    recipe = write(**quick)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(recipe.parent / "board"))
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(recipe.parent / "board")).Reload()
    state = json.loads((recipe.parent / "output" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    assert main(["train", str(write(**quick))]) == 2
    assert "is not installed (try `pip install 'hf_rskip[tensorboard]'`)" in capfd.readouterr().err
