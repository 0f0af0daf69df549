"""Recipes: what a YAML and a command line become, and the one sentence about each mistake."""

from dataclasses import fields

import pytest
import torch
import yaml
from transformers import get_scheduler

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.errors import UserError
from hf_rskip.models import RSkipConfig
from hf_rskip.recipe.describe import describe_schedule
from hf_rskip.recipe.parsing import check_values, parse_recipe
from hf_rskip.recipe.translation import GenerationArguments, ModelArguments, RSkipTrainingArguments

GROUPS = (ModelArguments, DataArguments, RSkipTrainingArguments, GenerationArguments)
BASE = {"source_lang": "en", "target_lang": "de", "dataset_name": "data", "use_cpu": True, "report_to": "none"}


@pytest.fixture
def parse(tmp_path):
    def parse(text="", words=(), **values):
        path = tmp_path / "recipe.yaml"
        keys = [line.split(":")[0] for line in text.splitlines()]
        defaults = {"output_dir": str(tmp_path), **BASE, **values}
        path.write_text(text + "\n" + yaml.safe_dump({key: defaults[key] for key in defaults if key not in keys}))
        return parse_recipe(path, [str(word) for word in words])

    return parse


@pytest.fixture
def refused(parse):
    def refused(*args, **values):
        with pytest.raises(UserError) as error:
            parse(*args, **values)
        message = str(error.value)
        assert message and "\n" not in message
        return message

    return refused


def test_a_key_belongs_to_one_group():
    names = [group_field.name for group in GROUPS for group_field in fields(group)]
    assert len(names) == len(set(names))


def test_defaults_are_those_of_the_groups(parse):
    recipe = parse()
    assert recipe.model == ModelArguments()
    assert recipe.generation == GenerationArguments()
    assert recipe.data == DataArguments(source_lang="en", target_lang="de", dataset_name="data")
    assert recipe.training.learning_rate == 5e-4 and recipe.training.lr_scheduler_type == "inverse_sqrt"


def test_values_reach_their_group_and_the_command_line_wins(parse):
    recipe = parse("skip_recursions: 3\nnum_beams: 4\nseed: 7", ["--skip_recursions", 4, "--max_source_length=9"])
    assert (recipe.model.skip_recursions, recipe.generation.num_beams, recipe.training.seed) == (4, 4, 7)
    assert recipe.data.max_source_length == 9


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 5e-3", "learning_rate", 5e-3),  # a string in YAML 1.1
        ("learning_rate: 5.0e-3", "learning_rate", 5e-3),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("skip_scale: -1.5", "skip_scale", -1.5),
        ("skip_scale: -1e-3", "skip_scale", -1e-3),
        ("num_train_epochs: 2.5", "num_train_epochs", 2.5),
        ("eval_steps: 4_000", "eval_steps", 4000.0),
        ("max_steps: 4_000", "max_steps", 4000),
        ("lowercase: true", "lowercase", True),
        ("lowercase: no", "lowercase", False),
        ("predict_with_generate: false\nmetric_for_best_model: loss", "predict_with_generate", False),
        ("source_lang: no", "source_lang", "no"),  # Norwegian, but a boolean in YAML 1.1
        ("eval_strategy: no\nload_best_model_at_end: false", "eval_strategy", "no"),
        ("early_stopping_patience: null", "early_stopping_patience", None),
        ("save_total_limit: 3", "save_total_limit", 3),
        ("run_name: 'with spaces = and --dashes'", "run_name", "with spaces = and --dashes"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "True"),
        ("optim: sgd\noptim_args: 'momentum=0.5'", "optim_args", "momentum=0.5"),
        ("lr_scheduler_kwargs: {timescale: 100}", "lr_scheduler_kwargs", {"timescale": 100}),
    ],
)
def test_values_have_the_type_of_their_field(parse, line, key, value):
    (group,) = (group for group in parse(line) if hasattr(group, key))
    assert getattr(group, key) == value and isinstance(getattr(group, key), type(value))


@pytest.mark.parametrize(("words", "value"), [(["--lowercase"], True), (["--lowercase", "false"], False)])
def test_flags_of_the_command_line(parse, words, value):
    assert parse("lowercase: true", words).data.lowercase is value


@pytest.mark.parametrize("text", ["train_files: [a b.en, a.de]", "train_files:\n- a b.en\n- a.de"])
def test_lists(parse, text):
    assert parse(text, dataset_name=None).data.train_files == ["a b.en", "a.de"]
    words = ["--train_files", "c.en", "c.de"]
    assert parse(text, words, dataset_name=None).data.train_files == ["c.en", "c.de"]


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 5), (7, 7)])
def test_the_checkpoints_to_average_are_kept(parse, limit, kept):
    """0 keeps all."""
    assert parse(save_total_limit=limit, average_checkpoints=5).training.save_total_limit == kept


