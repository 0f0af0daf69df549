"""The Triton kernels of recursive skip connections against the formula in float64: values and all gradients.

On a GPU they run there. Elsewhere Triton's interpreter runs them, which it does in a process that was started for it:
`TRITON_INTERPRET=1 pytest tests/models/test_skip_kernels_triton.py`, as the first test does.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_rskip.models import skip_kernels
from hf_rskip.models.skip_connections import rskip_layer_norm

AFFINES = ("per_step", "shared", "last")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
UNIT = 2.0**-24  # relative rounding error of float32


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
@pytest.mark.skipif(not skip_kernels.has_triton(), reason="needs the package triton")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


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


def formula(x, branch, weight, bias, recursions, affine, scale=1.0, eps=1e-5, rounded=lambda value: value):
    """In float64; `rounded` is applied to every result of an operation, and to every term of a sum."""
    size, y = x.shape[-1], branch
    for step in range(recursions):
        y = rounded(rounded(scale * x) + rounded(y))
        y = rounded(y - rounded(rounded(y).mean(-1, keepdim=True)))
        variance = rounded(rounded(y * y).mean(-1, keepdim=True))
        y = rounded(y * rounded(torch.rsqrt(rounded(variance + eps))))
        if affine != "last" or step == recursions - 1:
            row = step if affine == "per_step" else 0
            y = rounded(rounded(y * rounded(weight.reshape(-1, size)[row])) + rounded(bias.reshape(-1, size)[row]))
    return rounded(y)


def results(function, leaves, upstream, **kwargs):
    """The value of `function` and its gradients under a random upstream gradient."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # keeps strides
    y = function(*leaves, **kwargs)
    return y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


NAMES = ("y", "grad_x", "grad_branch", "grad_weight", "grad_bias")


def excess_over_roundings(leaves, upstream, found, draws=8, **arguments):
    """By how many of the errors that roundings make, in the worst of some draws, each result is off; by row."""
    wide, upstream = [leaf.double() for leaf in leaves], upstream.double()
    expected = results(formula, wide, upstream, **arguments)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    off = [results(formula, wide, upstream, rounded=Rounded.apply, **arguments) for _ in range(draws)]
    torch.random.set_rng_state(generator_state)
    ratios = {}
    for index, name in enumerate(NAMES):
        dtype, wanted = found[index].dtype, expected[index]
        if not wanted.numel():
            continue
        errors = torch.stack([(other[index] - wanted).abs() for other in off]).amax(0)
        errors = errors.amax(-1, keepdim=True)
        last = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
        tiny = torch.finfo(torch.float32).tiny + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        excess = (found[index].double() - wanted).abs() - last * wanted.abs() - tiny
        ratios[name] = (excess / (errors * (1+last/UNIT*0) + 1e-300)).max().item()
    return ratios
