"""The implementations of recursive skip connections against the formula in float64: values and all gradients."""

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skip_kernel_cases import (
    AFFINES,
    EXTREMES,
    PRECISIONS,
    assert_are_formula,
    assert_equals_formula,
    assert_second_derivatives,
    random_leaves,
    results,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hf_rskip import NORMS, RSkip, rskip_layer_norm
from hf_rskip.kernels import cpu, hook, rskip
from hf_rskip.kernels import dropout as random_numbers

CPP_BUILDS = rskip.has_cpp(torch.float32, torch.float32)
CPP = pytest.param("cpp", marks=pytest.mark.skipif(not CPP_BUILDS, reason="no C++ compiler builds the operator"))
BACKENDS = pytest.mark.parametrize("backend", ["recompute", CPP])


@pytest.fixture(autouse=True)
def nan_in_empty_memory():
    """What an operator does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@BACKENDS
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    size=st.one_of(st.integers(4, 40), st.sampled_from([64, 100, 128, 257, 512])),
    recursions=st.integers(1, 8),
    affine=st.sampled_from(AFFINES),
    of_x=st.sampled_from(sorted(EXTREMES)),
    of_branch=st.sampled_from(sorted(EXTREMES)),
    scale=st.sampled_from([1.0, 2.414, -0.5]),
)
@example([70], 33, 4, "per_step", "plain", "plain", 1.0)  # more rows than one flush of the sums
@example([300], 16, 3, "last", "plain", "plain", 1.0)
@example([], 1, 2, "per_step", "plain", "plain", 1.0)
@example([2], 8192, 2, "per_step", "one column", "plain", 1.0)
@example([2], 8192, 8, "last", "one column", "offset", 1.0)
@example([5], 512, 3, "last", "constant rows", "plain", 1.0)
@example([3], 16, 6, "last", "zero", "denormal", 1.0)
@example([3], 16, 8, "last", "zero", "tiny", 1.0)
def test_values_and_gradients(backend, leading, size, recursions, affine, of_x, of_branch, scale):
    leaves, upstream = random_leaves((*leading, size), recursions, affine)
    leaves[0], leaves[1] = EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1])
    assert_equals_formula(backend, leaves, upstream, recursions, affine, scale)


@BACKENDS
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
@pytest.mark.parametrize("affine", AFFINES)
def test_low_and_mixed_precision(backend, affine, dtypes):
    """One rounding at the end, not one a step; the residual may stay in float32 beside a branch that is not."""
    for size, recursions in ((16, 4), (50, 1), (512, 4)):
        leaves, upstream = random_leaves((7, size), recursions, affine, dtypes)
        assert_equals_formula(backend, leaves, upstream, recursions, affine)


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize(
    ("shape", "scale", "axes"),
    [((7, 1), 1.0, "channels"), ((7, 1), 2.0, "channels"), ((7, 16), 0.0, "channels"), ((7, 1, 1), 1.0, "sample")],
    ids=str,
)
def test_single_values_and_a_scale_of_zero_are_left_to_the_reference(backend, affine, shape, scale, axes):
    """Of single values every gradient but that of the bias is 0; rounding became up to 1.6 in bfloat16 at K = 4."""
    leaves, upstream = random_leaves(shape, 4, affine, (torch.bfloat16,) * 2)
    found, expected = [], []
    for name, values in ((backend, found), ("reference", expected)):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        y = rskip_layer_norm(*inputs, recursions=4, affine=affine, scale=scale, axes=axes, backend=name)
        values += [y, *torch.autograd.grad(y, inputs, upstream)]
    assert all(map(torch.equal, found, expected))
    if shape[-1] == 1:
        assert all(gradient.abs().max() < 1e-3 for gradient in found[1:4])


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
def test_any_strides(backend, affine):
    leaves, upstream = random_leaves((6, 5, 48), 3, affine)
    strided = [
        leaves[0].transpose(0, 1).contiguous().transpose(0, 1),
        leaves[1].repeat_interleave(2, -1)[..., ::2],
        *(leaf.mT.contiguous().mT if leaf.dim() > 1 else leaf for leaf in leaves[2:]),
    ]
    assert_equals_formula(backend, strided, upstream.mT.contiguous().mT, 3, affine)
    expanded = torch.ones(()).expand(6, 5, 48)  # as in the backward pass of `sum`
    assert_equals_formula(backend, leaves, expanded, 3, affine)


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
def test_constant_rows_give_the_bias(backend, affine):
    leaves, upstream = random_leaves((3, 100), 1, affine)
    leaves[:2] = torch.full((3, 100), 12345.678), torch.full((3, 100), -0.1)
    y, *_ = assert_equals_formula(backend, leaves, upstream, 1, affine)
    if backend == "cpp":
        assert torch.equal(y, leaves[3].expand(3, 100))


@BACKENDS
def test_rows_of_zeros_at_any_depth(backend):
    """As of padding: each step multiplies what is not there by up to 1 / sqrt(eps)."""
    leaves, upstream = random_leaves((2, 32), 1, "last")
    leaves[:2] = torch.zeros(2, 2, 32)
    y, *gradients = results(rskip_layer_norm, leaves, upstream, recursions=50, affine="last", backend=backend)
    assert torch.equal(y, leaves[3].expand(2, 32)) and all(gradient.isfinite().all() for gradient in gradients)


@BACKENDS
def test_many_rows_add_up(backend):
    """The gradients of gain and bias of 20,000 rows keep the digits of float32."""
    leaves, upstream = random_leaves((20_000, 16), 2, "per_step")
    assert_equals_formula(backend, leaves, upstream.abs(), 2, "per_step")


@CPP.marks[0]
@pytest.mark.parametrize("shape", [(2048, 512), (1100, 1001)], ids=["whole vectors", "part of one"])
def test_large_outputs_are_those_of_their_parts(shape):
    """From 2^20 values on they are written past the caches, if rows are whole vectors; a quarter of them is not."""
    leaves, upstream = random_leaves(shape, 3, "last")
    y, *rows, weight, bias = results(rskip_layer_norm, leaves, upstream, 3, "last", backend="cpp")
    quarters = [
        results(rskip_layer_norm, [*part, *leaves[2:]], up, 3, "last", backend="cpp")
        for *part, up in zip(*(tensor.chunk(4) for tensor in (*leaves[:2], upstream)), strict=True)
    ]
    *parts, of_weight, of_bias = zip(*quarters, strict=True)
    assert all(torch.equal(whole, torch.cat(part)) for whole, part in zip((y, *rows), parts, strict=True))
    torch.testing.assert_close((weight, bias), (sum(of_weight), sum(of_bias)), rtol=1e-5, atol=1e-3)


@BACKENDS
def test_gradients_that_nobody_asks_for(backend):
    leaves, upstream = random_leaves((9, 32), 2, "per_step")
    expected = results(rskip_layer_norm, leaves, upstream, backend=backend)[1:]
    for index, leaf in enumerate(leaves):
        alone = [other.detach().requires_grad_(other is leaf) for other in leaves]
        y = rskip_layer_norm(*alone, backend=backend)
        assert torch.equal(torch.autograd.grad(y, alone[index], upstream)[0], expected[index])
    with torch.inference_mode():
        assert torch.equal(rskip_layer_norm(*leaves, backend=backend), y)
    assert torch.equal(
        rskip_layer_norm(*leaves[:2], backend=backend),
        rskip_layer_norm(*leaves[:2], torch.ones(2, 32), torch.zeros(2, 32), backend=backend),
    )


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
def test_second_derivatives(backend, affine):
    assert_second_derivatives(backend, *random_leaves((9, 32), 3, affine), 3, affine)


@BACKENDS
def test_second_derivatives_where_x_is_the_branch(backend):
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = (
        torch.autograd.functional.hvp(lambda x, name=name: rskip_layer_norm(x, x, backend=name)[:, 0].sum(), x, x)[1]
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
def test_compile_and_checkpoint_see_through_it(backend, affine):
    leaves, upstream = random_leaves((9, 32), 3, affine)

    def call(*tensors):
        return rskip_layer_norm(*tensors, recursions=3, affine=affine, backend=backend)

    expected = results(call, leaves, upstream)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for found in (
        results(compiled, leaves, upstream),
        results(lambda *tensors: checkpoint(call, *tensors, use_reentrant=False), leaves, upstream),
    ):
        torch.testing.assert_close(found, expected)


@CPP.marks[0]
@pytest.mark.parametrize("closed", [False, True])
def test_the_operator_is_one_of_torch(closed):
    leaves, _ = random_leaves((9, 32), 3, "last" if closed else "per_step")
    x, branch, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    rows = 1 if closed else 3
    arguments = (x, branch, weight.reshape(rows, 32), bias.reshape(rows, 32), None, 3, closed, True, 1e-5, 1.0, 0.0)
    arguments += (torch.float32,)
    assert set(torch.library.opcheck(cpu.rskip_layer_norm, arguments).values()) == {"SUCCESS"}


@CPP.marks[0]
@pytest.mark.parametrize("affine", AFFINES)
def test_the_number_of_threads_changes_no_bit(affine):
    leaves, upstream = random_leaves((3000, 24), 3, affine)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(rskip_layer_norm, leaves, upstream, 3, affine, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


# RMS norm


@pytest.mark.parametrize("backend", ["reference", "recompute", CPP])
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("recursions", [1, 2, 5])
def test_rms_norm(backend, recursions, affine):
    for shape in ((0, 16), (37, 24), (2, 3, 100), (5, 512)):
        leaves, upstream = random_leaves(shape, recursions, affine)
        leaves = [leaves[0] + 1, *leaves[1:3]]  # a mean that must stay
        assert_equals_formula(backend, leaves, upstream, recursions, affine, 1.7)


# Dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """Of `kat_vectors` in Random123, the authors' own code."""
    found = random_numbers.philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert [word.item() for word in found] == [int(word, 16) for word in words.split()]


def test_uniform_numbers():
    seed = torch.tensor(-(2**62) + 12345)
    uniform = random_numbers.philox_uniform(seed, 100_000).double()
    assert 0 <= uniform.min() < 1e-4 and 1 - 1e-4 < uniform.max() < 1
    assert (uniform.mean() - 0.5).abs() < 0.005 and (uniform.var() - 1 / 12).abs() < 0.002
    other = random_numbers.philox_uniform(seed + 2**32, 100_000).double()  # the upper half of the seed counts
    assert torch.corrcoef(torch.stack([uniform, other]))[0, 1].abs() < 0.02


@BACKENDS
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=str)
def test_dropout_is_the_formula_with_its_mask(backend, affine, dtypes):
    seed = torch.tensor(0x9E3779B97F4A7C15 - 2**64)
    for shape, recursions, dropout in (
        ((37, 24), 3, 0.1),
        ((2, 70, 100), 1, 0.5),
        ((40, 33), 2, 0.9),
        ((0, 16), 2, 0.5),
    ):
        leaves, upstream = random_leaves(shape, recursions, affine, dtypes)
        found = assert_equals_formula(backend, leaves, upstream, recursions, affine, 2.414, dropout=dropout, seed=seed)
        uniform = random_numbers.philox_uniform(seed, leaves[0].numel()).view(shape)
        assert (found[2][uniform < dropout] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "recompute", CPP])