def test_null_keeps_the_default(parse):
    assert parse("save_total_limit: null").training.save_total_limit == 2
    assert parse("max_length_ratio: null").data.max_length_ratio is None
    recipe = parse("save_total_limit: 3\nskip_scale: null", ["--save_total_limit", "null"])
    assert recipe.training.save_total_limit == 2 and not {"save_total_limit", "skip_scale"} & recipe.given.keys()
    assert parse("test_split: null", ["--test_split", "other"]).data.test_split == "other"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("skip_recursion", "'skip_recursions'"),
        ("per_device_train_batch_token", "'per_device_train_batch_tokens'"),
        ("source_language", "'source_lang'"),
        ("decoder_vocab_size", "'"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(refused, key, hint):
    in_file = refused(f"{key}: 1")
    assert f"Unknown key {key!r} in " in in_file and "recipe.yaml" in in_file and hint in in_file
    on_command_line = refused("", [f"--{key}", "1"])
    assert (
        f"Unknown key '--{key}' in the command line" in on_command_line
        and hint.replace("'", "'--", 1) in on_command_line
    )
    assert refused("", [f"--{key}=1"]) == on_command_line


def test_an_unknown_key_without_a_neighbour(refused):
    assert "did you mean" not in refused("xyzzy: 1")
    assert "1" in refused("1: 2")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("learning_rate: fast", "learning_rate"),
        ("d_model: 12.5", "d_model"),
        ("d_model: [1, 2]", "d_model"),
        ("seed: ''", "seed"),
        ("lowercase: perhaps", "lowercase"),
        ("eval_strategy: sometimes", "eval_strategy"),
        ("num_beams: {a: 1}", "num_beams"),
        ("per_device_train_batch_tokens: 0", "per_device_train_batch_tokens"),
        ("early_stopping_patience: 0", "early_stopping_patience"),
        ("max_source_length: -1", "max_source_length"),
        ("max_steps: 0", "max_steps"),
        ("eval_steps: -1", "eval_steps"),
        ("save_steps: 0", "save_steps"),
        ("eval_delay: -1", "eval_delay"),
        ("source_lang: null", "source_lang"),
        ("train_files: [a, b]", "train_files"),
        ("optim: magic", "optim"),
        ("metric_for_best_model: blue", "metric_for_best_model must be one of bleu, chrf, loss"),
        ("predict_with_generate: false", "metric_for_best_model must be one of loss without predict_with_generate"),
        ("lr_scheduler_type: magic", "lr_scheduler_type"),
        ("save_strategy: 'no'", "load_best_model_at_end"),  # these do not fit each other
    ],
)
def test_a_wrong_value_is_refused_with_its_key(refused, line, key):
    assert key in refused(line)


def test_a_word_without_a_key(refused):
    assert "'epochs'" in refused("", ["epochs", "3"])
    assert "'4'" in refused("", ["--num_beams", "3", "4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("- a\n- b", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("a: [1, 2", "cannot be read"),
        ("a: 1\n b: 2", "cannot be read"),
    ],
)
def test_a_broken_file(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse_recipe(path, [])
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="There is no recipe '.*missing.yaml'"):
        parse_recipe(tmp_path / "missing.yaml", [])
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        parse_recipe(tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(UserError, match="cannot be read"):
        parse_recipe(tmp_path / "latin.yaml", [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 0),
        ("max_new_tokens", 0),
        ("length_penalty", "nan"),
        ("length_penalty", -1),
        ("gnmt_length_penalty", -0.1),
        ("gnmt_length_penalty", "inf"),
        ("max_len_a", -1),
        ("max_len_a", "inf"),
        ("max_len_b", -1),
        ("generation_num_beams", 0),
        ("per_device_eval_batch_size", 0),
        ("label_smoothing_factor", 1),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("adam_beta1", 1),
        ("adam_beta2", -0.1),
        ("adam_epsilon", -1),
        ("adam_epsilon", "inf"),
        ("weight_decay", "inf"),
        ("warmup_steps", "inf"),
        ("num_train_epochs", "inf"),
        ("logging_steps", "inf"),
        ("save_steps", "inf"),
        ("max_grad_norm", -1),
        ("seed", 4294967296),
        ("data_seed", -1),
        ("dataloader_num_workers", -1),
        ("dataloader_persistent_workers", "true"),
        ("bleu_tokenize", "no_such"),
        ("report_to", "wandb"),
        ("report_to", "no_such"),
        ("optim", "lion_8bit"),
        ("optim_args", "no_such_option=1"),
        ("lr_scheduler_type", "cosine_with_min_lr"),  # needs a minimum
        ("lr_scheduler_kwargs", '{"no_such": 1}'),
        ("fp16", "true"),
        ("eval_steps", "null"),  # which Transformers takes from logging_steps
    ],
)
def test_values_that_would_fail_after_hours_fail_at_once(write_recipe, key, value):
    with pytest.raises(UserError, match=key):
        parse_recipe(write_recipe(), [f"--{key}", str(value)])


@pytest.mark.parametrize(
    ("key", "value"), [("length_penalty", 0.6), ("gnmt_length_penalty", 0.6), ("early_stopping", "true")]
)
def test_greedy_search_has_no_use_for_beam_search_keys(write_recipe, key, value):
    """Transformers refuses them at the first save."""
    with pytest.raises(UserError, match=f"{key} has no effect with num_beams 1"):
        parse_recipe(write_recipe(), ["--num_beams", "1", f"--{key}", str(value)])


def test_the_default_schedule_warms_up_and_decays(write_recipe):
    training = parse_recipe(write_recipe(warmup_steps=None), []).training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], training.learning_rate)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(400), 400)
    rates = []
    for _ in range(400):
        rates.append(schedule.get_last_lr()[0] / training.learning_rate)
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[40] == 1 and rates[160] == pytest.approx(0.5)
    assert describe_schedule(training, 400) == "learning rate: 0.01, inverse_sqrt, warm-up in 40 of 400 steps"
    training.warmup_steps = 4000
    assert "inverse_sqrt (its peak is never reached: lower warmup_steps), warm-up in 4,000 of 400" in describe_schedule(
        training, 400
    )


