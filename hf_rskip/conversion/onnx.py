"""Exports to ONNX by Transformers' exporter.

An exported folder holds the configurations, the tokenizer or image processor, and the graphs: one of a model that
classifies images, two of one that translates. One decoder graph, without branches, serves the first step and all others:

| graph | inputs | outputs |
|---|---|---|
| `model.onnx` | `pixel_values` | `logits` |
| `encoder.onnx` | `input_ids`, `attention_mask` | `last_hidden_state` |
| `decoder.onnx` | `input_ids`, `encoder_attention_mask`, `encoder_hidden_states`, `past_key_values.{layer}.{decoder,encoder}.{key,value}` | `logits`, `present.{layer}.{decoder,encoder}.{key,value}` |

Images have shape `(batch, channels, height, width)` (float32), the size that the image processor makes, and their logits
`(batch, classes)`; the batch is free. Tokens and masks have shape `(batch, length)` (int64), keys and values
`(batch, heads, length, head_dim)` (float32); batch and lengths are free. The decoder takes any number of new tokens after
any number of past ones, 0 at the start. Of `encoder` keys and values it takes 0 at the start, too, and appends those of
the other source tokens, then none. Its tokens and `decoder` keys and values may have several rows for each source, one
after another, such as the beams of a search.

Graphs in int8 have matrices of 7 bits with a scale for each column, because instructions of many processors add two
products of 8 bits in 16; embeddings, norms and what attention multiplies stay float32.
"""  # noqa: E501

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from transformers import (
    BaseImageProcessor,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..decoding.onnx import DECODER_NAME, ENCODER_NAME
from ..errors import UserError, first_line
from ..models import RSkipForConditionalGeneration

_BATCH_LENGTH = {0: Dim.AUTO, 1: Dim.AUTO}  # of tokens and masks
_KEY_VALUE = {name: {0: Dim.AUTO, 2: Dim.AUTO} for name in ("key", "value")}


class _Graph(nn.Module):
    """Base class of the exported graphs of a model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model


class _Classifier(_Graph):
    """From images to the logits of their classes."""

    def forward(self, pixel_values):
        return {"logits": self.model(pixel_values).logits}


class _Encoder(_Graph):
    """From the source to its states."""

    def forward(self, input_ids, attention_mask):
        states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"last_hidden_state": states}


class _Decoder(_Graph):
    """From new target tokens and the past to logits and the longer past."""

    def forward(self, input_ids, encoder_attention_mask, encoder_hidden_states, past_key_values):
        cache = EncoderDecoderCache(
            *(
                DynamicCache([(layer[stack]["key"], layer[stack]["value"]) for layer in past_key_values.values()])
                for stack in ("decoder", "encoder")
            )
        )
        # The cross-attention appends the keys and values of the source tokens that it lacks: of all, then of none.
        cache.is_updated.clear()
        states = encoder_hidden_states[:, cache.cross_attention_cache.get_seq_length() :]
        logits = self.model(
            attention_mask=encoder_attention_mask,
            encoder_outputs=(states,),
            decoder_input_ids=input_ids,
            cache=cache,
            use_cache=True,
        ).logits
        return {"logits": logits, "present": _keys_and_values(cache)}


def _keys_and_values(cache: EncoderDecoderCache) -> dict:
    """The cache as the nested names of graph inputs and outputs."""
    stacks = {"decoder": cache.self_attention_cache.layers, "encoder": cache.cross_attention_cache.layers}
    return {
        str(index): {
            stack: {"key": layers[index].keys, "value": layers[index].values} for stack, layers in stacks.items()
        }
        for index in range(len(cache.self_attention_cache.layers))
    }


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    folder: Path,
    quantization: str | None = None,
) -> None:
    """Writes the graphs, the processor and the configurations to `folder`; see this module for what they are.

    The model is left in evaluation mode with eager attention. Each graph is named on standard output before it is
    traced, which takes some seconds.

    Args:
        model: one that translates or classifies images.
        processor: its tokenizer or image processor.
        folder: a new or empty one.
        quantization: `"int8"` for a model that translates; float32 unless given.

    Raises:
        [`UserError`]: if packages are missing or too old, if the model is of another package, or if one that classifies
            images is to be quantized.
    """
    translates = model.config.is_encoder_decoder
    if quantization and not translates:
        raise UserError(f"--quantization {quantization} is for models that translate")
    programs = trace(model, translation_graphs(model) if translates else _image_graphs(model, processor))

    import onnx_ir

    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        onnx_ir.save(quantize(program) if quantization else program, folder / name)
    model.config.save_pretrained(folder)
    if translates:
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def trace(model: PreTrainedModel, graphs: dict[str, tuple]) -> dict:
    """The `onnx_ir.Model` of each of the `graphs` of [`translation_graphs`], by its name, which is printed before."""
    model.eval()
    model.set_attn_implementation("eager")  # onnxruntime fuses its few operators
    exporter, programs = _create_exporter(), {}
    for number, (name, graph) in enumerate(graphs.items(), start=1):
        print(f"[{number} of {len(graphs)}] {name}", flush=True)
        programs[name] = _export(exporter, *graph)
    return programs


def quantize(program):
    """The graph with matrices in int8 as an `onnx_ir.Model`; `program` is changed."""
    from onnxruntime.quantization import QuantType
    from onnxscript.optimizer import fold_constants
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.configs import ExportFormat

    # The output layer is the embeddings, transposed: as constants these are two matrices, of which one is quantized.
    fold_constants(program, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    config = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    with _quiet():
        return OnnxRuntimeQuantizer(config).quantize(program, {}, ExportFormat.ONNX)


def _image_graphs(model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, tuple]:
    """Module, inputs and dynamic shapes of each graph, for 3 images of the size that the processor makes."""
    size = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    pixel_values = torch.zeros(3, model.config.num_channels, *size, device=model.device)
    return {"model.onnx": (_Classifier(model), {"pixel_values": pixel_values}, {"pixel_values": {0: Dim.AUTO}})}


def translation_graphs(model: PreTrainedModel) -> dict[str, tuple]:
    """Encoder and decoder graphs of a translation model; see [`_image_graphs`].

    Raises:
        [`UserError`]: if it is not a model of this package.
    """
    if not isinstance(model, RSkipForConditionalGeneration):
        raise UserError(f"ONNX graphs are made of models of this package, not of type {model.config.model_type!r}")
    # Sizes that the trace cannot take for constants or for one another: 3 sentences of 7 tokens, 4 of them in the
    # cache, and 2 beams each, with 5 new tokens after 4.
    tokens = torch.full((3, 7), model.config.decoder_start_token_id, device=model.device)
    source = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    outputs = model(input_ids=tokens[:, :4], decoder_input_ids=tokens[:, :4], use_cache=True)
    outputs.cache.self_attention_cache.batch_repeat_interleave(2)
    past = _keys_and_values(outputs.cache)
    decoder_inputs = {
        "input_ids": tokens[:, :5].repeat_interleave(2, dim=0),
        "encoder_attention_mask": source["attention_mask"],
        "encoder_hidden_states": model.get_encoder()(**source).last_hidden_state,
        "past_key_values": past,
    }
    shapes = dict.fromkeys(decoder_inputs, _BATCH_LENGTH) | {
        "past_key_values": {layer: dict.fromkeys(states, _KEY_VALUE) for layer, states in past.items()}
    }
    return {
        ENCODER_NAME: (_Encoder(model), source, dict.fromkeys(source, _BATCH_LENGTH)),
        DECODER_NAME: (_Decoder(model), decoder_inputs, shapes),
    }


def _create_exporter():
    try:
        import onnxruntime.quantization  # noqa: F401
        from transformers.exporters import OnnxExporter

        with _quiet():
            return OnnxExporter()
    except ImportError as error:
        raise UserError(f"Export to ONNX needs `pip install 'hf_rskip[onnx]'`: {first_line(error)}") from error


def _export(exporter, module: nn.Module, inputs: dict, dynamic_shapes: dict):
    """The `onnx_ir.Model` of `module`, whose inputs and outputs are named by their path in nested dictionaries."""
    import onnx_ir.passes.common
    from transformers.exporters import OnnxConfig

    with _quiet():
        exported = exporter.export(module, inputs, OnnxConfig(dynamic_shapes=dynamic_shapes))
    program = exported.program
    # Remove stack traces, which contain paths of this machine.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program)
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the progress and the warnings of exporters and quantizers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
