"""An encoder-decoder Transformer whose sublayers use a chosen skip connection."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.bart.modeling_bart import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checks import ENCODER_KEYWORDS, check_cache, check_keywords
from .configuration_rskip import RSkipConfig
from .generation_rskip import TranslationGenerationMixin
from .skip_connections import SKIP_CONNECTIONS, SkipConnection, SublayerPosition
from .skip_norms import norm_of


class RSkipSinusoidalPositionalEmbedding(nn.Module):
    """Sinusoidal positions (Vaswani et al., 2017): sines in the first half of the features, cosines in the second.

    With `learned` they are only the start of a trained table.
    """

    def __init__(self, num_positions: int, embedding_dim: int, learned: bool = False):
        super().__init__()
        self.num_positions, self.embedding_dim = num_positions, embedding_dim
        weight = self.create_weight()
        self.weight = nn.Parameter(weight) if learned else nn.Buffer(weight, persistent=False)

    def create_weight(self) -> torch.Tensor:
        """The table, `(num_positions, embedding_dim)`, computed in float64."""
        sines = math.ceil(self.embedding_dim / 2)
        exponent = 2 * torch.arange(sines, dtype=torch.float64) / self.embedding_dim
        angle = torch.arange(self.num_positions, dtype=torch.float64)[:, None] / 10000**exponent
        return torch.cat([angle.sin(), angle[:, : self.embedding_dim // 2].cos()], dim=1).float()

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(position_ids, self.weight)


class RSkipAttention(nn.Module):
    """Multi-head attention, over the layer's own input or, with `key_value_states`, over the encoder's output."""

    def __init__(self, config: RSkipConfig, num_heads: int, layer_idx: int, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.d_model // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        # Not -1 heads, which onnxruntime 1.26 cannot infer where all keys are in the cache and no tokens are left.
        return states.view(*states.shape[:-1], states.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def _keys_and_values(self, states, cache, is_cross_attention):
        """Keys and values of shape `(batch, heads, length, head_dim)`, through the cache where there is one."""
        if is_cross_attention and cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        keys = self._split_heads(self.k_proj(states))
        values = self._split_heads(self.v_proj(states))
        if cache is None:
            return keys, values
        if not is_cross_attention:
            return cache.self_attention_cache.update(keys, values, self.layer_idx)
        cache.is_updated[self.layer_idx] = True
        return cache.cross_attention_cache.update(keys, values, self.layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_cross_attention = key_value_states is not None
        states = key_value_states if is_cross_attention else hidden_states
        query = self._split_heads(self.q_proj(hidden_states))
        keys, values = self._keys_and_values(states, cache, is_cross_attention)
        if is_cross_attention and query.shape[0] != keys.shape[0]:
            # Several rows for each source: to attention they are further positions of one query.
            query = query.unflatten(0, (keys.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class RSkipMLP(nn.Module):
    """Position-wise feed-forward network."""

    def __init__(self, config: RSkipConfig, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.activation_fn = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation_fn(self.fc1(hidden_states))))


class RSkipLayer(GradientCheckpointingLayer):
    """A layer of a stack, `"encoder"` or `"decoder"`: each of its branches has a skip connection, `self_attn` has
    `self_attn_skip`."""

    def __init__(self, config: RSkipConfig, stack: str, layer_idx: int):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        heads, ffn_dim = (getattr(config, f"{stack}_{field}") for field in ("attention_heads", "ffn_dim"))
        layers, other_layers = config.encoder_layers, config.decoder_layers
        branches = {"self_attn": RSkipAttention(config, heads, layer_idx, is_causal=stack == "decoder")}
        if stack == "decoder":
            branches["encoder_attn"] = RSkipAttention(config, heads, layer_idx)
            layers, other_layers = other_layers, layers
        branches["mlp"] = RSkipMLP(config, ffn_dim)
        kind = SKIP_CONNECTIONS[config.skip_type]
        for index, (name, branch) in enumerate(branches.items()):
            position = SublayerPosition(stack, layer_idx, index, layers, len(branches), other_layers=other_layers)
            skip = kind.from_config(config, config.d_model, position)
            for linear, gain in skip.branch_gains.items():
                if hasattr(branch, linear):
                    getattr(branch, linear).init_gain = gain
            self.add_module(name, branch)
            self.add_module(f"{name}_skip", skip)
        self.layer_skip = kind.around_layer(config.d_model, norm_of(config), config.layer_norm_eps)

    def _residual_block(
        self, name: str, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, *args, **kwargs
    ) -> torch.Tensor:
        branch, skip = getattr(self, name), getattr(self, f"{name}_skip")
        output = branch(skip.before(hidden_states, token_mask), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output  # attention returns its weights, too
        return skip(hidden_states, self.dropout(output), token_mask)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`kwargs` are those of attention, with the `cache`."""
        layer_input = hidden_states
        hidden_states = self._residual_block("self_attn", hidden_states, token_mask, attention_mask, **kwargs)
        if encoder_hidden_states is not None:
            encoded = encoder_attention_mask, encoder_hidden_states
            hidden_states = self._residual_block("encoder_attn", hidden_states, token_mask, *encoded, **kwargs)
        hidden_states = self._residual_block("mlp", hidden_states, token_mask)
        return hidden_states if self.layer_skip is None else self.layer_skip(layer_input, hidden_states, token_mask)


