"""The norms of skip connections, over tensors whose features come last.

Each is called as `norm(hidden, mask)` with `hidden` of shape `(..., size)` and `mask` of shape `(...)`, true at real
tokens, or `None` when all are real; only batch normalisation looks at it. `normalize` takes gain and bias, too.
"""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

Norm = str | type[nn.Module]
"""A norm by its name in [`NORMS`], or a class like those there."""


class _Norm:
    """The call of all norms. `statistics_of` is a norm of the same class to be used with this one's gain and bias.

    Weights are read in the call of the module that has them: hooks that load them from the disk run at no other time.
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
        if not self.training or (mask is None and hidden.numel() > self.num_features):
            momentum = self._count_batch() if self.training else 0.0
            statistics = self.running_mean, self.running_var
            maps = torch.atleast_2d(hidden).movedim(-1, 1)
            maps = F.batch_norm(maps, *statistics, weight, bias, self.training, momentum, self.eps)
            return maps.movedim(1, -1).view(hidden.shape)
        mean, variance = self._batch_statistics(hidden, mask)
        normalized = ((hidden - mean) * torch.rsqrt(variance + self.eps)).to(hidden.dtype)
        return normalized if weight is None else normalized * weight + bias

    def _batch_statistics(self, hidden, mask):
        tokens = hidden.reshape(-1, self.num_features).to(torch.promote_types(hidden.dtype, torch.float32))
        mask = tokens.new_ones(()) if mask is None else mask
        keep = mask.expand(hidden.shape[:-1]).reshape(-1, 1).bool()
        tokens = tokens.masked_fill(~keep, 0)  # multiplication by 0 would turn infinities into NaN
        kept = keep.sum()
        count = kept.clamp(min=1)
        mean = tokens.sum(0) / count
        variance = ((tokens - mean).square() * keep).sum(0) / count
        with torch.no_grad():
            # As in torch: the running variance is the unbiased one, the variance that normalises is not.
            unbiased = variance * (count / (count - 1).clamp(min=1))
            momentum = (self._count_batch() * (kept > 0)).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return mean, variance

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics; momentum `None` is the mean of all, as in torch."""
        self.num_batches_tracked.add_(1)
        return 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum


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

NORM_AXES = {"channels": NORMS, "sample": NORMS | {"layer_norm": SampleLayerNorm, "rms_norm": SampleRMSNorm}}
"""Norms of feature maps by the axes of their statistics (`skip_norm_axes`): those of a position, or of a sample. Batch
statistics are those of a channel in either."""


def make_norm(
    norm: Norm, size: int, eps: float = 1e-5, elementwise_affine: bool = True, names: Collection[str] = NORMS
) -> nn.Module:
    """The norm of that name in [`NORMS`], or of that class, for `size` features.

    Raises:
        `ValueError`: if it is of a name that is not one of `names`.
    """
    of_classes = {made: name for table in NORM_AXES.values() for name, made in table.items()}
    name = norm if isinstance(norm, str) else of_classes.get(norm)
    if name is not None and name not in names:
        raise ValueError(f"`norm` must be one of {', '.join(names)}, not {name!r}")
    norm_class = NORMS[norm] if isinstance(norm, str) else norm
    return norm_class(size, eps=eps, elementwise_affine=elementwise_affine)


def norm_of(config) -> type[nn.Module]:
    """The class of norm that `config` asks for: its `skip_norm`, for images over its `skip_norm_axes`."""
    return NORM_AXES[getattr(config, "skip_norm_axes", "channels")][config.skip_norm]


__all__ = ["NORMS", "SampleLayerNorm", "SampleRMSNorm", "make_norm"]
