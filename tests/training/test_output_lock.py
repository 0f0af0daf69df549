"""Two runs never write into one folder."""

import errno
import fcntl
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_rskip.cli.main import main
from hf_rskip.errors import UserError
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.training import train
from hf_rskip.training.output_lock import locked

HOLD = """
import sys
from hf_rskip.training.output_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a folder until it is killed."""
    script = tmp_path / "hf-rskip"  # by this name the package knows not to import torch
    script.write_text(HOLD)
    started = []

    def hold(folder):
        command = [sys.executable, str(script), str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("words", [(), ("--resume_from_checkpoint", "true")], ids=["fresh", "resumed"])
def test_a_second_run_is_refused(words, holder, write_recipe, write_image_recipe, capfd):
    for recipe in (write_recipe(), write_image_recipe()):
        folder = recipe.parent / "output"
        holder(folder)
        (folder / ".incomplete" / "checkpoint-4").mkdir(parents=True)
        assert main(["train", str(recipe), *words]) == 2
        assert f"Another run is writing into {str(folder)!r}" in capfd.readouterr().err
        assert (folder / ".incomplete" / "checkpoint-4").is_dir(), "what the first is writing"


def test_a_killed_run_holds_nothing(holder, tmp_path):
    folder = tmp_path / "new" / "output"
    process = holder(folder)
    with pytest.raises(UserError), locked(folder):
        pass
    process.kill()
    process.wait()
    with locked(folder):
        pass
    holder(folder)


@pytest.mark.parametrize("kind", ["file", "loop", "read-only"])
def test_a_folder_that_cannot_be_written_into(kind, write_recipe, tmp_path, capfd):
    """Before the corpus, which is not there, is looked for."""
    folder = tmp_path / "output"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "loop":
        folder.symlink_to(folder)
    else:
        folder = Path("/proc/hf_rskip")  # where not even the administrator may create one
    recipe = write_recipe(output_dir=str(folder), dataset_name=str(tmp_path / "no_corpus"))
    assert main(["train", str(recipe)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-rskip: error: output_dir {str(folder)!r} cannot be written into: ")


def test_an_optimizer_that_cannot_be_is_refused_before_the_corpus_is_read(write_recipe, tmp_path, capfd):
    recipe = write_recipe(dataset_name=str(tmp_path / "no_corpus"), optim="sgd", optim_args="momentum=-1")
    assert main(["train", str(recipe)]) == 2
    assert "optim sgd cannot be used: " in capfd.readouterr().err.splitlines()[-1]
    assert not (recipe.parent / "output").exists()


def test_a_file_system_without_locks(write_image_recipe, monkeypatch, capfd):
    """Nobody is kept out, and everybody trains."""

    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    recipe = write_image_recipe(max_steps=1, eval_strategy="no", save_strategy="no", eval_steps=None)
    with locked(recipe.parent / "output"):
        assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    assert "model, card and scores: " in capfd.readouterr().out
    assert (recipe.parent / "output" / "model.safetensors").is_file()


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").touch()
    for output_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="output_dir '.*' cannot be written into: "), locked(output_dir):
            pass


@pytest.mark.parametrize(
    "write", [lambda path: path.write_text("text" * 999), lambda path: save_file({"x": torch.ones(999)}, path)]
)
def test_a_full_disk_at_the_last_save(write_recipe, tmp_path, monkeypatch, write):
    """Wherever a run meets it, it says how to go on; no file may grow beyond 1 kB, as if the rest did not fit."""

    def run(recipe):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write(tmp_path / "file")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train, "_train", run)
    with pytest.raises(UserError) as error:
        train.train(parse_recipe(write_recipe(), []))
    assert "File too large" in str(error.value)
    assert str(error.value).endswith("with space again, go on with `--resume_from_checkpoint true`.")
