"""Skip connections against their formulas, in float64 and with a random upstream gradient."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rskip import (
    B2T,
    NORMS,
    SKIP_CONNECTIONS,
    Admin,
    DeepNorm,
    DetachedRSkip,
    FixedAdmin,
    Keel,
    PeriNorm,
    PreNorm,
    ReZero,
    RSkip,
    SublayerPosition,
    XSkip,
)
from hf_rskip.models.skip_norms import NORM_AXES, NoNorm, norm_of

EPS = 1e-5
SIZE = 6
AFFINES = ("per_step", "shared", "last")
RECURSIONS = (1, 2, 3, 4)


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS)


def rms_norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def batch_norm(x):
    tokens = tuple(range(x.dim() - 1))
    centred = x - x.mean(tokens)
    return centred / torch.sqrt((centred * centred).mean(tokens) + EPS)


FORMULAS = {"layer_norm": layer_norm, "rms_norm": rms_norm, "batch_norm": batch_norm}


def rskip(x, branch, norm, gains, biases):
    y = branch
    for gain, bias in zip(gains, biases, strict=True):
        y = norm(x + y) * gain + bias
    return y


def gains_and_biases(norms, affine):
    """The K pairs that the K steps are meant to use, as two lists."""
    used = {"per_step": norms, "shared": [norms[0]] * len(norms), "last": [None] * (len(norms) - 1) + [norms[-1]]}
    gains = [1.0 if norm is None else norm.weight for norm in used[affine]]
    return gains, [0.0 if norm is None or norm.bias is None else norm.bias for norm in used[affine]]


def randomized(module):
    """The module in float64, with gains and biases that are neither 1 nor 0."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def random_inputs(*shape):
    torch.manual_seed(0)
    x, branch = torch.randn(2, *shape, dtype=torch.float64)
    return x.requires_grad_(), (0.3 + 2 * branch).requires_grad_()


def assert_same_function(actual, expected, leaves):
    """Equal values, and equal gradients of `leaves` under a random upstream gradient."""
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def centred(x):
    return x - x.mean(-1, keepdim=True)


def angle(x, y):
    return torch.acos(nn.functional.cosine_similarity(centred(x), centred(y), dim=-1).clamp(-1, 1))


def standardized(x):
    return centred(x) / x.std(-1, correction=0, keepdim=True)


# Formulas


@pytest.mark.parametrize("recursions", RECURSIONS)
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("norm", FORMULAS)
def test_rskip_is_its_formula(norm, affine, recursions):
    x, branch = random_inputs(3, 5, SIZE)
    skip = randomized(RSkip(SIZE, recursions, norm, affine, EPS))
    expected = rskip(x, branch, FORMULAS[norm], *gains_and_biases(skip.norm, affine))
    assert_same_function(skip(x, branch), expected, [x, branch, *skip.parameters()])
    vectors = 1 if norm == "rms_norm" else 2
    assert len(list(skip.parameters())) == vectors * (recursions if affine == "per_step" else 1)


@pytest.mark.parametrize("recursions", [1, 3])
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("norm", FORMULAS)
def test_rskip_passes_gradcheck(norm, affine, recursions):
    inputs = random_inputs(2, 3, 4)
    skip = randomized(RSkip(4, recursions, norm, affine))
    assert torch.autograd.gradcheck(lambda x, branch, *_: skip(x, branch), (*inputs, *skip.parameters()))


@pytest.mark.parametrize("recursions", RECURSIONS)
def test_closed_form_of_the_last_affine(recursions):
    x, branch = random_inputs(4, SIZE)
    skip = randomized(RSkip(SIZE, recursions, affine="last", eps=EPS))
    xc, fc = centred(x), centred(branch)
    vx, vf, c_xf = ((u * v).mean(-1, keepdim=True) for u, v in ((xc, xc), (fc, fc), (xc, fc)))
    a, c = torch.ones_like(vx), torch.ones_like(vx)
    for step in range(recursions):
        s = torch.sqrt(a**2 * vx + c**2 * vf + 2 * a * c * c_xf + EPS)
        a, c = a / s + (step < recursions - 1), c / s
    expected = (a * xc + c * fc) * skip.norm[-1].weight + skip.norm[-1].bias
    assert_same_function(skip(x, branch), expected, [x, branch, *skip.parameters()])


