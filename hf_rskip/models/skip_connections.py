"""Skip connections: how a residual block joins its input x to the output F of its branch.

A skip connection has a step before the branch and a step after it, so that one object expresses every form:

    x = skip(x, branch(skip.before(x)))

[`SKIP_CONNECTIONS`], at the end of this file, lists the formulas of all kinds. To add a kind, subclass
[`SkipConnection`] and enter the class there. A second stream beside x, as in ResiDual, is not supported.

Features come last: tokens are `(batch, length, features)`, and feature maps, `(batch, channels, height, width)` in a
convolution, are seen here as `(batch, height, width, channels)`, which is a view and costs nothing.

Source: Liu, Ren, Zhang, Sun and Zou, "Rethinking Skip Connection with Layer Normalization in Transformers and ResNets",
COLING 2020 (https://arxiv.org/abs/2105.07205); of the other forms, each class names its own.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .skip_norms import NORMS, NoNorm, Norm, make_norm, norm_of

AFFINES = ("per_step", "shared", "last")
"""Which of the K norms of an rSkip have gain and bias (`skip_norm_affine`)."""

_REAL_NORMS = tuple(name for name in NORMS if name != "none")


@dataclass(frozen=True)
class SublayerPosition:
    """Position of a skip connection in its stack, for kinds whose constants depend on the depth.

    Args:
        stack: `"encoder"` or `"decoder"`; of a model with one stack, either.
        layer, sublayer: index of the layer in its stack and of the sublayer in its layer, from 0.
        num_layers, num_sublayers: number of layers of the stack and of sublayers of each of its layers.
        branch_size: number of features that the branch takes, where a shortcut changes that of x.
        other_layers: number of layers of the other stack of an encoder-decoder; `None` where there is one stack.

    Raises:
        `ValueError`: if there is no such stack, layer or sublayer.
    """

    stack: str
    layer: int
    sublayer: int
    num_layers: int
    num_sublayers: int
    branch_size: int | None = None
    other_layers: int | None = None

    def __post_init__(self):
        if self.stack not in ("encoder", "decoder"):
            raise ValueError(f"`stack` must be 'encoder' or 'decoder', not {self.stack!r}")
        for name, count in (("layer", self.num_layers), ("sublayer", self.num_sublayers)):
            if not 0 <= getattr(self, name) < count:
                raise ValueError(f"`{name}` must be from 0 to below `num_{name}s` {count}, not {getattr(self, name)}")

    @property
    def depth(self) -> int:
        """Number of sublayers of the stack."""
        return self.num_layers * self.num_sublayers


class SkipConnection(nn.Module):
    """Base class: joins the input x of a residual block to the output of its branch.

    Subclasses define `forward`, the step after the branch. `x` and `branch` have shape `(..., size)`; `mask` has shape
    `(...)` and is true at real tokens, or is `None` when all are. Only norms with statistics over tokens look at it.
    The first line of the docstring of a subclass is its formula, for model cards.
    """

    norms: Collection[str] = NORMS
    """The names of `skip_norm` with which the formula is of this kind."""
    for_images = True
    """Whether a ResNet can have it."""
    options: tuple[str, ...] = ()
    """The fields of the configuration that this kind reads beside `skip_norm`."""
    branch_gains: dict[str, float] = {}
    """Xavier gains, other than 1, of linear layers of the branch by their names: `q_proj`, `k_proj`, `v_proj` and
    `out_proj` of an attention, `fc1` and `fc2` of an MLP."""

    @classmethod
    def for_position(cls, size: int, position: SublayerPosition, **options) -> "SkipConnection":
        """The skip connection with the constants of that position; `options` are other arguments of the class."""
        return cls(size, **options)

    @classmethod
    def from_config(cls, config, size: int, position: SublayerPosition) -> "SkipConnection":
        """Builds the skip connection of a configuration; see `for_position`."""
        names = {"skip_recursions": "recursions", "skip_norm_affine": "affine", "skip_scale": "scale"}
        options = {names[field]: getattr(config, field) for field in cls.options}
        return cls.for_position(size, position, norm=norm_of(config), eps=config.layer_norm_eps, **options)

    @classmethod
    def describe(cls, config) -> str:
        """The kind with its options, as a configuration says them."""
        fields = ("skip_type", "skip_norm", "skip_norm_axes", *cls.options)
        return ", ".join(f"{field}: {getattr(config, field)}" for field in fields if hasattr(config, field))

    @classmethod
    def around_layer(cls, size: int, norm: Norm = "layer_norm", eps: float = 1e-5) -> "SkipConnection | None":
        """A skip connection around each layer of a Transformer, with the sublayers for its branch: none by default."""
        return None

    @classmethod
    def final_norm(cls, size: int, norm: Norm = "layer_norm", eps: float = 1e-5) -> nn.Module:
        """The norm that ends a stack of blocks of this kind, called as `norm(hidden, mask)`: none by default."""
        return NoNorm(size)

    def init_weights(self) -> None:
        """Initialises its own parameters, not those of its norms, by functions of `transformers.initialization`.

        The models here call it. In other modules it is not called: the constructor must give the same values.
        """

    def before(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the branch: x itself by default."""
        return x


