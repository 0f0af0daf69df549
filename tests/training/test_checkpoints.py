"""Which checkpoint a run goes on from."""

import json
import shutil
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from hf_rskip.decoding.loading import load_model
from hf_rskip.errors import UserError
from hf_rskip.hub.push import collect_files
from hf_rskip.manifest import CONFIGURATIONS, check_manifest, write_manifest
from hf_rskip.training.averaging import average_weights
from hf_rskip.training.checkpoints import STAGING_NAME, find_checkpoint, list_checkpoints, rotate_checkpoints


def create(folder, **states):
    for name, state in states.items():
        checkpoint = folder / name.replace("_", "-")
        checkpoint.mkdir(parents=True)
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / file).write_bytes(b"content")
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    return folder


def contents(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


STATE = json.dumps({"global_step": 1})


@pytest.mark.parametrize("value", ["true", "True"])
def test_the_last_one_by_number(tmp_path, value):
    create(tmp_path, checkpoint_5=STATE, checkpoint_20=STATE, checkpoint_100=STATE)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, value) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("broken", ["", STATE[:-3], "[]"], ids=["empty", "truncated", "other"])
def test_one_whose_state_is_damaged_is_reported_and_kept(tmp_path, broken):
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=broken, checkpoint_7=broken)
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match="checkpoint-7' cannot be resumed from: .*trainer_state.json' is .*checkpoint-5`"
    ):
        find_checkpoint(tmp_path, "true")
    assert contents(tmp_path) == before
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"


def test_what_cannot_be_read_is_not_incomplete(tmp_path):
    """A loop of links is nothing that even the administrator can read."""
    create(tmp_path, checkpoint_4=STATE, checkpoint_8=STATE)
    for step in (4, 8):
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        path.unlink()
        path.symlink_to(path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="trainer_state.json' cannot be read .Too many levels.*no other .* is whole"):
        find_checkpoint(tmp_path, "true")
    rotate_checkpoints(tmp_path, 1, [])
    assert contents(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' cannot be read"):
        list_checkpoints(tmp_path / "file")


@pytest.mark.parametrize("content", [[], ["notes.txt", "model.safetensors"]], ids=["empty", "foreign"])
@pytest.mark.parametrize("value", ["true", "checkpoint-5"])
def test_a_folder_that_only_has_the_name_is_reported_and_kept(tmp_path, content, value):
    create(tmp_path, checkpoint_5=STATE)
    (tmp_path / "checkpoint-11").mkdir()
    for name in content:
        (tmp_path / "checkpoint-11" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="checkpoint-11' has the name of a checkpoint, but no .*: move it away"):
        find_checkpoint(tmp_path, value if value == "true" else str(tmp_path / value))
    rotate_checkpoints(tmp_path, 1, [tmp_path / "checkpoint-5"])
    assert contents(tmp_path) == before


def test_none_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path / "missing", "true") is None
    assert find_checkpoint(tmp_path, "true") is None


@pytest.mark.parametrize("value", [None, "", "false", "False"])
def test_a_fresh_start_beside_checkpoints_is_refused(tmp_path, value):
    assert find_checkpoint(tmp_path, value) is None
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=None)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds checkpoint-6: .*resume_from_checkpoint true"):
        find_checkpoint(tmp_path, value)
    assert contents(tmp_path) == before


def test_a_path(tmp_path):
    create(tmp_path, checkpoint_5=STATE, checkpoint_7=STATE)
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    with pytest.raises(
        UserError, match="checkpoint-8' cannot be resumed from: .*`--resume_from_checkpoint .*checkpoint-7`"
    ):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_one_without_a_manifest_is_taken_with_a_warning_if_it_has_all_files(tmp_path, lost, caplog):
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=STATE)
    assert find_checkpoint(tmp_path, "true") == tmp_path / "checkpoint-6"
    assert "checkpoint-6 has no manifest.json" in caplog.text
    (tmp_path / "checkpoint-6" / lost).unlink()
    with pytest.raises(UserError, match=f"checkpoint-6' cannot be resumed from: it has no {lost.split('.')[0]}; go on"):
        find_checkpoint(tmp_path, "true")
    assert (tmp_path / "checkpoint-6").exists()


@pytest.fixture(scope="module")
def copied(trained, tmp_path_factory):
    """The tiny run, to be damaged."""
    return shutil.copytree(trained.folder, tmp_path_factory.mktemp("run") / "output")


@contextmanager
def damaged(path, damage):
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_of_a_checkpoint_is_named_with_the_newest_checkpoint_that_is_whole(damage, copied):
    whole, last = list_checkpoints(copied)
    names = sorted(path.name for path in last.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for name in names:
        if (name, damage) == ("manifest.json", "missing"):
            continue
        with damaged(last / name, damage), pytest.raises(UserError) as error:
            find_checkpoint(copied, "true")
        assert str(error.value).startswith(f"{str(last)!r} cannot be resumed from: ")
        assert name in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"; go on with `--resume_from_checkpoint {whole}`")
    assert find_checkpoint(copied, "true") == last


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_of_a_model_is_named(damage, copied):
    """Whoever loads it: from its folder, as a part of an average, or to push it. Configurations may be edited."""
    loaders = (load_model, lambda folder: average_weights([folder]), collect_files)
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for load, name in product(loaders, names):
        if damage != "flipped" or name not in CONFIGURATIONS:
            with damaged(copied / name, damage), pytest.raises(UserError, match=name.replace(".", "[.]")) as error:
                load(str(copied))
            assert "\n" not in str(error.value)
    load_model(str(copied))


def test_a_manifest_of_nothing_proves_nothing(tmp_path):
    write_manifest(tmp_path)
    with pytest.raises(UserError, match="manifest.json' is damaged"):
        check_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_truncated_file_of_a_model_without_a_manifest_is_one_sentence(name, copied, tmp_path):
    folder = shutil.copytree(copied, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "manifest.json"))
    load_model(str(folder))
    with damaged(folder / name, "truncated"), pytest.raises(UserError) as error:
        load_model(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_were_changed_on_purpose_load_without_the_manifest(copied, tmp_path):
    folder = shutil.copytree(copied, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    model, _ = load_model(str(folder))
    model.lm_head.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(
        UserError, match="model.safetensors' is not as .*if you changed it yourself, remove '.*manifest"
    ):
        load_model(str(folder))
    (folder / "manifest.json").unlink()
    assert torch.equal(load_model(str(folder))[0].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("value", [None, "true"])
def test_a_fresh_start_beside_a_finished_model_is_refused(tmp_path, value):
    """Also the one that resuming comes to without a checkpoint."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="already holds a model, and no checkpoint to go on from"):
        find_checkpoint(tmp_path, value)


def test_a_refused_start_leaves_what_another_run_is_writing(tmp_path):
    create(tmp_path, checkpoint_5=STATE)
    create(tmp_path / STAGING_NAME, checkpoint_6=None)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds checkpoint-5"):
        find_checkpoint(tmp_path, None)
    assert contents(tmp_path) == before
    find_checkpoint(tmp_path, "true")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
