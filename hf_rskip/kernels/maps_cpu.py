"""Recursive skip connections over whole maps as one operator for CPUs, which takes one sample after the other."""

import ctypes
import re

import torch

from .cpu import load
from .maps_cpu_source import SOURCE

_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file that came with a checkpoint has operators of its own


def _arguments(x, tensors, recursions, centred, eps, scale, dim):
    sizes = len(x), x.shape[dim], x.shape[3 - dim], recursions, dim == 2, centred
    return (
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * 2)(eps, scale),
        torch.get_num_threads(),
    )


@torch.library.custom_op(f"{_NAMESPACE}::rskip_over_maps", mutates_args=(), device_types="cpu")
def forward(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centred: bool,
    eps: float,
    scale: float,
    dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, dtype=dtype)
    moments = x.new_empty(len(x), 5, x.shape[3 - dim], dtype=torch.float32)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    library = load((x.dtype, branch.dtype, dtype), SOURCE)
    tensors = (x, branch, weight, bias, y, moments)
    library.rskip_maps_forward(*_arguments(x, tensors, len(weight), centred, eps, scale, dim))
    return y, moments


@forward.register_fake
def _(x, branch, weight, bias, centred, eps, scale, dim, dtype):
    moments = x.new_empty(x.shape[0], 5, x.shape[3 - dim], dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), moments


@torch.library.custom_op(f"{_NAMESPACE}::rskip_over_maps_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    moments: torch.Tensor,
    centred: bool,
    eps: float,
    scale: float,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    partial = x.new_empty(len(x), 2, *weight.shape, dtype=torch.float64)
    wide = weight.float().contiguous(), bias.float().contiguous()
    library = load((x.dtype, branch.dtype, gradient.dtype), SOURCE)
    tensors = (gradient, x, branch, *wide, moments, grad_x, grad_branch, partial)
    library.rskip_maps_backward(*_arguments(x, tensors, len(weight), centred, eps, scale, dim))
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


@backward.register_fake
def _(gradient, x, branch, weight, bias, moments, centred, eps, scale, dim):
    return tuple(map(torch.empty_like, (x, branch, weight, bias)))


OPERATORS = forward, backward
