"""Translates sentences in batches of similar length."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError
from ..models.generation_rskip import find_options
from .beam_search import beam_search
from .score import batches_by_length, score_tokens

logger = logging.get_logger(__name__)


class Hypothesis(NamedTuple):
    text: str
    score: float
    """Log-probability of its tokens (natural logarithm, with the end token), divided by the length penalty."""


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_batch_tokens: int = 4096,
    **generate_kwargs,
) -> list[str]:
    """The translation of each sentence, in the order given; that of a blank sentence is the empty string.

    Args:
        model, tokenizer: as the Auto classes load them.
        sentences: one source sentence each. What goes beyond the model's positions is cut off, with a warning.
        max_batch_tokens: budget of a batch, in padded source tokens times beams.
        generate_kwargs: of `model.generate`, over the model's own generation configuration. `max_new_tokens` is lowered
            to the model's positions, with a warning.
    """
    translations = [""] * len(sentences)
    for batch, _, output in search(model, tokenizer, sentences, max_batch_tokens, **generate_kwargs):
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            translations[index] = text
    return translations


def translate_n_best(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    n_best: int,
    max_batch_tokens: int = 4096,
    **generate_kwargs,
) -> list[list[Hypothesis]]:
    """The `n_best` best translations of each sentence, best first; a blank sentence has the empty one only.

    Scores are those of the search, computed anew from the tokens, for the search keeps those of all words otherwise.
    For the other arguments see [`translate`].

    Raises:
        [`UserError`]: if there are fewer beams than `n_best`.
    """
    options = find_options(generate_kwargs, model.generation_config)
    beams, penalty = options.get("num_beams", 1), options.get("length_penalty", 1.0)
    if n_best > beams:
        raise UserError(f"{n_best} translations need as many beams: num_beams is {beams}")
    hypotheses = [[Hypothesis("", 0.0)] for _ in sentences]
    generate_kwargs = {**generate_kwargs, "num_return_sequences": n_best}
    for batch, sources, output in search(model, tokenizer, sentences, max_batch_tokens, **generate_kwargs):
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        targets = [until_end(row[1:], tokenizer) for row in output.tolist()]
        repeated = [source for source in sources for _ in range(n_best)]
        log_probs = score_tokens(model, tokenizer, repeated, targets, max_batch_tokens)
        scores = [sum(values) / max(1, len(values)) ** penalty for values in log_probs]
        rows = [Hypothesis(text, score) for text, score in zip(texts, scores, strict=True)]
        for number, index in enumerate(batch):
            hypotheses[index] = rows[number * n_best : (number + 1) * n_best]
    return hypotheses


def until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens up to the end token and with it; one that was cut off at the maximum length has none."""
    # A beam search of Transformers fills up with end tokens where the padding token is 0.
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return tokens[: tokens.index(eos) + 1] if eos in tokens else [token for token in tokens if token != pad]


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_batch_tokens: int = 4096,
    **generate_kwargs,
) -> Iterator[tuple[list[int], list[list[int]], torch.Tensor]]:
    """Searches batch by batch, the longest sentences first; blank sentences are left out.

    For the arguments see [`translate`].

    Yields:
        The indices of the sentences of a batch, their tokens, and what `generate` gives: the start token and the tokens
        of the translations, padded, `num_return_sequences` rows a sentence.

    Raises:
        [`UserError`]: if a `length_penalty` is given, and there are no beams.
    """
    if not sentences:
        return
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    sources = tokenizer(list(sentences), return_attention_mask=False, verbose=False)["input_ids"]
    too_long = sum(len(source) > limit for source in sources)
    if too_long:
        logger.warning(f"{too_long} of {len(sources)} sentences were cut off at {limit} tokens")
        sources = [source if len(source) <= limit else [*source[: limit - 1], source[-1]] for source in sources]
    options = find_options(generate_kwargs, model.generation_config)
    longest = options.get("max_new_tokens", 0)
    if longest > limit:
        logger.warning_once(f"max_new_tokens {longest} is lowered to {limit}, the positions of the model")
        generate_kwargs = {**generate_kwargs, "max_new_tokens": limit}
    beams, cached = options.get("num_beams", 1), options.get("use_cache", True)
    if beams == 1 and generate_kwargs.get("length_penalty") is not None:
        raise UserError("length_penalty has no effect with num_beams 1")
    if beams > 1 and cached and not (options.get("do_sample") or options.get("cache_implementation")):
        generate_kwargs = {"custom_generate": beam_search, **generate_kwargs}
    lengths = {index: len(sources[index]) for index, sentence in enumerate(sentences) if sentence.strip()}
    model.eval()
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    disable = None if is_first else True  # `None`: where there is no terminal
    bar = tqdm(total=len(lengths), unit=" sentences", leave=False, disable=disable)
    for batch in batches_by_length(lengths, max_batch_tokens // beams):
        inputs = tokenizer.pad({"input_ids": [sources[index] for index in batch]}, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs.to(model.device), **generate_kwargs)
        bar.update(len(batch))
        yield batch, [sources[index] for index in batch], output
    bar.close()
