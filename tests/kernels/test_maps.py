"""Recursive skip connections over whole feature maps against the formula in float64: values and all gradients.

The Triton kernels run on a GPU, or elsewhere in Triton's interpreter, in a process that was started for it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skip_kernel_cases import (
    AFFINES,
    EXTREMES,
    INTERPRETED,
    PRECISIONS,
    assert_are_formula,
    assert_equals_formula,
    assert_second_derivatives,
    random_leaves,
    results,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch.utils.checkpoint import checkpoint

from hf_rskip import RSkip, RSkipResNetConfig, RSkipResNetForImageClassification, rskip_layer_norm
from hf_rskip.kernels import hook, maps_cpu, rskip
from hf_rskip.models import skip_norms

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(
        not rskip.has_cpp(torch.float32, torch.float32, "sample"), reason="no C++ compiler builds the operator"
    ),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter"),
)
ON_CPU = pytest.mark.parametrize("backend", ["recompute", CPP])
BACKENDS = pytest.mark.parametrize("backend", ["recompute", CPP, TRITON])
COMPILES = pytest.mark.skipif(
    not rskip.has_triton() or INTERPRETED, reason="needs the package triton, and not its interpreter"
)


@COMPILES
@pytest.mark.skipif(DEVICE == "cuda", reason="they run here")
def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0", "-k", "triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([*command, __file__], capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


@pytest.fixture(autouse=True)
def nan_in_empty_memory():
    """What an operator does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def pixels(maps):
    """The features of a position side by side, as in the memory of `channels_last`."""
    return maps.contiguous()


def planes(maps):
    """The positions of a feature side by side, as in the memory of a map `(batch, channels, height, width)`."""
    return maps.movedim(-1, 1).contiguous().movedim(1, -1)


def neither(maps):
    return maps.repeat_interleave(2, 0)[::2].transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = pytest.mark.parametrize("layout", [planes, pixels], ids=lambda layout: layout.__name__)


def random_maps(layout, *args, device="cpu"):
    (x, branch, *affine), upstream = random_leaves(*args)
    leaves = [layout(x), layout(branch), *affine]
    return [leaf.to(device) for leaf in leaves], layout(upstream).to(device)


def assert_maps_equal_formula(backend, *args, **kwargs):
    return assert_equals_formula(backend, *args, axes="sample", device=device_of(backend), **kwargs)


@BACKENDS
@settings(deadline=None, max_examples=2 if INTERPRETED else 30, derandomize=True)
@given(
    samples=st.integers(0, 4),
    spatial=st.lists(st.integers(1, 6), max_size=3),
    size=st.one_of(st.integers(4, 40), st.sampled_from([64, 100])),
    recursions=st.integers(1, 5),
    affine=st.sampled_from(AFFINES),
    of_x=st.sampled_from(sorted(EXTREMES)),
    of_branch=st.sampled_from(sorted(EXTREMES)),
    scale=st.sampled_from([1.0, 2.414, -0.5]),
    layouts=st.tuples(*[st.sampled_from([planes, pixels, neither])] * 3),
)
@example(9, [2, 2], 5, 4, "per_step", "plain", "plain", 1.0, (planes,) * 3)
@example(2, [6, 7], 1, 2, "per_step", "plain", "plain", 1.0, (planes,) * 3)
@example(1, [40, 41], 3, 3, "per_step", "plain", "plain", 1.0, (planes,) * 3)
@example(1, [40, 41], 3, 3, "per_step", "offset", "plain", 1.0, (pixels,) * 3)
@example(1, [3, 3], 600, 3, "last", "plain", "plain", 1.0, (pixels,) * 3)
@example(1, [5, 5], 16, 6, "per_step", "zero", "zero", 1.0, (planes,) * 3)
@example(1, [5, 5], 16, 5, "last", "zero", "tiny", 1.0, (planes,) * 3)
@example(2, [5, 5], 16, 3, "last", "constant rows", "plain", 1.0, (planes,) * 3)
def test_values_and_gradients(backend, samples, spatial, size, recursions, affine, of_x, of_branch, scale, layouts):
    leaves, upstream = random_leaves((samples, *spatial, size), recursions, affine)
    maps = [EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1]), upstream]
    *leaves[:2], upstream = (layout(map) for layout, map in zip(layouts, maps, strict=True))
    assert_maps_equal_formula(backend, leaves, upstream, recursions, affine, scale)


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
def test_low_and_mixed_precision(backend, dtypes, layout):
    """One rounding at the end, not one a step; the residual may stay in float32 beside a branch that is not."""
    leaves, upstream = random_maps(layout, (2, 5, 7, 6), 4, "per_step", dtypes)
    assert_maps_equal_formula(backend, leaves, upstream, 4, "per_step")


