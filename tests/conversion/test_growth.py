"""What K = 1 models become with more recursions."""

import copy

import pytest
import torch

from hf_rskip import RSkip, RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.conversion.growth import GAIN, grow_recursions
from hf_rskip.conversion.marian import convert_marian_checkpoint, convert_marian_model
from hf_rskip.errors import UserError


@pytest.fixture
def model(make_marian):
    return convert_marian_model(make_marian(activation_function="relu"))


def logits(model, batch):
    with torch.no_grad():
        return model.double()(**batch).logits


@pytest.mark.parametrize("recursions", [2, 3])
def test_error_shrinks_like_the_gain_grows(model, batch, recursions):
    expected = logits(copy.deepcopy(model), batch)
    errors = [
        (logits(grow_recursions(model, recursions, gain), batch) - expected).norm() / expected.norm()
        for gain in (1, 100, 1000, 10_000)
    ]
    assert errors[0] > 0.3  # plain norms do damage
    for larger, smaller in zip(errors[1:], errors[2:], strict=False):
        assert 9 < larger / smaller < 11
    assert errors[1] < 0.1


def test_angle_of_one_block():
    """The output turns away from K = 1's by the angle that the docstring states."""
    torch.manual_seed(0)
    x, branch = torch.randn(2, 50, 64, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    for gain in (2.0, 10.0):
        skip = RSkip(64, recursions=2, eps=1e-12).double()
        skip.norm[0].weight.data.fill_(gain)
        n = torch.nn.functional.layer_norm(x + branch, (64,), eps=1e-12)
        y = skip(x, branch).detach()
        along = (x * n).mean(-1)
        orthogonal = (x - along[:, None] * n).square().mean(-1).sqrt()
        angle = torch.atan2(orthogonal, gain + along)
        torch.testing.assert_close((y * n).mean(-1), angle.cos())
        # In other words, the skip's weight is 1 + std(x + F) / a.
        weight = 1 + (x + branch).std(-1, correction=0, keepdim=True) / gain
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(weight * x + branch, (64,), eps=1e-12))


def test_the_added_steps_and_nothing_else(model):
    grown = grow_recursions(model, 3, 7.0)
    assert (grown.config.skip_recursions, model.config.skip_recursions) == (3, 1)
    assert grown.generation_config.to_dict() == model.generation_config.to_dict()
    trained, weights = model.state_dict(), grown.state_dict()
    for name, weight in weights.items():
        if "_skip.norm.0." in name or "_skip.norm.1." in name:
            assert weight.eq(7 if name.endswith("weight") else 0).all()
        else:
            assert torch.equal(weight, trained[name.replace("norm.2.", "norm.0.")])
    assert len(weights) == len(trained) + 2 * 2 * (2 * 2 + 3 * 3)  # gain and bias of 2 steps in each sublayer


def test_growing_twice_is_growing_once(model, batch):
    at_once = logits(grow_recursions(model, 3, 7.0), batch)
    torch.testing.assert_close(logits(grow_recursions(grow_recursions(model, 2, 7.0), 3, 7.0), batch), at_once)


@pytest.mark.parametrize("skip_norm", ["layer_norm", "rms_norm"])
def test_gradients_reach_every_parameter(batch, skip_norm):
    torch.manual_seed(0)
    config = RSkipConfig(
        **{"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "skip_recursions": 1, "skip_norm": skip_norm, "lm_head_bias": True},
    )
    grown = grow_recursions(RSkipForConditionalGeneration(config), 2)
    grown(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    # The keys' biases move every score of a query alike, so that they never get one, however many the recursions.
    idle = [name for name, p in grown.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert all(name.endswith("k_proj.bias") for name in idle)


def test_conversion_with_two_recursions(marian_folder):
    (model, _), (grown, _) = (convert_marian_checkpoint(str(marian_folder), recursions) for recursions in (1, 2))
    expected = grow_recursions(model, 2, GAIN).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in grown.state_dict().items())
    assert grown.config.source_lang == "en"


@pytest.mark.parametrize(
    ("values", "recursions", "message"),
    [
        ({}, 1, "`skip_recursions` must be more than the model's 1, not 1"),
        ({"skip_type": "pre_norm"}, 2, "not to 'pre_norm' with 'layer_norm'"),
        ({"skip_norm": "batch_norm"}, 2, "not to 'rskip' with 'batch_norm'"),
        ({"skip_recursions": 2, "skip_norm_affine": "last"}, 3, "must be 'per_step', not 'last'"),
    ],
)
def test_errors(values, recursions, message):
    config = RSkipConfig(
        **{"vocab_size": 9, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "skip_recursions": 1, **values}
    )
    with pytest.raises(UserError, match=message):
        grow_recursions(RSkipForConditionalGeneration(config), recursions)
