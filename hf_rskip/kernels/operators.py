"""The K steps over rows as operators of torch, one a direction, for CPUs.

Kept for the backward pass are x, F and 2 K + 2 float32 numbers a row, from which it rebuilds y_1 ... y_K. x and F are
`(rows, size)`, gains and biases `(K, size)`, all contiguous; `dtype` is the precision of y.
"""

import ctypes

import torch

from .cpu import load
from .reference import reference


def _arguments(tensors, sizes, eps):
    """The arguments of a function of `rskip.cpp`; `tensors` must live until it returns."""
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    return *pointers, (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_double(eps), torch.get_num_threads()


@torch.library.custom_op("hf_rskip::rskip", mutates_args=(), device_types="cpu")
def forward(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centred: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the statistics of each row; `centred` is false for RMS normalisation."""
    y, stats = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 2 * len(weight) + 2, dtype=torch.float32)
    tensors = x, branch, weight.float(), bias.float(), y, stats
    load((x.dtype, branch.dtype, dtype)).rskip_forward(*_arguments(tensors, (*x.shape, len(weight), centred), eps))
    return y, stats


@forward.register_fake
def _(x, branch, weight, bias, centred, eps, dtype):
    stats = x.new_empty(x.shape[0], 2 * weight.shape[0] + 2, dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), stats


@torch.library.custom_op("hf_rskip::rskip_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
    centred: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, F, gains and biases."""
    (rows, size), grad_x, grad_branch = x.shape, torch.empty_like(x), torch.empty_like(branch)
    chunks = min(64, -(-rows // (64 if size <= 8192 else 16)))
    partial = torch.empty(chunks, 2, *weight.shape, dtype=torch.float64)
    tensors = gradient.contiguous(), x, branch, weight.float(), bias.float(), stats, grad_x, grad_branch, partial
    sizes = rows, size, len(weight), centred, chunks
    load((x.dtype, branch.dtype, gradient.dtype)).rskip_backward(*_arguments(tensors, sizes, eps))
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


@backward.register_fake
def _(gradient, x, branch, weight, bias, stats, centred, eps):
    return tuple(map(torch.empty_like, (x, branch, weight, bias)))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.centred, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, _):
    if gradient is None:
        return (None,) * 7
    *inputs, stats = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = gradients_with_graph(inputs, gradient, ctx.centred, ctx.eps)
    else:
        gradients = backward(gradient, *inputs, stats, ctx.centred, ctx.eps)
    return *gradients, None, None, None


forward.register_autograd(_differentiate, setup_context=_setup_context)


def gradients_with_graph(inputs, gradient, centred, eps, axes="channels"):
    """The gradients of `inputs` (x, F, gains, biases) by autograd through the formula, so that they can be
    differentiated again; `None` for those that are not required."""
    inputs = [tensor.view_as(tensor) for tensor in inputs]  # x and F may be one tensor
    x, branch, weight, bias = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in inputs)
    y = reference(x, branch, weight.unbind(), bias.unbind(), centred, eps, axes)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient.to(y.dtype), create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