@BACKENDS
@LAYOUTS
def test_rms_norm(backend, layout):
    for shape, affine in (((0, 4, 16), "shared"), ((2, 6, 5, 24), "per_step"), ((2, 100), "last")):
        leaves, upstream = random_maps(layout, shape, 3, affine)
        leaves = [leaves[0] + 1, *leaves[1:3]]  # a mean that must stay
        assert_maps_equal_formula(backend, leaves, upstream, 3, affine, 1.7)


@BACKENDS
@LAYOUTS
def test_y_and_the_gradients_lie_in_memory_as_x_does(backend, layout):
    leaves, upstream = random_maps(layout, (3, 5, 4, 6), 2, "per_step", device=device_of(backend))
    y, grad_x, grad_branch, *_ = results(rskip_layer_norm, leaves, upstream, backend=backend, axes="sample")
    assert {value.stride() for value in (y, grad_x, grad_branch)} == {leaves[0].stride()}


@BACKENDS
@LAYOUTS
def test_samples_of_zeros_at_any_depth(backend, layout):
    for affine in ("per_step", "last"):
        leaves, upstream = random_maps(layout, (1, 3, 3, 8), 20, affine, device=device_of(backend))
        leaves[:2] = (torch.zeros_like(leaf) for leaf in leaves[:2])
        y, *gradients = results(rskip_layer_norm, leaves, upstream, 20, affine, backend=backend, axes="sample")
        assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        assert affine != "last" or torch.equal(y, leaves[3].expand(y.shape))


@BACKENDS
def test_an_expanded_gradient(backend):
    leaves, upstream = random_maps(planes, (3, 5, 4, 6), 2, "per_step")
    assert_maps_equal_formula(backend, leaves, torch.ones(()).expand(upstream.shape), 2, "per_step")


@BACKENDS
@LAYOUTS
def test_what_is_kept(backend, layout):
    """x, F, gains, biases and five numbers a feature and sample, whatever K is."""
    leaves, _ = random_maps(layout, (3, 16, 16, 8), 8, "per_step")
    given, kept = {leaf.untyped_storage().data_ptr() for leaf in leaves}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rskip_layer_norm(*(leaf.requires_grad_() for leaf in leaves), 8, backend=backend, axes="sample")
    assert y.requires_grad
    assert sum(kept.values()) == 5 * 4 * 3 * 8


@BACKENDS
def test_gradients_that_nobody_asks_for(backend):
    leaves, upstream = random_maps(planes, (3, 5, 4, 6), 2, "per_step", device=device_of(backend))
    arguments = {"backend": backend, "axes": "sample"}
    expected = results(rskip_layer_norm, leaves, upstream, **arguments)[1:]
    for index, leaf in enumerate(leaves):
        alone = [other.detach().requires_grad_(other is leaf) for other in leaves]
        y = rskip_layer_norm(*alone, **arguments)
        assert torch.equal(torch.autograd.grad(y, alone[index], upstream)[0], expected[index])
    with torch.inference_mode():
        assert torch.equal(rskip_layer_norm(*leaves, **arguments), y)
    assert torch.equal(
        rskip_layer_norm(*leaves[:2], **arguments),
        rskip_layer_norm(*leaves[:2], torch.ones_like(leaves[2]), torch.zeros_like(leaves[3]), **arguments),
    )


