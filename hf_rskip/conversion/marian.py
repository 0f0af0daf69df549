"""Converts MarianMT checkpoints to post-LN models of this package with the same outputs, and back."""

import copy
import re
from pathlib import Path

import torch
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks import check_count
from ..data.text.tokenizer import find_tokenizer
from ..decoding.loading import load_config, load_with_report
from ..errors import UserError
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..models.generation_rskip import TRANSLATION_OPTIONS
from .fold import fold_exactly
from .growth import grow_recursions

logger = logging.get_logger(__name__)

_SAME_FIELDS = RSkipConfig.__annotations__.keys() & MarianConfig.__annotations__.keys() - {"use_cache"}
_RENAMES = (
    (r"attn_layer_norm\.", "attn_skip.norm.0."),
    (r"\.final_layer_norm\.", ".mlp_skip.norm.0."),
    (r"\.(fc[12])\.", r".mlp.\1."),
)
# The forward pass of Marian reads the embeddings of encoder and decoder, never this matrix itself.
_UNUSED = {"model.shared.weight"}
_BIAS = "final_logits_bias"
_POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


def convert_marian_config(config: MarianConfig, lm_head_bias: bool) -> RSkipConfig:
    """The post-LN configuration (`rskip`, K = 1) of the same model.

    `encoder_layerdrop` and `decoder_layerdrop`, which matter in training only, have no counterpart: a value above 0 is
    dropped with a warning.

    Raises:
        [`UserError`]: if a field has a value that `RSkipConfig` does not allow.
    """
    for field in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, field):
            logger.warning(f"`{field}` {getattr(config, field)} is dropped: training will use every layer")
    try:
        return RSkipConfig(
            **{field: getattr(config, field) for field in _SAME_FIELDS},
            lm_head_bias=lm_head_bias,
            skip_type="rskip",
            skip_recursions=1,
            skip_norm="layer_norm",
            layer_norm_eps=1e-5,
        )
    except ValueError as error:
        raise UserError(f"This Marian configuration cannot be converted: {error}") from error


def convert_marian_model(marian: MarianMTModel) -> RSkipForConditionalGeneration:
    """The same function as a `RSkipForConditionalGeneration` with K = 1, in evaluation mode.

    Every weight is taken over under its new name, in its own dtype, and so is the generation configuration. A
    `final_logits_bias` other than zero becomes the bias of the output projection, which is trained, as it is in the
    C++ Marian (in Transformers it is a constant).

    Raises:
        [`UserError`]: if a weight has no counterpart, or positions are not the sinusoids of Vaswani et al. (2017).
    """
    weights = marian.state_dict()
    bias = weights.pop(_BIAS).squeeze(0)
    model = RSkipForConditionalGeneration(convert_marian_config(marian.config, bool(bias.any()))).to(marian.dtype)
    for name, stack in zip(_POSITIONS, (model.model.encoder, model.model.decoder), strict=True):
        # Half precision rounds the sinusoids that a checkpoint contains by up to 2^-9.
        if not torch.allclose(weights.pop(name).float(), stack.embed_positions.create_weight(), atol=2**-8):
            raise UserError(f"{name} is not a table of sinusoids, and other positions cannot be converted")
    renamed = {_new_name(name): weight for name, weight in weights.items() if name not in _UNUSED}
    if model.config.lm_head_bias:
        renamed["lm_head.bias"] = bias
    unmatched = renamed.keys() ^ model.state_dict().keys()
    if unmatched:
        raise UserError(f"Weights of one model have no counterpart in the other: {', '.join(sorted(unmatched))}")
    model.load_state_dict(renamed)
    model.generation_config = GenerationConfig(**marian.generation_config.to_diff_dict())
    return model.eval()


def convert_marian_checkpoint(
    source: str, recursions: int = 1
) -> tuple[RSkipForConditionalGeneration, PreTrainedTokenizerBase | None]:
    """The MarianMT checkpoint `source` as a model of this package, and its tokenizer if it has one.

    Args:
        source: folder or Hub id of a `MarianMTModel`, and of its tokenizer.
        recursions: K. With 1 the function is the same; more are added by
            [`~hf_rskip.conversion.growth.grow_recursions`], for fine-tuning.

    Raises:
        [`UserError`]: if `source` is not a complete MarianMT checkpoint, or if the tokenizer needs a package that is
            not installed.
    """
    check_count("`skip_recursions`", recursions)
    marian = _load_marian(source)
    tokenizer = find_tokenizer(source)
    model = convert_marian_model(marian)
    model.config.source_lang = getattr(tokenizer, "source_lang", None)
    model.config.target_lang = getattr(tokenizer, "target_lang", None)
    if recursions > 1:
        model = grow_recursions(model, recursions)
    if tokenizer is None:
        logger.warning(f"No tokenizer is written, since there is none in {source!r}: translating needs one")
    return model, tokenizer


@torch.no_grad()
def create_marian_model(model: RSkipForConditionalGeneration) -> MarianMTModel:
    """The same function as a `MarianMTModel`, in evaluation mode: the inverse of [`convert_marian_model`].

    A kind that folds exactly into post-LN is folded. Options of generation that a `MarianMTModel` does not know are
    dropped with a warning.

    Raises:
        [`UserError`]: if a `MarianMTModel` cannot compute it.
    """
    model = fold_exactly(model)
    config, only = model.config, {"skip_norm": "layer_norm", "layer_norm_eps": 1e-5, "learned_positions": False}
    for name, value in only.items():
        if getattr(config, name) != value:
            raise UserError(
                f"`{name}` of a MarianMT model is always {value!r}, and here it is {getattr(config, name)!r}: "
                "`--format onnx` takes any model, and `--format ctranslate2` all that folds"
            )
    # Marian's default forces token 0, the end token of OPUS-MT, at the maximum length.
    fields = {field: getattr(config, field) for field in _SAME_FIELDS} | {"forced_eos_token_id": None}
    marian = MarianMTModel(MarianConfig(**fields)).to(model.dtype)
    weights = model.state_dict()
    if config.share_encoder_decoder_embeddings:
        weights["model.shared.weight"] = weights["model.encoder.embed_tokens.weight"]
    for name, weight in marian.state_dict().items():
        if name not in (_BIAS, *_POSITIONS):
            weight.copy_(weights[_new_name(name)])
    if config.lm_head_bias:
        marian.final_logits_bias.copy_(model.lm_head.bias)
    marian.generation_config = copy.deepcopy(model.generation_config)
    for name in TRANSLATION_OPTIONS:
        if getattr(marian.generation_config, name, None) is not None:
            logger.warning(f"`{name}` is dropped: a MarianMT model does not know it")
            delattr(marian.generation_config, name)
    if marian.generation_config.max_new_tokens is None and marian.generation_config.max_length is None:
        marian.generation_config.max_new_tokens = config.max_position_embeddings - 1
    return marian.eval()


def export_marian(model: RSkipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the [`create_marian_model`] of a model, and its tokenizer, to a new or empty folder."""
    create_marian_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _new_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _load_marian(source: str) -> MarianMTModel:
    model_type = load_config(source).model_type
    if model_type != MarianConfig.model_type:
        raise UserError(f"{source!r} is a model of type {model_type!r}, not a Marian checkpoint")
    model, report = load_with_report(MarianMTModel, source)
    unaccounted = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unaccounted:
        raise UserError(f"{source!r} lacks weights of a MarianMT model, or has others: {', '.join(unaccounted)}")
    return model