@pytest.mark.parametrize("norm", FORMULAS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.414])
def test_xskip_is_its_formula(scale, norm):
    x, branch = random_inputs(3, 5, SIZE)
    skip = randomized(XSkip(SIZE, scale, norm, EPS))
    bias = 0.0 if skip.norm.bias is None else skip.norm.bias
    expected = FORMULAS[norm](scale * x + branch) * skip.norm.weight + bias
    assert_same_function(skip(x, branch), expected, [x, branch, *skip.parameters()])
    assert torch.autograd.gradcheck(lambda x, branch, *_: skip(x, branch), (x, branch, *skip.parameters()))


@pytest.mark.parametrize("norm", FORMULAS)
def test_pre_norm_is_its_formula(norm):
    x, _ = random_inputs(3, 5, SIZE)
    blocks = [randomized(PreNorm(SIZE, norm, EPS)) for _ in range(2)]
    final_norm = randomized(PreNorm.final_norm(SIZE, norm, EPS))
    branch = nn.Linear(SIZE, SIZE).double()

    def reference_norm(module, x):
        return FORMULAS[norm](x) * module.weight + (0.0 if module.bias is None else module.bias)

    actual = expected = x
    for skip in blocks:
        actual = skip(actual, branch(skip.before(actual)))
        expected = expected + branch(reference_norm(skip.norm, expected))
    parameters = [p for module in (*blocks, final_norm, branch) for p in module.parameters()]
    assert_same_function(final_norm(actual), reference_norm(final_norm, expected), [x, *parameters])


def test_post_ln_is_rskip_and_xskip():
    x, branch = random_inputs(3, 5, SIZE)
    norm = randomized(nn.LayerNorm(SIZE))
    for skip in (RSkip(SIZE, 1), RSkip(SIZE, 1, affine="shared"), RSkip(SIZE, 1, affine="last"), XSkip(SIZE, 1.0)):
        for parameter, value in zip(skip.double().parameters(), norm.parameters(), strict=True):
            parameter.data.copy_(value)
        torch.testing.assert_close(skip(x, branch), norm(x + branch), rtol=0, atol=0)


@pytest.mark.parametrize("recursions", RECURSIONS)
def test_without_a_norm_rskip_is_xskip(recursions):
    x, branch = random_inputs(3, SIZE)
    for skip in (RSkip(SIZE, recursions, "none"), XSkip(SIZE, recursions, "none")):
        assert not list(skip.parameters())
        assert_same_function(skip(x, branch), recursions * x + branch, [x, branch])


@pytest.mark.parametrize("recursions", RECURSIONS)
@pytest.mark.parametrize("norm", FORMULAS)
def test_affines_are_one_function_at_initialisation(norm, recursions):
    x, branch = random_inputs(3, 5, SIZE)
    expected = rskip(x, branch, FORMULAS[norm], [1.0] * recursions, [0.0] * recursions)
    for affine in AFFINES:
        assert_same_function(RSkip(SIZE, recursions, norm, affine).double()(x, branch), expected, [x, branch])


# The neighbours


def apply(formula, norm, x):
    """`formula` with the gain and bias of `norm`."""
    return formula(x) * norm.weight + (0.0 if norm.bias is None else norm.bias)


SCALED = {
    # kind: arguments, and the input of the norm behind the branch
    DeepNorm: ({"scale": 1.7, "beta": 0.5}, lambda skip, x, branch: 1.7 * x + branch),
    Admin: ({"scale": 1.7}, lambda skip, x, branch: skip.scale * x + branch),
    FixedAdmin: ({"scale": 1.7}, lambda skip, x, branch: 1.7 * x + branch),
    ReZero: ({}, lambda skip, x, branch: x + skip.branch_scale * branch),
    B2T: ({}, lambda skip, x, branch: x + branch),
    Keel: ({"scale": 12.0}, lambda skip, x, branch: 12 * x + branch),
}


