"""A resumed run: what it may change it does, what it must keep is checked, and a finished one stays as it is."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import DefaultFlowCallback, TrainerControl, TrainerState

from hf_rskip.cli.main import main
from hf_rskip.data.images.pixels import ImageTensors
from hf_rskip.errors import UserError
from hf_rskip.recipe.describe import describe_resumption
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.training.checkpoints import list_checkpoints
from hf_rskip.training.resuming import (
    RECORD_NAME,
    CurrentSteps,
    begin_record,
    check_data,
    finished_results,
    write_record,
)

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def resume(write_recipe, tmp_path):
    """Resumes a run of `write_recipe(**before)`, at step 4, with other keys and number of processes."""

    def resume(*words, processes=1, **before):
        path, checkpoint = write_recipe(**before), tmp_path / "checkpoint-4"
        record = begin_record(parse_recipe(path, []), None)
        record["values"]["processes"] = processes
        checkpoint.mkdir()
        write_record(checkpoint, record, 4)
        (checkpoint / "trainer_state.json").write_text('{"global_step": 4, "epoch": 0.36}')
        return begin_record(parse_recipe(path, list(words)), checkpoint)["resumed"]

    return resume


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("learning_rate", 0.01, 1e-5),
        ("weight_decay", 0, 0.1),
        ("adam_beta2", 0.98, 0.9),
        ("seed", 3, 4),
        ("per_device_train_batch_tokens", 512, 256),
        ("gradient_accumulation_steps", 1, 2),
        ("global_batch_tokens", None, 512),
        ("lr_scheduler_type", "inverse_sqrt", "linear"),
        ("dropout", 0.1, 0.2),
        ("max_source_length", 32, 30),
        ("max_train_samples", None, 100),
        ("dataset_name", "{corpus}", "elsewhere"),
        ("bf16", "False", "True"),
    ],
)
def test_what_must_stay_is_refused_with_both_values(resume, corpus_folder, key, old, new):
    with pytest.raises(UserError) as error:
        resume(f"--{key}", str(new))
    old = corpus_folder if old == "{corpus}" else old
    message = str(error.value).replace("'False'", "False").replace("'True'", "True")
    old, new = (value if value in ("True", "False") else repr(value) for value in (old, new))
    assert f"checkpoint-4 was trained with {key} {old} and cannot go on with {new}: " in message


def test_other_training_files_are_refused(resume, tmp_path):
    names = {part: [f"{part}.en", f"{part}.de"] for part in ("train_files", "validation_files", "test_files")}
    with pytest.raises(
        UserError, match=r"trained with train_files \['train_files.en'.* cannot go on with \['other.en'"
    ):
        resume("--train_files", "other.en", "other.de", dataset_name=None, **names)


def test_another_number_of_processes_is_refused_unless_the_steps_are_the_same(resume):
    with pytest.raises(UserError, match="trained with processes 2 and cannot go on with 1"):
        resume(processes=2)


def test_a_global_batch_is_the_same_on_any_number_of_processes(resume):
    (resumed,) = resume("--per_device_train_batch_tokens", "256", processes=2, global_batch_tokens=1024)
    assert resumed["changed"]["processes"] == [2, 1]
    assert resumed["changed"]["per_device_train_batch_tokens"] == [512, 256]


def test_what_may_change_is_said(resume):
    (resumed,) = resume("--num_train_epochs", "8", "--run_name", "another", "--num_beams", "3")
    assert resumed == {"step": 4, "changed": {"num_train_epochs": [4, 8], "num_beams": [2, 3]}}
    said = describe_resumption(resumed)
    assert said.startswith("step 4 with ") and "num_train_epochs 8 (before: 4)" in said and "num_beams 3" in said


def test_what_cannot_matter_is_not_mentioned(resume):
    assert resume("--run_name", "another", "--dataloader_num_workers", "1") == [{"step": 4, "changed": {}}]


def test_a_checkpoint_that_does_not_say_its_recipe_is_refused(write_recipe, tmp_path):
    with pytest.raises(UserError, match=r"recipe.json' cannot be read \(No such file"):
        begin_record(parse_recipe(write_recipe(), []), tmp_path)


@pytest.mark.parametrize(
    ("said", "steps", "expected"),
    [(None, 4000, [50, 100, 150]), (None, 200, [10, 20, 30]), (None, 8, [1, 2, 3]), (50, 200, [50, 100, 150])],
)
def test_a_short_run_logs_often_enough_for_a_curve(write_recipe, said, steps, expected):
    training = parse_recipe(write_recipe(logging_steps=said), []).training
    state, control = TrainerState(max_steps=steps, is_world_process_zero=False), TrainerControl()
    callbacks = [DefaultFlowCallback(), CurrentSteps(says_logging=said is not None)]
    callbacks[1].on_train_begin(training, state, control)
    logged = []
    while len(logged) < 3:
        state.global_step += 1
        control.should_log = False
        for callback in callbacks:
            callback.on_step_end(training, state, control)
        logged += [state.global_step] * control.should_log
    assert logged == expected and state.logging_steps == 50  # as the arguments say, which resuming compares


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 21},
            "eval_delay 21 would be after the end of 20 steps",
        ),
        ({"eval_strategy": "epoch", "eval_delay": 5, "save_strategy": "epoch"}, "after the end of 4 epochs"),
    ],
)
def test_an_evaluation_after_the_end_is_refused(write_recipe, changes, said):
    training = parse_recipe(write_recipe(**changes), []).training
    with pytest.raises(UserError, match=said):
        CurrentSteps(True).on_train_begin(training, TrainerState(max_steps=20, num_train_epochs=4), TrainerControl())


# Whole runs


def test_a_finished_run_stays_as_it_is(trained, capfd):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*") if path.name != ".lock"}
    assert main(["train", str(trained.recipe), *RESUME]) == 0
    out = capfd.readouterr().out
    assert out.endswith("nothing is left to do\n") and "holds a finished run of " in out
    assert main(["train", str(trained.recipe), *RESUME, "--num_beams", "3"]) == 2
    error = capfd.readouterr().err
    assert "holds a finished run of num_beams 2, which cannot become 3" in error
    assert main(["train", str(trained.recipe), *RESUME, "--learning_rate", "1e-5"]) == 2
    assert "trained with learning_rate 0.01 and cannot go on with 1e-05" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = json.loads((trained.folder / "all_results.json").read_text())
    recipe = parse_recipe(trained.recipe, RESUME)
    assert finished_results(recipe) == results and results["train_loss"] > 0
    assert finished_results(parse_recipe(trained.recipe, [*RESUME, "--num_train_epochs", "5"])) is None
    with pytest.raises(UserError, match=r"output' stands at \d+, beyond max_steps 3"):
        finished_results(parse_recipe(trained.recipe, [*RESUME, "--max_steps", "3"]))


def test_results_of_an_earlier_run_are_not_kept(trained, tmp_path, capfd):
    """Of one whose record is lost, so that it is resumed without a step to do."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns(".lock", RECORD_NAME))
    for checkpoint in list_checkpoints(folder):
        shutil.copy(trained.folder / checkpoint.name / RECORD_NAME, checkpoint)
    assert main(["train", str(trained.recipe), *RESUME, "--output_dir", str(folder)]) == 0, capfd.readouterr().err
    results = json.loads((folder / "all_results.json").read_text())
    assert "train_resumed_at_step" in results and "train_loss" not in results
    card = (folder / "README.md").read_text()
    assert " seconds (since it was last resumed" in card


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"torn", "is not as it was written"),
        ("all_results.json", None, r"cannot be read \(No such file"),
        ("all_results.json", b"{", "is damaged: it is not JSON"),
        (RECORD_NAME, b"[]", "is damaged: it is not a mapping"),
        (RECORD_NAME, b"{}", "does not say how that was trained"),
    ],
)
def test_a_damaged_finished_run_is_no_finished_run(trained, tmp_path, name, content, said):
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns(".lock"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        finished_results(parse_recipe(trained.recipe, [*RESUME, "--output_dir", str(folder)]))


def test_data_are_known_by_their_content(trained, tmp_path, monkeypatch, capfd):
    """A folder that was moved is taken, however its name is spelled; one that has changed is not."""
    shutil.copytree(trained.folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    corpus_folder = yaml.safe_load(trained.recipe.read_text())["dataset_name"]
    shutil.copytree(corpus_folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    words = ["train", str(trained.recipe), *RESUME, "--output_dir", "copy"]
    assert main([*words, "--dataset_name", "./moved"]) == 2
    assert "with this recipe nothing is left to train: its results stay as they are" in capfd.readouterr().err
    assert main([*words, "--dataset_name", os.path.relpath(corpus_folder)]) == 0
    assert "nothing is left to do" in capfd.readouterr().out
    table = pq.read_table("moved/train.parquet")
    pq.write_table(table.take([1, 0, *range(2, len(table))]), "moved/train.parquet")
    assert main([*words, "--dataset_name", "moved"]) == 2
    assert "The train data have changed since the checkpoint was written" in capfd.readouterr().err


def test_images_are_known_by_their_content():
    pixels, labels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([0, 1])
    record = {"data": {}}
    check_data(record, {"train": ImageTensors(pixels, labels).checksum()})
    check_data(record, {"train": ImageTensors(pixels.clone(), labels.clone()).checksum()})
    for other in (ImageTensors(pixels.flip(0), labels), ImageTensors(pixels, labels.flip(0))):
        with pytest.raises(UserError, match="The train data have changed"):
            check_data(record, {"train": other.checksum()})


def test_a_run_folder_is_no_checkpoint_of_a_finished_run(trained):
    recipe = parse_recipe(trained.recipe, ["--resume_from_checkpoint", str(trained.folder)])
    assert finished_results(recipe) is None  # and `find_checkpoint` refuses it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_steps", "3"], "stands at 4, beyond max_steps 3"),
        (["--num_train_epochs", "0.3"], "stands at 0.36, beyond num_train_epochs 0.3"),
    ],
)
def test_a_target_before_the_checkpoint_is_refused(resume, words, said):
    with pytest.raises(UserError, match=said):
        resume(*words)


def test_part_of_an_epoch_is_rounded_up_to_whole_steps(resume):
    """0.3 of 11 steps are 4, which end at 0.36."""
    (resumed,) = resume("--early_stopping_patience", "7", num_train_epochs=0.3)
    assert resumed == {"step": 4, "changed": {"early_stopping_patience": [6, 7]}}


def test_a_resumed_run_follows_what_may_change(write_image_recipe, capfd):
    """Steps of evaluation, saving and logging, patience and length, which the Trainer takes from the checkpoint."""
    recipe = write_image_recipe(num_train_epochs=1, early_stopping_patience=5)
    folder = recipe.parent / "output"
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    assert json.loads((folder / RECORD_NAME).read_text())["step"] == 9
    steps = {"eval_steps": 2, "save_steps": 2, "logging_steps": 1, "save_total_limit": 4}
    words = [word for key, value in {**steps, "max_steps": 13}.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(recipe), *RESUME, *words, "--early_stopping_patience", "7"]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "resuming from " in out and "eval_steps 2 (before: 3)" in out
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 13
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [3, 6, 9, 10, 12, 13]
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry][-3:] == [11, 12, 13]
    assert state["stateful_callbacks"]["EarlyStopping"]["args"]["early_stopping_patience"] == 7
    assert [path.name for path in list_checkpoints(folder)][-1] == "checkpoint-13"
    record = json.loads((folder / RECORD_NAME).read_text())
    assert record["step"] == 13 and record["resumed"][0]["changed"]["max_steps"] == [-1, 13]
    card = (folder / "README.md").read_text()
    assert "it was at step 9 with " in card and "early_stopping_patience 7 (before: 5)" in card
    keys = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert keys["eval_steps"] == 2 and keys["learning_rate"] == 0.05
    # And a longer training that has nothing to do leaves the record.
    assert main(["train", str(recipe), *RESUME, *words, "--early_stopping_patience", "9"]) == 2
    assert "with this recipe nothing is left to train" in capfd.readouterr().err
    assert json.loads((folder / RECORD_NAME).read_text()) == record
