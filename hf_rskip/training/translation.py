"""Trains a translation model from a recipe: data, tokenizer, model, Trainer, test."""

from dataclasses import asdict

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.arguments import DataArguments
from ..data.corpora import load_translation_dataset
from ..data.preprocessing import describe_dropped, filter_by_length, tokenize_corpus
from ..data.tokenizer import load_tokenizer, train_tokenizer
from ..errors import UserError
from ..evaluation.evaluate import evaluate_translation, split_languages
from ..hub.model_card import write_model_card
from ..models import RSkipConfig, RSkipForConditionalGeneration, SkipConnection
from .arguments import GenerationArguments, ModelArguments, Recipe
from .checkpoints import find_checkpoint
from .trainer import RSkipTrainer


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
        corpus = load_translation_dataset(data)
        if checkpoint:
            tokenizer = load_tokenizer(str(checkpoint))
        elif data.tokenizer_name:
            tokenizer = load_tokenizer(data.tokenizer_name)
        else:
            tokenizer = train_tokenizer(_sentences(corpus["train"], data), recipe.model.vocab_size, data.lowercase)
        train_set, dropped = filter_by_length(tokenize_corpus(corpus["train"], tokenizer, data), data)
        validation_set = tokenize_corpus(corpus["validation"], tokenizer, data)
        validation_set = validation_set.select(np.argsort(validation_set["target_length"]))
    set_seed(training.seed)
    model = _create_model(recipe.model, recipe.generation, data, tokenizer)

    def score(model: PreTrainedModel, split: str, **generate_kwargs) -> dict[str, float | str]:
        sentences = split_languages(corpus[split], data.source_lang, data.target_lang)
        return evaluate_translation(model, tokenizer, *sentences, training.bleu_tokenize, **generate_kwargs)[0]

    def validation_metrics(model: PreTrainedModel) -> dict[str, float]:
        scores = score(model, "validation", num_beams=training.generation_num_beams)
        return {name: scores[name] for name in ("bleu", "chrf")}

    callbacks = []
    if training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = RSkipTrainer(
        model=model,
        args=training,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        compute_translation_metrics=validation_metrics if training.predict_with_generate else None,
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        _describe(trainer, describe_dropped(dropped, len(train_set), "train"))

    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(_internal_call=True)  # pushed later, with the scores and the card
    trainer.save_state()
    test_metrics = {f"test_{name}": value for name, value in score(trainer.model, "test").items()}
    trainer.log_metrics("test", test_metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("test", test_metrics)
    metrics = {**result.metrics, **test_metrics}
    if trainer.is_world_process_zero():
        example = corpus["test"][0]["translation"][data.source_lang]
        write_model_card(training.output_dir, recipe, trainer.model, trainer.state, metrics, example)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _sentences(dataset: Dataset, data: DataArguments):
    """All sentences of both languages, in the order of the corpus."""
    for batch in dataset.iter(1000):
        for pair in batch["translation"]:
            yield pair[data.source_lang]
            yield pair[data.target_lang]


def _create_model(
    model_args: ModelArguments,
    generation_args: GenerationArguments,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> RSkipForConditionalGeneration:
    special_tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # As in Marian, padding starts the decoder where there is no token for it.
        "decoder_start_token_id": tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
    }
    try:
        config = RSkipConfig(
            **{**asdict(model_args), "vocab_size": len(tokenizer)},
            **special_tokens,
            source_lang=data.source_lang,
            target_lang=data.target_lang,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    longest = max(data.max_source_length, data.max_target_length)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"`max_position_embeddings` must be at least {longest}, as max_source_length and max_target_length allow, "
            f"not {config.max_position_embeddings}"
        )
    model = RSkipForConditionalGeneration(config)
    # So that the Trainer, loading the best checkpoint, does not report the tied weights as missing.
    model._keys_to_ignore_on_save = list(model.all_tied_weights_keys)
    generation = asdict(generation_args)
    generation["max_new_tokens"] = generation["max_new_tokens"] or data.max_target_length
    model.generation_config = GenerationConfig(**generation, **special_tokens)
    return model


def _describe(trainer: RSkipTrainer, kept: str) -> None:
    sampler = trainer._get_train_sampler()
    skip = next(module for module in trainer.model.modules() if isinstance(module, SkipConnection))
    print(kept)
    print(
        f"model: {type(skip).__name__}({skip.extra_repr()}), {trainer.model.num_parameters():,} parameters, "
        f"vocabulary of {trainer.model.config.vocab_size:,}"
    )
    print(f"batches: {len(sampler):,} an epoch, padding {sampler.padding_fraction():.1%}", flush=True)
