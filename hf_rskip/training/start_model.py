"""The model that a fine-tuning starts from."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..decoding.loading import load_config, not_loaded
from ..errors import UserError, first_line
from ..models import RSkipConfig, RSkipResNetConfig

_CONVERTED_FROM = {RSkipConfig.model_type: "marian", RSkipResNetConfig.model_type: "resnet"}


def load_start_config(start: str, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Loads the configuration in a folder or of a Hub id; raises a [`UserError`] if it is of another class."""
    config, expected = load_config(start), config_class.model_type
    if config.model_type != expected:
        source = _CONVERTED_FROM[expected]
        hint = f": `hf-rskip convert {source}` makes one of it" if config.model_type == source else ""
        raise UserError(f"{start!r} is a model of type {config.model_type!r}, not {expected!r}{hint}.")
    return config


def load_start_model(
    start: str,
    model_class: type[PreTrainedModel],
    asked: Mapping[str, Any],
    labels: Mapping[str, Any],
    may_be_new: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """Loads a model in float32; `asked` are the fields of its configuration that the recipe sets, `labels` those that
    the data set. Prints how many of its weights are not used.

    Args:
        may_be_new: by a part of the names of weights that the model may lack: what to print of them.

    Raises:
        [`UserError`]: if there is no such model, or it lacks other weights.
    """
    before = load_start_config(start, model_class.config_class)
    try:
        model, info = model_class.from_pretrained(
            start, **asked, **labels, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except ValueError as error:  # of the configuration that `asked` makes
        raise UserError(f"{first_line(error)}.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise not_loaded(start, error) from error
    lacking = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    for part, note in (may_be_new or {}).items():
        new = {key for key in lacking if part in key}
        lacking -= new
        if new:
            print(f"note: {note}", flush=True)
    if lacking:
        changed = {key: getattr(before, key) for key in asked if getattr(before, key) != asked[key]}
        values = ", ".join(f"{key} {asked[key]!r} in place of {old!r}" for key, old in changed.items())
        whose = f"what the recipe asks ({values})" if changed else "its own configuration"
        raise UserError(f"{start!r} has no weights for {whose}, such as {min(lacking)}.")
    if unused := sorted(info["unexpected_keys"]):
        print(f"note: {len(unused)} weights of {start} are not used, such as {unused[0]}", flush=True)
    return model
