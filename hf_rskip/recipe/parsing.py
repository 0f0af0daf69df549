"""Reads and checks training recipes: flat YAML files of keys."""

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from ..checks import did_you_mean
from ..data.images.arguments import ImageDataArguments
from ..data.text.arguments import DataArguments
from ..decoding.loading import load_config
from ..errors import UserError
from ..models import RSkipConfig, RSkipForConditionalGeneration, RSkipResNetConfig
from .images import ImageModelArguments, ImageTrainingArguments
from .keys import is_supported, why_refused
from .translation import GenerationArguments, ModelArguments, RSkipTrainingArguments


class Recipe(NamedTuple):
    """A parsed recipe."""

    task: str
    """A key of [`TASKS`]."""
    model: ModelArguments | ImageModelArguments
    data: DataArguments | ImageDataArguments
    training: RSkipTrainingArguments | ImageTrainingArguments
    generation: GenerationArguments | None
    """`None` where the task generates nothing."""
    keys: dict[str, Any]
    """What was said, by key: the recipe that makes the model again."""
    values: dict[str, Any]
    """The value of every key, said or not, but for `hub_token`."""


TASKS: dict[str, dict[str, type]] = {
    "translation": {
        "model": ModelArguments,
        "data": DataArguments,
        "training": RSkipTrainingArguments,
        "generation": GenerationArguments,
    },
    "image-classification": {
        "model": ImageModelArguments,
        "data": ImageDataArguments,
        "training": ImageTrainingArguments,
    },
}
"""The keys of each task, by the part of a [`Recipe`] that they make."""


@dataclass
class TaskArguments:
    """The key that decides which other keys there are."""

    task: str = field(default="translation", metadata={"help": "translation or image-classification."})


# Where the model goes and how it gets there is no part of what makes it.
_NOT_REPEATED = {"output_dir", "resume_from_checkpoint", "hub_token"}


class _Parser(HfArgumentParser):
    """An HfArgumentParser that raises instead of printing its whole usage."""

    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))

    def fields(self) -> list[Field]:
        return [part for arguments in self.dataclass_types for part in fields(arguments) if part.init]

    def keys(self, task: str) -> list[str]:
        return [part.name for part in self.fields() if is_supported(part.name, task)]

    def refuses(self, key: str, task: str) -> bool:
        """Whether the task has the key, but hf_rskip does not support it."""
        return not is_supported(key, task) and any(part.name == key for part in self.fields())

    def list_keys(self) -> list[str]:
        return [part.name for part in self.fields() if "list[" in str(part.type).lower()]


