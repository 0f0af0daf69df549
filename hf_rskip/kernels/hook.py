"""Decides whether an [`RSkip`] takes a fused function, and calls it."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..models.skip_connections import RSkip
from ..models.skip_norms import NORM_AXES
from .rskip import choose_backend, run

_FUSED = {
    norms[name]: (centred, axes)
    for axes, norms in NORM_AXES.items()
    for name, centred in (("layer_norm", True), ("rms_norm", False))
}
"""Whether each class of norm is centred, and its `axes`."""


def fused_rskip(skip: RSkip, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor | None:
    """The output of `skip` for x and branch of shape `(..., size)`, or `None` where its own formula is to be used."""
    norms = list(skip.norm)
    if not all(map(_is_plain, norms)) or _has_any_global_hook() or not _are_of_one_kind(norms, skip.affine):
        return None
    centred, axes = _FUSED[type(norms[0])]
    backend = choose_backend(x, branch, len(norms), axes)
    if backend == "reference":
        return None
    of_steps = norms[:1] * len(norms) if skip.affine == "shared" else norms
    gains, biases = [norm.weight for norm in of_steps], [norm.bias for norm in of_steps]
    return run(x, branch, gains, biases, centred, norms[0].eps, backend, axes)


def _is_plain(norm: nn.Module) -> bool:
    """Whether no hook observes `norm.forward` or loads its weights, and nothing replaces it."""
    watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    replaced = "forward" in norm.__dict__ or "normalize" in norm.__dict__
    return type(norm) in _FUSED and not watched and not replaced


def _are_of_one_kind(norms: list[nn.Module], affine: str) -> bool:
    """Whether the norms are as an [`RSkip`] makes them, not changed one by one."""
    first, own = norms[0], {"per_step": norms, "shared": norms[:1], "last": norms[-1:]}[affine]
    with_weight = [norm for norm in norms if norm.weight is not None]
    same = all(type(norm) is type(first) and norm.eps == first.eps for norm in norms)
    return same and with_weight == own and len({norm.bias is None for norm in own}) == 1
