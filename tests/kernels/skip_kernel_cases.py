"""What the tests of the implementations of recursive skip connections share: inputs, and how near is equal."""

import torch
from torch.utils.checkpoint import checkpoint

from hf_rskip import rskip_layer_norm, rskip_rms_norm

PRECISIONS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]
EXTREMES = {
    "plain": lambda x: x,
    "large": lambda x: 1e4 * x,
    "offset": lambda x: 1e4 + x,
    "small": lambda x: 1e-4 * x,
    "denormal": lambda x: 1e-39 * x,
    "constant rows": lambda x: x[..., :1].expand(x.shape).contiguous(),
    "zero": lambda x: 0 * x,
    "one column": lambda x: torch.cat([1e3 + 1e3 * x[..., :1].abs(), 1e-3 * x[..., 1:]], -1),
}
UNIT = 2.0**-24
"""Relative rounding error of float32."""


def random_leaves(shape, recursions, affine="per_step", dtypes=(torch.float32,) * 2):
    """x, F, gains and biases, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, branch, upstream = torch.randn(3, *shape, generator=generator)
    affine_shape = (recursions, shape[-1]) if affine == "per_step" else shape[-1:]
    weight, bias = (torch.rand(affine_shape, generator=generator) + shift for shift in (0.5, -0.5))
    dtype = torch.promote_types(*dtypes)
    return [x.to(dtypes[0]), (0.3 + 2 * branch).to(dtypes[1]), weight, bias], upstream.to(dtype)


class Rounded(torch.autograd.Function):
    """A value off by a rounding error of random sign, and its gradient by another one."""

    @staticmethod
    def forward(ctx, value):
        return value * (1 + UNIT * _signs(value))

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + UNIT * _signs(gradient))


def _signs(like):
    return 2.0 * torch.randint_like(like, 2) - 1


def formula(x, branch, weight, bias, recursions, affine, eps=1e-5, rounded=lambda value: value, axes="channels"):
    """In float64; `rounded` is applied to every result of an operation, and to every term of a sum.

    Without a bias it is that of RMS norm.
    """
    size, y, dims = x.shape[-1], branch, normalized_dims(x, axes)
    for step in range(recursions):
        y = rounded(x + rounded(y))
        if bias is not None:
            y = rounded(y - rounded(rounded(y).mean(dims, keepdim=True)))
        variance = rounded(rounded(y * y).mean(dims, keepdim=True))
        y = rounded(y * rounded(torch.rsqrt(rounded(variance + eps))))
        if affine != "last" or step == recursions - 1:
            row = step if affine == "per_step" else 0
            y = rounded(y * rounded(weight.reshape(-1, size)[row]))
            if bias is not None:
                y = rounded(y + rounded(bias.reshape(-1, size)[row]))
    return rounded(y)


def normalized_dims(x, axes):
    return (-1,) if axes == "channels" else tuple(range(1, x.dim()))


def results(function, leaves, upstream, *args, **kwargs):
    """The value of `function` and its gradients under the gradient `upstream`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # keeps strides
    y = function(*leaves, *args, **kwargs)
    return y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def assert_are_formula(found, leaves, upstream, ulps=0.5, **arguments):
    """Value and gradients, up to four times what rounding each operation to float32 makes of the formula, and one
    rounding, `ulps` units, of the result to its precision.

    The first is the largest of eight draws, over what is normalised together; rows that are constant or have a large
    offset have more of it.
    """
    maps = normalized_dims(leaves[0], arguments.get("axes", "channels"))
    bias = [None] * (4 - len(leaves))

    def given(x, branch, *affine, **kwargs):
        return formula(x, branch, *affine, *bias, **kwargs)

    wide = [leaf.double() for leaf in leaves], upstream.double()
    expected = results(given, *wide, **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [results(given, *wide, **arguments, rounded=Rounded.apply) for _ in range(8)]
    dtypes = torch.promote_types(leaves[0].dtype, leaves[1].dtype), *(leaf.dtype for leaf in leaves)
    names = ("y", "grad_x", "grad_branch", "grad_weight", "grad_bias")[: len(dtypes)]
    for name, value, wanted, dtype, *off in zip(names, found, expected, dtypes, *draws, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        if not value.numel():
            continue
        dims = -1 if "weight" in name or "bias" in name else maps
        tolerance = 4 * torch.stack([(other - wanted).abs() for other in off]).amax(0).amax(dims, keepdim=True)
        if dtype != torch.float32:
            tolerance = tolerance + ulps * torch.finfo(dtype).eps * (wanted.abs() + tolerance)
        smallest = torch.finfo(torch.float32).tiny + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        excess = (value.double().cpu() - wanted).abs() / (tolerance + smallest)
        assert excess.max() <= 1, f"{name}: {excess.max():.2f} of what is allowed"  # fails for NaN


def assert_equals_formula(backend, leaves, upstream, recursions, affine="per_step", axes="channels", device="cpu"):
    """Of `rskip_layer_norm`, or without a bias of `rskip_rms_norm`; with the same bits in a second run."""
    function = rskip_layer_norm if len(leaves) == 4 else rskip_rms_norm
    arguments = {"recursions": recursions, "affine": affine, "axes": axes}
    given = [leaf.to(device) for leaf in leaves], upstream.to(device)
    found, again = (results(function, *given, backend=backend, **arguments) for _ in range(2))
    assert all(map(torch.equal, found, again)), "differs from run to run"
    assert_are_formula(found, leaves, upstream, **arguments)
    return found


def assert_second_derivatives(backend, leaves, upstream, recursions, affine, axes="channels"):
    """Of the squared length of the gradient: of x and F, and of all inputs."""

    def second(function, leaves, upstream, count, **kwargs):
        leaves = [leaf.detach().requires_grad_(index < count) for index, leaf in enumerate(leaves)]
        y = function(*leaves, recursions=recursions, affine=affine, axes=axes, **kwargs)
        first = torch.autograd.grad(y, leaves[:count], upstream, create_graph=True)
        length = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(length, leaves[:count], materialize_grads=True)

    for count in (2, 4):
        found = second(rskip_layer_norm, leaves, upstream, count, backend=backend)
        expected = second(formula, [leaf.double() for leaf in leaves], upstream.double(), count)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def assert_compile_and_checkpoint_see_through(backend, leaves, upstream, affine, axes="channels"):
    def call(*tensors):
        return rskip_layer_norm(*tensors, recursions=3, affine=affine, backend=backend, axes=axes)

    expected = results(call, leaves, upstream)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    checkpointed = results(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False), leaves, upstream)
    for found in (results(compiled, leaves, upstream), checkpointed):
        torch.testing.assert_close(found, expected)


def assert_gradients_are_the_same_alone(leaves, upstream, **arguments):
    y, *expected = results(rskip_layer_norm, leaves, upstream, **arguments)
    for index, leaf in enumerate(leaves):
        alone = [other.detach().requires_grad_(other is leaf) for other in leaves]
        (found,) = torch.autograd.grad(rskip_layer_norm(*alone, **arguments), alone[index], upstream)
        assert torch.equal(found, expected[index])
    with torch.inference_mode():
        assert torch.equal(rskip_layer_norm(*leaves, **arguments), y)


def assert_rskip_is_formula(skip, leaves, upstream, affine, axes):
    """With the gains and biases of `leaves`, and the same where a hook watches one of its norms."""
    names = ("weight", "bias")[: len(leaves) - 2]
    steps = [[getattr(step, name) for step in skip.norm if getattr(step, name) is not None] for name in names]
    for parameters, leaf in zip(steps, leaves[2:], strict=True):
        for parameter, values in zip(parameters, leaf.reshape(-1, leaf.shape[-1]), strict=True):
            parameter.data.copy_(values)

    def check():
        x, branch = (leaf.clone().requires_grad_() for leaf in leaves[:2])
        skip.zero_grad()
        y = skip(x, branch)
        y.backward(upstream)
        gradients = (torch.stack([parameter.grad for parameter in parameters]) for parameters in steps)
        gradients = (found.view(leaf.shape) for found, leaf in zip(gradients, leaves[2:], strict=True))
        found = y, x.grad, branch.grad, *gradients
        assert_are_formula(found, leaves, upstream, recursions=len(skip.norm), affine=affine, eps=1e-3, axes=axes)

    check()
    seen = []
    skip.norm[0].register_forward_hook(lambda module, args, output: seen.append(output))
    check()
    assert len(seen) == (len(skip.norm) if affine == "shared" else 1)
