"""Several models as one that predicts the mean of their probabilities."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..models.checks import ENCODER_KEYWORDS, check_cache, check_keywords
from ..models.generation_rskip import TranslationGenerationMixin

_OF_ONE_MODEL = ("output_attentions", "output_hidden_states")


class EnsembleEncoder(nn.Module):
    """Runs the encoders of all models; their outputs stand side by side, `(batch, length, sum of d_model)`."""

    main_input_name = "input_ids"

    def __init__(self, models: Sequence[PreTrainedModel]):
        super().__init__()
        self.encoders = nn.ModuleList(model.get_encoder() for model in models)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        check_keywords(self, kwargs, ENCODER_KEYWORDS, _OF_ONE_MODEL)
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
        layers = [model.config.decoder_layers for model in models]
        config.decoder_layers = sum(layers)  # number of layers of the cache that `generate` prepares
        super().__init__(config)
        self.models = nn.ModuleList(models)
        self.encoder = EnsembleEncoder(models)
        self.first_layers = [0, *accumulate(layers)]
        self.widths = [model.config.hidden_size for model in models]
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.eval()

    @property
    def rows_share_sources(self) -> bool:
        return all(getattr(model, "rows_share_sources", False) for model in self.models)

    def _own_cache(self, cache: EncoderDecoderCache, index: int) -> EncoderDecoderCache:
        """The layers of model `index` in the cache of all."""
        own = [copy.copy(cache.self_attention_cache), copy.copy(cache.cross_attention_cache)]
        for part in own:
            part.layers = part.layers[self.first_layers[index] : self.first_layers[index + 1]]
        return EncoderDecoderCache(*own)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """`logits` are the logarithms of the mean probabilities; `cache` has the layers of all models, one by one.

        Other arguments are as in [`RSkipForConditionalGeneration`].
        """
        check_keywords(self, kwargs, without_effect=_OF_ONE_MODEL)
        check_cache(self, cache)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        states = encoder_outputs[0].split(self.widths, dim=-1)
        log_probs = [
            model(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=BaseModelOutput(last_hidden_state=own_states),
                cache=None if cache is None else self._own_cache(cache, index),
                use_cache=use_cache,
            ).logits.log_softmax(-1, dtype=torch.float32)
            for index, (model, own_states) in enumerate(zip(self.models, states, strict=True))
        ]
        logits = torch.stack(log_probs).logsumexp(0) - torch.tensor(len(log_probs)).log()
        return Seq2SeqLMOutput(logits=logits, cache=cache)
