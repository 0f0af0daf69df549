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
from torch.nn import functional as F


class _Norm:
    """How the norms here are called.

    `statistics_of` is a norm of the same class that takes the place of this one but for gain and bias. Weights are
    looked up in the call of the module that has them: hooks that bring them back from the disk run at no other time.
    """

    def forward(self, hidden, mask=None, statistics_of=None):
        norm = self if statistics_of is None else statistics_of
        return norm.normalize(hidden, self.weight, self.bias, mask)


class LayerNorm(_Norm, nn.LayerNorm):
    """Layer normalisation over the last dimension; the mask is accepted and not needed."""

    def normalize(self, hidden, weight, bias, mask=None):
        return F.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(_Norm, nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension: no centring and no bias."""

    bias = None

    def normalize(self, hidden, weight, bias, mask=None):
        return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)


class SampleLayerNorm(_Norm, nn.GroupNorm):
    """Layer normalisation over all positions and features of a sample together, with gain and bias for each feature.

    For feature maps, where it is group normalisation with one group. The norms of a text must not see its padding or,
    in a decoder, its future: there it is of no use.
    """

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True):
        super().__init__(1, size, eps=eps, affine=elementwise_affine)

    def normalize(self, hidden, weight, bias, mask=None):
        return F.group_norm(hidden.movedim(-1, 1), 1, weight, bias, self.eps).movedim(1, -1)


class SampleRMSNorm(RMSNorm):
    """Root-mean-square normalisation over all positions and features of a sample together; see [`SampleLayerNorm`]."""

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True):
        super().__init__(size, eps=eps, elementwise_affine=elementwise_affine)

    def normalize(self, hidden, weight, bias, mask=None):
        # `F.rms_norm` would rearrange the memory of maps whose channels do not lie last there.
        dims, dtype = tuple(range(1, hidden.dim())), torch.promote_types(hidden.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden, dim=dims, keepdim=True, dtype=dtype)
        rstd = torch.rsqrt(norm.square() / hidden.shape[1:].numel() + self.eps)
        return hidden * (rstd if weight is None else rstd * weight).to(hidden.dtype)


class BatchNorm(_Norm, nn.BatchNorm1d):
    """Batch normalisation of each feature over all tokens, in the manner of `nn.BatchNorm1d` but with features last.

    In training the statistics are those of the tokens that `mask` keeps, so that padding never enters them; in
    evaluation they are the running ones. Statistics are computed in float32 at least. In a causal decoder the training
    statistics span the whole sentence, future tokens included: that is inherent to batch normalisation.
    """

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True):
        super().__init__(size, eps=eps, affine=elementwise_affine)

    def normalize(self, hidden, weight, bias, mask=None):
        if mask is None and hidden.numel() > self.num_features:
            return self._normalize_all(hidden, weight, bias)
        if self.training:
            mean, variance = self._batch_statistics(hidden, mask)
        else:
            mean, variance = self.running_mean, self.running_var
        rstd = torch.rsqrt(variance.to(torch.promote_types(variance.dtype, torch.float32)) + self.eps)
        normalized = ((hidden - mean) * rstd).to(hidden.dtype)
        return normalized if weight is None else normalized * weight + bias

    def _normalize_all(self, hidden, weight, bias):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            hidden.movedim(-1, 1),
            self.running_mean,
            self.running_var,
            weight,
            bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        ).movedim(1, -1)

    def _batch_statistics(self, hidden, mask):
        tokens = hidden.reshape(-1, self.num_features).to(torch.promote_types(hidden.dtype, torch.float32))
        if mask is None:
            keep = tokens.new_ones(len(tokens), 1)
        else:
            keep = mask.expand(hidden.shape[:-1]).reshape(-1, 1).bool()
            tokens = tokens.masked_fill(~keep, 0)  # a product would turn overflow into NaN
        kept = keep.sum()
        count = kept.clamp(min=1)
        mean = tokens.sum(0) / count
        variance = ((tokens - mean).square() * keep).sum(0) / count
        with torch.no_grad():
            # As in torch: the running variance is the unbiased one, the variance that normalises is not.
            unbiased = variance * (count / (count - 1).clamp(min=1))
            momentum = (self.momentum * (kept > 0)).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
            self.num_batches_tracked.add_(1)
        return mean, variance


class NoNorm(_Norm, nn.Module):
    """The identity, where a formula is used without a norm."""

    weight = bias = None

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True):
        super().__init__()

    def normalize(self, hidden, weight, bias, mask=None):
        return hidden


NORMS: dict[str, type[nn.Module]] = {
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "batch_norm": BatchNorm,
    "none": NoNorm,
}
"""Every norm by its configuration name (`skip_norm`). Called as `norm(hidden, mask)`."""

SAMPLE_NORMS: dict[str, type[nn.Module]] = NORMS | {"layer_norm": SampleLayerNorm, "rms_norm": SampleRMSNorm}
"""The same names with statistics over a whole feature map. Batch statistics are those of a channel in either table."""

NORM_AXES = {"channels": NORMS, "sample": SAMPLE_NORMS}
"""What the norms of feature maps go over (`skip_norm_axes`): the channels of each position, or all of a sample."""


def make_norm(norm: str | type[nn.Module], size: int, eps: float = 1e-5, elementwise_affine: bool = True) -> nn.Module:
    """The norm of that name in [`NORMS`], or of that class, for `size` features.

    Raises:
        `ValueError`: if there is no norm of that name.
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, not {norm!r}")
        norm = NORMS[norm]
    return norm(size, eps=eps, elementwise_affine=elementwise_affine)


def norm_of(config) -> type[nn.Module]:
    """The class of norm that `config` asks for: its `skip_norm`, for images over its `skip_norm_axes`."""
    return NORM_AXES[getattr(config, "skip_norm_axes", "channels")][config.skip_norm]


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
            y = self.norm[0](x + y, mask, norm) if self.affine == "shared" else norm(x + y, mask)
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
