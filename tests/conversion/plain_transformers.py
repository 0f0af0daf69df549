"""Small models with random weights, and the kinds that fold exactly into post-LN."""

import pytest
import torch

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration

EXACT = [
    pytest.param({"skip_type": "rskip", "skip_recursions": 1}, id="rskip"),
    pytest.param({"skip_type": "rskip", "skip_recursions": 1, "skip_norm_affine": "last"}, id="rskip-last"),
    pytest.param({"skip_type": "rskip_detached", "skip_recursions": 1}, id="rskip_detached"),
    pytest.param({"skip_type": "xskip", "skip_scale": 3.0}, id="xskip"),
    pytest.param({"skip_type": "xskip", "skip_scale": -0.5, "lm_head_bias": True}, id="xskip-negative"),
    pytest.param({"skip_type": "xskip", "skip_scale": 2.0, "skip_norm": "rms_norm"}, id="xskip-rms"),
    pytest.param({"skip_type": "deep_norm"}, id="deep_norm"),
    pytest.param({"skip_type": "admin"}, id="admin"),
    pytest.param({"skip_type": "admin", "skip_norm": "rms_norm", "scale_embedding": False}, id="admin-rms"),
    pytest.param({"skip_type": "admin_fixed"}, id="admin_fixed"),
    pytest.param({"skip_type": "rezero"}, id="rezero"),
]
EMBEDDINGS = [
    pytest.param({}, id="shared"),
    pytest.param({"tie_word_embeddings": False}, id="shared-untied"),
    pytest.param({"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33}, id="separate"),
]


TINY = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 30,
}


def shake(model):
    """Moves all trained parameters from their initial values; returns the model in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's positions have none
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def make_model(seed=0, **values) -> RSkipForConditionalGeneration:
    torch.manual_seed(seed)
    return shake(RSkipForConditionalGeneration(RSkipConfig(**(TINY | values))))


def random_batch(config, rows=200, seed=1) -> dict[str, torch.Tensor]:
    """Sources and targets of 1 to 12 tokens, padded on the right."""
    torch.manual_seed(seed)
    sides = []
    for size in (config.vocab_size, config.decoder_vocab_size):
        mask = (torch.arange(12) < torch.randint(1, 13, (rows, 1))).long()
        sides.append((torch.randint(3, size, mask.shape) * mask, mask))
    (source, mask), (target, _) = sides
    target[:, 0] = config.decoder_start_token_id
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
