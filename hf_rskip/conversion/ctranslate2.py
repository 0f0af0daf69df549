"""Exports to CTranslate2, which translates on CPUs and GPUs in float32, float16 and int8.

Its Transformer is post-LN or pre-LN, so that what folds exactly into post-LN is folded (see
[`~hf_rskip.conversion.fold`]), and `pre_norm` and `peri_norm` are written as they are.

The folder holds `model.bin`, the vocabulary, the tokenizer, `generation_config.json`, and one `config.json` with the
keys of both CTranslate2 and this package, so that `hf-rskip translate` takes it. `early_stopping` is true there, since
it is in the beam search of CTranslate2; see [`~hf_rskip.decoding.ctranslate2`].
"""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError, require
from ..models import RSkipConfig
from .fold import fold_exactly

logger = logging.get_logger(__name__)

_PRE_LN = ("pre_norm", "peri_norm")
_ACTIVATIONS = {
    "relu": "RELU",
    "gelu": "GELU",
    "gelu_new": "GELUTanh",
    "gelu_pytorch_tanh": "GELUTanh",
    "quick_gelu": "GELUSigmoid",
    "silu": "SWISH",
    "swish": "SWISH",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
}
_SUBLAYERS = {"self_attn": "self_attention", "encoder_attn": "attention", "mlp": "ffn"}
_PERI_NORMS = {
    "self_attn": ("input_layer_norm", "post_attention_layer_norm"),
    "encoder_attn": ("external_pre_encoder_attention_layer_norm", "external_post_encoder_attention_layer_norm"),
    "mlp": ("pre_feedforward_layer_norm", "post_feedforward_layer_norm"),
}


@torch.no_grad()
def export_ctranslate2(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    quantization: str | None = None,
) -> None:
    """Writes a model that translates, and its tokenizer, to `folder`; see this module for how.

    Args:
        model: on the CPU, in float32.
        tokenizer: with one vocabulary.
        folder: a new or empty one.
        quantization: `"int8"`, `"int8_float32"`, `"int16"`, `"float16"`, `"bfloat16"`, or `None` for float32.

    Raises:
        [`UserError`]: if ctranslate2 is missing, or CTranslate2 cannot compute the model.
    """
    require("ctranslate2", "ctranslate2")
    from ctranslate2.specs import TransformerSpec

    model = _plain_transformer(model)
    tokens = _vocabularies(model.config, tokenizer)
    spec = TransformerSpec(*(_stack_spec(model, name) for name in ("encoder", "decoder")))
    _set_linear(spec.decoder.projection, model.lm_head)
    spec.register_source_vocabulary(tokens[0])
    spec.register_target_vocabulary(tokens[1])
    start = tokens[1][model.config.decoder_start_token_id]
    own = {"bos_token": start, "decoder_start_token": start, "eos_token": tokenizer.eos_token}
    own |= {"unk_token": tokenizer.unk_token or tokenizer.pad_token, "layer_norm_epsilon": model.config.layer_norm_eps}
    for name, value in (model.config.to_diff_dict() | own).items():
        spec.config.add_attribute(name, value)
    spec.validate()
    spec.optimize(quantization)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    generation_config = copy.deepcopy(model.generation_config)
    searches = (generation_config.num_beams or 1) > 1
    if searches and generation_config.early_stopping is not True:
        logger.warning("`early_stopping` is true in CTranslate2 and was not in the model: beam search can end earlier")
    generation_config.early_stopping = True if searches else None
    generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain_transformer(model: PreTrainedModel) -> PreTrainedModel:
    """The model as CTranslate2 can compute it: folded, or as it is where the kind is pre-LN.

    Raises:
        [`UserError`]: if there is no such form.
    """
    if getattr(model.config, "skip_type", None) not in _PRE_LN:
        model = fold_exactly(model)
    for name, known in (("skip_norm", ("layer_norm", "rms_norm")), ("activation_function", _ACTIVATIONS)):
        if getattr(model.config, name) not in known:
            raise UserError(f"`{name}` {getattr(model.config, name)!r} does not exist in CTranslate2")
    return model


def _vocabularies(config: RSkipConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The tokens of source and target in the order of their ids; rows without a token get an unused name."""
    if getattr(tokenizer, "separate_vocabs", False):
        raise UserError("A tokenizer with a vocabulary for each language is not exported to CTranslate2")
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    sizes = (config.vocab_size, config.decoder_vocab_size)
    return tuple([known.get(index, f"<unused {index}>") for index in range(size)] for size in sizes)


def _stack_spec(model: PreTrainedModel, name: str):
    """The specification of the encoder or the decoder, with its weights."""
    from ctranslate2.specs import common_spec, transformer_spec

    config, stack = model.config, model.get_submodule(f"model.{name}")
    is_decoder, is_peri = name == "decoder", config.skip_type == "peri_norm"
    spec = (transformer_spec.TransformerDecoderSpec if is_decoder else transformer_spec.TransformerEncoderSpec)(
        len(stack.layers),
        getattr(config, f"{name}_attention_heads"),
        pre_norm=config.skip_type in _PRE_LN,
        activation=common_spec.Activation[_ACTIVATIONS[config.activation_function]],
        rms_norm=config.skip_norm == "rms_norm",
        pre_post_layer_norm=is_peri,
        **({"external_pre_post_encoder_layers": is_peri} if is_decoder else {}),
    )
    spec.scale_embeddings = config.scale_embedding
    # A copy, since CTranslate2 quantizes in place.
    (spec.embeddings if is_decoder else spec.embeddings[0]).weight = stack.embed_tokens.weight.clone()
    spec.position_encodings.encodings = stack.embed_positions.weight
    if spec.pre_norm:
        _set_norm(spec.layer_norm, stack.final_norm)
    for layer_spec, layer in zip(spec.layer, stack.layers, strict=True):
        for sublayer, spec_name in _SUBLAYERS.items():
            if hasattr(layer, sublayer):
                branch_spec, skip = getattr(layer_spec, spec_name), getattr(layer, f"{sublayer}_skip")
                for linear_spec, group in zip(*_linears(sublayer, branch_spec, getattr(layer, sublayer)), strict=True):
                    _set_linear(linear_spec, *group)
                if is_peri:
                    before, after = _PERI_NORMS[sublayer]
                    _set_norm(getattr(layer_spec, before), skip.norm)
                    _set_norm(getattr(layer_spec, after), skip.branch_norm)
                else:
                    _set_norm(branch_spec.layer_norm, skip.norm if spec.pre_norm else skip.norm[0])
    return spec


def _linears(sublayer: str, spec, branch: nn.Module) -> tuple[list, list[tuple[nn.Linear, ...]]]:
    """The linear layers of a branch's specification, and those of the model that each of them holds."""
    if sublayer == "mlp":
        return [spec.linear_0, spec.linear_1], [(branch.fc1,), (branch.fc2,)]
    q, k, v = branch.q_proj, branch.k_proj, branch.v_proj
    return spec.linear, [*([(q, k, v)] if sublayer == "self_attn" else [(q,), (k, v)]), (branch.out_proj,)]


def _set_linear(spec, *layers: nn.Linear) -> None:
    """Sets the weights of one linear layer, or of several side by side."""
    spec.weight = torch.cat([layer.weight for layer in layers])
    if layers[0].bias is not None:
        spec.bias = torch.cat([layer.bias for layer in layers])


def _set_norm(spec, norm: nn.Module) -> None:
    spec.gamma = norm.weight
    if norm.bias is not None:
        spec.beta = norm.bias