@pytest.mark.parametrize("norm", FORMULAS)
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_forms_are_their_formulas(kind, norm):
    x, branch = random_inputs(3, 5, SIZE)
    options, argument = SCALED[kind]
    skip = randomized(kind(SIZE, **options, norm=norm, eps=EPS))
    expected = apply(FORMULAS[norm], skip.norm, argument(skip, x, branch))
    behind = [parameter for name, parameter in skip.named_parameters() if not name.startswith("branch_norm")]
    assert_same_function(skip(x, branch), expected, [x, branch, *behind])
    if kind is Keel:
        before = apply(FORMULAS[norm], skip.branch_norm, x)
        assert_same_function(skip.before(x), before, [x, *skip.branch_norm.parameters()])
    else:
        assert skip.before(x) is x


@pytest.mark.parametrize("norm", FORMULAS)
def test_peri_norm_is_its_formula(norm):
    x, branch = random_inputs(3, 5, SIZE)
    skip = randomized(PeriNorm(SIZE, norm=norm, eps=EPS))
    assert_same_function(skip.before(x), apply(FORMULAS[norm], skip.norm, x), [x, *skip.norm.parameters()])
    expected = x + apply(FORMULAS[norm], skip.branch_norm, branch)
    assert_same_function(skip(x, branch), expected, [x, branch, *skip.branch_norm.parameters()])


def test_rezero_without_a_norm():
    x, branch = random_inputs(3, SIZE)
    skip = randomized(ReZero(SIZE, "none"))
    assert_same_function(skip(x, branch), x + skip.branch_scale * branch, [x, branch, skip.branch_scale])


@pytest.mark.parametrize("recursions", RECURSIONS)
def test_detached_rskip_has_the_values_of_rskip_and_the_gradient_of_a_constant_weight(recursions):
    x, branch = random_inputs(20, SIZE)
    skip = randomized(DetachedRSkip(SIZE, recursions, eps=0))  # which stands at another place of the formula
    peer = RSkip(SIZE, recursions, affine="last", eps=0).double()
    peer.norm[-1].load_state_dict(skip.norm.state_dict())
    torch.testing.assert_close(skip(x, branch), peer(x, branch))
    with torch.no_grad():
        weight = torch.ones(20, 1, dtype=torch.float64)
        for _ in range(recursions - 1):
            argument = centred(weight * x + branch)
            weight = weight + torch.sqrt((argument * argument).mean(-1, keepdim=True))
    expected = apply(standardized, skip.norm, weight * x + branch)
    assert_same_function(skip(x, branch), expected, [x, branch, *skip.parameters()])
    upstream = torch.randn(20, SIZE, dtype=torch.float64)
    gradients = [torch.autograd.grad(module(x, branch), x, upstream)[0] for module in (skip, peer)]
    assert torch.allclose(*gradients) == (recursions == 1)


# Facts that follow from the formulas (unit gains)


def test_output_is_parallel_to_an_effective_scale():
    x, branch = random_inputs(20, 32)
    r = torch.ones(20, 1, dtype=torch.float64)
    for recursions in range(1, 6):
        y = RSkip(32, recursions, eps=0).double()(x, branch)
        torch.testing.assert_close(y, standardized(r * x + branch))
        r = r + (r * x + branch).std(-1, correction=0, keepdim=True)


