"""Recursive skip connections over whole feature maps against the formula in float64: values and all gradients."""

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
    assert_second_derivatives,
    random_leaves,
    results,
)

from hf_rskip import RSkipResNetConfig, RSkipResNetForImageClassification, rskip_layer_norm
from hf_rskip.kernels import hook, rskip
from hf_rskip.models.skip_connections import AFFINES


def pixels(maps):
    """The features of a position side by side, as in the memory of `channels_last`."""
    return maps.contiguous()


def planes(maps):
    """The positions of a feature side by side, as in the memory of a map `(batch, channels, height, width)`."""
    return maps.movedim(-1, 1).contiguous().movedim(1, -1)


def neither(maps):
    return maps.repeat_interleave(2, 0)[::2].transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = pytest.mark.parametrize("layout", [planes, pixels], ids=lambda layout: layout.__name__)
CLOSED_FORM = {"backend": "closed_form", "axes": "sample"}


def random_maps(layout, *args):
    (x, branch, *affine), upstream = random_leaves(*args)
    return [layout(x), layout(branch), *affine], layout(upstream)


def assert_maps_equal_formula(*args):
    return assert_equals_formula("closed_form", *args, axes="sample")


@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(
    samples=st.integers(0, 4),
    spatial=st.lists(st.integers(1, 6), max_size=3),
    size=st.one_of(st.integers(4, 40), st.sampled_from([64, 100])),
    recursions=st.integers(1, 5),
    affine=st.sampled_from(AFFINES),
    of_x=st.sampled_from(sorted(EXTREMES)),
    of_branch=st.sampled_from(sorted(EXTREMES)),
    layouts=st.tuples(*[st.sampled_from([planes, pixels, neither])] * 3),
)
@example(9, [2, 2], 5, 4, "per_step", "plain", "plain", (planes,) * 3)
@example(2, [6, 7], 1, 2, "per_step", "plain", "plain", (planes,) * 3)
@example(1, [40, 41], 3, 3, "per_step", "offset", "plain", (pixels,) * 3)
@example(1, [3, 3], 600, 3, "last", "plain", "plain", (pixels,) * 3)
@example(1, [5, 5], 16, 6, "per_step", "zero", "zero", (planes,) * 3)
@example(2, [5, 5], 16, 3, "last", "constant rows", "plain", (planes,) * 3)
def test_values_and_gradients(samples, spatial, size, recursions, affine, of_x, of_branch, layouts):
    leaves, upstream = random_leaves((samples, *spatial, size), recursions, affine)
    maps = [EXTREMES[of_x](leaves[0]), EXTREMES[of_branch](leaves[1]), upstream]
    *leaves[:2], upstream = (layout(map) for layout, map in zip(layouts, maps, strict=True))
    assert_maps_equal_formula(leaves, upstream, recursions, affine)


@LAYOUTS
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=str)
def test_low_and_mixed_precision(dtypes, layout):
    """One rounding at the end, not one a step; y and the gradients of x and F lie in memory as x does."""
    leaves, upstream = random_maps(layout, (2, 5, 7, 6), 4, "per_step", dtypes)
    found = assert_maps_equal_formula(leaves, upstream, 4)
    assert {value.stride() for value in found[:3]} == {leaves[0].stride()}


@LAYOUTS
def test_rms_norm(layout):
    for shape, affine in (((0, 4, 16), "shared"), ((2, 6, 5, 24), "per_step"), ((2, 100), "last")):
        leaves, upstream = random_maps(layout, shape, 3, affine)
        assert_maps_equal_formula([leaves[0] + 1, *leaves[1:3]], upstream, 3, affine)  # a mean that must stay


@pytest.mark.parametrize("affine", ["per_step", "last"])
def test_samples_of_zeros_at_any_depth(affine):
    leaves, upstream = random_maps(planes, (1, 3, 3, 8), 20, affine)
    leaves[:2] = (torch.zeros_like(leaf) for leaf in leaves[:2])
    y, *gradients = results(rskip_layer_norm, leaves, upstream, 20, affine, **CLOSED_FORM)
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert affine != "last" or torch.equal(y, leaves[3].expand(y.shape))


@LAYOUTS
def test_what_is_kept(layout):
    """x, F, gains, biases and five numbers a feature and sample, whatever K is."""
    leaves, _ = random_maps(layout, (3, 16, 16, 8), 8)
    given, kept = {leaf.untyped_storage().data_ptr() for leaf in leaves}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given and tensor.shape != (8, 8):  # rows of gains and biases
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rskip_layer_norm(*(leaf.requires_grad_() for leaf in leaves), 8, **CLOSED_FORM)
    assert y.requires_grad
    assert sum(kept.values()) == 5 * 4 * 3 * 8


def test_gradients_that_are_not_required():
    assert_gradients_are_the_same_alone(*random_maps(planes, (3, 5, 4, 6), 2), **CLOSED_FORM)


@LAYOUTS
def test_y_can_be_modified_in_place(layout):
    """As by `nn.ReLU(inplace=True)`."""
    leaves, upstream = random_maps(layout, (3, 5, 4, 6), 2)
    found, expected = (
        results(lambda *leaves, act=act: act(rskip_layer_norm(*leaves, **CLOSED_FORM)), leaves, upstream)
        for act in (torch.relu_, torch.relu)
    )
    assert all(map(torch.equal, found, expected))


def test_compile_and_checkpoint_see_through_it():
    leaves, upstream = random_maps(planes, (3, 5, 4, 6), 3)
    assert_compile_and_checkpoint_see_through("closed_form", leaves, upstream, "per_step", "sample")


@LAYOUTS
def test_second_derivatives(layout):
    leaves, upstream = random_maps(layout, (3, 5, 4, 6), 3)
    assert_second_derivatives("closed_form", leaves, upstream, 3, "per_step", "sample")


def test_auto_leaves_to_torch_what_it_does_as_well():
    def chosen(shape, recursions=8, **options):
        x = torch.empty(shape, **options)
        return rskip.choose_backend(x, x, recursions, "sample")

    for shape in ((128, 32, 32, 16), (8, 56, 56, 64)):
        assert chosen(shape) == "closed_form" and chosen(shape, 4) == "reference"
    assert chosen((128, 8, 8, 64)) == chosen((16, 32, 32, 16)) == "reference"
    assert chosen((128, 32, 32, 16), dtype=torch.float64) == chosen((128, 32, 32, 16), device="meta") == "reference"


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_resnet_is_the_same(monkeypatch, norm, memory_format):
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

    found, expected = map(loss_and_gradients, ("closed_form", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