@ON_CPU
@pytest.mark.parametrize(("affine", "layout"), [("per_step", planes), ("last", pixels)])
def test_compile_and_checkpoint_see_through_it(backend, affine, layout):
    leaves, upstream = random_maps(layout, (3, 5, 4, 6), 3, affine)

    def call(*tensors):
        return rskip_layer_norm(*tensors, recursions=3, affine=affine, backend=backend, axes="sample")

    expected = results(call, leaves, upstream)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for found in (
        results(compiled, leaves, upstream),
        results(lambda *tensors: checkpoint(call, *tensors, use_reentrant=False), leaves, upstream),
    ):
        torch.testing.assert_close(found, expected)


@ON_CPU
@LAYOUTS
def test_second_derivatives(backend, layout):
    assert_second_derivatives(backend, *random_maps(layout, (3, 5, 4, 6), 3, "per_step"), 3, "per_step", axes="sample")


@BACKENDS
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=str)
def test_dropout_is_the_formula_with_its_mask(backend, dtypes):
    """In bfloat16 what is kept of F is rounded first: 1 / (1 - p) is a power of 2 here."""
    leaves, upstream = random_maps(planes, (3, 5, 4, 6), 2, "per_step", dtypes)
    dropout = {"dropout": 0.5, "seed": torch.tensor(7)}
    assert_maps_equal_formula(backend, leaves, upstream, 2, "per_step", **dropout)