@pytest.mark.parametrize("branch_scale", [0.1, 1.0, 30.0])
def test_each_step_halves_the_angle(branch_scale):
    x, branch = random_inputs(20, 32)
    x, branch = standardized(x), branch_scale * branch
    first = angle(x, RSkip(32, 1, eps=0).double()(x, branch))
    for recursions in range(2, 6):
        y = RSkip(32, recursions, eps=0).double()(x, branch)
        torch.testing.assert_close(angle(x, y), first / 2 ** (recursions - 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("recursions", "weight"), [(1, 1.0), (2, 2.414), (3, 5.027), (4, 10.153), (5, 20.355)])
@pytest.mark.parametrize("branch_std", [0.3, 1.0, 4.0])
def test_effective_scale_of_an_orthogonal_branch(recursions, weight, branch_std):
    x, branch = (standardized(tensor) for tensor in random_inputs(20, 32))
    branch = branch_std * standardized(branch - (branch * x).mean(-1, keepdim=True) * x)
    y = RSkip(32, recursions, eps=0).double()(x, branch)
    r = (y * x).mean(-1) / ((y * branch).mean(-1) / branch_std**2)
    expected = branch_std / math.tan(math.atan(branch_std) / 2 ** (recursions - 1))
    torch.testing.assert_close(r, torch.full_like(r, expected))
    if branch_std == 1.0:
        assert expected == pytest.approx(weight, abs=6e-4)


def test_two_recursions_rotate_by_less_than_a_right_angle():
    x, branch = random_inputs(200, 8)
    x, branch = standardized(x), 1e4 * branch
    assert angle(x, XSkip(8, 2.0).double()(x, branch)).max() > math.radians(120)
    assert angle(x, RSkip(8, 2).double()(x, branch)).max() < math.radians(90)


# Batch normalisation against torch


@pytest.mark.parametrize("momentum", [0.1, None])  # `None` is set by `torch.optim.swa_utils.update_bn`
@pytest.mark.parametrize("padding", [None, 1e3, math.inf])
def test_batch_norm_is_that_of_torch_on_the_kept_tokens(padding, momentum):
    torch.manual_seed(0)
    norm, peer = randomized(NORMS["batch_norm"](SIZE)), nn.BatchNorm1d(SIZE, momentum=momentum).double()
    peer.load_state_dict(norm.state_dict())
    norm.momentum = momentum
    for _ in range(3):
        hidden = 2 + 3 * torch.randn(4, 7, SIZE, dtype=torch.float64)
        mask = None if padding is None else torch.rand(4, 7) < 0.6
        keep = torch.ones(4, 7, dtype=torch.bool) if mask is None else mask
        kept = hidden[keep].requires_grad_()
        if padding is not None:
            hidden[~mask] = padding
        hidden.requires_grad_()
        actual, expected = norm(hidden, mask)[keep], peer(kept)
        torch.testing.assert_close(actual, expected)
        if padding == math.inf:  # the statistics are sound, but infinity times a gradient of zero is not
            continue
        upstream = torch.randn_like(expected)
        actual = torch.autograd.grad(actual, [hidden, *norm.parameters()], upstream)
        expected = torch.autograd.grad(expected, [kept, *peer.parameters()], upstream)
        torch.testing.assert_close(actual[0][keep], expected[0])
        torch.testing.assert_close(actual[1:], expected[1:])
    torch.testing.assert_close(norm.state_dict(), peer.state_dict())
    assert norm.num_batches_tracked == 3
    hidden = torch.randn(4, 7, SIZE, dtype=torch.float64)
    torch.testing.assert_close(norm.eval()(hidden, keep), peer.eval()(hidden.mT).mT)


@pytest.mark.parametrize("affine", AFFINES)
def test_rskip_with_batch_norm_has_statistics_of_its_own_for_each_step(affine):
    skip = randomized(RSkip(SIZE, 3, "batch_norm", affine))
    peers = [nn.BatchNorm1d(SIZE, affine=False).double() for _ in range(3)]
    for training in (True, False):
        skip.train(training)
        x, branch = (tensor.detach() for tensor in random_inputs(50, SIZE))
        y = branch
        for peer, gain, bias in zip(peers, *gains_and_biases(skip.norm, affine), strict=True):
            y = peer.train(training)(x + y) * gain + bias
        torch.testing.assert_close(skip(x, branch), y)
    for norm, peer in zip(skip.norm, peers, strict=True):
        torch.testing.assert_close(dict(norm.named_buffers()), dict(peer.named_buffers()))


# Every kind as a module of its own

KINDS = [
    pytest.param(kind, {"norm": norm, **options}, id="-".join([kind.__name__, norm, *map(str, options.values())]))
    for kind, choices in {
        RSkip: [{"recursions": 1}, {"recursions": 3}, {"affine": "shared"}, {"affine": "last"}],
        DetachedRSkip: [{}],
        XSkip: [{}, {"scale": 2.414}],
        PreNorm: [{}],
        PeriNorm: [{}],
        **{kind: [options] for kind, (options, _) in SCALED.items()},
    }.items()
    for options in choices
    for norm in NORMS
    if norm in kind.norms
]


class Block(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.branch = nn.Linear(8, 8)
        self.skip = skip

    def forward(self, x, mask=None):
        return self.skip(x, self.branch(self.skip.before(x, mask)), mask)


def test_every_kind_of_the_table_is_tested_here():
    assert {param.values[0] for param in KINDS} == set(SKIP_CONNECTIONS.values())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_trains_in_a_module_of_ones_own(kind, options):
    torch.manual_seed(0)
    skip = kind(8, **options)
    block = Block(skip)
    x, target = torch.randn(2, 4, 5, 8)
    mask = torch.rand(4, 5) < 0.7
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        y = block(x, mask)
        assert y.shape == x.shape
        loss = (y - target)[mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        # ReZero's branch begins to learn with the second step.
        learning = [skip.branch_scale] if kind is ReZero and not losses else block.parameters()
        assert all(parameter.grad.abs().max() > 0 for parameter in learning)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_keeps_bfloat16(kind, options):
    block = Block(kind(8, **options)).bfloat16()
    x = torch.randn(4, 5, 8)
    for training in (True, False):
        y = block.train(training)(x.bfloat16())
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
    torch.testing.assert_close(y.float(), block.float()(x.bfloat16().float()), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", SKIP_CONNECTIONS)
def test_from_config_is_the_constructor(kind):
    config = SimpleNamespace(
        skip_norm="rms_norm", skip_recursions=3, skip_scale=0.5, skip_norm_affine="shared", layer_norm_eps=1e-3
    )
    if kind == "rskip_detached":
        config.skip_norm = "layer_norm"
    common = {"norm": config.skip_norm, "eps": 1e-3}
    admin = math.sqrt(9 / math.log(9) - 1)  # L = 8
    direct = {
        "rskip": lambda: RSkip(8, recursions=3, affine="shared", **common),
        "rskip_detached": lambda: DetachedRSkip(8, recursions=3, **common),
        "xskip": lambda: XSkip(8, scale=0.5, **common),
        "deep_norm": lambda: DeepNorm(8, 0.81 * 512 ** (1 / 16), 0.87 * 512 ** (-1 / 16), **common),
        "admin": lambda: Admin(8, admin, **common),
        "admin_fixed": lambda: FixedAdmin(8, admin, **common),
        "rezero": lambda: ReZero(8, **common),
        "b2t": lambda: B2T(8, 4, **common),
        "pre_norm": lambda: PreNorm(8, **common),
        "peri_norm": lambda: PeriNorm(8, **common),
        "keel": lambda: Keel(8, 8.0, **common),
    }[kind]()
    found = SKIP_CONNECTIONS[kind].from_config(config, 8, SublayerPosition("encoder", 0, 0, 4, 2, other_layers=2))
    assert str(found) == str(direct)
    assert found.branch_gains == direct.branch_gains
    assert all(map(torch.equal, found.parameters(), direct.parameters()))


@pytest.mark.parametrize("kind", SKIP_CONNECTIONS)
def test_every_kind_is_built_from_a_position_alone(kind):
    kind, x = SKIP_CONNECTIONS[kind], torch.randn(2, 3, SIZE)
    skips = [kind.for_position(SIZE, SublayerPosition("encoder", 2, place, 12, 2), eps=1e-3) for place in (0, 1)]
    norms = [module for skip in skips for module in skip.modules() if hasattr(module, "eps")]
    assert norms and {norm.eps for norm in norms} == {1e-3}
    hidden = x
    for skip in skips:
        hidden = skip(hidden, 0.5 * skip.before(hidden))
    around = kind.around_layer(SIZE)
    hidden = hidden if around is None else around(x, hidden)
    assert kind.final_norm(SIZE)(hidden).isfinite().all()


def test_constants_of_a_position():
    """The published ones: DeepNorm's table by architecture, Admin's and Keel's by the sublayers of a stack."""

    def position(sublayer=0, **other):
        return SublayerPosition("encoder", layer=0, sublayer=sublayer, num_layers=18, num_sublayers=2, **other)

    alone = DeepNorm.for_position(8, position())
    both = DeepNorm.for_position(8, position(other_layers=6))
    decoder = DeepNorm.for_position(8, SublayerPosition("decoder", 0, 0, 6, 3, other_layers=18))
    assert [skip.scale for skip in (alone, both, decoder)] == pytest.approx(
        [36**0.25, 0.81 * (18**4 * 6) ** 0.0625, 18**0.25]
    )
    assert [skip.branch_gains["fc1"] for skip in (alone, both, decoder)] == pytest.approx(
        [144**-0.25, 0.87 * (18**4 * 6) ** -0.0625, 72**-0.25]
    )
    assert Admin.for_position(8, position()).first_scale == pytest.approx(math.sqrt(37 / math.log(37) - 1))
    assert FixedAdmin.for_position(8, position()).scale == pytest.approx(math.sqrt(37 / math.log(37) - 1))
    assert Keel.for_position(8, position()).scale == 36
    first, last = (B2T.for_position(8, position(sublayer), norm="rms_norm") for sublayer in (0, 1))
    assert type(first.norm) is NORMS["rms_norm"] and type(last.norm) is NoNorm
    assert last.branch_gains == pytest.approx({"out_proj": 18**-0.5, "fc2": 18**-0.5})
    assert RSkip.for_position(8, position(), recursions=3, affine="last").extra_repr() == "recursions=3, affine=last"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("middle", 0, 0, 12, 2), "`stack` must be 'encoder' or 'decoder', not 'middle'"),
        (("encoder", 12, 0, 12, 2), "`layer` must be from 0 to below `num_layers` 12, not 12"),
        (("decoder", 0, -1, 12, 3), "`sublayer` must be from 0 to below `num_sublayers` 3, not -1"),
    ],
)
def test_positions_that_there_are_not(values, message):
    with pytest.raises(ValueError, match=message):
        SublayerPosition(*values)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    size=st.integers(1, 5),
    recursions=st.integers(1, 3),
    contiguous=st.booleans(),
)
def test_any_leading_shape(shape, size, recursions, contiguous):
    x, branch = (tensor.detach() for tensor in random_inputs(*shape, size))
    if not contiguous:
        x, branch = x.repeat_interleave(2, -1)[..., ::2], branch.mT.contiguous().mT if shape else branch
    skip = randomized(RSkip(size, recursions))
    expected = rskip(x, branch, layer_norm, *gains_and_biases(skip.norm, "per_step"))
    torch.testing.assert_close(skip(x, branch), expected)
    expected = layer_norm(0.5 * x + branch)
    torch.testing.assert_close(XSkip(size, 0.5).double()(x, branch), expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RSkip, {"recursions": 0}, "`recursions` must be an integer of at least 1, not 0"),
        (RSkip, {"recursions": 1.5}, "`recursions` must be an integer of at least 1, not 1.5"),
        (RSkip, {"recursions": True}, "`recursions` must be an integer of at least 1, not True"),
        (RSkip, {"affine": "first"}, "`affine` must be one of per_step, shared, last, not 'first'"),
        (XSkip, {"scale": math.nan}, "`scale` must be a finite number, not nan"),
        (RSkip, {"norm": "group_norm"}, f"`norm` must be one of {', '.join(NORMS)}, not 'group_norm'"),
    ],
)
def test_wrong_values_are_one_sentence(kind, options, message):
    with pytest.raises(ValueError) as error:
        kind(8, **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "norm"),
    [(kind, norm) for kind in SKIP_CONNECTIONS.values() for norm in (*NORMS, "group_norm") if norm not in kind.norms],
)
def test_norms_that_a_kind_does_not_have(kind, norm):
    """By name or class."""
    for asked in {norm, NORMS.get(norm, norm)}:
        with pytest.raises(ValueError) as error:
            kind.for_position(8, SublayerPosition("encoder", 0, 0, 2, 2), norm=asked)
        assert str(error.value) == f"`norm` must be one of {', '.join(kind.norms)}, not {norm!r}"


