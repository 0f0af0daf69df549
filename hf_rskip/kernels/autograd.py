"""The gradient of recursive skip connections without their intermediate values: they are computed again from x and F.

What is kept of a call is x, F and a few float32 numbers for each group of values that is normalised together:

- the chain: mean and 1 / std of each of the K steps, from which the backward pass rebuilds y_1 ... y_K;
- the closed form, where gain and bias come only at the last step: every y_k is a_k x + c_k u, where x and u = x + F are
  centred, so that K steps are K updates of two numbers, which depend on three: the variances of x and u and their
  covariance. One pass over the values gives those, a second one the output, whatever K is.
"""

import torch

from .dropout import keep_factors


def closed_form(
    v_xx: torch.Tensor, v_uu: torch.Tensor, v_xu: torch.Tensor, recursions: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """1 / sigma, a and c of y_K = (a x + c u) / sigma, and the derivatives of a and c with respect to the variances of
    x / sigma and u / sigma and their covariance.

    sigma is the larger of the standard deviations of x and u: the numbers stay small where both are (almost) constant,
    where each step multiplies by up to 1 / sqrt(eps). Rows of zeros would let a and c grow without end; a
    variance of 1e-58 ends that after some ten steps.
    """
    sigma = torch.maximum(v_xx, v_uu).clamp(min=1e-36).sqrt()
    over = 1 / sigma
    v_xx, v_uu, v_xu = (over * (over * v) for v in (v_xx, v_uu, v_xu))
    v_uu = v_uu.clamp(min=1e-22)
    a, c = torch.zeros_like(sigma), sigma
    da, dc = [torch.zeros_like(sigma)] * 3, [torch.zeros_like(sigma)] * 3
    for step in range(recursions):
        a = a + sigma if step else a
        variance = (a * a * v_xx + c * c * v_uu + 2 * a * c * v_xu).clamp(min=0)
        rstd = torch.rsqrt(variance + eps)
        by_a, by_c = 2 * (a * v_xx + c * v_xu), 2 * (c * v_uu + a * v_xu)
        direct = (a * a, c * c, 2 * a * c)
        drstd = [-0.5 * rstd**3 * (d + by_a * p + by_c * q) for d, p, q in zip(direct, da, dc, strict=True)]
        da = [p * rstd + a * d for p, d in zip(da, drstd, strict=True)]
        dc = [q * rstd + c * d for q, d in zip(dc, drstd, strict=True)]
        a, c = a * rstd, c * rstd
    return over, a, c, da, dc


def gradient_with_graph(function, inputs, gradient):
    """The gradients of `inputs` where they are differentiated again, by autograd through `function`; `None` for those
    that nobody asks for."""
    inputs = [tensor.view_as(tensor) for tensor in inputs]  # x and F may be one
    y, wanted = function(*inputs), [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient.to(y.dtype), create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


class RecomputedRSkip(torch.autograd.Function):
    """The K steps in tensor operations, on any device and in any precision.

    Statistics go over `dims`, and are those of RMS norm where `centred` is false; `seed` is that of the dropout of F.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, seed, recursions, closed, centred, eps, scale, dropout, dtype, dims):
        ctx.arguments = recursions, closed, centred, eps, scale, dropout, dims
        y, stats = _forward(x, branch, weight, bias, seed, *ctx.arguments)
        ctx.save_for_backward(x, branch, weight, bias, seed, *stats)
        return y.to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # only once: a checkpoint gives them no second time
        inputs, seed, stats = saved[:4], saved[4], saved[5:]
        if torch.is_grad_enabled():
            again = gradient_with_graph(lambda *given: _forward(*given, seed, *ctx.arguments)[0], inputs, gradient)
            return *again, *[None] * 9
        recursions, closed, centred, eps, scale, dropout, dims = ctx.arguments
        gradient, x, branch, weight, bias = _widened(gradient, *inputs)
        factors = keep_factors(seed, dropout, branch) if dropout else 1
        run = _closed_backward if closed else _chain_backward
        found = run(gradient, x, branch * factors, weight, bias, stats, recursions, centred, eps, scale, dims)
        found = found[0], found[1] * factors, *found[2:]
        return *(of.to(given.dtype) for of, given in zip(found, inputs, strict=True)), *[None] * 9


def _forward(x, branch, weight, bias, seed, recursions, closed, centred, eps, scale, dropout, dims):
    wide = _widened(x, branch, weight, bias)
    if dropout:
        wide[1] = wide[1] * keep_factors(seed, dropout, wide[1])
    run = _closed_forward if closed else _chain_forward
    return run(*wide, recursions, centred, eps, scale, dims)


def _widened(*tensors):
    """In float32 at least."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _affine_of(step, weight, bias):
    """Gain and bias of a step; there is one row of them for each step, or one for all."""
    row = step if len(weight) > 1 else 0
    return weight[row], bias[row]


def _sum_of_rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).sum(0)


def _mean(tensor, centred, dims):
    return tensor.mean(dims, keepdim=True) if centred else tensor.new_zeros(())


def _chain_forward(x, branch, weight, bias, recursions, centred, eps, scale, dims):
    x = scale * x
    y, stats = branch, []
    for step in range(recursions):
        y = x + y
        mean = _mean(y, centred, dims)
        rstd = torch.rsqrt((y - mean).square().mean(dims, keepdim=True) + eps)
        gain, shift = _affine_of(step, weight, bias)
        y = (y - mean) * rstd * gain + shift
        stats += [mean, rstd]
    return y, stats


def _chain_backward(gradient, x, branch, weight, bias, stats, recursions, centred, eps, scale, dims):
    x = scale * x
    y, normalized = branch, []
    for step in range(recursions):
        gain, shift = _affine_of(step, weight, bias)
        normalized.append((x + y - stats[2 * step]) * stats[2 * step + 1])
        y = normalized[-1] * gain + shift
    grad_x, grad_weight, grad_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for step in reversed(range(recursions)):
        y, row = normalized.pop(), step if len(weight) > 1 else 0
        grad_weight[row] += _sum_of_rows(gradient * y)
        grad_bias[row] += _sum_of_rows(gradient)
        gradient = gradient * weight[row]
        of_mean, of_std = _mean(gradient, centred, dims), (gradient * y).mean(dims, keepdim=True)
        gradient = stats[2 * step + 1] * (gradient - of_mean - y * of_std)
        grad_x = grad_x + gradient
    return scale * grad_x, gradient, grad_weight, grad_bias


def _centred_pair(x, branch, scale, mean_x, mean_u):
    x = scale * x
    return x - mean_x, x + branch - mean_u


def _closed_forward(x, branch, weight, bias, recursions, centred, eps, scale, dims):
    mean_x, mean_u = scale * _mean(x, centred, dims), _mean(scale * x + branch, centred, dims)
    x, u = _centred_pair(x, branch, scale, mean_x, mean_u)
    v_xx, v_uu, v_xu = ((p * q).mean(dims, keepdim=True) for p, q in ((x, x), (u, u), (x, u)))
    rounding = (2 * torch.finfo(x.dtype).eps) ** 2  # what it leaves of a row that is constant
    v_xx, v_uu = torch.maximum(v_xx, rounding * mean_x**2), torch.maximum(v_uu, rounding * mean_u**2)
    over, a, c, _, _ = closed_form(v_xx, v_uu, v_xu, recursions, eps)
    return (a * (over * x) + c * (over * u)) * weight[0] + bias[0], [mean_x, mean_u, v_xx, v_uu, v_xu]


def _closed_backward(gradient, x, branch, weight, bias, stats, recursions, centred, eps, scale, dims):
    over, a, c, da, dc = closed_form(*stats[2:], recursions, eps)
    x, u = (over * of for of in _centred_pair(x, branch, scale, *stats[:2]))
    grad_weight, grad_bias = _sum_of_rows(gradient * (a * x + c * u)), _sum_of_rows(gradient)
    gradient = gradient * weight[0]
    along_x, along_u = (gradient * x).mean(dims, keepdim=True), (gradient * u).mean(dims, keepdim=True)
    by_xx, by_uu, by_xu = (along_x * p + along_u * q for p, q in zip(da, dc, strict=True))
    gradient = gradient - _mean(gradient, centred, dims)
    grad_u = over * (c * gradient + 2 * by_uu * u + by_xu * x)
    grad_x = over * (a * gradient + 2 * by_xx * x + by_xu * u) + grad_u
    return scale * grad_x, grad_u, grad_weight[None], grad_bias[None]


def register_recomputation(forward_op, backward_op) -> None:
    """Gives the operator `forward_op` its gradient.

    `forward_op(x, branch, weight, bias, seed, recursions, closed, centred, eps, scale, dropout, dtype)` returns y and
    the statistics, and `backward_op(gradient, x, branch, weight, bias, stats, seed, recursions, closed, centred, eps,
    scale, dropout)` the gradients of x, F, weight and bias. x and F are `(rows, size)`, weight and bias
    `(1 or recursions, size)`; the seed is an int64 tensor `()`, or `None` without dropout.
    """

    def setup_context(ctx, inputs, output):
        *tensors, seed, recursions, closed, centred, eps, scale, dropout, _ = inputs
        ctx.save_for_backward(*tensors, output[1], seed)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.arguments = recursions, closed, centred, eps, scale, dropout

    def backward(ctx, gradient, _):
        if gradient is None:
            return (None,) * 12
        *inputs, stats, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            arguments = seed, *ctx.arguments, (-1,)
            again = gradient_with_graph(lambda *given: _forward(*given, *arguments)[0], inputs, gradient)
            return *again, *[None] * 8
        return *backward_op(gradient, *inputs, stats, seed, *ctx.arguments), *[None] * 8

    forward_op.register_autograd(backward, setup_context=setup_context)