def test_a_schedule_without_warm_up_and_milestones_after_the_end_are_called_so(write_recipe, write_image_recipe):
    training = parse_recipe(write_recipe(lr_scheduler_type="constant"), []).training
    assert describe_schedule(training, 400) == "learning rate: 0.01, constant, 400 steps"
    training = parse_recipe(write_image_recipe(lr_milestones=[1, 2.5, 3], num_train_epochs=2.5), []).training
    said = "times 0.1 after epochs 1, 2.5 (not reached), 3 (not reached), warm-up in 0 of 400 steps"
    assert describe_schedule(training, 400) == f"learning rate: 0.05, {said}"


def test_a_key_that_stands_twice_is_an_error(write_recipe):
    recipe = write_recipe()
    recipe.write_text(recipe.read_text() + "\nskip_recursions: 1\nskip-recursions: 3\n")
    with pytest.raises(UserError, match="'skip_recursions' stands twice"):
        parse_recipe(recipe, [])


def test_a_start_model_brings_its_tokenizer(write_recipe):
    with pytest.raises(UserError, match="tokenizer_name cannot be set with model_name_or_path"):
        parse_recipe(write_recipe(), ["--model_name_or_path", "a", "--tokenizer_name", "b"])


@pytest.mark.parametrize(
    "words", [["--max_new_tokens", "null"], ["--max_new_tokens=null"], ["--max-new-tokens", "null"]]
)
def test_null_unsets_a_key(write_recipe, words):
    recipe = parse_recipe(write_recipe(), [*words, "--seed", "5"])
    assert recipe.generation.max_new_tokens is None and recipe.training.seed == 5
    assert "max_new_tokens" not in recipe.given


def test_languages_are_those_of_the_model_that_it_starts_from(parse, refused, tmp_path):
    """And what the recipe or the command line names wins."""
    RSkipConfig(source_lang="en", target_lang="de").save_pretrained(tmp_path / "model")
    start = {"model_name_or_path": str(tmp_path / "model")}
    recipe = parse(**start, source_lang=None, target_lang=None)
    assert (recipe.data.source_lang, recipe.data.target_lang) == ("en", "de")
    assert recipe.given["source_lang"] == "en" and recipe.given["target_lang"] == "de"
    recipe = parse(words=["--model_name_or_path", tmp_path / "model", "--target-lang=fr"], target_lang=None)
    assert (recipe.data.source_lang, recipe.data.target_lang) == ("en", "fr")
    RSkipConfig().save_pretrained(tmp_path / "model")
    assert "source_lang must be a language code" in refused(**start, source_lang=None)
    missing = str(tmp_path / "missing")
    assert f"There is no model {missing!r}" in refused(model_name_or_path=missing, source_lang=None)


def test_a_key_of_the_other_task(refused):
    sentence = "'--image_size' in the command line is a key of task image-classification, and the task is translation."
    assert refused(words=["--image_size", 4]) == sentence
    with pytest.raises(UserError) as error:
        check_values({"num_beams": 4}, "here", "image-classification")
    assert str(error.value) == "'num_beams' in here is a key of task translation, and the task is image-classification."
