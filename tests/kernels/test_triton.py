"""The Triton kernels of recursive skip connections against the formula in float64: values and all gradients.

On a GPU they run there. Elsewhere Triton's interpreter runs them, which it does in a process that was started for it:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py`, as the first test does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skip_kernel_cases import (
    AFFINES,
    EXTREMES,
    INTERPRETED,
    PRECISIONS,
    assert_equals_formula,
    random_leaves,
    results,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition

from hf_rskip import RSkip, rskip_layer_norm
from hf_rskip.kernels import rskip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def assert_on_device(*args, **kwargs):
    assert_equals_formula("triton", *args, device=DEVICE, **kwargs)


@pytest.fixture(autouse=True)
def nan_in_empty_memory():
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@RUNS
@settings(deadline=None, max_examples=10 if INTERPRETED else 20, derandomize=True, database=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    size=st.one_of(st.integers(4, 40), st.sampled_from([64, 100, 128, 257, 512, 1000])),
    recursions=st.sampled_from([1, 2, 3, 4, 8]),
    affine=st.sampled_from(AFFINES),
    of_x=st.sampled_from(sorted(EXTREMES)),
    of_branch=st.sampled_from(sorted(EXTREMES)),
    scale=st.sampled_from([1.0, 2.414, -0.5]),
)
@example([300], 16, 2, "per_step", "plain", "plain", 1.0)  # several blocks of rows a program
@example([70], 24, 3, "last", "plain", "plain", 1.0)
@example([2], 8192, 2, "per_step", "one column", "plain", 1.0)
@example([5], 512, 3, "last", "constant rows", "plain", 1.0)
@example([3], 16, 6, "last", "zero", "denormal", 1.0)
@example([3], 16, 8, "last", "zero", "tiny", 1.0)
@example([3], 16, 8, "last", "zero", "zero", 1.0)
@example([3], 16, 8, "per_step", "zero", "zero", 1.0)
def test_values_and_gradients(leading, size, recursions, affine, of_x, of_branch, scale):
    leaves, upstream = random_leaves((*leading, size), recursions, affine)
    leaves[0], leaves[1] = EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1])
    assert_on_device(leaves, upstream, recursions, affine, scale)


@RUNS
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
def test_low_and_mixed_precision(affine, dtypes):
    """One rounding at the end, not one a step; the residual may stay in float32 beside a branch that is not."""
    for shape, recursions in (((7, 50), 1), ((3, 256), 4)):
        leaves, upstream = random_leaves(shape, recursions, affine, dtypes)
        assert_on_device(leaves, upstream, recursions, affine)


@RUNS
@pytest.mark.parametrize("affine", AFFINES)
def test_dropout_is_that_of_the_seed(affine):
    leaves, upstream = random_leaves((5, 40), 3, affine)
    for seed in (0, -(2**62) - 12345):
        seed = torch.tensor(seed, device=DEVICE)
        assert_on_device(leaves, upstream, 3, affine, scale=2.414, dropout=0.3, seed=seed)


@RUNS
@pytest.mark.parametrize("affine", AFFINES)
def test_rms_norm(affine):
    leaves, upstream = random_leaves((5, 40), 3, affine)
    assert_on_device([leaves[0] + 1, *leaves[1:3]], upstream, 3, affine, 2.414)  # a mean that must stay


@RUNS
def test_rows_of_zeros_at_any_depth():
    leaves, upstream = random_leaves((2, 32), 1, "last")
    leaves[:2] = torch.zeros(2, 2, 32)
    leaves, upstream = [leaf.to(DEVICE) for leaf in leaves], upstream.to(DEVICE)
    y, *gradients = results(rskip_layer_norm, leaves, upstream, recursions=50, affine="last", backend="triton")
    assert torch.equal(y, leaves[3].expand(2, 32)) and all(gradient.isfinite().all() for gradient in gradients)


@RUNS
def test_any_strides():
    leaves, upstream = random_leaves((6, 5, 48), 3, "per_step")
    leaves, upstream = [leaf.to(DEVICE) for leaf in leaves], upstream.to(DEVICE)
    arguments = {"recursions": 3, "backend": "triton"}
    expected = results(rskip_layer_norm, leaves, upstream, **arguments)
    strided = [
        leaves[0].transpose(0, 1).contiguous().transpose(0, 1),
        leaves[1].repeat_interleave(2, -1)[..., ::2],
        *(leaf.mT.contiguous().mT if leaf.dim() > 1 else leaf for leaf in leaves[2:]),
    ]
    for gradient in (upstream, upstream.mT.contiguous().mT):
        found = results(rskip_layer_norm, strided, gradient, **arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expanded = torch.ones((), device=DEVICE).expand(6, 5, 48)  # as in the backward pass of `sum`
    found = results(rskip_layer_norm, leaves, expanded, **arguments)
    torch.testing.assert_close(found, results(rskip_layer_norm, leaves, expanded.clone(), **arguments), rtol=0, atol=0)


@COMPILES
@pytest.mark.parametrize("affine", ["per_step", "last"])
def test_tracing_sees_the_kernels(affine, monkeypatch):
    """Without a graph break, and with the kernels themselves in the graph, beside which a compiler puts its own."""
    monkeypatch.setattr(rskip, "_device_of", torch.compiler.assume_constant_result(lambda backend: "cpu"))
    leaves, _ = random_leaves((9, 32), 2, affine)

    def call(*tensors):
        return rskip_layer_norm(*tensors, recursions=2, affine=affine, dropout=0.1, backend="triton")

    joint = []

    def partition(graph, inputs, **options):
        joint.append(graph.graph)
        return default_partition(graph, inputs, **options)

    def no_device(graph, inputs):
        return lambda *inputs: pytest.skip("compiled, but there is nothing to run it on")

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=no_device, partition_fn=partition)
    with pytest.raises(pytest.skip.Exception):
        torch.compile(call, backend=backend, fullgraph=True)(*(leaf.requires_grad_() for leaf in leaves))
    assert len(joint) == 1
    kernels = [node for node in joint[0].nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(kernels) == (3 if affine == "last" else 2)


@COMPILES
def test_an_exported_program_has_no_kernel():
    x, branch = torch.randn(2, 2048, 512)
    program = torch.export.export(RSkip(512, 2), (x, branch))
    assert not [node for node in program.graph.nodes if "rskip" in str(node.target) or "triton" in str(node.target)]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("affine", ["per_step", "last"])
def test_inductor_compiles_it_whole(affine):
    leaves, upstream = random_leaves((64, 512), 4, affine)
    leaves, upstream = [leaf.to(DEVICE) for leaf in leaves], upstream.to(DEVICE)

    def call(*tensors):
        return rskip_layer_norm(*tensors, recursions=4, affine=affine, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(results(compiled, leaves, upstream), results(call, leaves, upstream))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("closed", [False, True])
def test_the_operator_is_one_of_torch(closed):
    from hf_rskip.kernels import triton as triton_kernels

    leaves, _ = random_leaves((9, 32), 2, "last" if closed else "per_step")
    leaves = [leaf.to(DEVICE) for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in (*leaves[:2], *(leaf.reshape(-1, 32) for leaf in leaves[2:]))]
    arguments = (*leaves, torch.tensor(7, device=DEVICE), 2, closed, True, 1e-5, 1.0, 0.1, torch.float32)
    assert set(torch.library.opcheck(triton_kernels.rskip_layer_norm, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
@GPU
def test_autocast_gives_float32_as_layer_norm_does():
    leaves, _ = random_leaves((64, 512), 2, "per_step", (torch.float32, torch.bfloat16))
    x, branch, weight, bias = (leaf.to(DEVICE) for leaf in leaves)
    with torch.autocast("cuda", torch.bfloat16):
        for residual in (x, x.bfloat16()):
            for backend in ("triton", "reference"):
                y = rskip_layer_norm(residual, branch, weight, bias, backend=backend)
                assert y.dtype == torch.float32


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("affine", ["per_step", "last"])
def test_cuda_graphs_capture_it(affine):
    """Nothing in it waits for the device, and a replayed graph draws new dropout."""
    leaves, upstream = random_leaves((512, 512), 4, affine)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    upstream = upstream.to(DEVICE)

    def step(**more):
        y = rskip_layer_norm(*leaves, recursions=4, affine=affine, backend="triton", **more)
        return y, *torch.autograd.grad(y, leaves, upstream)

    expected = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(dropout=0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, dropped = step(), step(dropout=0.5)[0]
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    before = dropped.clone()
    graph.replay()
    assert not torch.equal(dropped, before)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shape", [(8192, 512), (8192, 1024)])
@pytest.mark.parametrize("affine", ["per_step", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_the_benchmark(shape, affine, dtype):
    leaves, upstream = random_leaves(shape, 4, affine, (dtype, dtype))
    assert_on_device(leaves, upstream, 4, affine)


@pytest.mark.gpu
@GPU
def test_rskip_takes_it_in_a_model():
    skip = RSkip(512, 4).to(DEVICE)
    x, branch = torch.randn(2, 2048, 512, device=DEVICE)
    assert rskip.choose_backend(x, branch, 4, "per_step") == "triton"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        skip(x, branch).sum().backward()
    launched = {event.key for event in profile.key_averages()}
    assert {"forward_kernel", "backward_kernel"} <= launched


@COMPILES
def test_kernels_compile_for_gpus_without_spills():
    """For an A100 and an H100, which need not be there; K = 4 needs more registers than less, and than `last`."""
    script = Path(__file__).parents[2] / "recipes" / "benchmarks" / "kernel_registers.py"

    def compiled(*arguments):
        command = [sys.executable, str(script), "--maps", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        head, *rows = (line.split() for line in result.stdout.splitlines()[:-1])
        return [dict(zip(head, row, strict=True)) for row in rows]

    rows = compiled("--recursions", "4", "--affines", "per_step")
    assert len(rows) == 2 * 2 * 2
    rows += compiled("--recursions", "4", "--affines", "last", "--sizes", "1024", "--architectures", "90", "--dropout")
    assert {row["spills"] for row in rows} == {"0"}, rows
