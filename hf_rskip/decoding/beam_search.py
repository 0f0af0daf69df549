"""Beam search of Transformers, but a sentence leaves the batch when its search has ended."""

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, generation

from ..models.generation_rskip import SourceLengthCriteria

_NEVER = -1e9
_ROW_BY_ROW = {
    generation.ForcedEOSTokenLogitsProcessor,
    generation.LogitNormalization,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.EosTokenCriteria,
    generation.MaxLengthCriteria,
    SourceLengthCriteria,
}
"""Processors and criteria of recipes and of Marian checkpoints that judge each row by its own tokens, or can be told
which sentences are left. With any other one the search is the same, but slower."""


def _gather(tensor: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """The chosen beams `(sentences, k)` of a tensor `(sentences, beams, ...)`."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], beams]


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.LongTensor:
    """A `custom_generate` of `model.generate` that finds what its own beam search finds, in less time.

    The search of Transformers runs every sentence of a batch until the last one ends. Here a sentence leaves the batch
    when its search is over. Its rules are the same: which hypotheses end, when no better one is expected
    (`early_stopping`), and how `length_penalty` scores them. Where a processor or criterion may know a sentence by its
    row, as that of `prefix_allowed_tokens_fn` does, all sentences stay to the end.

    Args:
        model: an encoder-decoder whose cache is a dynamic `EncoderDecoderCache`.
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` prepares them.

    Returns:
        `(sentences * num_return_sequences, length)`: the decoder's tokens, padded at the end.

    Raises:
        `ValueError`: for what it does not do: `return_dict_in_generate`, `low_memory`, a `decoder_attention_mask`.
    """
    if model_kwargs.get("decoder_attention_mask") is not None:
        raise ValueError("`decoder_attention_mask` is for the beam search of Transformers, not for this one")
    for name in ("return_dict_in_generate", "low_memory"):
        if getattr(generation_config, name):
            raise ValueError(f"`{name}` is for the beam search of Transformers, not for this one")
    beams, penalty, early = (
        getattr(generation_config, name) for name in ("num_beams", "length_penalty", "early_stopping")
    )
    prompt, longest = input_ids.shape[1], generation_config.max_length
    eos, pad = generation_config.eos_token_id, generation_config.pad_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if pad is None:
        pad = ends[0] if ends else 0
    keep = max(2, 1 + len(ends)) * beams
    sentences, device = len(input_ids) // beams, input_ids.device
    result = input_ids.new_full((sentences, beams, longest), pad)
    running = result.clone()
    running[:, :, :prompt] = input_ids.view(sentences, beams, prompt)
    scores = torch.zeros(sentences, beams, device=device)
    scores[:, 1:] = _NEVER  # at first all beams are the same
    ended, ended_scores = running.clone(), torch.full_like(scores, _NEVER)
    is_ended = torch.zeros_like(scores, dtype=torch.bool)
    active = torch.arange(sentences, device=device)
    unfinished = torch.ones_like(active, dtype=torch.bool)
    all_stay = any(type(rule) not in _ROW_BY_ROW for rule in [*logits_processor, *stopping_criteria])
    # The first step has one row a sentence, as its beams are equal; so has the source in every step, if the model can.
    shared = getattr(model, "rows_share_sources", False)
    of_beams = model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask")
    encoder_outputs = type(of_beams[0])(last_hidden_state=of_beams[0][0][::beams])
    attention_mask = None if of_beams[1] is None else of_beams[1][::beams]
    cache, tokens = model_kwargs.get("cache"), input_ids[::beams]

    for length in range(prompt, longest):
        output = model(
            decoder_input_ids=tokens,
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=True,
        )
        cache, log_probs = output.cache, output.logits[:, -1].float().log_softmax(-1)
        if length == prompt:
            log_probs = log_probs.repeat_interleave(beams, dim=0)
            (cache.self_attention_cache if shared else cache).batch_repeat_interleave(beams)
            if not shared:
                encoder_outputs, attention_mask = of_beams
        # The best continuations of each beam, then of each sentence.
        width = min(keep, log_probs.shape[-1])
        if logits_processor:
            log_probs = logits_processor(running[:, :, :length].flatten(0, 1), log_probs)
        best, words = log_probs.topk(width)
        best = (best.view(len(active), beams, width) + scores[:, :, None]).flatten(1)
        best, chosen = best.topk(min(keep, best.shape[1]))
        origin = chosen // width
        candidates = _gather(running, origin)
        candidates[:, :, length] = words.view(len(active), -1).gather(1, chosen)
        stops = stopping_criteria(candidates[:, :, : length + 1].flatten(0, 1), None).view(best.shape)

        # Ended hypotheses among the best `beams` compete with earlier ones.
        new = (best / (length + 1 - prompt) ** penalty).masked_fill(~stops, _NEVER)
        new[:, beams:] = _NEVER
        ended_scores, order = torch.cat([ended_scores, new], 1).topk(beams)
        ended = _gather(torch.cat([ended, candidates], 1), order)
        is_ended = _gather(torch.cat([is_ended, new > _NEVER], 1), order)

        # The best `beams` of the others continue.
        scores, order = best.masked_fill(stops, _NEVER).topk(beams)
        running, origin = _gather(candidates, order), origin.gather(1, order)

        hoped = longest - prompt if early == "never" and penalty > 0 else length + 1 - prompt
        worst = ended_scores.min(1).values.masked_fill(~is_ended.all(1), _NEVER)
        over = (scores[:, 0] / hoped**penalty <= worst) | stops.all(1)
        if early is True:
            over |= is_ended.all(1)
        over &= unfinished
        result[active[over]] = ended[over]
        unfinished &= ~over
        if not unfinished.any():
            break
        going = (unfinished | all_stay).nonzero().squeeze(1)
        cache.self_attention_cache.reorder_cache(going.repeat_interleave(beams) * beams + origin[going].flatten())
        if len(going) < len(active):
            rows = going if shared else (going[:, None] * beams + torch.arange(beams, device=device)).flatten()
            cache.cross_attention_cache.reorder_cache(rows)
            encoder_outputs = type(encoder_outputs)(last_hidden_state=encoder_outputs[0][rows])
            attention_mask = None if attention_mask is None else attention_mask[rows]
            active, running, scores = active[going], running[going], scores[going]
            ended, ended_scores, is_ended = ended[going], ended_scores[going], is_ended[going]
            unfinished = unfinished[going]
            for criterion in stopping_criteria:
                if isinstance(criterion, SourceLengthCriteria):
                    criterion.keep(going)
        tokens = running[:, :, length].flatten()[:, None]

    result = result[:, : generation_config.num_return_sequences].flatten(0, 1)
    filled = (result[:, prompt:] != pad).any(0).nonzero()
    return result[:, : prompt + (int(filled.max()) + 1 if len(filled) else 1)]
