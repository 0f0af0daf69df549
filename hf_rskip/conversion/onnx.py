"""Exports to ONNX by Transformers' exporter, and translates greedily with onnxruntime.

An exported folder holds the configurations, the tokenizer or image processor, and the graphs: one of a model that
classifies images, two of one that translates. One decoder graph serves the first step and all others, because the keys
and values of the cross-attention, which only depend on the source, come from the encoder:

| graph | inputs | outputs |
|---|---|---|
| `model.onnx` | `pixel_values` | `logits` |
| `encoder.onnx` | `input_ids`, `attention_mask` | `last_hidden_state`, `present.{layer}.encoder.{key,value}` |
| `decoder.onnx` | `decoder_input_ids`, `encoder_attention_mask`, `past_key_values.{layer}.{decoder,encoder}.{key,value}` | `logits`, `present.{layer}.decoder.{key,value}` |

Images have shape `(batch, channels, height, width)` (float32), the size that the image processor makes, and their logits
`(batch, classes)`; the batch is free. Tokens and masks have shape `(batch, length)` (int64), keys and values `(batch, heads, length, head_dim)` (float32). The
decoder takes any number of new tokens after any number of past ones, 0 at the start; batch and lengths are free.
"""  # noqa: E501

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from .output import new_folder

_INSTALL = "`pip install 'hf_rskip[onnx]'`"
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
    """From the source to what a decoder needs of it."""

    def forward(self, input_ids, attention_mask):
        # One step of the decoder fills the cross-attention's cache; the rest of the step is dead code in the graph.
        start = torch.full_like(input_ids[:, :1], self.model.config.decoder_start_token_id)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start, use_cache=True
        )
        present = _keys_and_values("encoder", outputs.cache.cross_attention_cache)
        return {"last_hidden_state": outputs.encoder_last_hidden_state, "present": present}


class _Decoder(_Graph):
    """From new target tokens and the past to logits and the longer past."""

    def forward(self, decoder_input_ids, encoder_attention_mask, past_key_values):
        cache = EncoderDecoderCache(
            *(
                DynamicCache([(layer[stack]["key"], layer[stack]["value"]) for layer in past_key_values.values()])
                for stack in ("decoder", "encoder")
            )
        )
        # With keys and values in the cache only the shape of the encoder's output is looked at.
        states = torch.zeros(*encoder_attention_mask.shape, self.model.config.d_model, device=self.model.device)
        outputs = self.model(
            attention_mask=encoder_attention_mask,
            encoder_outputs=(states,),
            decoder_input_ids=decoder_input_ids,
            cache=cache,
            use_cache=True,
        )
        return {"logits": outputs.logits, "present": _keys_and_values("decoder", cache.self_attention_cache)}


def _keys_and_values(stack: str, cache: DynamicCache) -> dict:
    """The cache as the nested names of graph outputs."""
    return {str(index): {stack: {"key": layer.keys, "value": layer.values}} for index, layer in enumerate(cache.layers)}


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase | BaseImageProcessor, folder: str | os.PathLike
) -> None:
    """Writes the graphs, the processor and the configurations to `folder`; see this module for what they are.

    The model is put into evaluation mode. Each graph is named on standard output before it is traced, which takes some
    seconds.

    Args:
        model: one that translates or classifies images.
        processor: its tokenizer or image processor.
        folder: a new or empty one.

    Raises:
        [`UserError`]: if packages are missing or too old, or if the folder is not empty.
    """
    folder = new_folder(folder)
    model.eval()
    exporter = _create_exporter()
    translates = model.config.is_encoder_decoder
    graphs = _translation_graphs(model) if translates else _image_graphs(model, processor)
    programs = {}
    for number, (name, graph) in enumerate(graphs.items(), start=1):
        print(f"[{number} of {len(graphs)}] {name}", flush=True)
        programs[name] = _export(exporter, *graph)

    import onnx_ir

    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        onnx_ir.save(program, folder / name)
    model.config.save_pretrained(folder)
    if translates:
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"graphs, configurations and preprocessing: {folder}", flush=True)


def _image_graphs(model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, tuple]:
    """Module, inputs and dynamic shapes of each graph, for 3 images of the size that the processor makes."""
    size = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    pixel_values = torch.zeros(3, model.config.num_channels, *size, device=model.device)
    return {"model.onnx": (_Classifier(model), {"pixel_values": pixel_values}, {"pixel_values": {0: Dim.AUTO}})}


