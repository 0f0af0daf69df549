"""A tiny model whose parameters are all away from their initial values, and a padded batch for it."""

import pytest
import torch

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration

TINY = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 24,
    "dropout": 0.0,
}


@pytest.fixture
def tiny_config():
    def tiny_config(**values):
        return RSkipConfig(**(TINY | values))

    return tiny_config


@pytest.fixture
def build(tiny_config):
    def build(cls=RSkipForConditionalGeneration, attn_implementation="sdpa", **values):
        torch.manual_seed(0)
        model = cls._from_config(tiny_config(**values), attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    return build


def padded(lengths, pad):
    """Random rows of the given lengths that end in the end token 2, padded with `pad`, and their mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 20, mask.shape)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return tokens.masked_fill(~mask, pad), mask.long()


@pytest.fixture
def batch():
    """Source of lengths 7, 4, 2 padded with 0, labels of lengths 3, 6, 5 padded with -100."""
    torch.manual_seed(1)
    input_ids, attention_mask = padded([7, 4, 2], 0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": padded([3, 6, 5], -100)[0]}
