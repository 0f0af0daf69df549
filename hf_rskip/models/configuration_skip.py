"""Common part of the configurations: the fields of the skip connections, and rules for values."""

import math
from collections.abc import Callable, Collection
from dataclasses import fields

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .skip_connections import AFFINES, SKIP_CONNECTIONS
from .skip_norms import NORMS

Rule = tuple[Callable[[object], bool], str]
"""A test of a value, and the allowed values in words: the end of "`field` must be ..."."""
# Upper bounds above any trained model: a configuration from the Hub cannot exhaust the memory.
MOST_LABELS, MOST_LAYERS, MOST_RECURSIONS, MOST_NORMS = 100_000, 10_000, 1_000, 20_000
MOST_VALUES = 10**11


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
FINITE: Rule = (lambda value: is_number(value) and math.isfinite(value), "a finite number")
POSITIVE: Rule = (lambda value: is_number(value) and 0 < value < math.inf, "a positive number")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
ACTIVATION: Rule = (lambda value: str(value) in ACT2FN, "a name of `transformers.activations.ACT2FN`")


def at_most(number: int = 10_000_000) -> Rule:
    return lambda value: value <= number, f"at most {number:,}"


def one_of(names: Collection[str], more: str = "") -> Rule:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}{more}"


class SkipConfig(PreTrainedConfig):
    """Base class of the configurations.

    Args:
        skip_type: The kind of skip connection, a key of `SKIP_CONNECTIONS`, such as `"rskip"`, `"xskip"` or
            `"pre_norm"`; `"deep_norm"`, `"b2t"` and `"rskip_detached"` are for Transformers only.
        skip_recursions: K, the number of recursions of `"rskip"` (and of `"rskip_detached"`), at least 1; K = 1 is
            post-LN. Other kinds ignore it.
        skip_scale: s, the fixed scale of `"xskip"`. Other kinds ignore it.
        skip_norm: `"layer_norm"`, `"rms_norm"`, `"batch_norm"`, or `"none"` where the formula allows it.
        skip_norm_affine: Gain and bias of the K norms of `"rskip"`: `"per_step"`, `"shared"` or `"last"`.
        layer_norm_eps: Added to the variance in every norm of a skip connection.

    Raises:
        `ValueError`: one sentence that names the field and what is allowed.
    """

    skip_type: str = "rskip"
    skip_recursions: int = 2
    skip_scale: float = 1.0
    skip_norm: str = "layer_norm"
    skip_norm_affine: str = "per_step"
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        known = [field.name for field in fields(self) if field.name.startswith("skip_")]
        for name in kwargs:
            if name.startswith("skip_"):
                raise ValueError(f"`{name}` must be one of {', '.join(known)}")
        self._check_values()
        labels = {"num_labels": kwargs.get("num_labels"), "id2label": self.id2label and len(self.id2label)}
        for field, number in labels.items():
            if number is not None and not (number == 0 or is_count(number) and number <= MOST_LABELS):
                raise ValueError(f"`{field}` must be of 0 to {MOST_LABELS:,} classes, not {number!r}")
        if not self.is_remote_code():
            kwargs.pop("auto_map", None)  # set by checkpoints with code, which this class does not need
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in Transformers, but keywords that are fields are checked like those of the constructor."""
        names = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        names |= cls.attribute_map.keys() | {name for name in kwargs if name.startswith("skip_")}
        given = {cls.attribute_map.get(name, name): kwargs.pop(name) for name in names & kwargs.keys()}
        return super().from_dict(config_dict | given, **kwargs)

    def _check(self, fields: str, *rules: Rule) -> None:
        """Raises a `ValueError` that says "`field` must be ..." unless each of `fields` fulfils all rules."""
        for field in fields.split():
            value = getattr(self, field)
            for is_allowed, what in rules:
                if not is_allowed(value):
                    raise ValueError(f"`{field}` must be {what}, not {value!r}")

    def _check_values(self) -> None:
        """Checks the fields, before anything is computed from them."""
        self._check("skip_recursions", COUNT, at_most(MOST_RECURSIONS))
        self._check("skip_scale", FINITE)
        self._check("layer_norm_eps", POSITIVE)
        self._check(
            "skip_type",
            one_of(SKIP_CONNECTIONS, ", or one of your own, whose module is imported first (`--import_module`)"),
        )
        self._check("skip_norm", one_of(NORMS))
        self._check("skip_norm_affine", one_of(AFFINES))
        norms = SKIP_CONNECTIONS[self.skip_type].norms
        what = f"one of {', '.join(norms)}" if len(norms) > 1 else repr(norms[0])
        self._check("skip_norm", (norms.__contains__, f"{what} with `skip_type` {self.skip_type!r}"))

    def _check_size(self, layers: dict[str, int], values: dict[str, int]) -> None:
        """Checks the numbers of `layers`, by the fields that give them, of norms, and of weights and positions:
        `values`, approximate, by the fields whose product each is."""
        count, fields = sum(layers.values()), " and ".join(layers)
        if count > MOST_LAYERS:
            raise ValueError(f"{fields} must make at most {MOST_LAYERS:,} layers, not {count:,}")
        if count * self.skip_recursions > MOST_NORMS:
            raise ValueError(
                f"`skip_recursions` times the number of layers must be at most {MOST_NORMS:,}, not "
                f"{self.skip_recursions:,} times {count:,}"
            )
        if sum(values.values()) > MOST_VALUES:
            largest, total = max(values, key=values.get), sum(values.values())
            raise ValueError(f"{largest} must make a model of at most {MOST_VALUES:.0e} weights, not {total:.1e}")
