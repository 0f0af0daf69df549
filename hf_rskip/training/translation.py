"""The task of translation: from a corpus to scores on its test split."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, TrainerCallback

from ..data.text.cleaning import clean_corpus
from ..data.text.corpora import checksum, hold_out, load_translation_dataset
from ..data.text.preprocessing import describe_dropped, filter_by_length, tokenize_corpus
from ..data.text.tokenizer import load_tokenizer
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer, scored_form
from ..evaluation.evaluate import evaluate_translation, lowercases, split_languages
from ..models import RSkipForConditionalGeneration
from ..recipe.describe import describe_model
from ..recipe.parsing import Recipe
from .task import Task
from .trainer import RSkipTrainer
from .translation_model import create_model, make_tokenizer


class Translation(Task):
    """Trains on pairs of sentences, evaluates by loss, BLEU and chrF, and tests by BLEU and chrF."""

    def __init__(self, recipe: Recipe, checkpoint: Path | None):
        super().__init__(recipe, checkpoint)
        data = recipe.data
        self.corpus = load_translation_dataset(data)
        # `pop`, so that the corpus does not stay mapped into memory.
        train_set, unclean = clean_corpus(self.corpus.pop("train"), data)
        if data.validation_size is not None:
            train_set, self.corpus["validation"] = hold_out(train_set, data)
        learned = {"train": train_set, "validation": self.corpus["validation"]}
        self.checksums = {split: checksum(part, data) for split, part in learned.items()}
        self.tokenizer = load_tokenizer(str(checkpoint)) if checkpoint else make_tokenizer(recipe, train_set)
        self.train_set, too_long = filter_by_length(tokenize_corpus(train_set, self.tokenizer, data), data)
        self.validation_set = tokenize_corpus(self.corpus["validation"], self.tokenizer, data)
        self.dropped = Counter(unclean) + Counter(too_long)
        self.example = self.corpus["test"][0]["translation"][data.source_lang]
        self.bleu_tokenize = choose_tokenizer(recipe.training.bleu_tokenize, data.target_lang)

    def create_model(self) -> RSkipForConditionalGeneration:
        model, training = create_model(self.recipe, self.tokenizer), self.recipe.training
        if model.config.max_position_embeddings % training.pad_to_multiple_of:
            raise UserError(
                f"pad_to_multiple_of {training.pad_to_multiple_of} must divide max_position_embeddings "
                f"{model.config.max_position_embeddings}, so that no padding goes beyond it."
            )
        model.set_attn_implementation(training.attn_implementation)
        return model

    def create_trainer(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> RSkipTrainer:
        training, pad_to = self.recipe.training, self.recipe.training.pad_to_multiple_of
        return RSkipTrainer(
            model=model,
            args=training,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=pad_to),
            train_dataset=self.train_set,
            eval_dataset=self._for_the_loss(model.config.max_position_embeddings),
            processing_class=self.tokenizer,
            compute_translation_metrics=self._validate if training.predict_with_generate else None,
            callbacks=callbacks,
        )

    def _for_the_loss(self, positions: int) -> Dataset:
        """Validation pairs for the loss: sorted by length, for little padding, without those beyond the positions."""
        pairs = self.validation_set
        longest = np.maximum(pairs["source_length"], pairs["target_length"])
        order = np.argsort(pairs["target_length"], stable=True)
        pairs = pairs.select(order[longest[order] <= positions])
        if len(pairs) == 0:
            raise UserError(f"No validation pair fits max_position_embeddings {positions}.")
        if (left_out := len(longest) - len(pairs)) and self.recipe.training.process_index == 0:
            print(f"validation: {left_out:,} of {len(longest):,} pairs have more tokens than positions, so no loss")
        return pairs

    def _validate(self, model: PreTrainedModel) -> dict[str, float]:
        scores, _ = self._score(model, "validation", num_beams=self.recipe.training.generation_num_beams)
        return {name: scores[name] for name in ("bleu", "chrf")}

    def _score(self, model: PreTrainedModel, split: str, **generate_kwargs) -> tuple[dict, list[str]]:
        sentences = split_languages(self.corpus[split], self.recipe.data.source_lang, self.recipe.data.target_lang)
        return evaluate_translation(model, self.tokenizer, *sentences, self.bleu_tokenize, **generate_kwargs)

    def describe(self, trainer: RSkipTrainer) -> None:
        sampler = trainer.make_sampler()
        print(describe_dropped(self.dropped, len(self.train_set)))
        describe_model(trainer.model, self.recipe, f"vocabulary of {trainer.model.config.vocab_size:,}")
        print(f"batches: {len(sampler):,} an epoch, padding {sampler.padding_fraction():.1%}", flush=True)

    def test(self, trainer: RSkipTrainer) -> tuple[dict[str, Any], list[str], list[str]]:
        beams = self.recipe.generation.num_beams
        if trainer.is_world_process_zero():
            print(f"test: translates {len(self.corpus['test']):,} sentences with num_beams {beams}", flush=True)
        scores, translations = self._score(trainer.whole_model(), "test")
        _, references = split_languages(self.corpus["test"], self.recipe.data.source_lang, self.recipe.data.target_lang)
        scored = scored_form(translations, references, lowercase=lowercases(self.tokenizer))
        return {f"test_{name}": value for name, value in scores.items()}, *scored
