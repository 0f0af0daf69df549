"""The C++ kernel against the formula in float64, values and all gradients; where it is chosen; how it is built."""

import functools
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skip_kernel_cases import (
    EXTREMES,
    PRECISIONS,
    assert_compile_and_checkpoint_see_through,
    assert_equals_formula,
    assert_gradients_are_the_same_alone,
    assert_rskip_is_formula,
    assert_second_derivatives,
    random_leaves,
    results,
)

from hf_rskip import NORMS, RSkip, rskip_layer_norm, rskip_rms_norm
from hf_rskip.kernels import cpu, hook, operators, rskip
from hf_rskip.models import skip_norms
from hf_rskip.models.skip_connections import AFFINES

CPP_BUILDS = rskip.has_cpp(torch.float32, torch.float32)
CPP = pytest.mark.skipif(not CPP_BUILDS, reason="no C++ compiler builds the kernel")


@CPP
@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    size=st.one_of(st.integers(4, 40), st.sampled_from([64, 100, 128, 257, 512])),
    recursions=st.integers(1, 8),
    affine=st.sampled_from(AFFINES),
    of_x=st.sampled_from(sorted(EXTREMES)),
    of_branch=st.sampled_from(sorted(EXTREMES)),
)
@example([70], 33, 4, "per_step", "plain", "plain")  # more rows than one flush of the sums
@example([300], 16, 3, "last", "plain", "plain")
@example([], 1, 2, "per_step", "plain", "plain")
@example([0], 16, 2, "shared", "plain", "plain")
@example([2], 8192, 2, "per_step", "one column", "plain")
@example([5], 512, 3, "last", "constant rows", "plain")
@example([5], 100, 1, "per_step", "constant rows", "constant rows")
@example([3], 16, 3, "last", "zero", "denormal")
@example([3], 16, 2, "shared", "large", "offset")
def test_values_and_gradients(leading, size, recursions, affine, of_x, of_branch):
    leaves, upstream = random_leaves((*leading, size), recursions, affine)
    leaves[0], leaves[1] = EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1])
    assert_equals_formula("cpp", leaves, upstream, recursions, affine)


@CPP
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
def test_low_and_mixed_precision(dtypes):
    """One rounding at the end, not one a step; the residual may stay in float32 beside a branch that is not."""
    for size, recursions, affine in ((16, 4, "per_step"), (50, 1, "per_step"), (512, 4, "shared")):
        leaves, upstream = random_leaves((7, size), recursions, affine, dtypes)
        assert_equals_formula("cpp", leaves, upstream, recursions, affine)


@CPP
@pytest.mark.parametrize("affine", AFFINES)
def test_rms_norm(affine):
    for shape, recursions in (((0, 16), 2), ((37, 24), 1), ((5, 512), 5)):
        leaves, upstream = random_leaves(shape, recursions, affine)
        leaves = [leaves[0] + 1, *leaves[1:3]]  # a mean that must stay
        assert_equals_formula("cpp", leaves, upstream, recursions, affine)


@CPP
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize(("shape", "axes"), [((7, 1), "channels"), ((7, 1, 1), "sample")], ids=str)
def test_single_values_are_left_to_the_reference(affine, shape, axes):
    """Every gradient but that of the bias is 0; rounding became up to 1.6 in bfloat16 at K = 4."""
    leaves, upstream = random_leaves(shape, 4, affine, (torch.bfloat16,) * 2)
    arguments = {"recursions": 4, "affine": affine, "axes": axes}
    backend = "cpp" if axes == "channels" else "closed_form"
    found, expected = (
        results(rskip_layer_norm, leaves, upstream, backend=name, **arguments) for name in (backend, "reference")
    )
    assert all(map(torch.equal, found, expected)) and all(gradient.abs().max() < 1e-3 for gradient in found[1:4])


@CPP
def test_any_strides():
    leaves, upstream = random_leaves((6, 5, 48), 3)
    strided = [
        leaves[0].transpose(0, 1).contiguous().transpose(0, 1),
        leaves[1].repeat_interleave(2, -1)[..., ::2],
        *(leaf.mT.contiguous().mT for leaf in leaves[2:]),
    ]
    assert_equals_formula("cpp", strided, upstream.mT.contiguous().mT, 3)
    assert_equals_formula("cpp", leaves, torch.ones(()).expand(6, 5, 48), 3)  # as in the backward pass of `sum`


