"""The initial tokenizer and model of a translation recipe."""

from dataclasses import asdict

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.text.corpora import iterate_sentences
from ..data.text.preprocessing import tokenizer_cache_file
from ..data.text.tokenizer import check_known, load_tokenizer, train_tokenizer
from ..errors import UserError, first_line
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..recipe.parsing import Recipe, check_lengths
from .start_model import load_start_config, load_start_model

_CHECKED_PAIRS = 1000
"""Pairs, at even distances in the corpus, of which a tokenizer must know most."""


def make_tokenizer(recipe: Recipe, train_set: Dataset) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the recipe names, or trains one on `train_set`, a cleaned corpus."""
    if recipe.training.model_name_or_path:
        load_start_config(recipe.training.model_name_or_path, RSkipConfig)
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
    if start:
        asked = {key: value for key, value in asdict(recipe.model).items() if key in recipe.given}
        asked.pop("vocab_size", None)
        model = load_start_model(start, RSkipForConditionalGeneration, asked, languages)
        special_tokens["decoder_start_token_id"] = model.config.decoder_start_token_id
    else:
        fields = {**asdict(recipe.model), "vocab_size": len(tokenizer)}
        try:
            model = RSkipForConditionalGeneration(RSkipConfig(**fields, **special_tokens, **languages))
        except ValueError as error:
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
