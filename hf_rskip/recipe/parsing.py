"""Reads and checks training recipes: flat YAML files of keys."""

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..checks import did_you_mean
from ..data.images.arguments import ImageDataArguments
from ..data.text.arguments import DataArguments
from ..decoding.loading import load_config
from ..errors import UserError, first_line
from ..models import RSkipConfig, RSkipForConditionalGeneration
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
    given: dict[str, Any]
    """The keys that were given, with their parsed values: a recipe that makes the same model."""
    values: dict[str, Any]
    """The value of every key, given or not, but for `hub_token`."""


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
"""The dataclasses of the keys of each task, by the part of a [`Recipe`] that they make."""


@dataclass
class TaskArguments:
    """The key that decides which other keys there are."""

    task: str = HfArg(default="translation", help="translation or image-classification.")


_NOT_REPEATED = {"output_dir", "resume_from_checkpoint", "hub_token"}
"""Keys that do not change the model."""


class _Parser(HfArgumentParser):
    """An HfArgumentParser that raises instead of printing its whole usage."""

    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))


def _fields(task: str) -> dict[str, Field]:
    """All keys of a task, supported or not."""
    return {part.name: part for arguments in _arguments(task) for part in fields(arguments) if part.init}


def _arguments(task: str) -> tuple[type, ...]:
    return (TaskArguments, *TASKS[task].values())


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
    overrides = group_words(overrides)
    said = {_name_of(key): value for given in (values, overrides) for key, value in given.items()}
    if said.get("test_split", "") is None:
        raise UserError("test_split cannot be null: a run always ends with the scores of its test split.")
    said = {key: value for key, value in said.items() if value is not None}
    task = _check_task(said.get("task"))
    check_values(values, where, task)
    for key in overrides:
        _check_key(key, "the command line", task, prefix="--")
    if task == "translation":
        said |= _languages_of_start(said)
    try:
        *parsed, rest = _Parser(_arguments(task), allow_abbrev=False).parse_args_into_dataclasses(
            _as_command_line(said), look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # keys that do not fit each other, by TrainingArguments
        raise UserError(" ".join(str(error).split())) from error
    if rest:
        raise UserError(f"The command line has {rest[0]!r} where a --key was expected.")
    values = {
        part.name: _plain(getattr(arguments, part.name))
        for arguments in parsed
        for part in fields(arguments)
        if is_supported(part.name, task) and part.name != "hub_token"
    }
    recipe = Recipe(
        **{"task": task, "generation": None, **dict(zip(TASKS[task], parsed[1:], strict=True))},
        given={key: values[key] for key in said if key not in _NOT_REPEATED},
        values=values,
    )
    if recipe.training.model_name_or_path and getattr(recipe.data, "tokenizer_name", None):
        raise UserError("tokenizer_name cannot be set with model_name_or_path, which brings its own.")
    return recipe


def group_words(words: Sequence[str]) -> dict[str, str | list[str] | None]:
    """The values of each `--key` of a command line; `None` for `null`, which unsets a key."""
    groups: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            groups[key] = [value] if equals else []
        elif groups:
            groups[key].append(word)
        else:
            raise UserError(f"The command line has {word!r} where a --key was expected.")
    return {key: None if group == ["null"] else group[0] if len(group) == 1 else group for key, group in groups.items()}


def _languages_of_start(said: dict[str, Any]) -> dict[str, str]:
    """Returns the languages of the model that a recipe starts from, unless the recipe names its own."""
    missing = [key for key in ("source_lang", "target_lang") if key not in said]
    if not missing or not said.get("model_name_or_path"):
        return {}
    config = load_config(str(said["model_name_or_path"]))
    return {key: language for key in missing if (language := getattr(config, key, None))}


def check_configuration(recipe: Recipe) -> None:
    """Raises a [`UserError`] if the model keys do not make a configuration, where no other model completes them."""
    if recipe.training.model_name_or_path is not None:
        return
    try:
        if recipe.task == "translation":
            config = RSkipConfig(**asdict(recipe.model))
            check_lengths(recipe, config.max_position_embeddings)
            with torch.device("meta"):
                RSkipForConditionalGeneration(config).set_attn_implementation(recipe.training.attn_implementation)
        else:
            recipe.model.make_config(recipe.given)
    except (ValueError, ImportError) as error:
        raise UserError(f"{first_line(error)}.") from error


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

    The `values` need not make a recipe; `where` is their place, as errors name it.
    """
    task = _check_task(task)
    for key, value in values.items():
        _check_key(key, where, task)
        if isinstance(value, list) and "list[" not in str(_fields(task)[_name_of(key)].type).lower():
            raise UserError(f"{key} takes one value, not a list, in {where}")


def _name_of(key: Any) -> str:
    return str(key).replace("-", "_")


def _check_task(task: str | None) -> str:
    task = TaskArguments.task if task is None else str(task)
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
    """Describes the keys of a task with default, meaning and choices, or those in which `word` occurs.

    Raises a [`UserError`] if it occurs in none.
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


def _check_key(key: str, where: str, task: str, prefix: str = "") -> None:
    name, known = _name_of(key), [name for name in _fields(task) if is_supported(name, task)]
    if name in _fields(task) and name not in known:
        raise UserError(f"{prefix}{name} is not supported in {where} (task: {task}): {why_refused(name, task)}.")
    if name not in known:
        for other in TASKS:
            if name in _fields(other):
                raise UserError(f"{prefix + str(key)!r} in {where} is a key of task {other}, and the task is {task}.")
        hint = did_you_mean(key, known, prefix)
        raise UserError(f"Unknown key {prefix + str(key)!r} in {where} (task: {task}){hint}")


def _as_command_line(values: dict) -> list[str]:
    """Converts a recipe to words of a command line, so that one parser reads both."""
    words = []
    for key, value in values.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