@CPP
def test_rows_of_zeros_at_any_depth():
    """As of padding: each step multiplies what is not there by up to 1 / sqrt(eps)."""
    leaves, upstream = random_leaves((2, 32), 1, "last")
    leaves[:2] = torch.zeros(2, 2, 32)
    y, *gradients = results(rskip_layer_norm, leaves, upstream, recursions=6, affine="last", backend="cpp")
    assert torch.equal(y, leaves[3].expand(2, 32)) and all(gradient.isfinite().all() for gradient in gradients)


@CPP
def test_many_rows_add_up():
    """The gradients of gain and bias of 5,000 rows keep the digits of float32."""
    leaves, upstream = random_leaves((5_000, 16), 2)
    assert_equals_formula("cpp", leaves, upstream.abs(), 2)


@CPP
@pytest.mark.parametrize("shape", [(2048, 512), (1100, 1001)], ids=["whole vectors", "part of one"])
def test_large_outputs_are_those_of_their_parts(shape):
    """From 2^20 values on they are written past the caches, if rows are whole vectors; a quarter of them is not."""
    leaves, upstream = random_leaves(shape, 3)
    y, *rows, weight, bias = results(rskip_layer_norm, leaves, upstream, 3, backend="cpp")
    quarters = [
        results(rskip_layer_norm, [*part, *leaves[2:]], up, 3, backend="cpp")
        for *part, up in zip(*(tensor.chunk(4) for tensor in (*leaves[:2], upstream)), strict=True)
    ]
    *parts, of_weight, of_bias = zip(*quarters, strict=True)
    assert all(torch.equal(whole, torch.cat(part)) for whole, part in zip((y, *rows), parts, strict=True))
    torch.testing.assert_close((weight, bias), (sum(of_weight), sum(of_bias)), rtol=1e-5, atol=1e-3)


@CPP
def test_a_sum_that_is_exact_stays_exact():
    """x + F far smaller than x and F."""
    leaves, upstream = random_leaves((32, 64), 3)
    x, noise = (1e4 * leaves[0]).round(), leaves[1]
    assert_equals_formula("cpp", [x, (1024 * noise).round() / 1024 - x, *leaves[2:]], upstream, 3)


@CPP
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_nan_stays_nan(backend):
    x, branch = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    branch[1, 5] = float("nan")
    for function in (rskip_layer_norm, rskip_rms_norm):
        assert function(x, branch, backend=backend).isnan().sum(-1).tolist() == [0, 64, 0, 0]


