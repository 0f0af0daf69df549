"""Skip connections: how a residual block joins its input x to the output F of its branch.

A skip connection has a step before the branch and a step after it, so that one object expresses every form:

    x = skip(x, branch(skip.before(x)))

| `skip_type` | class | formula |
|---|---|---|
| `rskip` | [`RSkip`] | y_1 = LN(x + F), y_k = LN(x + y_{k-1}), output y_K |
| `xskip` | [`XSkip`] | LN(s * x + F), or s * x + F without a norm |
| `pre_norm` | [`PreNorm`] | x + F(LN(x)), one more LN at the end of the stack |

F is the branch, K the number of recursions, s the scale; LN may be any norm of [`NORMS`]. Post-LN is `rskip` with K = 1
and `xskip` with s = 1. To add a kind, subclass [`SkipConnection`] and enter the class in [`SKIP_CONNECTIONS`].

Features come last: tokens are `(batch, length, features)`, and feature maps, `(batch, channels, height, width)` in a
convolution, are seen here as `(batch, height, width, channels)`, which is a view and costs nothing.

Source: Liu, Ren, Zhang, Sun and Zou, "Rethinking Skip Connection with Layer Normalization in Transformers and ResNets",
COLING 2020 (https://arxiv.org/abs/2105.07205); pre-norm: Wang et al., ACL 2019 (https://arxiv.org/abs/1906.01787).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .skip_norms import NoNorm, make_norm, norm_of

AFFINES = ("per_step", "shared", "last")
"""Which of the K norms of an rSkip have gain and bias (`skip_norm_affine`)."""


@dataclass(frozen=True)
class SublayerPosition:
    """Where a skip connection stands, for kinds whose constants depend on the depth."""

    stack: str
    """`"encoder"` (the only one of a ResNet) or `"decoder"`."""
    layer: int
    """Index of the layer in its stack, from 0."""
    sublayer: int
    """Index of the sublayer in its layer, from 0."""
    branch_size: int | None = None
    """Number of features that the branch takes, where a shortcut changes that of x; `None` where both are the same."""


class SkipConnection(nn.Module):
    """Base class: joins the input x of a residual block to the output of its branch.

    Subclasses define `forward` (the step after the branch) and, where they differ from the defaults here, the other
    methods. `x` and `branch` have shape `(..., size)`; `mask` has shape `(...)` and is true at real tokens, or is
    `None` when all tokens are real. Only norms with statistics over tokens look at it.
    """

    formula: str | None = None
    """For model cards, where the first line of the docstring does not say it."""

    requires_norm = False
    """Whether `skip_norm="none"` would leave a formula that is not of this kind."""
    options: tuple[str, ...] = ()
    """The fields of the configuration that this kind reads beside `skip_norm`."""

    @classmethod
    def from_config(cls, config, size: int, position: SublayerPosition) -> "SkipConnection":
        """Builds the skip connection of the sublayer at `position`, for tensors of shape `(..., size)`."""
        return cls(size, norm=norm_of(config), eps=config.layer_norm_eps)

    @classmethod
    def describe(cls, config) -> str:
        """The kind with its options, as a configuration says them."""
        fields = ("skip_type", "skip_norm", "skip_norm_axes", *cls.options)
        return ", ".join(f"{field}: {getattr(config, field)}" for field in fields if hasattr(config, field))

    @classmethod
    def final_norm(cls, config, size: int) -> nn.Module:
        """The norm that ends a stack of blocks of this kind, called as `norm(hidden, mask)`: none by default."""
        return NoNorm(size)

    def init_weights(self, branch: nn.Module) -> None:
        """This kind's part of the initialisation, after the model's own; `branch` is the module that computes F: an
        attention with `q_proj`, `k_proj`, `v_proj` and `out_proj`, an MLP with `fc1` and `fc2`, or the sequence of
        convolutional layers of a ResNet block.

        Parameters are to be filled with the functions of `transformers.initialization`, which leave loaded weights
        alone.
        """

    def before(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the branch: x itself by default."""
        return x


