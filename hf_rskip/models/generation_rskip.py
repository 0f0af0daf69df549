"""Options of `generate` for translation: GNMT's length penalty, and a length limit that grows with the source."""

import copy

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.models.bart.modeling_bart import shift_tokens_right

TRANSLATION_OPTIONS = ("max_len_a", "max_len_b", "gnmt_length_penalty")
"""Options that `generate` of other models does not know."""


class GNMTLengthPenalty(float):
    """A `length_penalty` by which a sum of log-probabilities is divided by `((5 + length) / 6) ** alpha`.

    This is the length normalisation of Wu et al. (2016), which Vaswani et al. (2017) use with alpha = 0.6. The beam
    search of Transformers divides by `length ** length_penalty`, wherever it scores a finished or a running beam, and
    this number makes that power another one. Lengths are in tokens with the end token, as in tensor2tensor and fairseq.

    Example:

    ```python
    >>> from hf_rskip.models.generation_rskip import GNMTLengthPenalty

    >>> round(13 ** GNMTLengthPenalty(0.5), 3)  # sqrt(18 / 6)
    1.732

    ```
    """

    def __rpow__(self, length):
        return ((5 + length) / 6) ** float(self)


def find_options(kwargs: dict, *configs: GenerationConfig | None) -> dict:
    """The options of a call of `generate` that are not `None`: keywords, then those of each configuration in turn.

    The first to give either of `gnmt_length_penalty` and `length_penalty` decides `length_penalty`.
    """
    options = {}
    for given in (kwargs, *(vars(config) for config in configs if config is not None)):
        given = {name: value for name, value in given.items() if value is not None}
        if "gnmt_length_penalty" in given:
            given["length_penalty"] = GNMTLengthPenalty(given["gnmt_length_penalty"])
        options = given | options
    return options


def length_limits(lengths: torch.Tensor, a: float | None, b: int | None, most: int) -> torch.LongTensor:
    """`a` times the source length plus `b`, from 1 to `most`: the limit of new tokens of each sentence."""
    return ((a or 0) * lengths + (b or 0)).clamp(1, most).long()


class SourceLengthCriteria(StoppingCriteria):
    """Ends each row at a length of its own.

    Args:
        max_new_tokens (`(sentences,)`): the most tokens to generate for each sentence; the rows of a call are so many
            beams or samples of each sentence.
    """

    def __init__(self, max_new_tokens: torch.Tensor):
        self.max_new_tokens = max_new_tokens
        self.prompt_length = None

    def keep(self, sentences: torch.LongTensor) -> None:
        """Drops all sentences but those of these indices."""
        self.max_new_tokens = self.max_new_tokens[sentences]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.prompt_length is None:  # the first call comes with the first token
            self.prompt_length = input_ids.shape[1] - 1
        limits = self.max_new_tokens.repeat_interleave(len(input_ids) // len(self.max_new_tokens))
        return input_ids.shape[1] - self.prompt_length >= limits.to(input_ids.device)


def most_new_tokens(options: dict, positions: int) -> int:
    """The tokens that fit behind a prompt, by default the start token; the last one is not an input again.

    `generate` puts the start token before a prompt that has none.
    """
    prompt = options.get("decoder_input_ids")
    if prompt is None:
        return positions
    start = options.get("decoder_start_token_id", options.get("bos_token_id", -1))
    is_added = (prompt[:, 0] != torch.as_tensor(start, device=prompt.device)).all().item()
    return positions + 1 - prompt.shape[1] - is_added


def check_options(options: dict, kwargs: dict, positions: int) -> None:
    """Raises a `ValueError` if one of the [`find_options`] of these keywords is wrong or would have no effect."""
    for name in TRANSLATION_OPTIONS:
        if name in options and not 0 <= options[name] < float("inf"):
            raise ValueError(f"`{name}` must be a finite number of at least 0, not {options[name]}")
    if kwargs.get("gnmt_length_penalty") is not None and options.get("num_beams", 1) <= 1:
        raise ValueError("`gnmt_length_penalty` has no effect with `num_beams` 1")
    # With a dynamic cache the model itself refuses the position, once a translation is so long.
    name = "max_new_tokens" if "max_new_tokens" in options else "max_length"
    most = positions + 1 if name == "max_length" else most_new_tokens(options, positions)
    if options.get("cache_implementation") and options.get(name, 0) > most:
        said = f"`{name}` must be at most {most} with the {positions} positions of the model"
        raise ValueError(f"{said}, not {options[name]}")


class TranslationGenerationMixin(GenerationMixin):
    """`generate` with three more options, in `generation_config` or as keyword arguments.

    - `gnmt_length_penalty`: alpha of [`GNMTLengthPenalty`], in place of `length_penalty`; beam search only.
    - `max_len_a`, `max_len_b`: a sentence of n source tokens gets at most `max_len_a * n + max_len_b` new tokens, both
      counted with their end tokens (fairseq's names; each is 0 where only the other is given). The limit is each
      sentence's own, so that a translation does not depend on its batch. `max_new_tokens`, and the positions of the
      model, limit it further. As with `max_new_tokens`, what reaches the limit is cut there.
    """

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's input for `labels` `(batch, length)`: start token first, last token off, -100 as padding."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs,
    ):
        options = find_options(kwargs, generation_config, self.generation_config)
        positions, changes = self.config.max_position_embeddings, {}
        check_options(options, kwargs, positions)
        most = most_new_tokens(options, positions)
        if options.get("num_beams", 1) > 1:
            changes["length_penalty"] = options.get("length_penalty", 1.0)
        a, b = options.get("max_len_a"), options.get("max_len_b")
        if a is not None or b is not None:
            limits = length_limits(self._source_lengths(inputs, **kwargs), a, b, most)
            changes["max_new_tokens"] = min(limits.max().item(), options.get("max_new_tokens", most))
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), SourceLengthCriteria(limits)])
        for name in TRANSLATION_OPTIONS:
            kwargs.pop(name, None)
        if generation_config is None:
            kwargs |= changes
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**changes)
        return super().generate(inputs, generation_config, logits_processor, stopping_criteria, **kwargs)

    def _source_lengths(self, inputs=None, input_ids=None, attention_mask=None, **kwargs) -> torch.Tensor:
        """The number of source tokens of each sentence, padding left out."""
        if attention_mask is not None:
            return attention_mask.sum(-1)
        tokens = inputs if inputs is not None else input_ids
        if tokens is not None and not tokens.is_floating_point():
            return (tokens != self.config.pad_token_id).sum(-1)
        states = kwargs["encoder_outputs"][0] if "encoder_outputs" in kwargs else kwargs.get("inputs_embeds", tokens)
        return torch.full(states.shape[:1], states.shape[1], device=states.device)