class _YamlLoader(yaml.SafeLoader):
    """Takes `true` and `false` alone for booleans, as YAML 1.2: `no` is a language, and a value of `save_strategy`.

    A key that stands twice is an error.
    """

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key).replace("-", "_") for key, _ in node.value if key.tag.endswith(":str")]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a flat YAML of training keys; `overrides` (`["--key", "value", ...]`) win over it, `null` unsets a key.

    Example:

    ```python
    >>> from hf_rskip import parse_recipe, train

    >>> recipe = parse_recipe("recipes/quickstart.yaml", ["--max_steps", "100"])
    >>> scores = train(recipe)  # doctest: +SKIP

    ```

    Raises:
        [`UserError`]: if the file is not a flat YAML mapping, or a key is unknown or its value of the wrong type.
    """
    return parse_values(read_yaml(Path(path)), overrides, str(path))


def parse_values(values: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """Parses the keys of a YAML file; `where` names the file in errors. See [`parse_recipe`]."""
    values, overrides = _unset(values, overrides)
    task = _find_task([*_as_command_line({"task": values.get("task")}), *overrides])
    if task == "translation":
        values = {**values, **_languages_of_start(values, overrides)}
    parser = _Parser((TaskArguments, *TASKS[task].values()), allow_abbrev=False)
    _check_values(values, parser, where, task)
    for word in overrides:
        if word.startswith("--"):
            _check_key(word[2:].split("=")[0], parser, "the command line", task, prefix="--")
    words = [*_as_command_line(values), *overrides]
    try:
        _, *parsed, rest = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # keys that do not fit each other, by TrainingArguments
        raise UserError(" ".join(str(error).split())) from error
    if rest:
        raise UserError(f"The command line has {rest[0]!r} where a --key was expected.")
    given = [*values, *(word[2:].split("=")[0] for word in overrides if word.startswith("--"))]
    keys = {
        key: _plain(getattr(part, key))
        for key in dict.fromkeys(word.replace("-", "_") for word in given)
        for part in (TaskArguments(task), *parsed)
        if hasattr(part, key) and key not in _NOT_REPEATED
    }
    values = {
        key: _plain(getattr(part, key))
        for part in (TaskArguments(task), *parsed)
        for key in [part.name for part in fields(part)]
        if is_supported(key, task) and key != "hub_token"
    }
    parts = {"generation": None, **dict(zip(TASKS[task], parsed, strict=True))}
    recipe = Recipe(task=task, keys=keys, values=values, **parts)
    if recipe.training.model_name_or_path and getattr(recipe.data, "tokenizer_name", None):
        raise UserError("tokenizer_name cannot be set with model_name_or_path, which brings its own.")
    return recipe


@dataclass
class _Start:
    model_name_or_path: str | None = None


def _languages_of_start(values: dict[str, Any], overrides: list[str]) -> dict[str, str]:
    """Returns the languages of the model that a recipe starts from, unless the recipe names its own."""
    words = [*_as_command_line({"model_name_or_path": values.get("model_name_or_path")}), *overrides]
    start = _Parser(_Start, allow_abbrev=False).parse_known_args(words)[0].model_name_or_path
    given = {_key_of(str(key)) for key, value in values.items() if value is not None} | set(map(_key_of, overrides))
    missing = [key for key in ("source_lang", "target_lang") if key not in given]
    if not start or not missing:
        return {}
    config = load_config(start)
    return {key: language for key in missing if (language := getattr(config, key, None))}


def check_configuration(recipe: Recipe) -> None:
    """Raises a [`UserError`] if the model keys do not make a configuration, where no other model completes them."""
    if recipe.training.model_name_or_path is not None:
        return
    said = {key: value for key, value in asdict(recipe.model).items() if value is not None}
    architecture = said.pop("architecture", None)
    try:
        if recipe.task == "translation":
            config = RSkipConfig(**said)
            check_lengths(recipe, config.max_position_embeddings)
            with torch.device("meta"):
                RSkipForConditionalGeneration(config).set_attn_implementation(recipe.training.attn_implementation)
        elif architecture is None:
            RSkipResNetConfig(**said)
        else:
            RSkipResNetConfig.from_name(
                architecture, **{key: value for key, value in said.items() if key in recipe.keys}
            )
    except (ValueError, ImportError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error


def check_lengths(recipe: Recipe, positions: int) -> None:
    """Raises a [`UserError`] if sentences may have more tokens than the model has positions."""
    generation = recipe.generation
    longest = max(recipe.data.max_source_length, recipe.data.max_target_length, generation.max_new_tokens or 0)
    if longest > positions:
        raise UserError(
            f"max_position_embeddings must be at least {longest}, as max_source_length, max_target_length and "
            f"max_new_tokens allow, not {positions}"
        )


def check_values(values: dict[str, Any], where: str, task: str | None = None) -> None:
    """Raises a [`UserError`] if a key is unknown to the task, or has a list of values where one is meant.

    Args:
        values: some keys of a recipe, maybe not all that one needs.
        where: their place, as errors name it.
        task: the default unless given.
    """
    task = _find_task(_as_command_line({"task": task}))
    _check_values(values, _Parser((TaskArguments, *TASKS[task].values()), allow_abbrev=False), where, task)


def _check_values(values: dict[str, Any], parser: _Parser, where: str, task: str) -> None:
    for key, value in values.items():
        _check_key(key, parser, where, task)
        if isinstance(value, list) and key not in parser.list_keys():
            raise UserError(f"{key} takes one value, not a list, in {where}")


def _key_of(word: str) -> str:
    """The key in a word of the command line, such as `seed` in `--seed=1`."""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _unset(values: dict, overrides: Sequence[str]) -> tuple[dict, list[str]]:
    """Removes the keys that the command line sets to `null`."""
    words = iter(overrides)
    kept, unset = [], {key for key, value in values.items() if value is None}
    for word in words:
        key, _, value = word.partition("=")
        following = None
        if word.startswith("--") and "=" not in word:
            following = value = next(words, None)
        if word.startswith("--") and value == "null":
            values = {name: old for name, old in values.items() if name.replace("-", "_") != _key_of(key)}
            unset.add(_key_of(key))
        else:
            kept += [word] if following is None else [word, following]
    if "test_split" in unset:
        raise UserError("test_split cannot be null: a run always ends with the scores of its test split.")
    return values, kept


def _find_task(words: list[str]) -> str:
    parser = _Parser(TaskArguments, allow_abbrev=False)
    task = parser.parse_known_args(words)[0].task
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, not {task!r}.")
    return task


def _plain(value):
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, float, str, list, dict, type(None))) else str(value)


def describe_keys(task: str, word: str | None = None) -> str:
    """Describes the keys of a task with default, meaning and choices; with a `word`, only those in which it occurs.

    Raises:
        [`UserError`]: if it occurs in none.
    """
    lines = []
    for title, part in {"task": TaskArguments, **TASKS[task]}.items():
        types = get_type_hints(part)
        group = [_describe_key(key, types[key.name]) for key in fields(part) if is_supported(key.name, task)]
        group = [line for line in group if word is None or word.lower() in line.lower()]
        lines += ["", title.capitalize(), *group] if group else []
    if not lines:
        raise UserError(f"No key of the task {task} has {word!r} in its name or description.")
    return "\n".join(lines[1:])


def _describe_key(key: Field, type_hint: Any) -> str:
    sentence = re.split(r"(?<=\.) ", " ".join(key.metadata["help"].split()))[0].replace("%%", "%")
    default = key.default if key.default_factory is MISSING else key.default_factory()
    kinds = [type_hint, *get_args(type_hint)]  # `Literal`, an `Enum`, or one of them or something else
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    choices += [choice.value for kind in kinds if isinstance(kind, EnumType) for choice in kind]
    choices = choices or key.metadata.get("choices", [])
    return f"  {key.name} ({_plain(default)}) {sentence}" + (f" One of {', '.join(choices)}." if choices else "")


def read_yaml(path: Path, what: str = "recipe") -> dict:
    """Reads the mapping in a YAML file; `what` names the kind of file in a [`UserError`]."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except FileNotFoundError:
        raise UserError(f"There is no {what} {str(path)!r}.") from None
    except IsADirectoryError:
        raise UserError(f"{str(path)!r} is a folder, not a {what}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The {what} {str(path)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"The {what} {str(path)!r} must be a mapping of keys to values.")
    return values


def _check_key(key: str, parser: _Parser, where: str, task: str, prefix: str = "") -> None:
    name, known = str(key).replace("-", "_"), parser.keys(task)
    if parser.refuses(name, task):
        raise UserError(f"{prefix}{name} is not supported in {where} (task: {task}): {why_refused(name, task)}.")
    if name not in known:
        for other, parts in TASKS.items():
            if name in (part.name for group in parts.values() for part in fields(group)):
                raise UserError(f"{prefix + str(key)!r} in {where} is a key of task {other}, and the task is {task}.")
        hint = did_you_mean(key, known, prefix)
        raise UserError(f"Unknown key {prefix + str(key)!r} in {where} (task: {task}){hint}")


def _as_command_line(values: dict) -> list[str]:
    """Converts a recipe to words of a command line, so that one parser reads both."""
    words = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
