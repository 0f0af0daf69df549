"""Loads a trained model with its tokenizer."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import load_tokenizer
from ..errors import UserError


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder or Hub id, in evaluation mode, on the GPU if there is one.

    Raises:
        [`UserError`]: if there is no such model, it is not one that translates, or weights are missing.
    """
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"No model could be loaded from {name!r}: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"]:
        raise UserError(f"The model {name!r} lacks weights of its configuration, such as {min(info['missing_keys'])}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), load_tokenizer(name)
