"""What a training recipe may say: one flat list of keys, checked before anything starts."""

import difflib
import json
import math
import re
import sys
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from sacrebleu.metrics import BLEU
from transformers import HfArgumentParser, SchedulerType, Seq2SeqTrainingArguments

from ..data.arguments import DataArguments
from ..errors import UserError
from ..models import RSkipConfig

# What the tokenizer and the data decide, and what is not for a recipe to say.
_NOT_IN_RECIPES = {
    "decoder_vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "is_encoder_decoder",
    "use_cache",
    "source_lang",
    "target_lang",
}

ModelArguments = make_dataclass(
    "ModelArguments",
    [
        (config_field.name, config_field.type, field(default=config_field.default))
        for config_field in fields(RSkipConfig)
        if config_field.name in RSkipConfig.__annotations__ and config_field.name not in _NOT_IN_RECIPES
    ],
    namespace={
        "__doc__": "The fields of [`RSkipConfig`] under their own names; `vocab_size` is that of the tokenizer."
    },
)


@dataclass
class GenerationArguments:
    """How the finished model translates; saved in its `generation_config.json`."""

    num_beams: int = field(default=5, metadata={"help": "Number of beams; 1 is greedy search."})
    length_penalty: float = field(default=1.0, metadata={"help": "Exponent of the length by which scores are divided."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest translation, in tokens; max_target_length unless given."}
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "Whether a beam search ends when num_beams candidates have ended."}
    )
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "Longest n-gram that may occur once only; 0 is off."}
    )

    def __post_init__(self):
        _check_at_least("num_beams", self.num_beams, 1)
        _check_at_least("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        _check_at_least("length_penalty", self.length_penalty, -math.inf)
        if self.max_new_tokens is not None:
            _check_at_least("max_new_tokens", self.max_new_tokens, 1)


def _check_at_least(key: str, value: float, least: float) -> None:
    if not value >= least:  # a NaN is at least nothing
        raise UserError(f"{key} must be {'a number' if least == -math.inf else f'at least {least}'}, not {value}.")


_LEAST = {
    "per_device_train_batch_tokens": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "generation_num_beams": 1,
    "seed": 0,
    "learning_rate": 0,
    "label_smoothing_factor": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
}


@dataclass
class RSkipTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the habits of machine translation as defaults, and what the Trainer lacks."""

    per_device_train_batch_tokens: int = field(
        default=4096,
        metadata={"help": "Budget of a batch on one device: padded tokens of the source, and of the target."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this model, with its tokenizer and configuration; model keys override the latter."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, flex_attention, or a kernel of the Hub."}
    )
    bleu_tokenize: str = field(
        default="13a", metadata={"help": "sacreBLEU's `tokenize`; `none` for text that is tokenized already."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate, reached after warmup_steps."})
    lr_scheduler_type: SchedulerType = field(
        default=SchedulerType.INVERSE_SQRT, metadata={"help": "Learning-rate schedule."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of Adam."})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Epsilon of Adam."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    eval_strategy: Literal["no", "steps", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(default="epoch", metadata={"help": "When to save."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether to end with the best model."})
    metric_for_best_model: str = field(default="bleu", metadata={"help": "By which metric the best model is chosen."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Whether evaluation during training translates, for BLEU and chrF."}
    )
    generation_num_beams: int = field(default=1, metadata={"help": "Number of beams of evaluation during training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sentences in an evaluation batch."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether early stopping goes on counting when a run is resumed."}
    )

    def __post_init__(self):
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a file is no place for a bar
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        for key, least in _LEAST.items():
            _check_at_least(key, getattr(self, key), least)
        if not self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor must be below 1, not {self.label_smoothing_factor}.")
        if self.early_stopping_patience is not None:
            _check_at_least("early_stopping_patience", self.early_stopping_patience, 1)
            if self.eval_strategy == "no":
                raise UserError("early_stopping_patience needs evaluations, but eval_strategy is no.")
        try:
            BLEU(tokenize=self.bleu_tokenize)
        except (KeyError, RuntimeError, ImportError) as error:
            raise UserError(f"bleu_tokenize {self.bleu_tokenize!r} is not to be had from sacreBLEU.") from error
        metrics = ("bleu", "chrf", "loss") if self.predict_with_generate else ("loss",)
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in metrics:
            without = "" if self.predict_with_generate else " without predict_with_generate"
            raise UserError(
                f"metric_for_best_model must be one of {', '.join(metrics)}{without}, "
                f"not {self.metric_for_best_model!r}."
            )


class Recipe(NamedTuple):
    """A parsed recipe."""

    model: ModelArguments
    data: DataArguments
    training: RSkipTrainingArguments
    generation: GenerationArguments
    keys: dict[str, Any]
    """What was said, by key: the recipe that makes the model again."""


# Where the model goes and how it gets there is no part of what makes it.
_NOT_REPEATED = {"output_dir", "resume_from_checkpoint", "hub_token"}


class _Parser(HfArgumentParser):
    """An HfArgumentParser that raises instead of printing its whole usage."""

    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))

    def keys(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def list_keys(self) -> list[str]:
        return [action.dest for action in self._actions if action.nargs in ("+", "*")]


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


def parse_recipe(path: str | Path, overrides: list[str]) -> Recipe:
    """Reads a flat YAML of training keys; `overrides` (`["--key", "value", ...]`) win over it.

    Raises:
        [`UserError`]: if the file is not a flat YAML mapping, or a key is unknown or its value of the wrong type.
    """
    parser = _Parser((ModelArguments, DataArguments, RSkipTrainingArguments, GenerationArguments), allow_abbrev=False)
    values = _read_yaml(Path(path))
    for key, value in values.items():
        _check_key(key, parser.keys(), str(path))
        if isinstance(value, list) and key not in parser.list_keys():
            raise UserError(f"{key} takes one value, not a list, in {path}")
    for word in overrides:
        if word.startswith("--"):
            _check_key(word[2:].split("=")[0], parser.keys(), "the command line", prefix="--")
    words = [*_as_command_line(values), *overrides]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # keys that do not fit each other, by TrainingArguments
        raise UserError(" ".join(str(error).split())) from error
    training, data = parsed[2], parsed[1]
    if training.model_name_or_path and data.tokenizer_name:
        raise UserError("tokenizer_name cannot be set with model_name_or_path, which brings its own.")
    if rest:
        raise UserError(f"The command line has {rest[0]!r} where a --key was expected.")
    given = [*values, *(word[2:].split("=")[0] for word in overrides if word.startswith("--"))]
    keys = {
        key: _plain(getattr(part, key))
        for key in dict.fromkeys(word.replace("-", "_") for word in given)
        for part in parsed
        if hasattr(part, key) and key not in _NOT_REPEATED
    }
    return Recipe(*parsed, keys)


def _plain(value):
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, float, str, list, dict, type(None))) else str(value)


def describe_keys() -> str:
    """All keys with their defaults, and the help of those that Transformers does not document."""
    training = {part.name: part for part in fields(RSkipTrainingArguments)}
    groups = {
        "Model (see RSkipConfig)": fields(ModelArguments),
        "Data": fields(DataArguments),
        "Generation": fields(GenerationArguments),
        "Training": [training.pop(name) for name in RSkipTrainingArguments.__annotations__],
        "Training (see Seq2SeqTrainingArguments)": training.values(),
    }
    lines = []
    for title, parts in groups.items():
        lines += ["", title]
        for part in parts:
            about = "" if title.endswith("Seq2SeqTrainingArguments)") else part.metadata.get("help", "")
            default = part.default if part.default_factory is MISSING else part.default_factory()
            lines.append(f"  {part.name} ({_plain(default)}) {about}".rstrip())
    return "\n".join(lines[1:])


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except FileNotFoundError:
        raise UserError(f"There is no recipe {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The recipe {str(path)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"The recipe {str(path)!r} must be a mapping of keys to values.")
    return values


def _check_key(key: str, known: list[str], where: str, prefix: str = "") -> None:
    if str(key).replace("-", "_") not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {prefix + close[0]!r}?" if close else ""
        raise UserError(f"Unknown key {prefix + str(key)!r} in {where}{hint}")


def _as_command_line(values: dict) -> list[str]:
    """A recipe as words of a command line, so that both are converted to the fields' types in one way."""
    words = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