@CPP
def test_the_number_of_threads_changes_no_bit():
    leaves, upstream = random_leaves((3000, 24), 3)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(rskip_layer_norm, leaves, upstream, 3, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


# As operators of torch


@CPP
def test_the_operators_are_ones_of_torch():
    leaves, gradient = random_leaves((9, 32), 3)
    inputs = (*(leaf.requires_grad_() for leaf in leaves), True, 1e-5, torch.float32)
    assert set(torch.library.opcheck(operators.forward, inputs).values()) == {"SUCCESS"}
    leaves = [leaf.detach() for leaf in leaves]
    stats = operators.forward(*leaves, True, 1e-5, torch.float32)[1]
    found = torch.library.opcheck(operators.backward, (gradient, *leaves, stats, True, 1e-5))
    assert set(found.values()) == {"SUCCESS"}


@CPP
@pytest.mark.parametrize("affine", AFFINES)
def test_compile_and_checkpoint_see_through_it(affine):
    assert_compile_and_checkpoint_see_through("cpp", *random_leaves((9, 32), 3, affine), affine)


@CPP
def test_autocast_leaves_the_precisions():
    leaves, upstream = random_leaves((64, 32), 3, dtypes=(torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(rskip_layer_norm, leaves, upstream, 3, backend="cpp")
    assert all(map(torch.equal, found, results(rskip_layer_norm, leaves, upstream, 3, backend="cpp")))


@CPP
def test_gradients_that_are_not_required():
    leaves, upstream = random_leaves((9, 32), 2)
    assert_gradients_are_the_same_alone(leaves, upstream, backend="cpp")
    neutral = torch.ones(2, 32), torch.zeros(2, 32)
    found, expected = (rskip_layer_norm(*leaves[:2], *affine, backend="cpp") for affine in ((), neutral))
    assert torch.equal(found, expected)


@CPP
@pytest.mark.parametrize("affine", AFFINES)
def test_second_derivatives(affine):
    assert_second_derivatives("cpp", *random_leaves((9, 32), 3, affine), 3, affine)


@CPP
def test_second_derivatives_where_x_is_the_branch():
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = (
        torch.autograd.functional.hvp(lambda x, name=name: rskip_layer_norm(x, x, backend=name)[:, 0].sum(), x, x)[1]
        for name in ("cpp", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_forward_mode_and_transforms_of_torch():
    """Right where `auto` chooses, and an error rather than zeros where it does not."""
    skip, wide = RSkip(64, 4), RSkip(64, 4).double()
    x, branch, tangent = torch.randn(3, 16384, 64, generator=torch.Generator().manual_seed(0))
    _, expected = torch.func.jvp(wide, (x.double(), branch.double()), (tangent.double(),) * 2)
    for function in (skip, lambda *tensors: rskip_layer_norm(*tensors, recursions=4)):
        _, found = torch.func.jvp(function, (x, branch), (tangent, tangent))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: skip(x, branch)[:, 0].sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(skip(leaf, branch)[:, 0].sum(), leaf)[0])
    with pytest.raises(ValueError, match="has no rule for torch.func and forward-mode derivatives"):
        torch.func.jvp(lambda x: rskip_layer_norm(x, branch, backend="cpp"), (x,), (tangent,))


@pytest.mark.parametrize(
    "transform",
    [
        lambda function, x, other: torch.func.jvp(function, (x,), (other,))[1],
        lambda function, x, other: torch.func.vjp(function, x)[1](other)[0],
    ],
    ids=["jvp", "vjp"],
)
def test_compiled_transforms_of_torch(transform):
    x, branch, other = torch.randn(3, 16384, 64, generator=torch.Generator().manual_seed(0))

    def transformed(x, branch, other):
        return transform(lambda x: rskip_rms_norm(x, branch, recursions=4), x, other)

    torch._dynamo.reset()
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x, branch, other)
    expected = transformed(x.double(), branch.double(), other.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


# In RSkip


@CPP
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", skip_norms.SampleLayerNorm, skip_norms.SampleRMSNorm])
@pytest.mark.parametrize("affine", AFFINES)
def test_rskip_is_the_same_function_watched_or_not(monkeypatch, affine, norm):
    backend, axes = ("cpp", "channels") if isinstance(norm, str) else ("closed_form", "sample")
    monkeypatch.setattr(hook, "choose_backend", lambda *_: backend)
    leaves, upstream = random_leaves((3, 5, 4, 24), 3, affine)
    leaves = leaves[:3] if norm in ("rms_norm", skip_norms.SampleRMSNorm) else leaves
    assert_rskip_is_formula(RSkip(24, 3, norm, affine, eps=1e-3), leaves, upstream, affine, axes)


@pytest.mark.parametrize("affine", AFFINES)
def test_norms_that_were_changed_one_by_one_are_called(monkeypatch, affine):
    """As they are: with the eps, gains and classes that each of them has."""
    monkeypatch.setattr(hook, "choose_backend", lambda *_: pytest.fail("goes by the first norm alone"))
    x, branch = torch.randn(2, 5, 8)

    def no_bias(norms):
        for norm in norms[:1] if affine == "per_step" else norms:
            norm.weight, norm.bias = torch.nn.Parameter(torch.ones(8)), None

    def other_gains(norms):
        for index in range(3):
            norms[index] = NORMS["layer_norm"](8, elementwise_affine=affine != "per_step" or index != 1)

    def other_eps(norms):
        norms[1].eps = 0.5

    def other_class(norms):
        norms[1] = NORMS["rms_norm"](8)

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


def test_auto_leaves_to_torch_what_it_does_as_well(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.empty(16384, 64)

    def chosen(x, branch=None, recursions=2):
        return rskip.choose_backend(x, x if branch is None else branch, recursions)

    odd = torch.empty(32768, 65)
    for other in (x.double(), x.half(), x[:8192], x[:, :16].repeat(8, 1), odd, x[:0], torch.empty(64, 16384)):
        assert chosen(other) == "reference"
    assert chosen(x, x.double()) == chosen(x, recursions=1) == chosen(x, x[:1]) == "reference"
    if CPP_BUILDS:
        assert chosen(x) == "cpp"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert chosen(x) == "reference" and chosen(x, recursions=4) == chosen(x.repeat(2, 1)) == "cpp"
    program = torch.export.export(RSkip(64, 2), (x, x))
    assert not [node for node in program.graph.nodes if "rskip" in str(node.target)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@pytest.mark.parametrize("axes", rskip.BACKENDS)
def test_a_trace_computes_the_same(axes):
    x, branch = torch.randn(2, 3, 4, 8)
    traced = torch.jit.trace(lambda *given: rskip_layer_norm(*given, axes=axes), (x, branch))
    assert torch.equal(traced(branch, x), rskip_layer_norm(branch, x, axes=axes))


@pytest.mark.parametrize(
    ("branch", "weight", "arguments", "message"),
    [
        ((3, 16), None, {}, "`x` and `branch` must have one shape `(..., size)`, not [4, 16] and [3, 16]"),
        ((4, 8), None, {}, "`x` and `branch` must have one shape"),
        ((16,), None, {}, "`x` and `branch` must have one shape"),
        ((4, 16), None, {"affine": "per-step"}, "`affine` must be one of per_step, shared, last, not 'per-step'"),
        ((4, 16), None, {"axes": "samples"}, "`axes` must be one of channels, sample, not 'samples'"),
        ((4, 16), None, {"recursions": 0}, "`recursions` must be an integer of at least 1, not 0"),
        ((4, 16), None, {"recursions": 2.0}, "`recursions` must be an integer of at least 1, not 2.0"),
        ((4, 16), (3, 16), {}, "`weight` must have shape (2, 16), not (3, 16)"),
        ((4, 16), (16,), {}, "`weight` must have shape (2, 16), not (16,)"),
        ((4, 16), (2, 16), {"affine": "last"}, "`weight` must have shape (1, 16) or (16,), not (2, 16)"),
        ((4, 16), None, {"backend": "cuda"}, "`backend` must be one of auto, reference, cpp for"),
        ((4, 16), None, {"backend": "cpp", "axes": "sample"}, "`backend` must be one of auto, reference, closed_form"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(branch, weight, arguments, message):
    weight = None if weight is None else torch.ones(weight)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rskip_layer_norm(torch.randn(4, 16), torch.randn(branch), weight, **arguments)


def test_wrong_tensors_are_one_sentence():
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match="^backend='cpp' takes float32, bfloat16 and float16, not torch.float64 and"):
        rskip_layer_norm(x.double(), x.double(), backend="cpp")
    message = "`x` must have a shape `(batch, ..., size)` for axes='sample', not [16]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rskip_layer_norm(x[0], x[0], axes="sample")


# The compiler


def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", shlex.quote(str(tmp_path / "no-compiler")))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(rskip, "load", functools.cache(cpu.load.__wrapped__))
    x, branch = torch.randn(2, 16384, 64)
    for recursions in (4, 5):
        assert RSkip(64, recursions)(x, branch).isfinite().all()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "unfused" in message and "no-compiler" in message


TINY = (torch.float32,) * 3, 'extern "C" int answer() { return 42; }'


@CPP
def test_builds_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(lambda _: cpu.load.__wrapped__(*TINY), range(2)))
    assert [library.answer() for library in libraries] == [42, 42]
    assert sorted(path.suffix for path in (tmp_path / "hf_rskip").iterdir()) == [".json", ".so"]


@CPP
@pytest.mark.parametrize("harm", [lambda whole: whole[:4096], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])])
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


@CPP
def test_a_library_of_others_is_not_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load = cpu.load.__wrapped__
    assert load(*TINY) is not None
    (tmp_path / "hf_rskip").chmod(0o775)
    assert load(*TINY) is None
    assert "hf_rskip' must belong to this user, and nobody else may write to it" in caplog.text
