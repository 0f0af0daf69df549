"""Tokenizes sentence pairs once, and drops those that training cannot use."""

import json
import os
from pathlib import Path

import numpy as np
import tokenizers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from .arguments import DataArguments
from .columns import keep_rows, read_column


def tokenize_corpus(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Tokenizes both sides of every pair, without truncation.

    The result is cached on disk beside the dataset, and reused for the same dataset, tokenizer and languages.

    Args:
        dataset: A split of [`~hf_rskip.data.text.corpora.load_translation_dataset`].
        tokenizer: Appends the end-of-sequence token itself.

    Returns:
        The dataset with the columns `input_ids` and `labels` (token ids of the source and the target, including the
        end of sequence), and `source_length` and `target_length` (their numbers). A blank side has no other token.
    """

    def tokenize(batch):
        sources, targets = (
            ["" if pair[language].isspace() else pair[language] for pair in batch["translation"]]
            for language in (args.source_lang, args.target_lang)
        )
        encoded = tokenizer(sources, text_target=targets, return_attention_mask=False, verbose=False)
        return {
            "input_ids": encoded["input_ids"],
            "labels": encoded["labels"],
            "source_length": [len(ids) for ids in encoded["input_ids"]],
            "target_length": [len(ids) for ids in encoded["labels"]],
        }

    # An epoch maps the whole file into memory: ids are stored in the smallest type.
    ids, length = List(Value("uint16" if len(tokenizer) <= 2**16 else "int32")), Value("int32")
    features = Features({"input_ids": ids, "labels": ids, "source_length": length, "target_length": length})
    return dataset.map(
        tokenize,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=args.preprocessing_num_workers,
        new_fingerprint=_fingerprint(dataset, tokenizer, args, features),
        desc="Tokenizing",
    )


def _fingerprint(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, features: Features
) -> str | None:
    if not tokenizer.is_fast:
        return None  # without a backend: `datasets` hashes the Python object
    # A hash of the object, or of the whole description, changes when the tokenizer is used: calls leave their padding
    # and truncation behind in it.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]
    languages = (args.source_lang, args.target_lang)
    described = (json.dumps(backend), tokenizer.split_special_tokens, languages, str(features))
    return Hasher.hash((dataset._fingerprint, *described))


def tokenizer_cache_file(dataset: Dataset, args: DataArguments, vocab_size: int) -> Path | None:
    """Returns the cache file of the tokenizer trained on a dataset: beside it if it is on disk, else `None`.

    Training takes seconds, which many runs on one corpus share.
    """
    if not dataset.cache_files:
        return None
    folder = Path(dataset.cache_files[0]["filename"]).parent
    if not os.access(folder, os.W_OK):
        return None
    options = (vocab_size, args.lowercase, args.tokenizer_train_samples, args.source_lang, args.target_lang)
    return folder / f"tokenizer-{Hasher.hash((dataset._fingerprint, *options, tokenizers.__version__))}.json"


def filter_by_length(dataset: Dataset, args: DataArguments) -> tuple[Dataset, dict[str, int]]:
    """Drops the pairs that training cannot use: an empty side, too long, or too different in length.

    Args:
        dataset: A result of [`tokenize_corpus`], for training: evaluation keeps every pair.

    Returns:
        The remaining pairs in their order, and the number of pairs dropped for each reason; a pair counts for the
        first reason that applies.

    Raises:
        UserError: if no pair remains.
    """
    source, target = (read_column(dataset, name) for name in ("source_length", "target_length"))
    shorter, longer = np.minimum(source, target), np.maximum(source, target)
    reasons = {
        "empty": shorter <= 1,
        f"source longer than {args.max_source_length} tokens": source > args.max_source_length,
        f"target longer than {args.max_target_length} tokens": target > args.max_target_length,
    }
    if args.max_length_ratio is not None:
        reasons[f"length ratio above {float(args.max_length_ratio)}"] = longer > args.max_length_ratio * shorter

    return drop_pairs(dataset, reasons, "the length limits", args)


def drop_pairs(
    dataset: Dataset, reasons: dict[str, np.ndarray], step: str, args: DataArguments
) -> tuple[Dataset, dict[str, int]]:
    """Drops the pairs to which a reason applies, `(pairs,)` of booleans each; returns the others and the counts.

    Raises a [`UserError`] if no pair remains after this `step`.
    """
    kept, counts = np.ones(len(dataset), dtype=bool), {}
    for reason, applies in reasons.items():
        counts[reason] = int(np.count_nonzero(kept & applies))
        kept &= ~applies
    if not kept.any():
        raise UserError(f"No training pair is left after {step} ({describe_dropped(counts, 0)}).")
    return keep_rows(dataset, kept, args.preprocessing_num_workers), counts


def describe_dropped(counts: dict[str, int], kept: int) -> str:
    """Describes in one line how many training pairs are kept and, by reason, how many were dropped."""
    line = f"train: {kept:,} of {kept + sum(counts.values()):,} pairs kept"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    return f"{line}; dropped {dropped}" if dropped else line
