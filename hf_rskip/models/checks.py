"""Checks of configurations and of keyword arguments: a wrong one raises one sentence that names it."""

import math
from collections.abc import Callable, Collection, Mapping

import transformers
from transformers.activations import ACT2FN
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from .skip_connections import AFFINES, SKIP_CONNECTIONS
from .skip_norms import NORM_AXES, NORMS

Rule = tuple[Callable[[object], bool], str]
"""Whether a value is allowed, and what is: the end of "`field` must be ..."."""
LOWEST_TRANSFORMERS = "5.24"
"""The release that calls a cache of keys and values `cache`, which was `past_key_values` before."""
ENCODER_KEYWORDS = ("logits_to_keep", "return_dict")
"""What `generate` passes on to an encoder that takes any keyword."""
# Above any model that was trained, so that a configuration from the Hub cannot exhaust the memory.
MOST_LABELS, MOST_LAYERS, MOST_RECURSIONS, MOST_NORMS = 100_000, 10_000, 1_000, 20_000
MOST_VALUES = 10**11
_KNOWN_KEYWORDS = TransformersKwargs.__optional_keys__ | FlashAttentionKwargs.__optional_keys__
# For packed sequences, state-space models and mixtures of experts, which no model here has.
_WITHOUT_EFFECT = FlashAttentionKwargs.__optional_keys__ | {"position_ids", "seq_idx", "output_router_logits"}
_IS_TOO_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, LOWEST_TRANSFORMERS.split(".")))


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
        `TypeError`: if a keyword is unknown to Transformers or has no effect, or if Transformers is too old.
    """
    name = type(module).__name__
    needs = f"{name} needs transformers>={LOWEST_TRANSFORMERS}"
    if _IS_TOO_OLD:
        raise TypeError(f"{needs}; {transformers.__version__} is installed")
    for keyword, value in keywords.items():
        if keyword not in _KNOWN_KEYWORDS and keyword not in also:
            hint = f": {needs}, where it is called `cache`" if keyword == "past_key_values" else ""
            raise TypeError(f"{name}.forward() got an unexpected keyword argument {keyword!r}{hint}")
        if (keyword in _WITHOUT_EFFECT or keyword in without_effect) and value is not None and value is not False:
            raise TypeError(f"{name}.forward() does not support {keyword!r}")


def check_cache(module, cache, kind: type) -> None:
    """Raises a `TypeError` unless `cache` is `None` or of its kind."""
    if cache is not None and not isinstance(cache, kind):
        name, wrong = type(module).__name__, type(cache).__name__
        raise TypeError(f"{name}.forward() needs a {kind.__name__} of Transformers as `cache`, not {wrong}")


def check(config, fields: str, *rules: Rule) -> None:
    """Raises a `ValueError` that says "`field` must be ..." unless each of `fields` fulfils all rules."""
    for field in fields.split():
        value = getattr(config, field)
        for is_allowed, what in rules:
            if not is_allowed(value):
                raise ValueError(f"`{field}` must be {what}, not {value!r}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


COUNT: Rule = (is_count, "an integer of at least 1")
COUNTS: Rule = (
    lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_count, value)),
    "a list of integers of at least 1",
)
RATE: Rule = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
ACTIVATION: Rule = (lambda value: str(value) in ACT2FN, "a name of `transformers.activations.ACT2FN`")


def at_most(number: int = 10_000_000) -> Rule:
    return lambda value: value <= number, f"at most {number:,}"


def one_of(names: Collection[str], more: str = "") -> Rule:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}{more}"


def check_num_labels(config, keywords: Mapping[str, object]) -> None:
    """Checks the number of classes, which is `num_labels` of `keywords` or the length of `id2label`."""
    given = keywords.get("num_labels")
    for field, number in (("num_labels", given), ("id2label", config.id2label and len(config.id2label))):
        if number is not None and not (number == 0 or is_count(number) and number <= MOST_LABELS):
            raise ValueError(f"`{field}` must be of 0 to {MOST_LABELS:,} classes, not {number!r}")


def check_size(config, layers: dict[str, int], values: dict[str, int]) -> None:
    """Checks the numbers of `layers`, by the fields that give them, of norms, and of weights and positions: `values`,
    approximate, by the fields whose product each is."""
    count, fields = sum(layers.values()), " and ".join(layers)
    if count > MOST_LAYERS:
        raise ValueError(f"{fields} must make at most {MOST_LAYERS:,} layers, not {count:,}")
    if count * config.skip_recursions > MOST_NORMS:
        raise ValueError(
            f"`skip_recursions` times the number of layers must be at most {MOST_NORMS:,}, not "
            f"{config.skip_recursions:,} times {count:,}"
        )
    if sum(values.values()) > MOST_VALUES:
        largest, total = max(values, key=values.get), sum(values.values())
        raise ValueError(f"{largest} must make a model of at most {MOST_VALUES:.0e} weights, not {total:.1e}")


def check_skip_fields(config) -> None:
    """Checks the `skip_*` fields and `layer_norm_eps`, which all configurations have."""
    check(config, "skip_recursions", COUNT, at_most(MOST_RECURSIONS))
    check(config, "skip_scale", (lambda value: is_number(value) and abs(value) < math.inf, "a finite number"))
    check(config, "layer_norm_eps", (lambda value: is_number(value) and 0 < value < math.inf, "a positive number"))
    check(config, "skip_type", one_of(SKIP_CONNECTIONS, ", or a kind whose module was imported"))
    check(config, "skip_norm", one_of(NORMS))
    check(config, "skip_norm_affine", one_of(AFFINES))
    if hasattr(config, "skip_norm_axes"):
        check(config, "skip_norm_axes", one_of(NORM_AXES))
        if not SKIP_CONNECTIONS[config.skip_type].for_images:
            raise ValueError(f"`skip_type` {config.skip_type!r} is not for a ResNet")
    norms = SKIP_CONNECTIONS[config.skip_type].norms
    if config.skip_norm not in norms:
        what = f"one of {', '.join(norms)}" if len(norms) > 1 else repr(norms[0])
        raise ValueError(f"`skip_norm` must be {what} with `skip_type` {config.skip_type!r}, not {config.skip_norm!r}")