def test_dropout_is_drawn_from_the_generator_of_torch(backend):
    leaves, upstream = random_leaves((500, 64), 2, "per_step")

    def call(*tensors, **arguments):
        return rskip_layer_norm(*tensors, backend=backend, **arguments)

    torch.manual_seed(0)
    first = results(call, leaves, upstream, dropout=0.3)
    other = results(call, leaves, upstream, dropout=0.3)
    torch.manual_seed(0)
    again = results(call, leaves, upstream, dropout=0.3)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    dropped = (first[2] == 0).float().mean().item()
    assert abs(dropped - 0.3) < 0.02
    assert abs(((first[2] == 0) & (other[2] == 0)).float().mean().item() - 0.09) < 0.02
    assert all(map(torch.equal, results(call, leaves, upstream, dropout=0.0), results(call, leaves, upstream)))
    torch.manual_seed(0)
    kept = results(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False, dropout=0.3), leaves, upstream)
    assert all(map(torch.equal, first, kept))


def test_auto_spares_the_mask_of_a_seed():
    """Which tensor operations draw slowly; without one the reference takes torch's dropout."""
    for size in (33, 64):
        x = torch.randn(16, size)
        assert rskip.choose_backend(x, x, 1, "per_step", seeded=True) == ("cpp" if CPP_BUILDS else "reference")
    torch.manual_seed(0)
    found = rskip_layer_norm(x, x, recursions=1, dropout=0.3)
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x + torch.dropout(x, 0.3, True), (64,)))


