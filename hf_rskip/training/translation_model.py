"""The initial tokenizer and model of a translation recipe."""

from dataclasses import asdict

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.text.corpora import iterate_sentences
from ..data.text.preprocessing import tokenizer_cache_file
from ..data.text.tokenizer import check_known, load_tokenizer, train_tokenizer
from ..decoding.loading import load_config
from ..errors import UserError, first_line
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..recipe.parsing import Recipe, check_lengths

_CHECKED_PAIRS = 1000
"""Pairs, at even distances in the corpus, of which a tokenizer must know most."""


def make_tokenizer(recipe: Recipe, train_set: Dataset) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the recipe names, or trains one on `train_set`, a cleaned corpus."""
    if recipe.training.model_name_or_path:
        _load_start_config(recipe.training.model_name_or_path)
    name = recipe.data.tokenizer_name or recipe.training.model_name_or_path
    if name:
        tokenizer = load_tokenizer(name)
        check_known(tokenizer, iterate_sentences(train_set, recipe.data, _CHECKED_PAIRS), name)
        return tokenizer
    return train_tokenizer(
        iterate_sentences(train_set, recipe.data, recipe.data.tokenizer_train_samples),
        recipe.model.vocab_size,
        recipe.data.lowercase,
        model_max_length=recipe.model.max_position_embeddings,
        cache_file=tokenizer_cache_file(train_set, recipe.data, recipe.model.vocab_size),
    )


def create_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RSkipForConditionalGeneration:
    """Creates a model of the recipe's configuration, or loads the one that it starts from."""
    data, start = recipe.data, recipe.training.model_name_or_path
    special_tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # As in Marian, padding starts the decoder where there is no token for it.
        "decoder_start_token_id": tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
    }
    languages = {"source_lang": data.source_lang, "target_lang": data.target_lang}
    try:
        if start:
            model = _start_from(start, recipe, languages)
            special_tokens["decoder_start_token_id"] = model.config.decoder_start_token_id
        else:
            said = {**asdict(recipe.model), "vocab_size": len(tokenizer)}
            model = RSkipForConditionalGeneration(RSkipConfig(**said, **special_tokens, **languages))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{first_line(error)}.") from error
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"The tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} of {start!r}")
    generation = {key: value for key, value in asdict(recipe.generation).items() if value is not None}
    if "gnmt_length_penalty" in generation:
        del generation["length_penalty"]
    if not generation.keys() & {"max_new_tokens", "max_len_a", "max_len_b"}:
        generation["max_new_tokens"] = data.max_target_length
    check_lengths(recipe, config.max_position_embeddings)
    model.generation_config = GenerationConfig(**generation, **special_tokens)
    return model


def _load_start_config(start: str) -> RSkipConfig:
    config = load_config(start)
    if config.model_type != RSkipConfig.model_type:
        hint = ": `hf-rskip convert marian` makes one of it" if config.model_type == "marian" else ""
        raise UserError(f"{start!r} is a model of type {config.model_type!r}, not {RSkipConfig.model_type!r}{hint}.")
    return config


def _start_from(start: str, recipe: Recipe, languages: dict[str, str]) -> RSkipForConditionalGeneration:
    """Loads the model of a folder or Hub id, with the recipe's model keys in place of its own."""
    before = _load_start_config(start)
    said = {key: value for key, value in asdict(recipe.model).items() if key in recipe.keys and key != "vocab_size"}
    model, info = RSkipForConditionalGeneration.from_pretrained(
        start, **said, **languages, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    foreign = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    if foreign:
        changed = {key: getattr(before, key) for key in said if getattr(before, key) != said[key]}
        asked = ", ".join(f"{key} {said[key]!r} in place of {old!r}" for key, old in changed.items())
        raise UserError(f"{start!r} has no weights for what the recipe asks ({asked}), such as {min(foreign)}.")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        print(f"note: {len(unused)} weights of {start} are not used, such as {unused[0]}", flush=True)
    return model