@pytest.mark.parametrize("kind", [RSkip, XSkip])
def test_a_norm_of_ones_own_has_a_name_when_the_table_has_it(monkeypatch, kind):
    class Halved(NoNorm):
        def normalize(self, hidden, weight, bias, mask=None):
            return hidden / 2

    monkeypatch.setitem(NORMS, "halved", Halved)
    assert kind(8, 1, norm="halved")(torch.ones(8), torch.ones(8)).tolist() == [1.0] * 8


# Feature maps: formulas of (batch, channels, height, width); skip connections see the same memory with channels last

MAP = (3, 4, 5, 2)
SAMPLE, CHANNELS, BATCH = (1, 2, 3), (1,), (0, 2, 3)


def map_norm(name, axes):
    """The norm as a formula of an NCHW tensor, and the dimensions over which it goes."""
    dims = BATCH if name == "batch_norm" else {"sample": SAMPLE, "channels": CHANNELS}[axes]

    def norm(x):
        if name != "rms_norm":
            x = x - x.sum(dims, keepdim=True) / math.prod(x.shape[dim] for dim in dims)
        square = (x * x).sum(dims, keepdim=True) / math.prod(x.shape[dim] for dim in dims)
        return x / (square + EPS) ** 0.5

    return norm


def affine_of(module):
    """Gain and bias of a norm for an NCHW tensor."""
    return tuple(
        default if parameter is None else parameter[:, None, None]
        for parameter, default in ((module.weight, 1.0), (module.bias, 0.0))
    )


