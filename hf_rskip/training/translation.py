"""Trains a translation model from a recipe: data, tokenizer, model, Trainer, test."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.cleaning import clean_corpus
from ..data.corpora import checksum, iterate_sentences, load_translation_dataset
from ..data.preprocessing import describe_dropped, filter_by_length, tokenize_corpus, tokenizer_cache_file
from ..data.tokenizer import check_known, load_tokenizer, train_tokenizer
from ..decoding.loading import load_config
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer, scored_form
from ..evaluation.evaluate import evaluate_translation, lowercases, split_languages
from ..evaluation.predictions import write_predictions
from ..hub.translation_model_card import write_model_card
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..studies.probe_callback import ProbeCallback
from ..studies.probe_data import training_sentences
from .checkpoints import find_checkpoint
from .describe import describe_model
from .recipe import Recipe, check_lengths
from .resuming import (
    CurrentSteps,
    EarlyStopping,
    begin_record,
    check_data,
    complete_metrics,
    describe_resumption,
    write_record,
)
from .trainer import RSkipTrainer

_CHECKED_PAIRS = 1000
"""Pairs, at even distances in the corpus, of which a tokenizer must know most."""


def train(recipe: Recipe) -> dict[str, float | str]:
    """Trains, evaluates on the test split, and leaves the best model in `output_dir`.

    Returns:
        What `all_results.json` holds.

    Raises:
        [`UserError`]: if the data, the configuration or `output_dir` cannot be used; before any training starts.
    """
    data, training = recipe.data, recipe.training
    with training.main_process_first(desc="preparing the corpus"):
        checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
        record = begin_record(recipe, checkpoint)
        corpus = load_translation_dataset(data)
        check_data(record, {split: checksum(corpus[split], data) for split in ("train", "validation")})
        # What is no longer referred to is no longer mapped into memory.
        train_set, unclean = clean_corpus(corpus.pop("train"), data)
        tokenizer = load_tokenizer(str(checkpoint)) if checkpoint else make_tokenizer(recipe, train_set)
        train_set, dropped = filter_by_length(tokenize_corpus(train_set, tokenizer, data), data)
        validation_set = tokenize_corpus(corpus["validation"], tokenizer, data)
    set_seed(training.seed)
    model = create_model(recipe, tokenizer)
    # Sorted, for little padding; a sentence beyond the model's positions counts for BLEU only, where it is cut.
    longest = np.maximum(validation_set["source_length"], validation_set["target_length"])
    order = np.argsort(validation_set["target_length"], stable=True)
    validation_set = validation_set.select(order[longest[order] <= model.config.max_position_embeddings])
    if len(validation_set) == 0:
        raise UserError(f"No validation pair fits max_position_embeddings {model.config.max_position_embeddings}.")
    if model.config.max_position_embeddings % training.pad_to_multiple_of:
        raise UserError(
            f"pad_to_multiple_of {training.pad_to_multiple_of} must divide max_position_embeddings "
            f"{model.config.max_position_embeddings}, so that no padding goes beyond it."
        )
    model.set_attn_implementation(training.attn_implementation)

    bleu_tokenize = choose_tokenizer(training.bleu_tokenize, data.target_lang)

    def score(model: PreTrainedModel, split: str, **generate_kwargs) -> tuple[dict[str, float | str], list[str]]:
        sentences = split_languages(corpus[split], data.source_lang, data.target_lang)
        return evaluate_translation(model, tokenizer, *sentences, bleu_tokenize, **generate_kwargs)

    def validation_metrics(model: PreTrainedModel) -> dict[str, float]:
        scores, _ = score(model, "validation", num_beams=training.generation_num_beams)
        return {name: scores[name] for name in ("bleu", "chrf")}

    callbacks = [CurrentSteps(not {"logging_steps", "logging_strategy"}.isdisjoint(recipe.keys))]
    if training.early_stopping_patience:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    if training.probe_steps:
        batch = training_sentences(model, tokenizer, train_set)
        callbacks.append(ProbeCallback(batch, training.probe_steps, training.label_smoothing_factor or None))
    trainer = RSkipTrainer(
        model=model,
        args=training,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=training.pad_to_multiple_of),
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        compute_translation_metrics=validation_metrics if training.predict_with_generate else None,
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        sampler = trainer.make_sampler()
        print(describe_dropped(Counter(unclean) + Counter(dropped), len(train_set), "train"))
        describe_model(trainer.model, recipe, f"vocabulary of {model.config.vocab_size:,}")
        print(f"batches: {len(sampler):,} an epoch, padding {sampler.padding_fraction():.1%}", flush=True)
        if checkpoint:
            print(f"resuming from {checkpoint}, {describe_resumption(record['resumed'][-1])}", flush=True)

    trainer.record = record
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoint:
        complete_metrics(result.metrics, recipe, record, trainer.state.global_step)
    trainer.use_average()
    trainer.save_model(_internal_call=True)  # pushed later, with the scores and the card
    trainer.save_state()
    scores, translations = score(trainer.whole_model(), "test")
    test_metrics = {f"test_{name}": value for name, value in scores.items()}
    trainer.log_metrics("test", test_metrics)
    metrics = {**result.metrics, **test_metrics}
    for part, values in {"train": result.metrics, "test": test_metrics, "all": metrics}.items():
        trainer.save_metrics(part, values, combined=False)  # which would keep what an earlier run left
    if trainer.is_world_process_zero():
        _, references = split_languages(corpus["test"], data.source_lang, data.target_lang)
        write_predictions(training.output_dir, *scored_form(translations, references, lowercase=lowercases(tokenizer)))
        example = corpus["test"][0]["translation"][data.source_lang]
        write_model_card(training.output_dir, recipe, trainer.model, trainer.state, metrics, record, example)
        write_record(training.output_dir, record, trainer.state.global_step)
        print(f"model, card and scores: {training.output_dir}", flush=True)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def make_tokenizer(recipe: Recipe, train_set: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or a new one for `train_set`, a cleaned corpus."""
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
    """A new model of the recipe's configuration, or the one that it starts from."""
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
        raise UserError(str(error).strip().splitlines()[0]) from error
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
    """The model of a folder or Hub id, with the recipe's model keys in place of its own."""
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
