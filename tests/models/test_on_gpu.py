"""Models on a GPU against themselves on a CPU."""

import copy

import pytest
import torch

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.models import SKIP_CONNECTIONS


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SKIP_CONNECTIONS)
def test_loss_gradients_and_beams(kind):
    torch.manual_seed(0)
    config = RSkipConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, skip_type=kind,
    )  # fmt: skip
    on_cpu = RSkipForConditionalGeneration(config).eval()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    tokens = torch.randint(4, 50, (3, 8))
    losses = [
        model(input_ids=tokens.to(model.device), labels=tokens.to(model.device)).loss for model in (on_cpu, on_gpu)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-5)
    for (name, expected), found in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-3, atol=1e-5, msg=name)
    beams = [model.generate(tokens.to(model.device), num_beams=3, max_new_tokens=8).cpu() for model in (on_cpu, on_gpu)]
    assert torch.equal(*beams)