def random_maps(memory_format=torch.contiguous_format, shape=MAP):
    """x and F as NCHW leaves."""
    x, branch = (tensor.detach().contiguous(memory_format=memory_format) for tensor in random_inputs(*shape))
    return x.requires_grad_(), branch.requires_grad_()


def on_maps(function):
    """`function` of tensors with the features last, as one of NCHW tensors."""
    return lambda *tensors: function(*(tensor.movedim(1, -1) for tensor in tensors)).movedim(-1, 1)


MAP_NORMS = [(norm, axes) for axes in NORM_AXES for norm in FORMULAS]
MEMORY = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def config_of(norm, axes, **options):
    defaults = {"skip_recursions": 1, "skip_scale": 1.0, "skip_norm_affine": "per_step", "layer_norm_eps": EPS}
    return SimpleNamespace(skip_norm=norm, skip_norm_axes=axes, **(defaults | options))


def skip_from(kind, config, branch_size=None):
    return randomized(
        SKIP_CONNECTIONS[kind].from_config(config, MAP[1], SublayerPosition("encoder", 0, 0, 2, 1, branch_size))
    )


@MEMORY
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_norms_of_maps_are_their_formulas(name, axes, memory_format):
    x, _ = random_maps(memory_format)
    for elementwise_affine in (True, False):
        norm = randomized(NORM_AXES[axes][name](MAP[1], eps=EPS, elementwise_affine=elementwise_affine))
        gain, bias = affine_of(norm)
        assert_same_function(on_maps(norm)(x), map_norm(name, axes)(x) * gain + bias, [x, *norm.parameters()])
        inputs = (x, *norm.parameters())
        assert torch.autograd.gradcheck(lambda x, *_, norm=norm: on_maps(norm)(x), inputs)


