"""Loads trained models, complete or not at all."""

import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..manifest import check_model
from .ensemble import Ensemble

_MODELS = {
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForImageClassification: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}


def load_complete(auto_class: type, name: str) -> PreTrainedModel:
    """The model of a folder or Hub id, in evaluation mode, on the GPU if there is one.

    Args:
        auto_class: `AutoModelForSeq2SeqLM` or `AutoModelForImageClassification`.
        name: the folder or id.

    Raises:
        [`UserError`]: if there is no such model, it is of another kind, weights are missing, or a file is not as it was
            written.
    """
    check_model(name)
    try:
        config = AutoConfig.from_pretrained(name)
        if type(config) not in _MODELS[auto_class]:
            raise UserError(
                f"No model could be loaded from {name!r}: it is one of type {config.model_type!r}, which "
                f"{auto_class.__name__} does not take"
            )
        model, info = auto_class.from_pretrained(name, output_loading_info=True)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise not_loaded(name, error) from error
    if info["missing_keys"]:
        raise UserError(f"The model {name!r} lacks weights of its configuration, such as {min(info['missing_keys'])}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def not_loaded(name: str, error: Exception) -> UserError:
    """What to say where Transformers has found no model; where there is no such folder, it says so of the Hub alone."""
    missing = "" if os.path.exists(name) else "there is no such folder, and as a Hub id: "
    return UserError(f"No model could be loaded from {name!r}: {missing}{str(error).strip().splitlines()[0]}")


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that translates and its tokenizer; see [`load_complete`]."""
    return load_complete(AutoModelForSeq2SeqLM, name), load_tokenizer(name)


def load_ensemble(names: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of one name, or the [`Ensemble`] of several, and the tokenizer that they share.

    Raises:
        [`UserError`]: if one cannot be loaded, or has another vocabulary than the first.
    """
    loaded = [load_model(name) for name in names]
    (first, tokenizer), *others = loaded
    for name, (_, other) in zip(names[1:], loaded[1:], strict=True):
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name!r} has another vocabulary than {names[0]!r}: they cannot translate together")
    return (Ensemble([model for model, _ in loaded]) if others else first), tokenizer
