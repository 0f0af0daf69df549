"""Runs that are killed, told to stop, or out of space go on from a whole checkpoint, and end as if they were not."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerControl, TrainerState

from hf_rskip.cli.main import main
from hf_rskip.errors import Preempted
from hf_rskip.training.checkpoints import find_checkpoint, list_checkpoints, rotate_checkpoints
from hf_rskip.training.preemption import StopOnSignal
from hf_rskip.training.resuming import RECORD_NAME

RESUME = ("--resume_from_checkpoint", "true")


def assert_same_end(folder, expected):
    """The same weights and scores, and the same evaluations on the way."""
    weights, expected_weights = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    assert evaluations(folder) == evaluations(expected)
    scores, expected_scores = (json.loads((path / "test_results.json").read_text()) for path in (folder, expected))
    assert without_times(scores) == without_times(expected_scores)
    assert not (folder / ".incomplete").exists()


def evaluations(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [without_times(entry) for entry in state["log_history"] if "eval_loss" in entry]
    return history, state["best_global_step"], state["best_metric"]


def without_times(values):
    return {name: value for name, value in values.items() if not name.endswith(("runtime", "per_second"))}


@pytest.fixture
def terminate_at(monkeypatch):
    """Sends this process SIGTERM in the middle of the steps with these numbers, counted from 1."""
    training_step = Trainer.training_step

    def set_steps(*steps, number=signal.SIGTERM, times=1):
        def step_under_fire(self, *args, **kwargs):
            if self.state.global_step + 1 in steps:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step_under_fire)

    return set_steps


def run_until_the_end(recipe, stops, capfd):
    """Starts the run again whenever it was stopped, at each of `stops`."""
    words = ["train", str(recipe)]
    handler = signal.getsignal(signal.SIGTERM)
    for step in stops:
        assert main(words) == 143
        error = capfd.readouterr().err.splitlines()[-1]
        assert error == (f"hf-rskip: stopped by SIGTERM after step {step}; go on with `--resume_from_checkpoint true`")
        assert list_checkpoints(recipe.parent / "output")[-1].name == f"checkpoint-{step}"
        assert signal.getsignal(signal.SIGTERM) is handler
        words = ["train", str(recipe), *RESUME]
    assert main(words) == 0, capfd.readouterr().err


# SIGTERM


@pytest.mark.slow
def test_sigterm_in_translation(trained, write_recipe, terminate_at, capfd):
    """After steps at which nothing is due, an evaluation is, and an epoch ends."""
    recipe = write_recipe()
    terminate_at(6, 8, 11, 11)
    run_until_the_end(recipe, (6, 8, 11), capfd)
    assert_same_end(recipe.parent / "output", trained.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluated", "saved", "schedule"), [("steps", "best", "reduce_lr_on_plateau"), ("epoch", "epoch", "greedy")]
)
def test_sigterm_in_image_classification(evaluated, saved, schedule, write_image_recipe, terminate_at, capfd):
    """Likewise; the average of the weights goes on too, and so do early stopping and schedules by the metric."""
    changes = {"ema_decay": 0.8, "early_stopping_patience": 2, "load_best_model_at_end": True}
    changes |= {"eval_strategy": evaluated, "save_strategy": saved, "lr_scheduler_type": schedule}
    whole, stopped = write_image_recipe(**changes), write_image_recipe(**changes)
    assert main(["train", str(whole)]) == 0, capfd.readouterr().err
    terminate_at(5, 6, 9)
    run_until_the_end(stopped, (5, 6, 9), capfd)
    assert_same_end(stopped.parent / "output", whole.parent / "output")
    states = [torch.load(list_checkpoints(path.parent / "output")[-1] / "scheduler.pt") for path in (stopped, whole)]
    assert states[0] == states[1]


def test_the_first_ctrl_c_saves_and_the_second_ends_at_once(write_image_recipe, terminate_at, capfd):
    recipe = write_image_recipe(num_train_epochs=1)
    terminate_at(4, number=signal.SIGINT)
    assert main(["train", str(recipe)]) == 130
    error = capfd.readouterr().err
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops at once\n" in error
    assert error.endswith("hf-rskip: stopped by Ctrl-C after step 4; go on with `--resume_from_checkpoint true`\n")
    terminate_at(5, number=signal.SIGINT, times=2)
    assert main(["train", str(recipe), *RESUME]) == 130
    assert capfd.readouterr().err.endswith("hf-rskip: interrupted\n")
    assert list_checkpoints(recipe.parent / "output")[-1].name == "checkpoint-4"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_in_the_last_step(write_image_recipe, terminate_at, capfd):
    terminate_at(9)
    recipe = write_image_recipe(num_train_epochs=1)
    run_until_the_end(recipe, (9,), capfd)
    history, _, _ = evaluations(recipe.parent / "output")
    assert [entry["step"] for entry in history] == [3, 6, 9]


@pytest.mark.parametrize("prefix", ["eval", "test"])
def test_sigterm_in_the_last_evaluation(prefix, write_image_recipe, monkeypatch, capfd):
    recipe = write_image_recipe(num_train_epochs=1)
    evaluation_loop = Trainer.evaluation_loop

    def loop_under_fire(self, *args, metric_key_prefix, **kwargs):
        if self.state.global_step == 9 and metric_key_prefix == prefix:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluation_loop(self, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluation_loop", loop_under_fire)
        assert main(["train", str(recipe)]) == 143
    assert "hf-rskip: stopped by SIGTERM after step 9; go on with" in capfd.readouterr().err
    assert main(["train", str(recipe), *RESUME]) == 0, capfd.readouterr().err
    assert [entry["step"] for entry in evaluations(recipe.parent / "output")[0]] == [3, 6, 9]


@pytest.mark.parametrize("step", [8, 14])
def test_an_evaluation_at_a_signal_can_be_the_last(step, write_recipe, terminate_at, capfd):
    """In the middle and at the end of an epoch; nothing is learned, so that patience ends at the second evaluation."""
    every = step // 2
    recipe = write_recipe(
        learning_rate=0.0,
        early_stopping_patience=1,
        load_best_model_at_end=False,
        eval_steps=every,
        save_steps=every,
        max_steps=28,
    )
    terminate_at(step)
    run_until_the_end(recipe, (step,), capfd)
    state = json.loads((recipe.parent / "output" / "trainer_state.json").read_text())
    assert state["global_step"] == step
    assert [entry["step"] for entry in evaluations(recipe.parent / "output")[0]] == [every, step]


@pytest.mark.parametrize(
    ("saved", "is_due", "is_best", "is_out_of_turn"),
    [
        ("steps", False, False, True),
        ("steps", True, False, False),
        ("steps", False, True, True),
        ("best", False, False, True),
        ("best", False, True, False),
    ],
)
@pytest.mark.parametrize("place", ["step", "end of an epoch", "end"])
def test_which_checkpoints_are_out_of_turn(place, saved, is_due, is_best, is_out_of_turn):
    """Those that are not written without the signal; at an end, after what is due there."""
    stop, args = StopOnSignal(), SimpleNamespace(world_size=1, save_strategy=saved)
    state = TrainerState(global_step=4, epoch=1.0 if "epoch" in place else 0.5)
    control = TrainerControl(should_save=is_due, should_training_stop=place == "end")
    with stop.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(args, state, control)
        if place != "step":
            assert control.should_save == is_due
            stop.on_save(args, state, control)  # goes on
            control.should_save = False
            stop.on_epoch_end(args, state, control)
        state.best_global_step = 4 if is_best else 2
        assert control.should_save and stop.is_out_of_turn(args, state) == is_out_of_turn
        with pytest.raises(Preempted, match="after step 4"):
            stop.on_save(args, state, control)


def test_a_signal_while_processes_tell_each_other_of_signals(monkeypatch):
    """It is not told any more at this step, and must not be lost for the next."""

    def gather(numbers):
        told = numbers.clone()
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.cat([told, told])

    monkeypatch.setattr("hf_rskip.training.preemption.gather", gather)
    stop, args = StopOnSignal(), SimpleNamespace(world_size=2, device="cpu")
    with stop.caught():
        assert [stop.is_told_to_stop(args) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("swallow", [contextlib.nullcontext(), contextlib.suppress(Exception)])
def test_a_signal_after_the_training_reaches_the_end_whatever_a_library_makes_of_it(swallow):
    stop = StopOnSignal()
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 7"), stop.raised(7), swallow:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("Error calling __set_name__") from error


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_and_their_workers(write_image_recipe, warm_python, tmp_path):
    """A scheduler tells everybody, data workers included; here, all but the first process."""
    recipe = write_image_recipe(per_device_train_batch_size=16, num_train_epochs=200, dataloader_num_workers=1)
    folder = recipe.parent / "output"
    module = tmp_path / "sender.py"
    module.write_text(
        "import os, signal, psutil\n"
        "from transformers import Trainer\n"
        "training_step = Trainer.training_step\n"
        "def step(self, *args, **kwargs):\n"
        "    if self.state.global_step == 4 and self.args.process_index == 1:\n"
        "        for process in [psutil.Process(), *psutil.Process().children()]:\n"
        "            process.send_signal(signal.SIGTERM)\n"
        "    return training_step(self, *args, **kwargs)\n"
        "Trainer.training_step = step\n"
    )
    torchrun = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["-m", "hf_rskip.cli", "train", "--import_module", "sender", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [*torchrun, *words], capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
    )
    assert result.returncode != 0
    assert "stopped by SIGTERM after step 5" in result.stderr, result.stderr
    checkpoint = list_checkpoints(folder)[-1]
    assert checkpoint.name == "checkpoint-5"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_the_fork_server_of_workers_outlives_sigterm(warm_python):
    """Workers end themselves when it ends. Here it is started by the interpreter itself, as a user's is."""
    script = (
        "import multiprocessing, psutil\n"
        "from hf_rskip.training.preemption import start_fork_server\n"
        f"multiprocessing.set_executable({sys.executable!r})\n"
        "start_fork_server()\n"
        "servers = [child for child in psutil.Process().children() if 'forkserver' in str(child.cmdline())]\n"
        "servers[0].terminate(), print(*map(len, psutil.wait_procs(servers, 1)))\n"
    )
    assert subprocess.run([warm_python, "-c", script], stdout=subprocess.PIPE, text=True).stdout == "0 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_that_persist_do_not_keep_the_process(context, write_recipe, run_cli):
    """Python ends them at exit with SIGTERM, which they ignore, and waits for them.

    By a fork server, as in a study and in Python 3.14, what they need is pickled.
    """
    keys = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    keys |= {"dataloader_multiprocessing_context": context, "max_steps": 2, "save_steps": 2, "eval_steps": 2}
    result = run_cli("train", write_recipe(**keys))
    assert result.code == 0 and "Traceback" not in result.err, result.err