class RSkipPreTrainedModel(PreTrainedModel):
    config_class = RSkipConfig
    config: RSkipConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RSkipLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    def __init__(self, config: RSkipConfig):
        super().__init__(config)
        config.check_values()  # again, as fields may have been set since it was made

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform projections, zero biases, embeddings of variance 1 / d_model, then each skip connection's."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            table = torch.empty_like(module.weight).normal_(std=self.config.d_model**-0.5)
            if module.padding_idx is not None:
                table[module.padding_idx] = 0
            init.copy_(module.weight, table)
        elif isinstance(module, RSkipSinusoidalPositionalEmbedding):
            init.copy_(module.weight, module.create_weight())
        elif isinstance(module, SkipConnection):
            module.init_weights()
        else:
            super()._init_weights(module)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes the vocabulary that source and target share; see `PreTrainedModel.resize_token_embeddings`.

        Raises:
            `ValueError`: if source and target have vocabularies of their own.
        """
        if not self.config.share_encoder_decoder_embeddings:
            raise ValueError("`resize_token_embeddings` needs `share_encoder_decoder_embeddings`")
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.tie_word_embeddings:
            decoder = self.get_decoder()
            decoder.embed_tokens = self._get_resized_embeddings(decoder.embed_tokens, self.config.vocab_size)
        self.config.decoder_vocab_size = self.config.vocab_size
        return embeddings


class RSkipStack(RSkipPreTrainedModel):
    """Base class of encoder and decoder: embeddings with positions, and the norm that ends some stacks."""

    _tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: RSkipConfig, vocab_size: int):
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model, config.pad_token_id)
        self.embed_positions = RSkipSinusoidalPositionalEmbedding(
            config.max_position_embeddings, config.d_model, config.learned_positions
        )
        self.final_norm = SKIP_CONNECTIONS[config.skip_type].final_norm(
            config.d_model, norm_of(config), config.layer_norm_eps
        )
        self.gradient_checkpointing = False

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, offset: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Embeddings `(batch, length, d_model)` of the tokens, or the given ones, scaled, with positions and dropout.

        The positions are `offset`, `offset + 1`, ...; an offset of shape `(batch, 1)` gives each row its own start, and
        positions below 0 count as 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}.forward() needs exactly one of input_ids and inputs_embeds")
        inputs_embeds = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds) * self.embed_scale
        length = inputs_embeds.shape[1]
        # A static cache counts in a tensor; reading it would synchronise the device.
        end = length if isinstance(offset, torch.Tensor) else length + offset
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"The sequence has {end} tokens, more than the {self.config.max_position_embeddings} of "
                "`max_position_embeddings`"
            )
        position_ids = (torch.arange(length, device=inputs_embeds.device) + offset).clamp(min=0)
        return self.dropout(inputs_embeds + self.embed_positions(position_ids).to(inputs_embeds))


class RSkipEncoder(RSkipStack):
    """Transformer encoder."""

    _can_record_outputs = {"hidden_states": RSkipLayer, "attentions": RSkipAttention}

    def __init__(self, config: RSkipConfig):
        super().__init__(config, config.vocab_size)
        self.layers = nn.ModuleList(RSkipLayer(config, "encoder", index) for index in range(config.encoder_layers))
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        check_keywords(self, kwargs, ENCODER_KEYWORDS)
        token_mask = attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
        # The first real token stands at position 0, on whichever side the padding is.
        offset = 0 if token_mask is None else -token_mask.int().argmax(dim=1, keepdim=True)
        hidden_states = self.embed(input_ids, inputs_embeds, offset)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, token_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states, token_mask))


class RSkipDecoder(RSkipStack):
    """Transformer decoder."""

    _tp_plan = RSkipStack._tp_plan | {
        "layers.*.encoder_attn.q_proj": "colwise",
        "layers.*.encoder_attn.k_proj": "colwise",
        "layers.*.encoder_attn.v_proj": "colwise",
        "layers.*.encoder_attn.out_proj": "rowwise",
    }
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RSkipLayer, num_hidden_layers_key="decoder_layers"),
        "attentions": OutputRecorder(RSkipAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(RSkipAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: RSkipConfig):
        super().__init__(config, config.decoder_vocab_size)
        self.layers = nn.ModuleList(RSkipLayer(config, "decoder", index) for index in range(config.decoder_layers))
        self.post_init()

    def _token_mask(self, input_ids, attention_mask, length):
        """True at real tokens `(batch, length)`: by the mask if one was given, else by the tokens."""
        if attention_mask is not None:
            return attention_mask[:, -length:].bool() if attention_mask.dim() == 2 else None
        if input_ids is None:
            return None
        # The end token is an input only where a longer sentence of the batch goes on.
        eos = self.config.eos_token_id
        token_mask = input_ids != self.config.pad_token_id
        for end in eos if isinstance(eos, list) else [eos]:
            token_mask &= input_ids != end
        token_mask[:, :1] = True  # the start token is real even if it is one of these
        return token_mask

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.LongTensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        check_keywords(self, kwargs)
        check_cache(self, cache)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = None if cache is None else cache.self_attention_cache
        hidden_states = self.embed(input_ids, inputs_embeds, 0 if past is None else past.get_seq_length())
        token_mask = self._token_mask(input_ids, attention_mask, hidden_states.shape[1])
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, cache=past
        )
        has_beams = encoder_hidden_states is not None and encoder_hidden_states.shape[0] != hidden_states.shape[0]
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states[:, :1] if has_beams else hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                causal_mask,
                token_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.final_norm(hidden_states, token_mask), cache=cache
        )


class RSkipModel(RSkipPreTrainedModel):
    """The encoder-decoder without a head; see [`RSkipForConditionalGeneration`] for the arguments of `forward`."""

    def __init__(self, config: RSkipConfig):
        super().__init__(config)
        if config.share_encoder_decoder_embeddings:
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.encoder = RSkipEncoder(config)
        self.decoder = RSkipDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value
        if self.config.share_encoder_decoder_embeddings and self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: tuple[torch.Tensor] | BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        check_keywords(self, kwargs)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            cache=decoder_outputs.cache,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )


class RSkipForConditionalGeneration(RSkipPreTrainedModel, TranslationGenerationMixin):
    """The encoder-decoder with a language-modelling head: translation and other sequence-to-sequence tasks."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RSkipConfig):
        super().__init__(config)
        if config.share_encoder_decoder_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
        # The default for this class name is the causal loss, which would shift the labels a second time.
        self.loss_type = "ForMaskedLM"
        self.model = RSkipModel(config)
        self.lm_head = nn.Linear(config.d_model, config.decoder_vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        # Options that Transformers does not know are not loaded from a `generation_config` made from the `config`.
        self.generation_config._from_model_config = False
        super().save_pretrained(*args, **kwargs)

    @property
    def rows_share_sources(self) -> bool:
        """Whether `decoder_input_ids` may have several rows for each source, one after another, such as its beams."""
        return self.config._attn_implementation in ("eager", "sdpa")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: tuple[torch.Tensor] | BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            input_ids, attention_mask: source tokens, and 1 at the real ones, `(batch, source_length)`.
            decoder_input_ids, decoder_attention_mask: target tokens, shifted right, `(batch, target_length)`; made from
                `labels` unless given.
            encoder_outputs: what an earlier call of the encoder returned, in place of the source.
            cache: keys and values of past target tokens, of which `decoder_input_ids` is then the continuation.
            inputs_embeds, decoder_inputs_embeds: token embeddings, before scaling, in place of tokens,
                `(batch, length, d_model)`.
            labels: tokens to predict, not shifted, `(batch, target_length)`; -100 is ignored. Gives a mean
                cross-entropy, in nats a token, or with `num_items_in_batch` the sum divided by that number.
            use_cache: whether to return `cache`; never with `labels`.
            logits_to_keep: number of last positions that get logits, 0 for all, or a tensor as for Transformers'
                `slice_logits_to_keep`.

        Returns:
            A `Seq2SeqLMOutput` with `logits` of shape `(batch, target_length, decoder_vocab_size)`.
        """
        check_keywords(self, kwargs)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.decoder_vocab_size, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **others)


__all__ = ["RSkipForConditionalGeneration", "RSkipModel", "RSkipPreTrainedModel"]
