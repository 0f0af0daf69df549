"""Loads trained models, and refuses incomplete ones."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data.names import check_different, check_name
from ..data.text.tokenizer import load_tokenizer
from ..errors import UserError, first_line
from ..manifest import MODEL_FILES, TOKENIZER_FILES, check_model
from ..models import RSkipResNetConfig
from .ctranslate2 import CTranslate2Model
from .ensemble import Ensemble
from .onnx import ENCODER_NAME, OnnxTranslationModel

_TASKS = {
    AutoModelForSeq2SeqLM: ("translate", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    AutoModelForImageClassification: ("classify images", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
}

_ENGINES = {"model.bin": CTranslate2Model, ENCODER_NAME: OnnxTranslationModel}
"""The engine of an export, by a file that it has."""


def load_complete(auto_class: type, name: str) -> PreTrainedModel:
    """The model of a folder or Hub id, in evaluation mode, on the GPU if there is one.

    Args:
        auto_class: `AutoModelForSeq2SeqLM` or `AutoModelForImageClassification`.
        name: the folder or id.

    Raises:
        [`UserError`]: if there is no such model, it is of another kind, weights are missing, or a file is not as it was
            written.
    """
    check_model(name, set(MODEL_FILES) - set(TOKENIZER_FILES))  # `load_tokenizer` checks the others
    load_config(name, auto_class)
    model, info = load_with_report(auto_class, name)
    if info["missing_keys"]:
        raise UserError(f"The model {name!r} lacks weights of its configuration, such as {min(info['missing_keys'])}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def load_with_report(model_class: type, name: str) -> tuple[PreTrainedModel, dict]:
    """The model of a folder or Hub id, and Transformers' report on its weights, such as `missing_keys`.

    Raises:
        [`UserError`]: if there is none, or its weights have other shapes than its configuration says.
    """
    try:
        return model_class.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise not_loaded(name, error) from error


def load_config(name: str, auto_class: type | None = None) -> PreTrainedConfig:
    """The configuration of a model's folder or Hub id.

    Raises:
        [`UserError`]: if there is none, or it is not of a model for `auto_class`.
    """
    check_name(name, "model")
    if os.path.isfile(name):
        raise UserError(f"{name!r} is a file, not the folder of a model.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two of values of another type
        raise not_loaded(name, error) from error
    if auto_class is not None:
        task, models = _TASKS[auto_class]
        if type(config) not in models:
            raise UserError(f"{name!r} is a model of type {config.model_type!r}, which cannot {task}.")
    return config


def classifies_images(name: str) -> bool:
    """Whether the model of a folder or Hub id is an image classifier of this package."""
    return load_config(name).model_type == RSkipResNetConfig.model_type


def load_image_processor(name: str) -> BaseImageProcessor:
    """The image processor of a folder or Hub id; raises a [`UserError`] if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} has no image processor: {first_line(error)}") from error


def not_loaded(name: str, error: Exception) -> UserError:
    """The error for a model that Transformers cannot load; it also says if there is no such folder."""
    missing = "" if os.path.exists(name) else "there is no such folder, and as a Hub id: "
    private = "; a private one needs `hf auth login`" if isinstance(error.__cause__, RepositoryNotFoundError) else ""
    return UserError(f"No model could be loaded from {name!r}: {missing}{first_line(error)}{private}.")


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that translates and its tokenizer; see [`load_complete`]."""
    return load_complete(AutoModelForSeq2SeqLM, name), load_tokenizer(name)


def load_translator(name: str) -> tuple[PreTrainedModel | CTranslate2Model, PreTrainedTokenizerBase]:
    """Model and tokenizer of [`load_model`], or of an export to another engine, which is called in the same way."""
    if Path(name, "onnx").is_dir() and not any(Path(name).glob("*.safetensors")):
        raise UserError(f"{name!r} is an export for browsers: `hf-rskip export` without --format makes one to run here")
    for file, engine in _ENGINES.items():
        if Path(name, file).is_file():
            check_model(name, "*")
            return engine(name), load_tokenizer(name)
    return load_model(name)


def load_image_classifier(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model that classifies images and its image processor; see [`load_complete`]."""
    return load_complete(AutoModelForImageClassification, name), load_image_processor(name)


def load_ensemble(names: Sequence[str]) -> tuple[PreTrainedModel | CTranslate2Model, PreTrainedTokenizerBase]:
    """The model of one name, or the [`Ensemble`] of several, and the tokenizer that they share.

    Raises:
        [`UserError`]: if one is given twice, cannot be loaded or translates alone, or if one has another vocabulary, or
            other special tokens, than the first.
    """
    check_different(names)
    loaded = [load_translator(name) for name in names]
    first, tokenizer = loaded[0]
    if len(names) == 1:
        return first, tokenizer
    for name, (model, other) in zip(names, loaded, strict=True):
        if isinstance(model, CTranslate2Model):
            raise UserError(f"{name!r} is an export to CTranslate2, which translates alone")
        for key in ("decoder_layers", "max_position_embeddings"):
            if not hasattr(model.config, key):
                raise UserError(f"{name!r} of type {model.config.model_type!r} translates alone: it has no {key}")
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name!r} has another vocabulary than {names[0]!r}: they cannot translate together")
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            if getattr(model.config, key, None) != getattr(first.config, key, None):
                raise UserError(f"{name!r} has another {key} than {names[0]!r}: they cannot translate together")
    return Ensemble([model for model, _ in loaded]), tokenizer
