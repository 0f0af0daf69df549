"""Translates with onnxruntime, by the graphs that [`~hf_rskip.conversion.onnx.export_onnx`] wrote."""

import os

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..errors import UserError, first_line, require
from ..models.checks import ENCODER_KEYWORDS, check_cache, check_keywords
from ..models.generation_rskip import TranslationGenerationMixin

ENCODER_NAME, DECODER_NAME = "encoder.onnx", "decoder.onnx"
_NOT_IN_GRAPHS = ("output_attentions", "output_hidden_states")


class Graph:
    """A session of onnxruntime that shares its inputs and outputs with torch; as many threads as torch has."""

    def __init__(self, folder: str | os.PathLike, name: str):
        onnxruntime = require("onnxruntime", "onnx")
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"There is no {name} in {os.fspath(folder)!r}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            # On a CPU that operator takes longer than the addition and the norm that it replaces.
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
            )
        except Exception as error:  # onnxruntime's errors have no common class
            raise UserError(f"{path!r} is damaged: {first_line(error)}") from error

    def run(self, names: list[str], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of these names."""
        from onnxruntime import OrtValue

        values = {name: OrtValue.from_dlpack(tensor.contiguous()) for name, tensor in inputs.items()}
        return [torch.from_dlpack(value) for value in self.session.run_with_ort_values(names, values)]


class OnnxEncoder(nn.Module):
    """Runs the graph of the encoder; its output is `(batch, length, d_model)`."""

    main_input_name = "input_ids"

    def __init__(self, graph: Graph, config: PreTrainedConfig):
        super().__init__()
        self.graph, self.config = graph, config

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        check_keywords(self, kwargs, ENCODER_KEYWORDS, _NOT_IN_GRAPHS)
        _check_length(input_ids.shape[1], self.config)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        (states,) = self.graph.run(["last_hidden_state"], {"input_ids": input_ids, "attention_mask": mask})
        return BaseModelOutput(last_hidden_state=states)


class OnnxTranslationModel(TranslationGenerationMixin, PreTrainedModel):
    """An exported model, which generates and scores as the one in torch does; it cannot be trained or saved.

    Args:
        folder: what [`~hf_rskip.conversion.onnx.export_onnx`] wrote.

    Raises:
        [`UserError`]: if onnxruntime is missing, or the folder has no such graphs.
    """

    rows_share_sources = True
    _supports_sdpa = True

    def __init__(self, folder: str | os.PathLike):
        encoder, decoder = (Graph(folder, name) for name in (ENCODER_NAME, DECODER_NAME))
        try:
            config, generation_config = (each.from_pretrained(folder) for each in (AutoConfig, GenerationConfig))
        except (OSError, ValueError) as error:
            raise UserError(f"{os.fspath(folder)!r} is not a complete export to ONNX: {first_line(error)}") from error
        super().__init__(config)
        self.generation_config = generation_config
        self.encoder, self.graph = OnnxEncoder(encoder, self.config), decoder
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """For the arguments see [`RSkipForConditionalGeneration`]."""
        check_keywords(self, kwargs, ["decoder_attention_mask"], ["decoder_attention_mask", *_NOT_IN_GRAPHS])
        check_cache(self, cache)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        states = encoder_outputs[0]
        if attention_mask is None:
            attention_mask = torch.ones(states.shape[:2], dtype=torch.int64)
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        _check_length(cache.get_seq_length() + decoder_input_ids.shape[1], self.config)
        inputs = {
            "input_ids": decoder_input_ids,
            "encoder_attention_mask": attention_mask,
            "encoder_hidden_states": states,
        }
        heads, layers = self.config.decoder_attention_heads, {}
        for index in range(self.config.decoder_layers):
            layers[f"{index}.decoder"] = cache.self_attention_cache.layers[index]
            layers[f"{index}.encoder"] = cache.cross_attention_cache.layers[index]
        for name, layer in layers.items():
            if not layer.is_initialized:
                rows = len(states if name.endswith("encoder") else decoder_input_ids)
                layer.lazy_initialization(states, states)
                layer.keys = layer.values = states.new_empty(rows, heads, 0, self.config.d_model // heads)
            inputs |= {f"past_key_values.{name}.key": layer.keys, f"past_key_values.{name}.value": layer.values}
        names = [f"present.{name}.{part}" for name in layers for part in ("key", "value")]
        logits, *present = self.graph.run(["logits", *names], inputs)
        for layer, keys, values in zip(layers.values(), present[::2], present[1::2], strict=True):
            layer.keys, layer.values = keys, values
        return Seq2SeqLMOutput(logits=logits, cache=cache)


def _check_length(length: int, config: PreTrainedConfig) -> None:
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(f"The sequence has {length} tokens, more than the {limit} of `max_position_embeddings`")
