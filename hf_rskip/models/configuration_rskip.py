"""Configuration of the translation model."""

from .configuration_skip import ACTIVATION, COUNT, FLAG, MOST_LAYERS, RATE, SkipConfig, count, is_count


class RSkipConfig(SkipConfig):
    r"""
    Configuration of an [`RSkipModel`], an encoder-decoder Transformer whose sublayers use a chosen skip connection.
    Names are those of Marian and BART; the defaults are a Transformer-base (Vaswani et al., 2017) with rSkip+LN, K = 2.

    Args:
        vocab_size: Number of tokens of the source vocabulary (and of the target vocabulary, when they are shared).
        decoder_vocab_size: Number of tokens of the target vocabulary; `vocab_size` unless given.
        d_model: Width of the model, a multiple of both numbers of attention heads.
        encoder_layers, decoder_layers: Number of layers of each stack.
        encoder_attention_heads, decoder_attention_heads: Number of attention heads of each layer.
        encoder_ffn_dim, decoder_ffn_dim: Inner width of the feed-forward sublayers.
        activation_function: Name of a function of `transformers.activations.ACT2FN`.
        dropout, attention_dropout, activation_dropout: Dropout of embeddings and branch outputs, of attention weights,
            and inside the feed-forward sublayers.
        max_position_embeddings: Longest sequence, in tokens, that the positions cover.
        learned_positions: Whether the positions are trained; they start as the sinusoids.
        scale_embedding: Whether embeddings are multiplied by the square root of `d_model`.
        share_encoder_decoder_embeddings: Whether source and target share one vocabulary and, with
            `tie_word_embeddings`, one embedding matrix.
        tie_word_embeddings: Whether the output projection is the target embedding matrix. `False` separates all
            matrices.
        lm_head_bias: Whether the output projection has a bias, one trained number a target token, as in Marian.
        pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: The special tokens.
        use_cache: Whether generation keeps keys and values of past tokens.
        source_lang, target_lang: Codes of the languages that the model translates from and into.

    Example:

    ```python
    >>> from hf_rskip import RSkipConfig, RSkipForConditionalGeneration

    >>> config = RSkipConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, skip_recursions=3)
    >>> model = RSkipForConditionalGeneration(config)

    ```
    """

    model_type = "rskip"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    vocab_size: int = 32000
    decoder_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    max_position_embeddings: int = 1024
    learned_positions: bool = False
    scale_embedding: bool = True
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    pad_token_id: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int = 1
    use_cache: bool = True
    source_lang: str | None = None
    target_lang: str | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        if self.decoder_vocab_size is None:
            self.decoder_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        are_equal = config_dict.get("decoder_vocab_size") == config_dict.get("vocab_size")
        if are_equal and config_dict.get("share_encoder_decoder_embeddings"):
            config_dict = config_dict | {"decoder_vocab_size": None}  # follows a `vocab_size` of the keywords
        return super().from_dict(config_dict, **kwargs)

    def _is_token(self, value) -> bool:
        return value == 0 or is_count(value, self.decoder_vocab_size - 1)

    def _are_tokens(self, value) -> bool:
        return all(token is None or self._is_token(token) for token in (value if isinstance(value, list) else [value]))

    def check_values(self) -> None:
        super().check_values()
        self._check("vocab_size decoder_vocab_size d_model max_position_embeddings", COUNT)
        self._check("encoder_attention_heads encoder_ffn_dim", COUNT)
        self._check("decoder_attention_heads decoder_ffn_dim", COUNT)
        self._check("encoder_layers decoder_layers", count(MOST_LAYERS))
        self._check("dropout attention_dropout activation_dropout", RATE)
        self._check("activation_function", ACTIVATION)
        self._check("learned_positions scale_embedding share_encoder_decoder_embeddings tie_word_embeddings", FLAG)
        self._check("lm_head_bias use_cache is_encoder_decoder", FLAG)
        what = f"a token of the vocabulary, from 0 to {self.decoder_vocab_size - 1}"
        self._check("pad_token_id decoder_start_token_id", (self._is_token, what))
        self._check("eos_token_id bos_token_id", (self._are_tokens, what))
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, field)
            what = f"a multiple of `{field}`, {heads}"
            self._check("d_model", (lambda width, heads=heads: width % heads == 0, what))
        if self.share_encoder_decoder_embeddings:
            what = f"`vocab_size`, {self.vocab_size}, with `share_encoder_decoder_embeddings`"
            self._check("decoder_vocab_size", (lambda size: size == self.vocab_size, what))


__all__ = ["RSkipConfig"]