@MEMORY
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm"])
def test_norms_over_whole_samples_keep_the_order_in_memory(name, memory_format):
    x, _ = random_maps(memory_format)
    y = on_maps(NORM_AXES["sample"][name](MAP[1]).double())(x)
    assert y.is_contiguous(memory_format=memory_format)


@MEMORY
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("recursions", [1, 2, 3])
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_rskip_of_maps_is_its_formula(name, axes, recursions, affine, memory_format):
    x, branch = random_maps(memory_format)
    skip = skip_from("rskip", config_of(name, axes, skip_recursions=recursions, skip_norm_affine=affine))
    gains, biases = gains_and_biases(skip.norm, affine)
    gains = [gain if isinstance(gain, float) else gain[:, None, None] for gain in gains]
    biases = [bias if isinstance(bias, float) else bias[:, None, None] for bias in biases]
    expected = rskip(x, branch, map_norm(name, axes), gains, biases)
    assert_same_function(on_maps(skip)(x, branch), expected, [x, branch, *skip.parameters()])


@MEMORY
@pytest.mark.parametrize("scale", [1.0, 2.414])
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_xskip_of_maps_is_its_formula(name, axes, scale, memory_format):
    x, branch = random_maps(memory_format)
    skip = skip_from("xskip", config_of(name, axes, skip_scale=scale))
    gain, bias = affine_of(skip.norm)
    expected = map_norm(name, axes)(scale * x + branch) * gain + bias
    assert_same_function(on_maps(skip)(x, branch), expected, [x, branch, *skip.parameters()])
    plain = skip_from("xskip", config_of("none", axes, skip_scale=scale))
    assert_same_function(on_maps(plain)(x, branch), scale * x + branch, [x, branch])


