"""Log-probabilities of given translations."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .ctranslate2 import CTranslate2Model


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str],
    max_batch_tokens: int = 4096,
) -> list[list[float]]:
    """The log-probability of every token of every translation, the end token last, in the order given.

    Args:
        model, tokenizer: as the Auto classes load them.
        sources, targets: a sentence and its translation each; a blank one is its end token alone.
        max_batch_tokens: budget of a batch, in padded tokens of the longer side.

    Raises:
        [`UserError`]: if a sentence has more tokens than the model has positions.
    """
    return score_tokens(model, tokenizer, *tokenize_pairs(model, tokenizer, sources, targets), max_batch_tokens)


def tokenize_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each sentence and translation; raises a [`UserError`] if one has more than the model takes."""
    source_ids = tokenizer(list(sources), return_attention_mask=False, verbose=False)["input_ids"]
    target_ids = tokenizer(text_target=list(targets), return_attention_mask=False, verbose=False)["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    for number, pair in enumerate(zip(source_ids, target_ids, strict=True), start=1):
        longest = max(map(len, pair))
        if limit and longest > limit:
            raise UserError(f"Sentence {number} has {longest} tokens, more than the {limit} positions of the model")
    return source_ids, target_ids


def score_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[list[int]],
    targets: Sequence[list[int]],
    max_batch_tokens: int = 4096,
) -> list[list[float]]:
    """Scores tokens, as [`score`] does texts: the natural logarithm of p(token | source, tokens before it)."""
    lengths = [max(map(len, pair)) for pair in zip(sources, targets, strict=True)]
    log_probs = [[] for _ in lengths]
    model.eval()
    bar = tqdm(total=len(lengths), unit=" sentences", leave=False, disable=None, delay=1)  # `None`: no terminal
    for batch in batches_by_length(dict(enumerate(lengths)), max_batch_tokens):
        pairs = [sources[index] for index in batch], [targets[index] for index in batch]
        is_torch = not isinstance(model, CTranslate2Model)
        rows = _score_in_torch(model, tokenizer, *pairs) if is_torch else model.score_tokens(*pairs)
        for index, row in zip(batch, rows, strict=True):
            log_probs[index] = row[: len(targets[index])]
        bar.update(len(batch))
    bar.close()
    return log_probs


def _score_in_torch(model, tokenizer, sources, targets) -> list[list[float]]:
    """The log-probabilities of a batch, and zeros after the end of a target."""
    inputs = tokenizer.pad({"input_ids": sources}, return_tensors="pt").to(model.device)
    labels = [torch.tensor(target, dtype=torch.int64) for target in targets]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    if not labels.numel():
        return labels.tolist()
    labels = labels.to(model.device)
    with torch.inference_mode():
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        # Cross-entropy is 0 where the label is -100.
        values = -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return values.tolist()


def batches_by_length(lengths: Mapping[int, int], max_tokens: int) -> Iterator[list[int]]:
    """The keys of `lengths`, longest first, in batches of at most `max_tokens` padded tokens, or of one sentence."""
    order = sorted(lengths, key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + rows]
        start += rows