# What operators have no rule for


def test_forward_mode_and_transforms_of_torch():
    """Right where `auto` chooses, and an error rather than zeros where it does not."""
    skip = RSkip(64, 4).double()
    x, branch, tangent = torch.randn(3, 16384, 64, generator=torch.Generator().manual_seed(0))
    for function in (skip.float(), lambda *tensors: rskip_layer_norm(*tensors, recursions=4)):
        _, found = torch.func.jvp(function, (x, branch), (tangent, tangent))
        _, expected = torch.func.jvp(skip.double(), (x.double(), branch.double()), (tangent.double(),) * 2)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        skip.float()
    gradient = torch.func.grad(lambda x: skip(x, branch)[:, 0].sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(skip(leaf, branch)[:, 0].sum(), leaf)[0])
    for backend in ("recompute", *["cpp"] * CPP_BUILDS):
        with pytest.raises(ValueError, match="has no rule for torch.func and forward-mode derivatives"):
            torch.func.jvp(lambda x, name=backend: rskip_layer_norm(x, branch, backend=name), (x,), (tangent,))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan")])
def test_dropout_out_of_range(dropout):
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match="^`dropout` must be at least 0 and less than 1, not "):
        rskip_layer_norm(x, x, dropout=dropout)


def run(program, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


# In RSkip


@BACKENDS
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", AFFINES)
def test_rskip_is_the_same_function_watched_or_not(monkeypatch, affine, norm, backend):
    monkeypatch.setattr(hook, "choose_backend", lambda *_: backend)
    leaves, upstream = random_leaves((3, 20, 24), 3, affine)
    leaves = leaves if norm == "layer_norm" else leaves[:3]
    skip = RSkip(24, 3, norm, affine, eps=1e-3)
    names = ("weight", "bias")[: len(leaves) - 2]
    affine_parameters = [
        [getattr(step, name) for step in skip.norm if getattr(step, name) is not None] for name in names
    ]
    for parameters, leaf in zip(affine_parameters, leaves[2:], strict=True):
        for parameter, values in zip(parameters, leaf.reshape(-1, 24), strict=True):
            parameter.data.copy_(values)
    seen = []

    def check():
        x, branch = (leaf.clone().requires_grad_() for leaf in leaves[:2])
        skip.zero_grad()
        y = skip(x, branch)
        y.backward(upstream)
        of_affine = (
            torch.stack([parameter.grad for parameter in parameters]).view(leaf.shape)
            for parameters, leaf in zip(affine_parameters, leaves[2:], strict=True)
        )
        found = (y, x.grad, branch.grad, *of_affine)
        assert_are_formula(found, leaves, upstream, recursions=3, affine=affine, eps=1e-3)

    check()
    skip.norm[0].register_forward_hook(lambda module, args, output: seen.append(output))
    check()
    assert len(seen) == (3 if affine == "shared" else 1)


@pytest.mark.parametrize("affine", AFFINES)
def test_norms_that_were_changed_one_by_one_are_called(monkeypatch, affine):
    """As they are: with the eps, gains and classes that each of them has."""
    monkeypatch.setattr(hook, "choose_backend", lambda *_: pytest.fail("goes by the first norm alone"))
    x, branch = torch.randn(2, 5, 8)

    def other_eps(norms):
        norms[1].eps = 0.5

    def other_class(norms):
        norms[1] = NORMS["rms_norm"](8)

    def other_gains(norms):
        for index in range(3):
            norms[index] = NORMS["layer_norm"](8, elementwise_affine=affine != "per_step" or index != 1)

    def no_bias(norms):
        for norm in norms[:1] if affine == "per_step" else norms:
            norm.weight, norm.bias = torch.nn.Parameter(torch.ones(8)), None

    for change in (other_eps, other_class, other_gains, no_bias):
        skip = RSkip(8, 3, affine=affine)
        change(skip.norm)
        assert skip(x, branch).shape == x.shape
    skip, seen = RSkip(8, 3, affine=affine), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        skip(x, branch)
    finally:
        handle.remove()
    assert sum(module in list(skip.norm) for module in seen) == 3


def test_nan_stays_nan():
    x, branch = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    branch[1, 5] = float("nan")
    for name, function in (("layer_norm", rskip_layer_norm), ("rms_norm", rskip.rskip_rms_norm)):
        for affine in AFFINES:
            for backend in ("reference", "recompute", *["cpp"] * CPP_BUILDS):
                y = function(x, branch, recursions=2, affine=affine, backend=backend)
                assert y.isnan().sum(-1).tolist() == [0, 64, 0, 0], (name, affine, backend)


@BACKENDS
@pytest.mark.parametrize("recursions", [1, 3])
def test_a_sum_that_is_exact_stays_exact(backend, recursions):
    """x + F far smaller than x and F."""
    leaves, upstream = random_leaves((32, 64), recursions, "per_step")
    x, noise = leaves[:2]
    x = (1e4 * x).round()
    assert_equals_formula(
        backend, [x, (1024 * noise).round() / 1024 - x, *leaves[2:]], upstream, recursions, "per_step"
    )


def test_auto_leaves_to_torch_what_it_does_as_well(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.randn(16384, 64)

    def chosen(x, branch=None, recursions=2):
        return rskip.choose_backend(x, x if branch is None else branch, recursions, "per_step")

    odd = torch.randn(32768, 65)
    for other in (x.double(), x.half(), x[:8192], x[:, :16].repeat(8, 1), odd, x[:0], torch.randn(64, 16384)):
        assert chosen(other) == "reference"
    if CPP_BUILDS:
        assert chosen(x) == "cpp"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert chosen(x) == "reference" and chosen(x, recursions=4) == chosen(x.repeat(2, 1)) == "cpp"
    assert chosen(x, recursions=1) == chosen(x, x[:1]) == "reference"
    program = torch.export.export(RSkip(64, 2), (x, x))
    assert not [node for node in program.graph.nodes if "rskip" in str(node.target)]


def test_auto_takes_triton_for_rows_that_fit_registers(monkeypatch):
    monkeypatch.setattr(rskip, "has_triton", lambda: True)
    with FakeTensorMode():

        def chosen(shape, recursions, affine="per_step", dtype=torch.bfloat16):
            x = torch.empty(shape, device="cuda", dtype=dtype)
            return rskip.choose_backend(x, x, recursions, affine)

        for size, recursions in ((16, 8), (512, 8), (1024, 8), (2048, 4), (4096, 2)):
            assert chosen((2**20 // size, size), recursions) == "triton"
            assert chosen((2**20 // size - 1, size), recursions) == "reference"
            assert chosen((2**20 // size, size), recursions + 1, "shared") == "reference"
        assert chosen((128, 8192), 64, "last") == "triton"
        assert chosen((1024, 1024), 2, dtype=torch.float64) == "reference"


@pytest.mark.parametrize("backend", ["auto", "reference", "recompute", "cpp"])
@pytest.mark.parametrize(
    ("branch", "weight", "arguments", "message"),
    [
        ((3, 16), None, {}, "`x` and `branch` must have one shape `(..., size)`, not [4, 16] and [3, 16]"),
        ((4, 8), None, {}, "`x` and `branch` must have one shape"),
        ((16,), None, {}, "`x` and `branch` must have one shape"),
        ((4, 16), None, {"affine": "per-step"}, "`affine` must be one of per_step, shared, last, not 'per-step'"),
        ((4, 16), None, {"recursions": 0}, "`recursions` must be an integer of at least 1, not 0"),
        ((4, 16), None, {"recursions": 2.0}, "`recursions` must be an integer of at least 1, not 2.0"),
        ((4, 16), (3, 16), {}, "`weight` must have shape (2, 16), not (3, 16)"),
        ((4, 16), (16,), {}, "`weight` must have shape (2, 16), not (16,)"),
        ((4, 16), (2, 16), {"affine": "last"}, "`weight` must have shape (1, 16) or (16,), not (2, 16)"),
        ((4, 16), None, {"dropout": 0.1, "seed": 7}, "`seed` must be an int64 tensor of shape `()`"),
        ((4, 16), None, {"dropout": 0.1, "seed": torch.tensor([7])}, "`seed` must be an int64 tensor of shape `()`"),
    ],
)
def test_wrong_arguments_are_one_sentence(backend, branch, weight, arguments, message):
    weight = None if weight is None else torch.ones(weight)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rskip_layer_norm(torch.randn(4, 16), torch.randn(branch), weight, backend=backend, **arguments)


def test_precisions_that_no_operator_takes():
    x, branch = torch.randn(1024, 512), torch.randn(1024, 512, dtype=torch.float64)
    for pair in ((x, branch), (branch, x), (branch, branch)):
        assert rskip.choose_backend(*pair, 2, "per_step") == "reference"


def test_wrong_backends_are_one_sentence():
    x = torch.randn(4, 16)
    with pytest.raises(
        ValueError, match="^`backend` must be one of auto, reference, recompute, cpp, triton, not 'cuda'$"
    ):
        rskip_layer_norm(x, x, backend="cuda")
    with pytest.raises(ValueError, match="^backend='triton' runs on cuda, and x is on cpu$"):
        rskip_layer_norm(x, x, backend="triton")
    with pytest.raises(ValueError, match="^backend='cpp' takes float32, bfloat16 and float16, not torch.float64 and"):
        rskip_layer_norm(x.double(), x.double(), backend="cpp")


# The compiler


AUTO = """
    import torch
    from hf_rskip import NORMS, RSkip
    x, branch = torch.randn(2, 16384, 64)
    print(RSkip(64, 3)(x, branch).isfinite().all().item())
"""


def test_without_a_compiler_there_is_one_line(tmp_path):
    result = run(AUTO, CXX=str(tmp_path / "no-compiler"), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.stdout == "True\n", result.stderr
    lines = [line for line in result.stderr.splitlines() if "unfused" in line]
    assert len(lines) == 1 and "no-compiler" in lines[0]


@CPP.marks[0]
def test_builds_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with ThreadPoolExecutor() as pool:
        libraries = pool.map(cpu.load.__wrapped__, [(torch.float32,) * 3] * 2)
    assert None not in libraries
    assert sorted(path.suffix for path in (tmp_path / "hf_rskip").iterdir()) == [".json", ".so"]


TINY = (torch.float32,) * 3, 'extern "C" int answer() { return 42; }'


@CPP.marks[0]
@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:4096],
        lambda content: bytes(4096) + content[4096:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["cut off", "zeros", "one bit"],
)
def test_a_damaged_library_is_built_anew(tmp_path, monkeypatch, harm):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load = cpu.load.__wrapped__
    assert load(*TINY).answer() == 42
    (library,) = tmp_path.rglob("*.so")
    content = library.read_bytes()
    library.unlink()  # not that which this process has loaded
    library.write_bytes(harm(content))
    assert load(*TINY).answer() == 42
    assert library.stat().st_size == len(content) and library.parent.stat().st_mode & 0o777 == 0o700


@CPP.marks[0]
def test_a_library_of_others_is_not_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load = cpu.load.__wrapped__
    assert load(*TINY) is not None
    (tmp_path / "hf_rskip").chmod(0o775)
    assert load(*TINY) is None
    assert "'hf_rskip' must belong to this user, and nobody else may write to it" in caplog.text.replace(
        f"{tmp_path}/", ""
    )