@CPP.marks[0]
@LAYOUTS
def test_the_number_of_threads_changes_no_bit(layout):
    leaves, upstream = random_maps(layout, (7, 20, 20, 24), 3, "per_step")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(rskip_layer_norm, leaves, upstream, 3, backend="cpp", axes="sample"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@CPP.marks[0]
@pytest.mark.parametrize("dim", [1, 2])
def test_the_operators_are_ones_of_torch(dim):
    x, branch, gradient = torch.randn(3, 2, 9, 8)
    size = x.shape[3 - dim]
    weight, bias = torch.rand(2, 3, size)
    arguments = True, 1e-5, 1.0, dim
    moments = maps_cpu.forward(x, branch, weight, bias, *arguments, torch.float32)[1]
    for operator, inputs in (
        (maps_cpu.forward, (x, branch, weight, bias, *arguments, torch.float32)),
        (maps_cpu.backward, (gradient, x, branch, weight, bias, moments, *arguments)),
    ):
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        assert set(torch.library.opcheck(operator, inputs, test_utils=checks).values()) == {"SUCCESS"}


def test_auto_leaves_to_torch_what_it_does_as_well(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def chosen(shape, recursions=2, **options):
        x = torch.empty(shape, **options)
        return rskip.choose_backend(x, x, recursions, "per_step", "sample")

    assert chosen((128, 15, 16, 16)) == chosen((64, 32, 32, 7)) == chosen((128, 8, 8, 64)) == "reference"
    assert chosen((128, 16, 16, 32), dtype=torch.float64) == chosen((128, 16, 16, 32), 1) == "reference"
    assert chosen((8, 56, 56, 64)) == chosen((2**20, 64)) == chosen((128, 16, 16, 32), device="meta") == "reference"
    if rskip.has_cpp(torch.float32, torch.float32, "sample"):
        assert chosen((128, 16, 16, 32)) == chosen((128, 8, 8, 64), 8) == chosen((8, 56, 56, 64), 3) == "cpp"


# The Triton kernels


@COMPILES
@pytest.mark.parametrize("layout", [planes, pixels])
def test_tracing_sees_the_kernels(layout, monkeypatch):
    """Without a graph break, and with the kernels themselves in the graph, beside which a compiler puts its own."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))  # which says what kernels write
    monkeypatch.setattr(driver, "_active", target)
    monkeypatch.setattr(rskip, "_device_of", torch.compiler.assume_constant_result(lambda backend: "cpu"))
    leaves, _ = random_maps(layout, (3, 5, 4, 6), 2, "per_step")
    joint = []

    def partition(graph, inputs, **options):
        joint.append(graph.graph)
        return default_partition(graph, inputs, **options)

    def no_device(graph, inputs):
        return lambda *inputs: pytest.skip("compiled, but there is nothing to run it on")

    def call(*tensors):
        return rskip_layer_norm(*tensors, backend="triton", axes="sample")

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=no_device, partition_fn=partition)
    with pytest.raises(pytest.skip.Exception):
        torch.compile(call, backend=backend, fullgraph=True)(*(leaf.requires_grad_() for leaf in leaves))
    kernels = [node for node in joint[0].nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(joint) == 1 and len(kernels) == 6


@COMPILES
def test_kernels_compile_for_gpus_without_spills():
    script = Path(__file__).parents[2] / "recipes" / "benchmarks" / "kernel_registers.py"
    command = [sys.executable, str(script), "--sizes", "--maps", "784x512", "--architectures", "90"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    head, *rows = (line.split() for line in result.stdout.splitlines()[:-1])
    assert len(rows) == 4 * 2 + 2
    assert {row[head.index("spills")] for row in rows} == {"0"}, rows


# In RSkip and in a model


@ON_CPU
@pytest.mark.parametrize("norm", [skip_norms.SampleLayerNorm, skip_norms.SampleRMSNorm])
@pytest.mark.parametrize("affine", AFFINES)
def test_rskip_is_the_same_function_watched_or_not(monkeypatch, affine, norm, backend):
    monkeypatch.setattr(hook, "choose_backend", lambda *_: backend)
    leaves, upstream = random_maps(planes, (3, 5, 4, 6), 3, affine)
    leaves = leaves if norm is skip_norms.SampleLayerNorm else leaves[:3]
    skip = RSkip(6, 3, norm, affine, eps=1e-3)
    names = ("weight", "bias")[: len(leaves) - 2]
    parameters = [[getattr(step, name) for step in skip.norm if getattr(step, name) is not None] for name in names]
    for of_name, leaf in zip(parameters, leaves[2:], strict=True):
        for parameter, values in zip(of_name, leaf.reshape(-1, 6), strict=True):
            parameter.data.copy_(values)
    seen = []

    def check():
        x, branch = (leaf.clone().requires_grad_() for leaf in leaves[:2])
        skip.zero_grad()
        y = skip(x, branch)
        y.backward(upstream)
        gradients = (torch.stack([parameter.grad for parameter in of_name]) for of_name in parameters)
        gradients = (found.view(leaf.shape) for found, leaf in zip(gradients, leaves[2:], strict=True))
        found = (y, x.grad, branch.grad, *gradients)
        assert_are_formula(found, leaves, upstream, recursions=3, affine=affine, eps=1e-3, axes="sample")

    check()
    skip.norm[0].register_forward_hook(lambda module, args, output: seen.append(output))
    check()
    assert len(seen) == (3 if affine == "shared" else 1)


@ON_CPU
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_resnet_is_the_same(monkeypatch, backend, norm, memory_format):
    torch.manual_seed(0)
    config = RSkipResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", skip_recursions=3, skip_norm=norm,
        stem_type="cifar", num_labels=5,
    )  # fmt: skip
    assert config.skip_norm_axes == "sample"
    model = RSkipResNetForImageClassification(config).to(memory_format=memory_format)
    images, labels = torch.randn(4, 3, 16, 16).contiguous(memory_format=memory_format), torch.arange(4)

    def loss_and_gradients(name):
        monkeypatch.setattr(hook, "choose_backend", lambda *_: name)
        model.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    torch.testing.assert_close(loss_and_gradients(backend), loss_and_gradients("reference"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", "recompute"])
@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((16,), "sample", "`x` must have a shape `(batch, ..., size)` for axes='sample', not [16]"),
        ((4, 16), "samples", "`axes` must be one of channels, sample, not 'samples'"),
    ],
)
def test_wrong_arguments_are_one_sentence(backend, shape, axes, message):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rskip_layer_norm(x, x, backend=backend, axes=axes)
