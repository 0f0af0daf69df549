"""Several models as one that predicts the mean of their probabilities."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..models.generation_rskip import TranslationGenerationMixin


class EnsembleEncoder(nn.Module):
    """Runs the encoders of all models; their outputs stand side by side, `(batch, length, sum of d_model)`."""

    main_input_name = "input_ids"

    def __init__(self, models: Sequence[PreTrainedModel]):
        super().__init__()
        self.encoders = nn.ModuleList(model.get_encoder() for model in models)

    def forward(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        states = [encoder(input_ids, attention_mask).last_hidden_state for encoder in self.encoders]
        return BaseModelOutput(last_hidden_state=torch.cat(states, dim=-1))


class Ensemble(TranslationGenerationMixin, PreTrainedModel):
    """Encoder-decoders of one vocabulary that translate together: p(token) is the mean of theirs.

    It generates as the first of them does, whose generation configuration it has, and cannot be trained or saved.

    Args:
        models: at least one, in evaluation mode, on one device.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, models: Sequence[PreTrainedModel]):
        config = copy.deepcopy(models[0].config)
        config.max_position_embeddings = min(model.config.max_position_embeddings for model in models)
        super().__init__(config)
        self.models = nn.ModuleList(models)
        self.encoder = EnsembleEncoder(models)
        self.widths = [model.config.hidden_size for model in models]
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.eval()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first step makes a cache for each model

    def get_encoder(self, *args, **kwargs) -> EnsembleEncoder:
        return self.encoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return self.models[0].prepare_decoder_input_ids_from_labels(labels)

    def _reorder_cache(self, past_key_values, beam_idx):
        for cache in past_key_values:
            cache.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: list[EncoderDecoderCache] | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """`logits` are the logarithms of the mean probabilities, and `past_key_values` a list of a cache a model."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = [
                EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
                for model in self.models
            ]
        caches = past_key_values or [None] * len(self.models)
        states = encoder_outputs[0].split(self.widths, dim=-1)
        log_probs = [
            model(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=own_states),
                past_key_values=cache,
                use_cache=use_cache,
            ).logits.log_softmax(-1, dtype=torch.float32)
            for model, own_states, cache in zip(self.models, states, caches, strict=True)
        ]
        logits = torch.stack(log_probs).logsumexp(0) - torch.tensor(len(log_probs)).log()
        return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)
