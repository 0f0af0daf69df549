"""Initialisation: the model's own, and that of the skip connections."""

import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from hf_rskip import RSkipForConditionalGeneration
from hf_rskip.models.skip_connections import ReZero

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def assert_xavier_uniform(weight, gain=1.0):
    bound = gain * math.sqrt(6 / sum(weight.shape))
    assert 0.97 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("skip_norm", ["layer_norm", "rms_norm", "batch_norm"])
@pytest.mark.parametrize("skip_type", ["rskip", "xskip", "pre_norm", "peri_norm", "keel", "admin_fixed"])
def test_initialization(tiny_config, skip_type, skip_norm):
    torch.manual_seed(0)
    config = tiny_config(skip_type=skip_type, skip_norm=skip_norm, vocab_size=300, tie_word_embeddings=False)
    model = RSkipForConditionalGeneration(config)
    assert_xavier_uniform(model.lm_head.weight)
    for stack in (model.model.encoder, model.model.decoder):
        embeddings = stack.embed_tokens.weight
        assert embeddings[1:].std().item() == pytest.approx(16**-0.5, rel=0.05)
        assert embeddings[0].abs().max() == 0
        for name, parameter in stack.named_parameters():
            if "norm" in name:
                assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
            elif "layers" in name and name.endswith("weight"):
                assert_xavier_uniform(parameter)
            elif "layers" in name:
                assert torch.all(parameter == 0), name
        for name, buffer in stack.named_buffers():
            if "running" in name:
                assert torch.all(buffer == (1 if name.endswith("var") else 0)), name


def test_sinusoids(build):
    table = build().model.decoder.embed_positions.weight
    for position, feature in [(0, 0), (0, 8), (1, 0), (5, 3), (23, 7), (23, 8), (11, 15)]:
        wave = math.sin if feature < 8 else math.cos
        expected = wave(position / 10000 ** (2 * (feature % 8) / 16))
        assert table[position, feature].item() == pytest.approx(expected, abs=1e-7)


def test_each_kind_initializes_each_sublayer_once(tiny_config, monkeypatch):
    calls = []
    monkeypatch.setattr(ReZero, "init_weights", lambda skip: calls.append(skip))
    model = RSkipForConditionalGeneration(tiny_config(skip_type="rezero"))
    expected = [module for module in model.modules() if isinstance(module, ReZero)]
    assert len(calls) == len(expected) == 2 * 2 + 2 * 3
    assert set(calls) == set(expected)


def save_and_load(model, path):
    model.save_pretrained(path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    return loaded


def test_deep_norm(tiny_config, batch, tmp_path):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "d_model": 32}
    model = RSkipForConditionalGeneration(tiny_config(skip_type="deep_norm", **sizes))
    encoder, decoder = model.model.encoder.layers[2], model.model.decoder.layers[1]
    assert encoder.mlp_skip.scale == pytest.approx(0.81 * 162 ** (1 / 16))
    assert decoder.encoder_attn_skip.scale == pytest.approx(6**0.25)
    for layer, beta in ((encoder, 0.87 * 162 ** (-1 / 16)), (decoder, 24**-0.25)):
        for linear in (layer.mlp.fc1, layer.mlp.fc2, layer.self_attn.v_proj, layer.self_attn.out_proj):
            assert_xavier_uniform(linear.weight, beta)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert_xavier_uniform(linear.weight)
    assert_xavier_uniform(decoder.encoder_attn.out_proj.weight, 24**-0.25)
    loaded = save_and_load(model, tmp_path)
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0, atol=0)


def test_rezero(tiny_config, batch, tmp_path):
    model = RSkipForConditionalGeneration(tiny_config(skip_type="rezero", skip_norm="none"))
    encoder = model.model.encoder
    states = encoder(batch["input_ids"]).last_hidden_state
    embedded = encoder.embed_tokens(batch["input_ids"]) * 4 + encoder.embed_positions.weight[:7]
    torch.testing.assert_close(states, embedded)

    alphas = [module.branch_scale for module in model.modules() if isinstance(module, ReZero)]
    assert len(alphas) == 10
    for _ in range(2):
        model(**batch).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(alpha != 0 for alpha in alphas)
    save_and_load(model, tmp_path)


def test_weights_that_a_checkpoint_lacks_are_initialized_and_the_others_kept(build, tmp_path):
    model = build(skip_type="xskip")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, skip_type="rezero", skip_norm="none", output_loading_info=True
    )
    assert all(name.endswith("_skip.branch_scale") for name in info["missing_keys"])
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters()).get(name, torch.zeros(())))


def test_admin(tiny_config, tmp_path):
    model = RSkipForConditionalGeneration(tiny_config(skip_type="admin", encoder_layers=3))
    for stack, sublayers in ((model.model.encoder, 6), (model.model.decoder, 6)):
        scale = math.sqrt((sublayers + 1) / math.log(sublayers + 1) - 1)
        for layer in stack.layers:
            assert torch.all(layer.mlp_skip.scale == torch.tensor(scale))
    with torch.no_grad():
        model.model.encoder.layers[0].mlp_skip.scale.uniform_()
    save_and_load(model, tmp_path)


def test_b2t(tiny_config, batch, tmp_path):
    torch.manual_seed(0)
    model = RSkipForConditionalGeneration(tiny_config(skip_type="b2t", encoder_layers=3, d_model=32)).eval()
    for layer in model.model.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            assert_xavier_uniform(linear.weight, 3**-0.5)
        for linear in (layer.self_attn.v_proj, layer.mlp.fc1):
            assert_xavier_uniform(linear.weight)
    assert_xavier_uniform(model.model.decoder.layers[0].encoder_attn.out_proj.weight, 2**-0.5)

    # A layer as its paper writes it.
    layer = model.model.encoder.layers[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        first = torch.layer_norm(x + layer.self_attn(x)[0], [32])
        expected = torch.layer_norm(x + first + layer.mlp(first), [32])
        torch.testing.assert_close(layer(x, None, None), expected)
    assert len(list(layer.self_attn_skip.parameters())) == 2 and not list(layer.mlp_skip.parameters())
    loaded = save_and_load(model, tmp_path)
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0, atol=0)
