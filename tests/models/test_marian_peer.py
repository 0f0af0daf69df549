"""Post-LN, which is rSkip with K = 1 and xSkip with s = 1, is the Transformer of Marian."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import MarianConfig, MarianMTModel

RENAMES = {
    ".norm.0.": ".",
    ".norm.": ".",
    "attn_skip": "attn_layer_norm",
    "mlp_skip": "final_layer_norm",
    "mlp.": "",
}


def name_in_marian(name):
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def marian_with_weights_of(model):
    values = {name: value for name, value in model.config.to_dict().items() if name in MarianConfig.__annotations__}
    config = MarianConfig(**values, forced_eos_token_id=None)
    peer = MarianMTModel._from_config(config, attn_implementation=model.config._attn_implementation).eval()
    peer.generation_config.forced_eos_token_id = None
    weights = {name_in_marian(name): weight for name, weight in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name in ("final_logits_bias", "model.shared.weight") or "positions" in name for name in missing)
    return peer


POST_LN = [
    pytest.param({"skip_type": "rskip", "skip_recursions": 1}, id="rskip"),
    pytest.param({"skip_type": "rskip", "skip_recursions": 1, "skip_norm_affine": "last"}, id="rskip-last"),
    pytest.param({"skip_type": "xskip", "skip_scale": 1.0}, id="xskip"),
]
VARIANTS = [
    pytest.param({"scale_embedding": True, "activation_function": "relu"}, id="scaled-relu-shared"),
    pytest.param({"scale_embedding": False, "activation_function": "swish"}, id="swish-shared"),
    pytest.param(
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33, "activation_function": "swish"},
        id="scaled-swish-separate",
    ),
]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("post_ln", POST_LN)
def test_logits_loss_and_every_gradient(build, batch, post_ln, variant, attn_implementation):
    model = build(attn_implementation=attn_implementation, **post_ln, **variant).train()
    peer = marian_with_weights_of(model).train()
    actual, expected = model(**batch), peer(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for output in (actual, expected):
        output.loss.backward()
    gradients = {name_in_marian(name): parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in peer.named_parameters() if parameter.requires_grad}
    if "model.shared.weight" in expected:
        expected["model.encoder.embed_tokens.weight"] = expected.pop("model.shared.weight")
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("post_ln", POST_LN)
def test_generation_token_by_token(build, batch, post_ln, variant, num_beams):
    if num_beams > 1 and Version(transformers.__version__) < Version("5.18") and "decoder_vocab_size" in variant:
        pytest.skip("beam search of Transformers 5.17 takes the source vocabulary's size for the target's")
    model = build(**post_ln, **variant)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # Without these a random model repeats one token and no row ever ends.
    options = {"no_repeat_ngram_size": 2, "eos_token_id": [2, 3, 4, 5]}
    options |= {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 15}
    actual = model.generate(**source, **options)
    assert torch.equal(actual, marian_with_weights_of(model).generate(**source, **options))
    assert len(actual.unique()) > 4
