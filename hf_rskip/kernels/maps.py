"""Recursive skip connections whose norms go over whole samples: K steps are K updates of a few numbers a channel.

With one mean and one standard deviation a sample, and gains and biases for each channel, every y_k is in each channel
of a sample a combination of s x and u = s x + F: a (s x - mean) + c (u - mean) + e, where e is the mean of y_k there.
What a step makes of a, c and e depends on five numbers for each channel and sample: the means of s x and u, their
variances and their covariance. One pass over the maps gives those, a second one the output, whatever K is; in the
backward pass one gives three sums, a second one the gradients. Kept are x, F and the five numbers.
"""

import torch

from .autograd import gradient_with_graph


def rskip_over_maps(x, branch, weight, bias, recursions, affine, centred, eps, scale, dtype, operators):
    """The K steps over `(samples, ..., channels)`; gain and bias are `(rows, channels)`, one row for each step that has
    its own. The layout of x in memory becomes that of y and of the gradients.
    """
    if affine == "shared":
        weight, bias = weight.expand(recursions, -1), bias.expand(recursions, -1)
    elif affine == "last":
        ones = torch.ones_like(weight).expand(recursions - 1, -1)
        weight, bias = torch.cat([ones, weight]), torch.cat([torch.zeros_like(ones), bias])
    samples, *spatial, channels = x.shape
    positions = x.shape[1:-1].numel()
    if x.is_contiguous():
        dim = 1
        x, branch = (tensor.reshape(samples, positions, channels).contiguous() for tensor in (x, branch))
    else:
        dim = 2
        x, branch = (tensor.movedim(-1, 1).reshape(samples, channels, positions).contiguous() for tensor in (x, branch))
    y = RecomputedMapsRSkip.apply(x, branch, weight, bias, centred, eps, scale, dim, dtype, operators)
    return y.view(samples, *spatial, channels) if dim == 1 else y.view(samples, channels, *spatial).movedim(1, -1)


class RecomputedMapsRSkip(torch.autograd.Function):
    """The K steps over contiguous maps, `(samples, positions, channels)` or `(samples, channels, positions)`, by two
    functions: [`OPERATORS`] or others that do the same.

    `dim` is that of the positions; gain and bias are `(recursions, channels)`.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, centred, eps, scale, dim, dtype, operators):
        y, moments = operators[0](x, branch, weight, bias, centred, eps, scale, dim, dtype)
        ctx.save_for_backward(x, branch, weight, bias, moments)
        ctx.arguments = centred, eps, scale, dim
        ctx.operator = operators[1]
        return y

    @staticmethod
    def backward(ctx, gradient):
        *inputs, moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated again
            arguments = *ctx.arguments, gradient.dtype
            gradients = gradient_with_graph(lambda *given: forward(*given, *arguments)[0], inputs, gradient)
        else:
            gradients = ctx.operator(gradient.contiguous(), *inputs, moments, *ctx.arguments)
        return *gradients, *[None] * 6


def forward(x, branch, weight, bias, centred, eps, scale, dim, dtype):
    """y and the moments of each channel and sample."""
    x, u = _scaled_and_sum(x, branch, scale)
    means = x.mean(dim), u.mean(dim)
    x, u = (values - mean.unsqueeze(dim) for values, mean in zip((x, u), means, strict=True))
    moments = torch.stack([*means, *((p * q).mean(dim) for p, q in ((x, x), (u, u), (x, u)))])
    state, _ = _chain(moments, weight, bias, centred, eps)
    a, c, e = state.to(x.dtype).unsqueeze(dim + 1)
    return (a * x + c * u + e).to(dtype), moments


def backward(gradient, x, branch, weight, bias, moments, centred, eps, scale, dim):
    """The gradients of x, F, gains and biases."""
    dtypes, positions = [tensor.dtype for tensor in (x, branch, weight, bias)], x.shape[dim]
    x, u = _scaled_and_sum(x, branch, scale)
    mean_x, mean_u = moments[:2].unsqueeze(dim + 1)
    x, u = x - mean_x, u - mean_u
    gradient = gradient.to(x.dtype)
    sums = torch.stack([(gradient * x).sum(dim), (gradient * u).sum(dim), gradient.sum(dim)]).double()
    (a, c, _), steps = _chain(moments, weight, bias, centred, eps)
    of_means, of_variances, grad_weight, grad_bias = _chain_backward(sums, steps, weight, centred)
    (of_x, of_u), (by_xx, by_uu, by_xu) = of_means / positions, of_variances / positions
    gradient = gradient - (sums[2] / positions).to(x.dtype).unsqueeze(dim)

    def combined(*numbers):
        up, along_x, along_u, rest = torch.stack(numbers).to(x.dtype).unsqueeze(dim + 1)
        return up * gradient + along_x * x + along_u * u + rest

    of_x, of_u = combined(a, 2 * by_xx, by_xu, of_x), combined(c, by_xu, 2 * by_uu, of_u)
    found = scale * (of_x + of_u), of_u, grad_weight, grad_bias
    return tuple(gradient.to(dtype) for gradient, dtype in zip(found, dtypes, strict=True))


OPERATORS = forward, backward
"""The K steps over contiguous maps and their gradient, in tensor operations; other modules have those of a device."""


def _scaled_and_sum(x, branch, scale):
    """s x and u, in float32 at least."""
    x = scale * x.to(torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32))
    return x, x + branch


def _chain(moments, weight, bias, centred, eps):
    """a, c and e of y_K, `(3, samples, channels)`, and for each step those of what is normalised, their products with
    the second moments, and 1 / std.

    In float64: in a sample of zeros each step multiplies a and c by 1 / sqrt(eps), until a variance of 1e-34 ends it.
    """
    mean_x, mean_u, xx, uu, xu = moments.double()
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    products = torch.stack([xx, xu, zero, xu, uu, zero, zero, zero, one]).unflatten(0, (3, 3))
    of_x, state = torch.stack([one, zero, mean_x]), torch.stack([zero, one, mean_u])
    steps = []
    for gain, shift in zip(weight.double(), bias.double(), strict=True):
        if steps:
            state = state + of_x
        if centred:
            state[2] -= state[2].mean(-1, keepdim=True)
        moved = (products * state).sum(1)
        variance = (state * (moved + 1e-34 * state)).sum(0).mean(-1, keepdim=True)
        rstd = torch.rsqrt(variance.clamp(min=0) + eps)
        state, moved = rstd * state, rstd * moved
        steps.append((state, moved, rstd))
        state = gain * state
        state[2] += shift
    return state, steps


def _chain_backward(gradient, steps, weight, centred):
    """The gradients of the two means, of the variances and the covariance, and of gains and biases."""
    of_means, of_variances = torch.zeros_like(gradient[:2]), torch.zeros_like(gradient)
    grad_weight, grad_bias = [], []
    for step, (state, moved, rstd) in reversed(list(enumerate(steps))):
        grad_weight.insert(0, (gradient * state).sum((0, 1)))
        grad_bias.insert(0, gradient[2].sum(0))
        gradient = weight[step].double() * gradient
        of_std = (gradient * state).sum(0).mean(-1, keepdim=True)
        a, c, _ = state
        of_variances -= of_std * torch.stack([a * a / 2, c * c / 2, a * c])
        gradient = rstd * (gradient - of_std * moved)
        if centred:
            gradient[2] -= gradient[2].mean(-1, keepdim=True)
        of_means[0 if step else 1] += gradient[2]
    return of_means, of_variances, torch.stack(grad_weight), torch.stack(grad_bias)