# SIGKILL


def test_no_worker_of_a_fork_server_outlives_its_training(warm_python):
    script = (
        "import time, torch\n"
        "from torch.utils.data import DataLoader\n"
        "from hf_rskip.training.preemption import outlive_signal\n"
        "keys = {'num_workers': 1, 'multiprocessing_context': 'forkserver', 'persistent_workers': True}\n"
        "batches = iter(outlive_signal(DataLoader(torch.arange(4), **keys)))\n"
        "next(batches), print(batches._workers[0].pid, flush=True), time.sleep(300)\n"
    )
    process = subprocess.Popen([warm_python, "-c", script], stdout=subprocess.PIPE)
    worker = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    assert select.select([worker], [], [], 60)[0]


def kill_at_random(start_cli, python, recipe, kills, seed):
    """Kills a run again and again: while it writes a checkpoint, and at any time in the next one and a half seconds.

    Returns:
        How many of the kills left a checkpoint that was being written or removed.
    """
    rng, folder, torn = random.Random(seed), recipe.parent / "output", 0
    staging = folder / ".incomplete"
    for number in range(kills):
        with open(recipe.parent / "log", "wb") as log:
            process = start_cli("train", recipe, *RESUME, stdout=log, python=[python])
            before = len(list_checkpoints(folder)) and list_checkpoints(folder)[-1].name
            while process.poll() is None:
                last = len(list_checkpoints(folder)) and list_checkpoints(folder)[-1].name
                if any(staging.glob("*/*")) if number % 2 else last != before:
                    time.sleep(rng.uniform(0, 0.03 if number % 2 else 1.5))
                    break
                time.sleep(0.005)
            process.kill()
            process.communicate()
        torn += staging.exists() and any(staging.glob("*/*"))
        for checkpoint in list_checkpoints(folder):  # whatever has the name of a checkpoint is one
            assert find_checkpoint(folder, str(checkpoint)) == checkpoint
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            load_file(checkpoint / "model.safetensors")
    return torn


