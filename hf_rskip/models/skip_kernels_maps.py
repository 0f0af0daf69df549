"""Recursive skip connections whose norms go over whole samples: K steps are K updates of a few numbers a channel.

With one mean and one standard deviation a sample, and gains and biases for each channel, every y_k is in each channel
of a sample a combination of s x and u = s x + F: a (s x - mean) + c (u - mean) + e, where e is the mean of y_k there.
What a step makes of a, c and e depends on five numbers for each channel and sample: the means of s x and u, their
variances and their covariance. One pass over the maps gives those, a second one the output, whatever K is; in the
backward pass one gives three sums, a second one the gradients. Kept are x, F and the five numbers.
"""

import torch

from .skip_kernels_autograd import _refuse_second_derivative


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
    y = RecomputedMapsRSkip.apply(x, branch, weight, bias, centred, eps, scale, dtype, dim, operators)
    return y.view(samples, *spatial, channels) if dim == 1 else y.view(samples, channels, *spatial).movedim(1, -1)


class RecomputedMapsRSkip(torch.autograd.Function):
    """The K steps over contiguous maps, `(samples, positions, channels)` or `(samples, channels, positions)`.

    `dim` is that of the positions; gain and bias are `(recursions, channels)`. `operators` has the four passes over the
    maps: this module, or another one with such functions.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, centred, eps, scale, dtype, dim, operators):
        moments = operators.moments(x, branch, scale, dim)
        state, _ = _chain(moments, weight, bias, centred, eps)
        ctx.save_for_backward(x, branch, weight, bias, moments)
        ctx.arguments = centred, eps, scale, dim, operators
        numbers = torch.cat([moments[:2], state.to(moments.dtype)])
        return operators.combine(x, branch, numbers, scale, dim, dtype)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_derivative()
        x, branch, weight, bias, moments = ctx.saved_tensors
        centred, eps, scale, dim, operators = ctx.arguments
        gradient = gradient.contiguous()
        sums = operators.gradient_sums(gradient, x, branch, moments, scale, dim).double()
        (a, c, _), steps = _chain(moments, weight, bias, centred, eps)
        of_means, of_variances, grad_weight, grad_bias = _chain_backward(sums, steps, weight, centred)
        # Of s x and u: what multiplies the gradient, s x - mean, u - mean and 1.
        by_xx, by_uu, by_xu = of_variances / x.shape[dim]
        mean_x, mean_u = (of_means - torch.stack([a, c]) * sums[2]) / x.shape[dim]
        of_x, of_u = torch.stack([a, 2 * by_xx, by_xu, mean_x]), torch.stack([c, by_xu, 2 * by_uu, mean_u])
        numbers = torch.cat([moments[:2], torch.cat([scale * (of_x + of_u), of_u]).to(moments.dtype)])
        grad_x, grad_branch = operators.combine_gradients(gradient, x, branch, numbers, scale, dim)
        return grad_x, grad_branch, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *[None] * 6


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
        rstd = torch.rsqrt((state * (moved + 1e-34 * state)).sum(0).mean(-1, keepdim=True) + eps)
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


def _scaled_and_sum(x, branch, scale):
    """s x and u, in float32 at least."""
    x = scale * x.to(torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32))
    return x, x + branch


class TensorOperators:
    """The four passes over maps in tensor operations; another backend has a class of its own with the same functions.

    Numbers of a sample and channel are `(n, samples, channels)`, and the first two are the means of s x and u.
    """

    @staticmethod
    def moments(x, branch, scale, dim):
        x, u = _scaled_and_sum(x, branch, scale)
        means = x.mean(dim), u.mean(dim)
        x, u = (values - mean.unsqueeze(dim) for values, mean in zip((x, u), means, strict=True))
        return torch.stack([*means, *((p * q).mean(dim) for p, q in ((x, x), (u, u), (x, u)))])

    @staticmethod
    def combine(x, branch, numbers, scale, dim, dtype):
        mean_x, mean_u, a, c, e = numbers.unsqueeze(dim + 1)
        x, u = _scaled_and_sum(x, branch, scale)
        return (a * (x - mean_x) + c * (u - mean_u) + e).to(dtype)

    @staticmethod
    def gradient_sums(gradient, x, branch, moments, scale, dim):
        mean_x, mean_u = moments[:2].unsqueeze(dim + 1)
        x, u = _scaled_and_sum(x, branch, scale)
        return torch.stack([(gradient * values).sum(dim) for values in (x - mean_x, u - mean_u, torch.ones_like(u))])

    @staticmethod
    def combine_gradients(gradient, x, branch, numbers, scale, dim):
        mean_x, mean_u, *factors = numbers.unsqueeze(dim + 1)
        dtypes = x.dtype, branch.dtype
        x, u = _scaled_and_sum(x, branch, scale)
        x, u = x - mean_x, u - mean_u
        of_x, of_branch = ((g * gradient + p * x + q * u + rest) for g, p, q, rest in (factors[:4], factors[4:]))
        return of_x.to(dtypes[0]), of_branch.to(dtypes[1])
