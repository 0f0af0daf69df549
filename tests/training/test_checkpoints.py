"""Which checkpoint a run goes on from."""

import json

import pytest

from hf_rskip.errors import UserError
from hf_rskip.training.checkpoints import STAGING_NAME, find_checkpoint


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


@pytest.mark.parametrize("broken", [None, "", STATE[:-3]], ids=["missing", "empty", "truncated"])
def test_an_incomplete_one_is_removed(tmp_path, broken):
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=broken, checkpoint_7=broken)
    assert find_checkpoint(tmp_path, "true") == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_none_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path / "missing", "true") is None
    assert find_checkpoint(create(tmp_path, checkpoint_6=None), "true") is None
    assert contents(tmp_path) == []


@pytest.mark.parametrize("value", [None, "", "false", "False"])
def test_a_fresh_start_beside_checkpoints_is_refused(tmp_path, value):
    assert find_checkpoint(tmp_path, value) is None
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=None)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds checkpoint-6: .*resume_from_checkpoint true"):
        find_checkpoint(tmp_path, value)
    assert contents(tmp_path) == before


def test_a_path(tmp_path):
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=None, checkpoint_7=STATE)
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    for name in ("checkpoint-6", "checkpoint-8"):
        with pytest.raises(UserError, match=f"{name}' is not a complete checkpoint"):
            find_checkpoint(tmp_path, str(tmp_path / name))
    assert (tmp_path / "checkpoint-6").exists(), "what the user named is not ours to remove"


@pytest.mark.parametrize("lost", ["model.safetensors", "scheduler.pt", "rng_state.pth"])
def test_one_that_lost_a_file_is_refused_and_kept(tmp_path, lost):
    create(tmp_path, checkpoint_5=STATE, checkpoint_6=STATE)
    (tmp_path / "checkpoint-6" / lost).unlink()
    with pytest.raises(UserError, match=f"checkpoint-6' cannot be resumed from: it has no {lost.split('.')[0]}"):
        find_checkpoint(tmp_path, "true")
    assert (tmp_path / "checkpoint-6").exists()


def test_a_fresh_start_beside_a_finished_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="already holds a model"):
        find_checkpoint(tmp_path, None)


def test_a_refused_start_leaves_what_another_run_is_writing(tmp_path):
    create(tmp_path, checkpoint_5=STATE)
    create(tmp_path / STAGING_NAME, checkpoint_6=None)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds checkpoint-5"):
        find_checkpoint(tmp_path, None)
    assert contents(tmp_path) == before
    find_checkpoint(tmp_path, "true")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