fused: Callable[["RSkip", torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None
"""Hook for a faster implementation: called with an [`RSkip`], x and F, it returns the output, or `None` to leave it to
the formula. `hf_rskip.kernels` sets it; code from the Hub runs without."""


class RSkip(SkipConnection):
    """y_1 = LN(x + F(x)), y_k = LN(x + y_{k-1}), output y_K

    The recursive skip connection with layer normalisation, rSkip+LN. With K = 1 it is post-LN; without a norm K x + F.

    Args:
        size: number of features, the last dimension of x. Feature maps are given as `maps.movedim(1, -1)`.
        recursions: K, at least 1.
        norm: a name of [`NORMS`], or a class like those there: [`SampleLayerNorm`] goes over whole feature maps. It is
            made as `norm(size, eps=eps, elementwise_affine=...)` and called as `norm(hidden, mask)`.
        affine: `"per_step"` (own gain and bias for each of the K norms), `"shared"` (one gain and bias for all) or
            `"last"` (gain and bias only at step K; the steps before it just normalise). Batch statistics belong to a
            step in every case.
        eps: added to the variance.
    """

    options = ("skip_recursions", "skip_norm_affine")

    def __init__(
        self, size: int, recursions: int = 2, norm: Norm = "layer_norm", affine: str = "per_step", eps: float = 1e-5
    ):
        super().__init__()
        if not isinstance(recursions, int) or isinstance(recursions, bool) or recursions < 1:
            raise ValueError(f"`recursions` must be an integer of at least 1, not {recursions!r}")
        if affine not in AFFINES:
            raise ValueError(f"`affine` must be one of {', '.join(AFFINES)}, not {affine!r}")
        with_affine = {"per_step": range(recursions), "shared": [0], "last": [recursions - 1]}[affine]
        self.norm = nn.ModuleList(make_norm(norm, size, eps, step in with_affine) for step in range(recursions))
        self.affine = affine

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = None if fused is None else fused(self, x, branch)
        if y is not None:
            return y
        y = branch
        for norm in self.norm:
            y = self.norm[0](x + y, mask, norm) if self.affine == "shared" else norm(x + y, mask)
        return y

    def extra_repr(self) -> str:
        return f"recursions={len(self.norm)}, affine={self.affine}"


class XSkip(SkipConnection):
    """LN(s x + F), or s x + F with `norm="none"`, with a fixed scale s

    The expanded skip connection, xSkip+LN or xSkip. With s = 1 and layer normalisation it is post-LN.
    """

    options = ("skip_scale",)

    def __init__(self, size: int, scale: float = 1.0, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"`scale` must be a finite number, not {scale!r}")
        self.scale = scale
        self.norm = make_norm(norm, size, eps, names=self.norms)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(torch.add(branch, x, alpha=self.scale), mask)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class DetachedRSkip(SkipConnection):
    """LN(r_K x + F), where r_K is the weight that rSkip with K recursions gives x, but constant to the gradient.

    r_1 = 1 and r_{k+1} = r_k + std(r_k x + F), a number for each token. The outputs are, but for `eps`, those of rSkip
    with gain and bias at the last step; only the gradient does not see how x and F make the weight.
    """

    norms = ("layer_norm",)
    for_images = False
    options = ("skip_recursions",)

    def __init__(self, size: int, recursions: int = 2, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__()
        self.recursions = recursions
        self.norm = make_norm(norm, size, eps, names=self.norms)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(self.weight_of_x(x, branch) * x + branch, mask)

    @torch.no_grad()
    def weight_of_x(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """r_K, `(..., 1)`."""
        weight = torch.ones_like(x[..., :1])
        for _ in range(self.recursions - 1):
            variance = (weight * x + branch).var(-1, correction=0, keepdim=True)
            weight = weight + torch.sqrt(variance + self.norm.eps)
        return weight

    def extra_repr(self) -> str:
        return f"recursions={self.recursions}"


class DeepNorm(XSkip):
    """LN(alpha x + F), alpha growing with the depth, and branches that start smaller by beta.

    For N encoder and M decoder layers: alpha = .81 (N^4 M)^(1/16) and beta = .87 (N^4 M)^(-1/16) in the encoder,
    alpha = (3 M)^(1/4) and beta = (12 M)^(-1/4) in the decoder; for N layers of a model with one stack,
    alpha = (2 N)^(1/4) and beta = (8 N)^(-1/4). beta is the Xavier gain of `fc1`, `fc2`, `v_proj` and `out_proj`.
    Not for a ResNet, whose branches normalise away the scale of their weights.
    Source: Wang et al., 2022 (https://arxiv.org/abs/2203.00555).
    """

    norms = _REAL_NORMS
    for_images = False
    options = ()

    def __init__(self, size: int, scale: float, beta: float, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__(size, scale, norm, eps)
        self.branch_gains = dict.fromkeys(("fc1", "fc2", "v_proj", "out_proj"), beta)

    @classmethod
    def for_position(cls, size, position, **options):
        layers = position.num_layers
        if position.other_layers is None:
            alpha, beta = (2 * layers) ** (1 / 4), (8 * layers) ** (-1 / 4)
        elif position.stack == "encoder":
            depth = layers**4 * position.other_layers
            alpha, beta = 0.81 * depth ** (1 / 16), 0.87 * depth ** (-1 / 16)
        else:
            alpha, beta = (3 * layers) ** (1 / 4), (12 * layers) ** (-1 / 4)
        return cls(size, alpha, beta, **options)


def admin_scale(depth: int) -> float:
    """Admin's weight of x in a stack of `depth` sublayers, sqrt((L + 1) / ln(L + 1) - 1)."""
    return math.sqrt((depth + 1) / math.log(depth + 1) - 1)


class Admin(SkipConnection):
    """LN(w x + F), with w learned for each feature; it starts at sqrt((L + 1) / ln(L + 1) - 1) for L sublayers.

    Source: Liu et al., 2020 (https://arxiv.org/abs/2004.08249), which measures the first w in a pass over data; the
    constant is the one of its authors' admin-torch.
    """

    norms = _REAL_NORMS

    def __init__(self, size: int, scale: float, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__()
        self.first_scale = scale
        self.scale = nn.Parameter(torch.full((size,), scale))
        self.norm = make_norm(norm, size, eps, names=self.norms)

    @classmethod
    def for_position(cls, size, position, **options):
        return cls(size, admin_scale(position.depth), **options)

    def init_weights(self):
        init.constant_(self.scale, self.first_scale)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(self.scale * x + branch, mask)


class FixedAdmin(XSkip):
    """LN(w x + F), w = sqrt((L + 1) / ln(L + 1) - 1) for L sublayers

    [`Admin`] without learning w.
    """

    norms = _REAL_NORMS
    options = ()

    @classmethod
    def for_position(cls, size, position, **options):
        return cls(size, admin_scale(position.depth), **options)


class ReZero(SkipConnection):
    """LN(x + a F), or x + a F with `norm="none"`, with one learned number a that starts at 0.

    Source: Bachlechner et al., 2020 (https://arxiv.org/abs/2003.04887).
    """

    def __init__(self, size: int, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__()
        self.branch_scale = nn.Parameter(torch.zeros(()))
        self.norm = make_norm(norm, size, eps)

    def init_weights(self):
        init.zeros_(self.branch_scale)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(x + self.branch_scale * branch, mask)


class B2T(XSkip):
    """Post-LN, and the last norm of a layer adds the layer's input, too: a path past all norms but the last.

    The output projections of the branches, `out_proj` and `fc2`, start smaller by N^(-1/2) in a stack of N layers; that
    these are the weights to scale is our reading. Source: Takase et al., 2023 (https://arxiv.org/abs/2206.00330).
    """

    norms = _REAL_NORMS
    for_images = False
    options = ()

    def __init__(self, size: int, num_layers: int = 1, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__(size, 1.0, norm, eps)
        self.branch_gains = dict.fromkeys(("out_proj", "fc2"), num_layers**-0.5)

    @classmethod
    def for_position(cls, size, position, **options):
        skip = cls(size, position.num_layers, **options)
        if position.sublayer == position.num_sublayers - 1:
            skip.norm = NoNorm(size)  # the norm behind the last sublayer stands around the layer
        return skip

    @classmethod
    def around_layer(cls, size, norm="layer_norm", eps=1e-5):
        return XSkip(size, 1.0, norm, eps)


class PreNorm(SkipConnection):
    """Pre-norm residual: x + F(LN(x)), with one final norm at the end of the stack.

    Source: Wang et al., ACL 2019 (https://arxiv.org/abs/1906.01787).
    """

    norms = _REAL_NORMS

    def __init__(self, size: int, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__()
        self.norm = make_norm(norm, size, eps, names=self.norms)

    @classmethod
    def for_position(cls, size, position, **options):
        return cls(position.branch_size or size, **options)

    @classmethod
    def final_norm(cls, size, norm="layer_norm", eps=1e-5):
        return make_norm(norm, size, eps)

    def before(self, x, mask=None):
        return self.norm(x, mask)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + branch


class PeriNorm(PreNorm):
    """Norms on both sides of the branch: x + LN(F(LN(x))), with one final norm at the end of the stack.

    Source: Kim et al., "Peri-LN", 2025 (https://arxiv.org/abs/2502.02732). In the models here dropout comes before the
    second norm.
    """

    def __init__(self, size: int, branch_size: int | None = None, norm: Norm = "layer_norm", eps: float = 1e-5):
        super().__init__(branch_size or size, norm, eps)
        self.branch_norm = make_norm(norm, size, eps)

    @classmethod
    def for_position(cls, size, position, **options):
        return cls(size, position.branch_size, **options)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + self.branch_norm(branch, mask)


class Keel(XSkip):
    """LN(alpha x + F(LN(x))), alpha the number of sublayers of the stack.

    Source: Chen and Wei, 2026 (https://arxiv.org/abs/2601.19895), as others describe it.
    """

    norms = _REAL_NORMS
    options = ()

    def __init__(
        self, size: int, scale: float, branch_size: int | None = None, norm: Norm = "layer_norm", eps: float = 1e-5
    ):
        super().__init__(size, scale, norm, eps)
        self.branch_norm = make_norm(norm, branch_size or size, eps)

    @classmethod
    def for_position(cls, size, position, **options):
        return cls(size, float(position.depth), position.branch_size, **options)

    def before(self, x, mask=None):
        return self.branch_norm(x, mask)


SKIP_CONNECTIONS: dict[str, type[SkipConnection]] = {
    "rskip": RSkip,  # y_1 = LN(x + F), y_k = LN(x + y_{k-1}), output y_K
    "rskip_detached": DetachedRSkip,  # LN(r_K x + F), the weight r_K that rSkip gives x, constant to the gradient
    "xskip": XSkip,  # LN(s x + F)
    "deep_norm": DeepNorm,  # LN(alpha x + F), alpha by depth, branches start smaller
    "admin": Admin,  # LN(w x + F), w learned for each feature, starts by depth
    "admin_fixed": FixedAdmin,  # LN(w x + F), w by depth
    "rezero": ReZero,  # LN(x + a F), a learned, starts at 0
    "b2t": B2T,  # post-LN, and the last norm of a layer adds the layer's input, too
    "pre_norm": PreNorm,  # x + F(LN(x)), one more LN at the end of the stack
    "peri_norm": PeriNorm,  # x + LN(F(LN(x))), one more LN at the end of the stack
    "keel": Keel,  # LN(alpha x + F(LN(x))), alpha by depth
}
"""Every kind of skip connection by its configuration name (`skip_type`)."""

__all__ = [
    "B2T",
    "SKIP_CONNECTIONS",
    "Admin",
    "DeepNorm",
    "DetachedRSkip",
    "FixedAdmin",
    "Keel",
    "PeriNorm",
    "PreNorm",
    "RSkip",
    "ReZero",
    "SkipConnection",
    "SublayerPosition",
    "XSkip",
]
