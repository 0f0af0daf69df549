"""Recursive skip connections whose norms go over whole samples: K steps are K updates of a few numbers a channel.

With one mean and one standard deviation a sample, and gains and biases for each channel, every y_k is in each channel
of a sample a combination of x and u = x + F: a (x - mean) + c (u - mean) + e, where e is the mean of y_k there.
What a step makes of a, c and e depends on five numbers for each channel and sample: the means of x and u, their
variances and their covariance. One pass over the maps gives those, a second one the output, whatever K is; in the
backward pass one gives three sums, a second one the gradients. Kept are x, F and the five numbers.
"""

import torch

from .operators import gradients_with_graph


def closed_form_over_maps(x, branch, weight, bias, centred, eps, dtype):
    """The K steps over `(samples, ..., channels)` in tensor operations, on any device and in any precision.

    Gains and biases are `(K, channels)`. y has precision `dtype`; y and the gradients lie in memory as x does.
    """
    dim = 1 if x.is_contiguous() else 2
    y = _ClosedForm.apply(x, branch, weight, bias, centred, eps, dtype, dim)
    # A view made in `apply` could not be modified in place.
    return _unflat(y, x.shape, dim)


class _ClosedForm(torch.autograd.Function):
    """The steps, with y as [`_flat`] makes it."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, centred, eps, dtype, dim):
        ctx.centred, ctx.eps, ctx.dim = centred, eps, dim
        moments, of_x, of_u = _centred_pair(x, branch, dim)
        variances = ((p * q).mean(dim) for p, q in ((of_x, of_x), (of_u, of_u), (of_x, of_u)))
        moments = torch.stack([*moments, *variances])
        ctx.save_for_backward(x, branch, weight, bias, moments)
        state, _ = _chain(moments, weight, bias, centred, eps)
        return _combined(state.to(of_x.dtype), (of_x, of_u), dim).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        *inputs, moments = ctx.saved_tensors  # read once: a checkpoint gives them no second time
        (x, branch, weight, bias), dim = inputs, ctx.dim
        if torch.is_grad_enabled():
            gradient = _unflat(gradient, x.shape, dim)
            return *gradients_with_graph(inputs, gradient, ctx.centred, ctx.eps, "sample"), *[None] * 4
        _, of_x, of_u = _centred_pair(x, branch, dim, moments[:2])
        up = gradient.contiguous().to(of_x.dtype)
        positions = up.shape[dim]
        sums = torch.stack([(up * of_x).sum(dim), (up * of_u).sum(dim), up.sum(dim)]).double()
        (a, c, _), steps = _chain(moments, weight, bias, ctx.centred, ctx.eps)
        by_means, by_variances, grad_weight, grad_bias = _chain_backward(sums, steps, weight, ctx.centred)
        (by_x, by_u), (by_xx, by_uu, by_xu) = by_means / positions, by_variances / positions
        up_mean = sums[2] / positions

        def combined(factor, along_x, along_u, rest):
            numbers = torch.stack([factor, along_x, along_u, rest - factor * up_mean]).to(up.dtype)
            return _combined(numbers, (up, of_x, of_u), dim)

        grad_u = combined(c, by_xu, 2 * by_uu, by_u)
        grad_x = combined(a, 2 * by_xx, by_xu, by_x).add_(grad_u)
        maps = (_unflat(found.to(given.dtype), x.shape, dim) for found, given in ((grad_x, x), (grad_u, branch)))
        return *maps, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *[None] * 4


def _flat(maps, dim):
    """Contiguous, `(samples, positions, channels)` for dim 1 and `(samples, channels, positions)` for dim 2: `dim` is
    that of the positions."""
    samples, *_, channels = maps.shape
    positions = maps.shape[1:-1].numel()
    if dim == 1:
        return maps.reshape(samples, positions, channels).contiguous()
    return maps.movedim(-1, 1).reshape(samples, channels, positions).contiguous()


def _unflat(flat, shape, dim):
    samples, *spatial, channels = shape
    return flat.view(shape) if dim == 1 else flat.view(samples, channels, *spatial).movedim(1, -1)


def _centred_pair(x, branch, dim, means=None):
    """The means over positions of x and u, and x and u less these, in float32 at least."""
    x, branch = _flat(x, dim), _flat(branch, dim)
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32))
    u = x + branch
    means = (x.mean(dim), u.mean(dim)) if means is None else means
    return means, x - means[0].unsqueeze(dim), u.sub_(means[1].unsqueeze(dim))


def _combined(numbers, maps, dim):
    """The sum of `maps`, each times its own number of each channel and sample, and of the last such number."""
    *factors, rest = numbers.unsqueeze(dim + 1)
    total = torch.addcmul(rest, factors[0], maps[0])
    for factor, values in zip(factors[1:], maps[1:], strict=True):
        total.addcmul_(factor, values)
    return total


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
