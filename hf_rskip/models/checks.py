"""Checks of the arguments of `forward`: a wrong one raises one sentence that names it."""

from collections.abc import Collection, Mapping

from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs
from transformers.utils.versions import require_version

require_version("transformers>=5.24.0.dev0")  # which calls a cache of keys and values `cache`
ENCODER_KEYWORDS = ("labels", "logits_to_keep", "return_dict")
"""Keywords that `generate` passes to an encoder."""
_KNOWN_KEYWORDS = TransformersKwargs.__optional_keys__ | FlashAttentionKwargs.__optional_keys__
# For packed sequences, state-space models and mixtures of experts, which no model here has.
_WITHOUT_EFFECT = FlashAttentionKwargs.__optional_keys__ | {"position_ids", "seq_idx", "output_router_logits"}


def check_keywords(
    module, keywords: Mapping[str, object], also: Collection[str] = (), without_effect: Collection[str] = ()
) -> None:
    """Checks the additional keywords of a `forward`: allowed are those that Transformers passes to every model.

    Args:
        module: the module whose `forward` it is.
        keywords: its `**kwargs`.
        also: other keywords that are allowed.
        without_effect: keywords of Transformers that this module ignores, beyond those that all models here ignore.

    Raises:
        `TypeError`: if a keyword is unknown to Transformers or has no effect.
    """
    name = type(module).__name__
    for keyword, value in keywords.items():
        if keyword not in _KNOWN_KEYWORDS and keyword not in also:
            hint = ": it is `cache` since Transformers 5.24" if keyword == "past_key_values" else ""
            raise TypeError(f"{name}.forward() got an unexpected keyword argument {keyword!r}{hint}")
        ignored = (keyword in _WITHOUT_EFFECT or keyword in without_effect) and value is not False
        if value is not None and (ignored or keyword == "is_causal"):  # which would change the attention of every kind
            raise TypeError(f"{name}.forward() does not support {keyword!r}")


def check_cache(module, cache) -> None:
    """Raises a `TypeError` unless `cache` is `None` or has a part for each of the two attentions of a decoder."""
    if cache is not None and not isinstance(cache, EncoderDecoderCache):
        name, wrong = type(module).__name__, type(cache).__name__
        raise TypeError(f"{name}.forward() needs an EncoderDecoderCache of Transformers as `cache`, not {wrong}")
