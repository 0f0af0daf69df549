"""Common part of the configurations: the fields of the skip connections, and rules for values."""

import math
from collections.abc import Callable, Collection
from dataclasses import fields

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .skip_connections import AFFINES, SKIP_CONNECTIONS

Rule = tuple[Callable[[object], bool], str]
"""A test of a value, and the allowed values in words: the end of "`field` must be ..."."""
# Upper bounds above any trained model: a configuration from the Hub cannot ask for millions of modules.
MOST_LABELS, MOST_LAYERS, MOST_RECURSIONS, MOST_FEATURES = 100_000, 1_000, 100, 10_000_000


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value, most: int = MOST_FEATURES) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def count(most: int) -> Rule:
    return lambda value: is_count(value, most), f"an integer from 1 to {most:,}"


def counts(most: int) -> Rule:
    return (
        lambda value: isinstance(value, (list, tuple)) and all(map(is_count, value)) and 0 < sum(value) <= most,
        f"a list of integers of at least 1 whose sum is at most {most:,}",
    )


COUNT: Rule = count(MOST_FEATURES)
RATE: Rule = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
FINITE: Rule = (lambda value: is_number(value) and math.isfinite(value), "a finite number")
POSITIVE: Rule = (lambda value: is_number(value) and 0 < value < math.inf, "a positive number")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
ACTIVATION: Rule = (lambda value: str(value) in ACT2FN, "a name of `transformers.activations.ACT2FN`")


def one_of(names: Collection[str], more: str = "") -> Rule:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}{more}"


class SkipConfig(PreTrainedConfig):
    """Base class of the configurations.

    Args:
        skip_type: The kind of skip connection, a key of `SKIP_CONNECTIONS`, such as `"rskip"`, `"xskip"` or
            `"pre_norm"`; `"deep_norm"`, `"b2t"` and `"rskip_detached"` are for Transformers only.
        skip_recursions: K, the number of recursions of `"rskip"` (and of `"rskip_detached"`), at least 1; K = 1 is
            post-LN. It has no effect on other kinds.
        skip_scale: s, the fixed scale of `"xskip"`. It has no effect on other kinds.
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
                raise ValueError(f"`{name}` is not a field: those that begin with skip_ are {', '.join(known)}")
        self.check_values()
        labels = None if self.id2label is None else len(self.id2label)
        for field, number in (("num_labels", kwargs.get("num_labels")), ("id2label", labels)):
            if number not in (None, 0) and not is_count(number, MOST_LABELS):
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

    def _check(self, fields: str, rule: Rule) -> None:
        """Raises a `ValueError` that says "`field` must be ..." unless each of `fields` fulfils the rule."""
        is_allowed, what = rule
        for field in fields.split():
            value = getattr(self, field)
            if not is_allowed(value):
                raise ValueError(f"`{field}` must be {what}, not {value!r}")

    def check_values(self) -> None:
        """Checks the fields, before anything is computed from them."""
        self._check("skip_recursions", count(MOST_RECURSIONS))
        self._check("skip_scale", FINITE)
        self._check("layer_norm_eps", POSITIVE)
        self._check(
            "skip_type",
            one_of(SKIP_CONNECTIONS, ", or one of your own, whose module is imported first (`--import_module`)"),
        )
        norms = SKIP_CONNECTIONS[self.skip_type].norms
        self._check("skip_norm", one_of(norms, f" with `skip_type` {self.skip_type!r}"))
        self._check("skip_norm_affine", one_of(AFFINES))
