"""Batches to probe a model on: of a training set, of a test set, or random."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BaseImageProcessor,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.images.arguments import ImageDataArguments
from ..data.images.augmentation import normalize
from ..data.images.loading import name_row
from ..data.images.pixels import collate, open_image
from ..models import RSkipResNetConfig

Batch = dict[str, torch.Tensor]

SAMPLES = 32
"""Default number of sentence pairs or images of a batch."""


def spread(dataset, samples: int) -> list[int]:
    """Chooses rows at even distances, as the first ones of a dataset may all be of one class."""
    count = min(samples, len(dataset))
    return (np.arange(count) * len(dataset) // max(count, 1)).tolist()


def sentence_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str]
) -> Batch:
    """Makes a batch of sentence pairs, truncated to the positions of the model."""
    encoded = tokenizer(
        list(sources), text_target=list(targets), truncation=True, max_length=model.config.max_position_embeddings
    )
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    pairs = [{"input_ids": source, "labels": target} for source, target in pairs]
    return dict(DataCollatorForSeq2Seq(tokenizer)(pairs))


def training_sentences(collator: DataCollatorForSeq2Seq, train_set: Dataset, samples: int = SAMPLES) -> Batch:
    """Makes a batch of a result of [`~hf_rskip.data.text.preprocessing.tokenize_corpus`]."""
    pairs = train_set.select(spread(train_set, samples)).select_columns(["input_ids", "labels"])
    return dict(collator(list(pairs)))


def image_batch(processor: BaseImageProcessor, dataset: Dataset, args: ImageDataArguments, split: str) -> Batch:
    """Makes a batch of a split of [`~hf_rskip.data.images.loading.load_image_dataset`], as evaluation sees them."""
    images = [open_image(row["image"], name_row(args, split, row["row"])) for row in dataset]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixel_values, "labels": torch.tensor(dataset["label"][:])}


def training_images(train_set, args: ImageDataArguments, samples: int = SAMPLES) -> Batch:
    """Makes a batch of a training set of images, without the augmentation of the Trainer."""
    with torch.random.fork_rng([]):  # some sets crop at random
        streamed = isinstance(train_set, IterableDataset)
        rows = list(islice(train_set, samples) if streamed else (train_set[i] for i in spread(train_set, samples)))
    batch = collate(rows)
    images = normalize(batch["pixel_values"], args.image_mean, args.image_std)
    return {"pixel_values": images, "labels": batch["labels"]}


def random_batch(config: PreTrainedConfig, samples: int, size: int, seed: int) -> Batch:
    """Makes a batch of random sentences of `size` tokens, or images of `size` x `size` pixels, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, RSkipResNetConfig):
        images = torch.randn(samples, config.num_channels, size, size, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(config.num_labels, (samples,), generator=generator)}
    end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {config.pad_token_id, config.bos_token_id, config.decoder_start_token_id, *end}

    def draw(vocab_size: int) -> torch.Tensor:
        ordinary = torch.tensor([token for token in range(vocab_size) if token not in special])
        return ordinary[torch.randint(len(ordinary), (samples, size), generator=generator)]

    return {"input_ids": draw(config.vocab_size), "labels": draw(config.decoder_vocab_size)}