@pytest.mark.slow
def test_kills_at_random_moments(trained, write_recipe, start_cli, warm_python, capfd):
    recipe = write_recipe()
    kill_at_random(start_cli, warm_python, recipe, kills=2, seed=0)
    assert main(["train", str(recipe), *RESUME]) == 0, capfd.readouterr().err
    assert_same_end(recipe.parent / "output", trained.folder)


# A full disk


@pytest.mark.slow
def test_a_full_disk(trained, write_recipe, run_cli, warm_python, capfd):
    """No file may grow beyond 100 kB, as if the rest did not fit; then there is space again."""
    recipe = write_recipe()
    folder = recipe.parent / "output"

    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    run = "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    stopped = run_cli("train", recipe, "--max_steps", 44, python=[warm_python, "-c", limit + run])
    assert stopped.code == 2
    assert "checkpoint-4' could not be written (" in stopped.err and "with this mended, go on with" in stopped.err
    assert list_checkpoints(folder) == []
    assert main(["train", str(recipe), *RESUME]) == 0, capfd.readouterr().err
    assert_same_end(folder, trained.folder)


# The folder


def create(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 1}')
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / f"checkpoint-{step}" / name).write_text(f"of {step}")


def test_what_was_being_written_is_removed_and_what_was_being_replaced_is_put_back(tmp_path):
    create(tmp_path, 4)
    create(tmp_path / ".incomplete", 8)
    create(tmp_path / ".incomplete" / "replaced", 4, 6)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_text("the new one")
    assert find_checkpoint(tmp_path, "true") == tmp_path / "checkpoint-6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "the new one"


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [4, 8, 12, 100]), (3, [8, 12, 100]), (2, [8, 100]), (1, [8, 100])], ids=str
)
def test_rotation_keeps_what_it_must(tmp_path, limit, kept):
    create(tmp_path, 4, 8, 12, 100)
    rotate_checkpoints(tmp_path, limit, [tmp_path / "checkpoint-8", tmp_path / "checkpoint-100"])
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_the_best_model_of_a_run_that_was_moved_is_its_own(write_image_recipe, tmp_path, capfd):
    """The state of the Trainer has the old path, where another run has a checkpoint of the same step by now."""
    recipe = write_image_recipe(num_train_epochs=1, load_best_model_at_end=True)
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    folder = (recipe.parent / "output").rename(tmp_path / "moved")
    best, last = list_checkpoints(folder)
    other = shutil.copytree(last, recipe.parent / "output" / best.name)
    assert (other / "model.safetensors").read_bytes() != (best / "model.safetensors").read_bytes()
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = str(recipe.parent / "output" / best.name)
    (last / "trainer_state.json").write_text(json.dumps(state))
    # As if it had been killed before its end.
    for path in (folder / "model.safetensors", folder / RECORD_NAME, last / "manifest.json"):
        path.unlink()
    words = ["train", str(recipe), "--output_dir", str(folder), *RESUME]
    assert main(words) == 0, capfd.readouterr().err
    weights, kept = (load_file(path / "model.safetensors") for path in (folder, best))
    assert all(torch.equal(value, kept[name]) for name, value in weights.items())
    (folder / RECORD_NAME).unlink()
    best.rename(tmp_path / "lost")
    assert main(words) == 2
    assert f"The best model is lost: there is no {str(best)!r}" in capfd.readouterr().err
