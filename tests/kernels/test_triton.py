"""The Triton kernels against the formula in float64: values and all gradients.

On a GPU they run there. Elsewhere Triton's interpreter runs them, in a process that was started for it:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py`, as the first test does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skip_kernel_cases import EXTREMES, PRECISIONS, assert_are_formula, assert_equals_formula, random_leaves, results

from hf_rskip import RSkip, rskip_layer_norm
from hf_rskip.kernels import operators, rskip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
COMPILES = pytest.mark.skipif(
    not rskip.has_triton() or INTERPRETED, reason="needs the package triton, and not its interpreter"
)


@COMPILES
@pytest.mark.skipif(DEVICE == "cuda", reason="the tests below run here")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


def assert_on_device(leaves, upstream, recursions):
    if DEVICE == "cuda":
        return assert_equals_formula("triton", leaves, upstream, recursions, device=DEVICE)
    from hf_rskip.kernels import triton

    dtype = torch.promote_types(leaves[0].dtype, leaves[1].dtype)
    bias = torch.zeros_like(leaves[2]) if len(leaves) == 3 else leaves[3]
    given = *(leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves[:3]), bias
    y, stats = triton.forward(*given, len(leaves) == 4, 1e-5, dtype)
    gradient = upstream.reshape(y.shape)
    found = y, *triton.backward(gradient, *given, stats, len(leaves) == 4, 1e-5)[: len(leaves)]
    found = [value.view(shape) for value, shape in zip(found, (y.shape, *map(torch.Tensor.size, leaves)), strict=True)]
    # The interpreter cuts bfloat16 where a GPU rounds.
    assert_are_formula(found, leaves, upstream, ulps=1.0, recursions=recursions, affine="per_step")


@RUNS
@pytest.mark.parametrize(
    ("rows", "size", "recursions", "of_x", "of_branch"),
    [
        (300, 16, 2, "plain", "plain"),  # several blocks of rows a program
        (0, 16, 2, "plain", "plain"),
        (7, 33, 4, "plain", "plain"),
        (3, 257, 1, "offset", "large"),
        (2, 1000, 3, "one column", "small"),
        (5, 64, 3, "constant rows", "plain"),
        (3, 16, 8, "zero", "zero"),
    ],
)
def test_values_and_gradients(rows, size, recursions, of_x, of_branch):
    leaves, upstream = random_leaves((rows, size), recursions)
    leaves[0], leaves[1] = EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1])
    assert_on_device(leaves, upstream, recursions)


@RUNS
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
def test_low_and_mixed_precision(dtypes):
    """One rounding at the end, not one a step; the residual may stay in float32 beside a branch that is not."""
    assert_on_device(*random_leaves((3, 50), 3, dtypes=dtypes), 3)


@RUNS
def test_rms_norm():
    leaves, upstream = random_leaves((5, 40), 3)
    assert_on_device([leaves[0] + 1, *leaves[1:3]], upstream, 3)  # a mean that must stay


@COMPILES
def test_kernels_compile_for_gpus_without_spills():
    """For an H100, which need not be there; K = 4 needs more registers than less."""
    script = Path(__file__).parents[2] / "recipes" / "benchmarks" / "kernel_registers.py"
    command = [sys.executable, str(script), "--recursions", "4", "--sizes", "512", "--architectures", "90"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    head, *rows = (line.split() for line in result.stdout.splitlines()[:-1])
    assert [row[head.index("spills")] for row in rows] == ["0", "0"]


@pytest.mark.gpu
@GPU
def test_the_operator_is_one_of_torch():
    leaves, _ = random_leaves((9, 32), 2)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    found = torch.library.opcheck(operators.forward, (*leaves, True, 1e-5, torch.float32))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.gpu
@GPU
def test_autocast_gives_float32_as_layer_norm_does():
    leaves, _ = random_leaves((64, 512), 2, dtypes=(torch.float32, torch.bfloat16))
    x, branch, weight, bias = (leaf.to(DEVICE) for leaf in leaves)
    with torch.autocast("cuda", torch.bfloat16):
        for residual in (x, x.bfloat16()):
            for backend in ("triton", "reference"):
                y = rskip_layer_norm(residual, branch, weight, bias, backend=backend)
                assert y.dtype == torch.float32


@pytest.mark.gpu
@GPU
def test_cuda_graphs_capture_it():
    leaves, upstream = random_leaves((512, 512), 4)
    leaves, upstream = [leaf.to(DEVICE) for leaf in leaves], upstream.to(DEVICE)
    expected = results(rskip_layer_norm, leaves, upstream, 4, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(rskip_layer_norm, leaves, upstream, 4, backend="triton")
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@GPU
def test_rskip_takes_it_where_the_environment_says_so(monkeypatch):
    skip = RSkip(512, 4).to(DEVICE)
    x, branch = torch.randn(2, 2048, 512, device=DEVICE)
    monkeypatch.setenv("HF_RSKIP_TRITON", "1")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        skip(x, branch).sum().backward()
    launched = {event.key for event in profile.key_averages()}
    assert {"forward_kernel", "backward_kernel"} <= launched
