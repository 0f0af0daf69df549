"""Every key of a recipe is supported, with one meaning for a resumed run, or refused with its reason."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_rskip.cli.main import main
from hf_rskip.errors import UserError
from hf_rskip.ranges import _RANGES
from hf_rskip.recipe.describe import find_idle_keys
from hf_rskip.recipe.keys import CANNOT_MATTER, MAY_CHANGE, MUST_STAY, REFUSED, REFUSED_BY_TASK
from hf_rskip.recipe.parsing import TASKS, TaskArguments, describe_keys, parse_recipe

SUPPORTED = [MUST_STAY, MAY_CHANGE, CANNOT_MATTER]


def test_every_key_is_in_one_set():
    keys = {key.name for parts in TASKS.values() for part in [TaskArguments, *parts.values()] for key in fields(part)}
    for key in keys:
        assert sum(key in names for names in [*SUPPORTED, REFUSED]) == 1, key
    later = {"activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_multiprocessing_context"}
    assert set().union(*SUPPORTED) - keys <= later  # not in every version of Transformers
    assert {key.name for key in fields(Seq2SeqTrainingArguments)} <= keys


def test_ranges_are_those_of_keys():
    known = {key.name for parts in TASKS.values() for part in parts.values() for key in fields(part)}
    ranged = [key for _, keys in _RANGES.values() for key in keys.split()]
    assert set(ranged) <= known


@pytest.mark.parametrize(
    ("task", "key"), [(task, key) for task in TASKS for key in sorted({**REFUSED, **REFUSED_BY_TASK[task]})]
)
def test_a_key_that_would_do_nothing_is_refused(write_recipe, write_image_recipe, task, key):
    known = {part.name for group in TASKS[task].values() for part in fields(group)}
    recipe = write_recipe() if task == "translation" else write_image_recipe()
    with pytest.raises(UserError) as error:
        parse_recipe(recipe, [f"--{key}", "false"])
    reason = {**REFUSED, **REFUSED_BY_TASK[task]}[key]
    expected = f"--{key} is not supported in the command line (task: {task}): {reason}." if key in known else key
    assert expected in str(error.value)


# What `hf-rskip keys` prints


@pytest.mark.parametrize("task", TASKS)
def test_keys_have_a_sentence_each(task):
    lines = [line for line in describe_keys(task).splitlines() if line.startswith("  ")]
    names = [line.split()[0] for line in lines]
    assert len(set(names)) == len(names) and not {*REFUSED, *REFUSED_BY_TASK[task]} & set(names)
    assert {"skip_recursions", "learning_rate", "dataset_name", "seed"} < set(names)
    for line in lines:
        assert len(line.split(") ", 1)[1].split()) >= 2, line


@pytest.mark.parametrize("task", TASKS)
def test_argparse_formats_the_help_of_keys(task):
    """Python 3.14 checks each help text when it parses a recipe: a single percent sign is an error."""
    assert "%%" not in HfArgumentParser([TaskArguments, *TASKS[task].values()]).format_help()


def test_keys_say_their_choices_and_true_defaults():
    lines = {line.split()[0]: line for line in describe_keys("translation").splitlines() if line.strip()}
    assert lines["save_strategy"] == "  save_strategy (epoch) When to save. One of no, steps, epoch, best."
    assert "inverse_sqrt" in lines["lr_scheduler_type"].split("One of")[1]
    assert lines["scale_embedding"].startswith("  scale_embedding (True)")


def test_keys_of_a_word(capsys):
    assert main(["keys", "WARM"]) == 0
    out = capsys.readouterr().out
    assert "  warmup_steps (0.1)" in out and "dropout" not in out
    assert main(["keys", "image-classification", "milestones"]) == 0
    assert "  lr_milestones (None)" in capsys.readouterr().out
    assert main(["keys", "milestones"]) == 2
    assert "No key of the task translation has 'milestones'" in capsys.readouterr().err


# Keys that others leave without effect


def _idle(path):
    recipe = parse_recipe(path, [])
    return find_idle_keys(recipe, recipe.model)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"skip_type": "pre_norm", "skip_scale": 2.0}, "skip_scale"),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, "eval_steps"),
        ({"logging_strategy": "epoch"}, "logging_steps"),
        ({"max_steps": 4}, "num_train_epochs"),
        ({"lr_scheduler_type": "constant"}, "warmup_steps"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "adam_beta2"),
        ({"hub_model_id": "a/b"}, "hub_model_id"),
        ({"loss_spike_window": 5}, "loss_spike_window"),
        ({"tokenizer_name": "folder"}, "vocab_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_idle_keys_are_named(write_recipe, changes, key):
    assert key in dict(_idle(write_recipe(**changes)))


@pytest.mark.parametrize(
    ("optim", "idle"),
    [
        ("adamw_torch", []),
        ("paged_ademamix_8bit", []),
        ("lion_32bit", ["adam_epsilon"]),
        ("grokadamw", ["adam_beta1", "adam_epsilon"]),
    ],
)
def test_keys_of_adam_that_other_optimizers_take(write_recipe, optim, idle):
    """As `Trainer.get_optimizer_cls_and_kwargs` passes them on; the optimizers need not be installed here."""
    recipe = parse_recipe(write_recipe(adam_beta1=0.8, adam_epsilon=1e-7), [])
    recipe.values["optim"] = optim
    assert list(dict(find_idle_keys(recipe, recipe.model))) == idle


def test_a_recipe_without_idle_keys(write_recipe, write_image_recipe):
    for recipe in (write_recipe(), write_image_recipe()):
        assert _idle(recipe) == []
    idle = dict(_idle(write_image_recipe(lr_milestones=[1], lr_scheduler_type="linear")))
    assert list(idle) == ["lr_scheduler_type"]
    assert "momentum" in dict(_idle(write_image_recipe(optim="adamw_torch", momentum=0.5)))
