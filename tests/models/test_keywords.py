"""Keywords: those of Transformers are taken, all others are refused by name."""

import importlib.metadata

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import TransformersKwargs

from hf_rskip import (
    RSkipForConditionalGeneration,
    RSkipModel,
    RSkipResNetBackbone,
    RSkipResNetConfig,
    RSkipResNetForImageClassification,
    RSkipResNetModel,
)
from hf_rskip.decoding.ensemble import Ensemble
from hf_rskip.models import checks


@pytest.fixture
def calls(build):
    """Each model that has a `forward` of its own, with its arguments."""
    model = build()
    tokens = torch.tensor([[5, 6, 2]])
    pair = {"input_ids": tokens, "decoder_input_ids": tokens}
    states = torch.zeros(1, 3, model.config.d_model)
    config = RSkipResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    images = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    return {
        RSkipForConditionalGeneration: (model, pair),
        RSkipModel: (model.model, pair),
        "RSkipEncoder": (model.model.encoder, {"input_ids": tokens}),
        "RSkipDecoder": (model.model.decoder, {"input_ids": tokens, "encoder_hidden_states": states}),
        Ensemble: (Ensemble([model, model]), pair),
        "EnsembleEncoder": (Ensemble([model, model]).encoder, {"input_ids": tokens}),
        RSkipResNetModel: (RSkipResNetModel(config), images),
        RSkipResNetForImageClassification: (RSkipResNetForImageClassification(config), images),
        RSkipResNetBackbone: (RSkipResNetBackbone(config), images),
    }


def test_unknown_keywords_are_refused_by_name(calls):
    for model, inputs in calls.values():
        model(**inputs)
        for keyword in ("cash", "past_key_values", "cache_position"):
            with pytest.raises(TypeError, match=f"{type(model).__name__}.forward.* unexpected keyword .*'{keyword}'"):
                model(**inputs, **{keyword: None})


def test_the_former_name_of_the_cache_says_since_when(calls):
    model, inputs = calls[RSkipForConditionalGeneration]
    cache = model(**inputs, use_cache=True).cache
    with pytest.raises(TypeError, match="'past_key_values': it is `cache` since Transformers 5.24$"):
        model(**inputs, past_key_values=cache)


def test_keywords_of_transformers_are_taken(calls):
    model, inputs = calls[RSkipForConditionalGeneration]
    expected = model(**inputs).logits
    # Those that pack several sequences into a row are for flash attention.
    for keyword in sorted(TransformersKwargs.__optional_keys__ - {"is_causal"}):
        torch.testing.assert_close(model(**inputs, **{keyword: None}).logits, expected)


def test_keywords_without_effect_are_refused(calls):
    asked = dict.fromkeys(calls, ("position_ids", "cu_seq_lens_q"))
    asked |= {name: (*asked[name], "output_attentions") for name in asked if "ResNet" in str(name)}
    asked |= {
        name: ("position_ids", "output_attentions", "output_hidden_states") for name in (Ensemble, "EnsembleEncoder")
    }
    for name, (model, inputs) in calls.items():
        for keyword in asked[name]:
            with pytest.raises(TypeError, match=rf"{type(model).__name__}.forward\(\) does not support '{keyword}'"):
                model(**inputs, **{keyword: True})
    model, inputs = calls[RSkipForConditionalGeneration]
    for value in (True, False):  # either would change the attention of encoder and decoder
        with pytest.raises(TypeError, match="does not support 'is_causal'"):
            model(**inputs, is_causal=value)


def test_the_encoder_of_an_ensemble_returns_a_tuple_if_asked(calls):
    encoder, inputs = calls["EnsembleEncoder"]
    (states,) = encoder(**inputs, return_dict=False)
    torch.testing.assert_close(states, encoder(**inputs).last_hidden_state)


def test_a_cache_of_another_kind_is_refused(calls):
    """A plain cache would mix the keys and values of the two attentions of a layer."""
    for name in (RSkipForConditionalGeneration, RSkipModel, "RSkipDecoder", Ensemble):
        model, inputs = calls[name]
        for cache in (1, DynamicCache()):
            wrong = type(cache).__name__
            with pytest.raises(
                TypeError, match=f"needs an EncoderDecoderCache of Transformers as `cache`, not {wrong}"
            ):
                model(**inputs, cache=cache)


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.23.0")
    with pytest.raises(
        ImportError, match=r"^transformers>=5\.24\S* is required .* but found transformers==5\.23\.0\.$"
    ):
        importlib.reload(checks)