def _translation_graphs(model: PreTrainedModel) -> dict[str, tuple]:
    """Encoder and decoder graphs of a translation model; see [`_image_graphs`]."""
    # Sizes that the trace cannot take for constants or for one another: 3 sentences of 7 tokens, 5 new tokens after 4.
    tokens = torch.full((3, 7), model.config.decoder_start_token_id, device=model.device)
    source = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    cache = model(**source, decoder_input_ids=tokens[:, :4], use_cache=True).cache
    past = _keys_and_values("decoder", cache.self_attention_cache)
    for layer, states in _keys_and_values("encoder", cache.cross_attention_cache).items():
        past[layer] |= states
    return {
        "encoder.onnx": (_Encoder(model), source, dict.fromkeys(source, _BATCH_LENGTH)),
        "decoder.onnx": (
            _Decoder(model),
            {
                "decoder_input_ids": tokens[:, :5],
                "encoder_attention_mask": source["attention_mask"],
                "past_key_values": past,
            },
            {
                "decoder_input_ids": _BATCH_LENGTH,
                "encoder_attention_mask": _BATCH_LENGTH,
                "past_key_values": {layer: dict.fromkeys(states, _KEY_VALUE) for layer, states in past.items()},
            },
        ),
    }


def _create_exporter():
    from transformers.exporters import OnnxExporter

    try:
        with _quiet():
            return OnnxExporter()
    except ImportError as error:
        raise UserError(f"Export to ONNX needs {_INSTALL}: {str(error).rstrip('.')}") from error


def _export(exporter, module: nn.Module, inputs: dict, dynamic_shapes: dict):
    """The `onnx_ir.Model` of `module`, whose inputs and outputs are named by their path in nested dictionaries."""
    import onnx_ir.passes.common
    from transformers.exporters import OnnxConfig

    with _quiet():
        exported = exporter.export(module, inputs, OnnxConfig(dynamic_shapes=dynamic_shapes))
    program = exported.program
    # Stack traces with the paths of this machine.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program)
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the progress and the warnings of the exporters."""
    verbosity, torch_level = transformers_logging.get_verbosity(), logging.getLogger("torch").level
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logging.getLogger("torch").setLevel(torch_level)


class OnnxTranslationModel:
    """Greedy search with onnxruntime over a folder that [`export_onnx`] wrote.

    Args:
        folder: the exported folder.
        session_options: `onnxruntime.SessionOptions`, of which both sessions are made.
        providers: onnxruntime's execution providers, best first; all that are installed by default.

    Raises:
        [`UserError`]: if onnxruntime is missing, or the folder has no such graphs.
    """

    def __init__(self, folder: str | os.PathLike, session_options=None, providers: list | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"Running an exported model needs {_INSTALL}") from error
        paths = [os.path.join(folder, name) for name in ("encoder.onnx", "decoder.onnx")]
        for path in paths:
            if not os.path.isfile(path):
                raise UserError(f"There is no {os.path.basename(path)} in {os.fspath(folder)!r}")
        providers = providers or onnxruntime.get_available_providers()
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(path, session_options, providers=providers) for path in paths
        )
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)

    def generate(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, max_new_tokens: int | None = None
    ) -> np.ndarray:
        """Translates a batch, as `model.generate(..., num_beams=1)` does.

        Args:
            input_ids, attention_mask: source tokens and 1 at the real ones, `(batch, source_length)`.
            max_new_tokens: as in the generation configuration by default, and at most the model's positions.

        Returns:
            `(batch, target_length)` tokens: the start token, the translation, the end token, padding.

        Raises:
            `ValueError`: if the source is longer than the model's positions.
        """
        batch, length = input_ids.shape
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"The sequence has {length} tokens, more than the {limit} of `max_position_embeddings`")
        steps = min(max_new_tokens or self.generation_config.max_new_tokens or limit, limit)
        attention_mask = attention_mask.astype(np.int64)
        past = self._empty_past(batch)
        past |= self._run(self.encoder, input_ids=input_ids.astype(np.int64), attention_mask=attention_mask)
        past.pop("last_hidden_state")
        tokens = np.full((batch, 1), self.generation_config.decoder_start_token_id, dtype=np.int64)
        unfinished = np.ones(batch, dtype=bool)
        for _ in range(steps):
            present = self._run(
                self.decoder, decoder_input_ids=tokens[:, -1:], encoder_attention_mask=attention_mask, **past
            )
            best = present.pop("logits")[:, -1].argmax(-1)
            tokens = np.append(tokens, np.where(unfinished, best, self.generation_config.pad_token_id)[:, None], axis=1)
            unfinished &= ~np.isin(best, self.generation_config.eos_token_id)
            if not unfinished.any():
                break
            past |= present
        return tokens

    def _empty_past(self, batch: int) -> dict[str, np.ndarray]:
        """Keys and values of no target tokens."""
        heads = self.config.decoder_attention_heads
        empty = np.zeros((batch, heads, 0, self.config.d_model // heads), dtype=np.float32)
        return {spec.name: empty for spec in self.decoder.get_inputs() if ".decoder." in spec.name}

    @staticmethod
    def _run(session, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by their names, `present` ones by those that they have as inputs of the next step."""
        names = [spec.name for spec in session.get_outputs()]
        outputs = session.run(names, inputs)
        return {
            name.replace("present.", "past_key_values."): output for name, output in zip(names, outputs, strict=True)
        }