@MEMORY
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_pre_norm_of_maps_is_its_formula(name, axes, memory_format):
    x, branch = random_maps(memory_format)
    config = config_of(name, axes)
    wider = torch.randn(3, 7, 5, 2, dtype=torch.float64).requires_grad_()  # where a shortcut changes the channels
    for size, before in ((None, x), (7, wider)):
        skip = skip_from("pre_norm", config, size)
        gain, bias = affine_of(skip.norm)
        leaves = [before, *skip.parameters()]
        assert_same_function(on_maps(skip.before)(before), map_norm(name, axes)(before) * gain + bias, leaves)
        torch.testing.assert_close(on_maps(skip)(x, branch), x + branch, rtol=0, atol=0)
    final_norm = randomized(PreNorm.final_norm(MAP[1], norm_of(config), EPS))
    gain, bias = affine_of(final_norm)
    expected = map_norm(name, axes)(x) * gain + bias
    assert_same_function(on_maps(final_norm)(x), expected, [x, *final_norm.parameters()])


@pytest.mark.parametrize("kind", ["peri_norm", "keel"])
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_norms_on_both_sides_of_a_branch_of_other_channels(name, axes, kind):
    x, branch = random_maps()
    wider = torch.randn(3, 7, 5, 2, dtype=torch.float64)
    skip = skip_from(kind, config_of(name, axes), 7)
    norms = {"peri_norm": (skip.norm, skip.branch_norm), "keel": (skip.branch_norm, skip.norm)}[kind]
    (gain, bias), (gain_behind, bias_behind) = map(affine_of, norms)
    formula = map_norm(name, axes)
    torch.testing.assert_close(on_maps(skip.before)(wider), formula(wider) * gain + bias)
    if kind == "peri_norm":
        expected = x + formula(branch) * gain_behind + bias_behind
    else:
        expected = formula(2 * x + branch) * gain_behind + bias_behind
    assert_same_function(on_maps(skip)(x, branch), expected, [x, branch])


@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_one_recursion_is_xskip_with_scale_one_on_maps(name, axes):
    x, branch = random_maps()
    xskip = skip_from("xskip", config_of(name, axes))
    for affine in AFFINES:
        skip = skip_from("rskip", config_of(name, axes, skip_norm_affine=affine))
        skip.norm[0].load_state_dict(xskip.norm.state_dict())
        torch.testing.assert_close(on_maps(skip)(x, branch), on_maps(xskip)(x, branch), rtol=0, atol=0)


@MEMORY
def test_batch_norm_of_maps_is_that_of_torch(memory_format):
    torch.manual_seed(0)
    norm, peer = randomized(NORMS["batch_norm"](MAP[1])), nn.BatchNorm2d(MAP[1]).double()
    peer.load_state_dict(norm.state_dict())
    for training in (True, True, True, False):
        norm.train(training), peer.train(training)
        x = (1 + 3 * torch.randn(MAP, dtype=torch.float64)).contiguous(memory_format=memory_format).requires_grad_()
        upstream = torch.randn_like(x)
        outputs = [on_maps(norm)(x), peer(x)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        modules = zip(outputs, (norm, peer), strict=True)
        torch.testing.assert_close(*(torch.autograd.grad(y, [x, *m.parameters()], upstream) for y, m in modules))
    torch.testing.assert_close(norm.state_dict(), peer.state_dict(), rtol=0, atol=0)
    assert norm.num_batches_tracked == 3


@MEMORY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "axes"), MAP_NORMS)
def test_norms_of_maps_in_low_precision(name, axes, dtype, memory_format):
    x = random_maps(memory_format, (2, 8, 16, 16))[0].detach()
    norm = NORM_AXES[axes][name](8)
    expected = map_norm(name, axes)(x)
    for training in (True, False):
        y = on_maps(norm.to(dtype).train(training))(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()
        if training:
            torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    # Squares of numbers like these overflow in float16.
    if name != "batch_norm":
        large = on_maps(norm)((300 * x).to(dtype))
        torch.testing.assert_close(large.double(), expected, rtol=0.03, atol=0.03)


def test_batch_norm_of_a_single_value_a_channel():
    """Where torch raises an error; as with masks, the value is its own mean."""
    norm = NORMS["batch_norm"](MAP[1]).double()
    assert on_maps(norm)(torch.randn(1, MAP[1], 1, 1, dtype=torch.float64)).abs().max() == 0
    assert all(buffer.isfinite().all() for buffer in norm.buffers())
    vector = torch.randn(MAP[1], dtype=torch.float64)
    torch.testing.assert_close(norm.eval()(vector), norm(vector[None])[0])