class RSkip(SkipConnection):
    """Recursive skip connection with layer normalisation, rSkip+LN.

    y_1 = LN(x + F), y_k = LN(x + y_{k-1}), output y_K. With K = 1 it is post-LN. Without a norm it is K * x + F.

    Args:
        size: number of features, the last dimension of x.
        recursions: K, at least 1.
        norm: a name of [`NORMS`], or a class such as [`SampleLayerNorm`].
        affine: `"per_step"` (own gain and bias for each of the K norms), `"shared"` (one gain and bias for all) or
            `"last"` (gain and bias only at step K; the steps before it just normalise). Batch statistics belong to a
            step in every case.
        eps: added to the variance.

    Example:

    ```python
    >>> import torch
    >>> from hf_rskip import RSkip

    >>> feed_forward = torch.nn.Linear(16, 16)
    >>> skip = RSkip(16, recursions=2)
    >>> x = torch.randn(4, 10, 16)
    >>> y = skip(x, feed_forward(skip.before(x)))
    >>> y.shape
    torch.Size([4, 10, 16])

    ```
    """

    options = ("skip_recursions", "skip_norm_affine")
    formula = "y_1 = LN(x + F(x)), y_k = LN(x + y_{k-1}), output y_K"

    def __init__(
        self,
        size: int,
        recursions: int = 2,
        norm: str | type[nn.Module] = "layer_norm",
        affine: str = "per_step",
        eps: float = 1e-5,
    ):
        super().__init__()
        if not isinstance(recursions, int) or isinstance(recursions, bool) or recursions < 1:
            raise ValueError(f"`recursions` must be an integer of at least 1, not {recursions!r}")
        if affine not in AFFINES:
            raise ValueError(f"`affine` must be one of {', '.join(AFFINES)}, not {affine!r}")
        has_affine = {
            "per_step": [True] * recursions,
            "shared": [True] + [False] * (recursions - 1),
            "last": [False] * (recursions - 1) + [True],
        }[affine]
        self.norm = nn.ModuleList(make_norm(norm, size, eps, elementwise_affine=flag) for flag in has_affine)
        self.affine = affine

    @classmethod
    def from_config(cls, config, size, position):
        return cls(size, config.skip_recursions, norm_of(config), config.skip_norm_affine, config.layer_norm_eps)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = branch
        for norm in self.norm:
            if self.affine == "shared":
                y = norm.normalize(x + y, self.norm[0].weight, self.norm[0].bias, mask)
            else:
                y = norm(x + y, mask)  # a call, so that the hooks that bring offloaded weights back are run
        return y

    def extra_repr(self) -> str:
        return f"recursions={len(self.norm)}, affine={self.affine}"


class XSkip(SkipConnection):
    """Expanded skip connection with a fixed scale: xSkip+LN, LN(s * x + F), or xSkip, s * x + F, with `norm="none"`.

    With s = 1 and layer normalisation it is post-LN. The scale is not learned.
    """

    options = ("skip_scale",)

    def __init__(self, size: int, scale: float = 1.0, norm: str | type[nn.Module] = "layer_norm", eps: float = 1e-5):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"`scale` must be a finite number, not {scale!r}")
        self.scale = scale
        self.norm = make_norm(norm, size, eps)

    @classmethod
    def from_config(cls, config, size, position):
        return cls(size, config.skip_scale, norm_of(config), config.layer_norm_eps)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(torch.add(branch, x, alpha=self.scale), mask)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class PreNorm(SkipConnection):
    """Pre-norm residual: x + F(LN(x)), with one final norm at the end of the stack."""

    requires_norm = True

    def __init__(self, size: int, norm: str | type[nn.Module] = "layer_norm", eps: float = 1e-5):
        super().__init__()
        if norm in ("none", NoNorm):
            raise ValueError("`norm` must be a norm, not 'none'")
        self.norm = make_norm(norm, size, eps)

    @classmethod
    def from_config(cls, config, size, position):
        return super().from_config(config, position.branch_size or size, position)

    @classmethod
    def final_norm(cls, config, size):
        return make_norm(norm_of(config), size, config.layer_norm_eps)

    def before(self, x, mask=None):
        return self.norm(x, mask)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + branch


SKIP_CONNECTIONS: dict[str, type[SkipConnection]] = {
    "rskip": RSkip,
    "xskip": XSkip,
    "pre_norm": PreNorm,
}
"""Every kind of skip connection by its configuration name (`skip_type`)."""
