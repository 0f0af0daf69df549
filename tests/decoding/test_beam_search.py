"""The search that drops ended sentences finds what the search of Transformers finds."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.decoding.beam_search import beam_search
from hf_rskip.decoding.ensemble import Ensemble


@pytest.fixture(scope="module")
def models():
    """Two random models that end sentences early and late."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = RSkipConfig(
            vocab_size=30,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            lm_head_bias=True,
        )
        model = RSkipForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            model.lm_head.weight.mul_(0.3)
        found.append(model)
    return found


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(2)
    lengths = torch.tensor([7, 1, 12, 3, 9, 2, 7, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": torch.randint(3, 30, (8, 12)) * mask, "attention_mask": mask}


class FavouritesOfRows(LogitsProcessor):
    """Sentence i likes token 10 + i."""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(scores))
        scores = scores.clone()
        scores[rows, 10 + rows // (len(rows) // 8)] += 4
        return scores


class LimitsOfRows(StoppingCriteria):
    """Sentence i ends after 2 + i tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 3 + torch.arange(8).repeat_interleave(len(input_ids) // 8)


def odd_or_even(sentence, tokens):
    """Even sentences get even tokens, odd ones odd tokens, and all may end."""
    return [2, *range(4 + sentence % 2, 30, 2)]


OPTIONS = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"gnmt_length_penalty": 0.6},
    {"early_stopping": True},
    {"num_return_sequences": 4},
    {"no_repeat_ngram_size": 2},
    {"max_len_a": 1, "max_len_b": 3},
    {"max_len_a": 2, "gnmt_length_penalty": 1.0, "num_return_sequences": 2, "no_repeat_ngram_size": 3},
    {"eos_token_id": [2, 5, 9]},
    {"min_new_tokens": 6},
    {"max_new_tokens": 1},
    {"repetition_penalty": 1.5, "bad_words_ids": [[7], [8, 9]], "suppress_tokens": [11]},
    {"forced_bos_token_id": 6, "forced_eos_token_id": 2, "exponential_decay_length_penalty": (3, 1.2)},
    {"sequence_bias": [[[12], 2.0]], "begin_suppress_tokens": [4, 5], "renormalize_logits": True},
    {"encoder_no_repeat_ngram_size": 1, "max_len_a": 1},
    {"encoder_repetition_penalty": 3.0, "max_len_a": 1},
    {"prefix_allowed_tokens_fn": odd_or_even, "max_len_a": 1},
    {"logits_processor": LogitsProcessorList([FavouritesOfRows()]), "max_len_a": 1},
    {"stopping_criteria": StoppingCriteriaList([LimitsOfRows()]), "max_len_a": 1, "max_len_b": 5},
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_same_tokens(models, batch, options, count):
    model = Ensemble(models) if count > 1 else models[0]
    options = {"num_beams": 4, "max_new_tokens": 20, **options}
    if "max_len_a" in options:
        del options["max_new_tokens"]
    expected = model.generate(**batch, **options)
    found = model.generate(**batch, **options, custom_generate=beam_search)
    # Transformers fills up with the end token where padding is token 0.
    ends = options.get("eos_token_id", 2)
    first = ends[0] if isinstance(ends, list) else ends
    assert len(found) == len(expected) and found.shape[1] == expected.shape[1]
    for row, reference in zip(found.tolist(), expected.tolist(), strict=True):
        kept = [token for token in reversed(reference)]
        while kept and kept[0] in (0, first):
            kept.pop(0)
        assert row[: len(kept)] == kept[::-1]
        assert set(row[len(kept) :]) <= {0, first}


def test_ended_sentences_leave(models, batch):
    rows = []
    hook = (
        models[0]
        .get_decoder()
        .register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    )
    output = models[0].generate(**batch, num_beams=4, max_len_a=2, max_len_b=0, custom_generate=beam_search)
    hook.remove()
    assert rows[:2] == [8, 32] and rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < 32
    for row, length in zip(output, batch["attention_mask"].sum(1), strict=True):
        assert (row[1:] != 0).sum() <= 2 * length


@pytest.mark.parametrize("option", ["return_dict_in_generate", "low_memory"])
def test_what_it_does_not_give_is_refused(models, batch, option):
    with pytest.raises(ValueError, match=f"`{option}` is for the beam search of Transformers"):
        models[0].generate(**batch, num_beams=2, max_new_tokens=4, custom_generate=beam_search, **{option: True})


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_rows_share_a_source(models, batch, attn_implementation):
    """Three targets for each source, at once and after a past, are those of the source three times."""
    targets = torch.randint(3, 30, (24, 5), generator=torch.Generator().manual_seed(3))
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in batch.items()}
    models[0].set_attn_implementation(attn_implementation)
    with torch.no_grad():
        expected = models[0](**repeated, decoder_input_ids=targets).logits
        outputs = models[0](**batch, decoder_input_ids=targets[:, :3], use_cache=True)
        cache = outputs.cache
        assert cache.cross_attention_cache.layers[0].keys.shape[0] == 8 and models[0].rows_share_sources
        states = (outputs.encoder_last_hidden_state,)
        mask = batch["attention_mask"]
        rest = models[0](attention_mask=mask, encoder_outputs=states, decoder_input_ids=targets[:, 3:], cache=cache)
    torch.testing.assert_close(torch.cat([outputs.logits, rest.logits], 1), expected, atol=1e-5, rtol=0)


def test_nothing_but_padding(models, batch):
    model = copy.deepcopy(models[0])
    pad = model.config.pad_token_id
    options = {"num_beams": 2, "max_new_tokens": 4, "sequence_bias": {(pad,): 1e4}}
    tokens = model.generate(**batch, **options, custom_generate=beam_search)
    assert (tokens[:, 1:] == pad).all() and tokens.shape[1] == 2
