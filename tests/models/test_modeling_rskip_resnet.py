"""The ResNet against the formulas of its papers in float64, and against Transformers' ResNet."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, ResNetConfig, ResNetForImageClassification

from hf_rskip import (
    SKIP_CONNECTIONS,
    RSkipResNetBackbone,
    RSkipResNetConfig,
    RSkipResNetForImageClassification,
    RSkipResNetModel,
)
from hf_rskip.models.modeling_rskip_resnet import RSkipResNetLayer

PLAIN = {"skip_type": "xskip", "skip_norm": "none"}
KINDS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param({"skip_recursions": 2}, id="rskip-layer_norm-sample"),
    pytest.param({"skip_recursions": 3, "skip_norm": "batch_norm", "skip_norm_affine": "last"}, id="rskip-batch_norm"),
    pytest.param({"skip_type": "xskip", "skip_scale": 2.414, "skip_norm_axes": "channels"}, id="xskip-channels"),
    pytest.param({"skip_type": "pre_norm", "skip_norm": "rms_norm"}, id="pre_norm-rms_norm"),
    pytest.param({"skip_type": "admin"}, id="admin"),
    pytest.param({"skip_type": "admin_fixed"}, id="admin_fixed"),
    pytest.param({"skip_type": "rezero"}, id="rezero"),
    pytest.param({"skip_type": "peri_norm"}, id="peri_norm"),
    pytest.param({"skip_type": "keel", "skip_norm": "batch_norm"}, id="keel"),
]
EPS, BATCH_EPS = 1e-3, 1e-5
TINY = {
    "embedding_size": 6,
    "hidden_sizes": [8, 12],
    "depths": [2, 1],
    "layer_type": "basic",
    "stem_type": "cifar",
    "num_labels": 5,
    "layer_norm_eps": EPS,
}


def build(cls=RSkipResNetForImageClassification, dtype=torch.float64, **values):
    """A tiny model with parameters and running statistics away from where they start, in training mode."""
    torch.manual_seed(0)
    model = cls(RSkipResNetConfig(**(TINY | values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model.to(dtype).train()


def images(dtype=torch.float64, size=16):
    torch.manual_seed(1)
    return torch.randn(4, 3, size, size, dtype=dtype), torch.tensor([0, 4, 2, 2])


# The network as its papers write it: functions of tensors and a table of weights


class Reference:
    """Logits in training mode. Nothing of the models is used but the names of the weights."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights

    def norm(self, x, name, dims, eps=BATCH_EPS, centre=True):
        if centre:
            x = x - x.mean(dims, keepdim=True)
        x = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
        if f"{name}.weight" in self.weights:
            x = x * self.weights[f"{name}.weight"][:, None, None]
        if f"{name}.bias" in self.weights:
            x = x + self.weights[f"{name}.bias"][:, None, None]
        return x

    def batch_norm(self, x, name):
        return self.norm(x, f"{name}.normalization", (0, 2, 3))

    def skip_norm(self, x, name):
        kind, axes = self.config.skip_norm, self.config.skip_norm_axes
        if kind == "none":
            return x
        dims = (0, 2, 3) if kind == "batch_norm" else {"sample": (1, 2, 3), "channels": (1,)}[axes]
        return self.norm(x, name, dims, EPS, centre=kind != "rms_norm")

    def convolve(self, x, name, stride=1):
        weight = self.weights[f"{name}.convolution.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def join(self, x, branch, name):
        config = self.config
        blocks = sum(config.depths)
        scales = {
            "xskip": config.skip_scale,
            "admin": self.weights.get(f"{name}.scale", torch.ones(1))[:, None, None],
            "admin_fixed": math.sqrt((blocks + 1) / math.log(blocks + 1) - 1),
            "keel": blocks,
        }
        if config.skip_type == "pre_norm":
            return x + branch
        if config.skip_type == "peri_norm":
            return x + self.skip_norm(branch, f"{name}.branch_norm")
        if config.skip_type == "rezero":
            return self.skip_norm(x + self.weights[f"{name}.branch_scale"] * branch, f"{name}.norm")
        if config.skip_type in scales:
            return self.skip_norm(scales[config.skip_type] * x + branch, f"{name}.norm")
        for step in range(config.skip_recursions):
            branch = self.skip_norm(x + branch, f"{name}.norm.{step}")
        return branch

    def shortcut(self, x, name, channels, stride):
        if self.config.shortcut_type == "A":
            missing = channels - x.shape[1]
            x = x[:, :, ::stride, ::stride]
            return torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)
        x = self.convolve(x, f"{name}.shortcut", stride)
        return x if self.config.preactivation else self.batch_norm(x, f"{name}.shortcut")

    def block(self, x, name, channels, stride):
        config, act = self.config, F.silu
        before = {"pre_norm": "norm", "peri_norm": "norm", "keel": "branch_norm"}.get(config.skip_type)
        start = self.skip_norm(x, f"{name}.skip.{before}") if before else x
        if config.layer_type == "basic":
            strides = [stride, 1]
        else:
            strides = [stride, 1, 1] if config.downsample_in_bottleneck else [1, stride, 1]
        changes = channels != x.shape[1] or stride != 1
        if config.preactivation:  # He et al. (2016b), figure 1b: x + conv(act(BN(conv(act(BN(x))))))
            start = act(self.batch_norm(start, f"{name}.preactivation"))
        h = start
        for index, stride_of_layer in enumerate(strides):
            h = self.convolve(h, f"{name}.layer.{index}", stride_of_layer)
            last = index == len(strides) - 1
            if not (config.preactivation and last):
                h = self.batch_norm(h, f"{name}.layer.{index}")
            h = h if last else act(h)
        x = self.shortcut(start, name, channels, stride) if changes else x
        y = self.join(x, h, f"{name}.skip")
        return y if config.preactivation else act(y)

    def __call__(self, x):
        config, act = self.config, F.silu
        h = self.convolve(x, "resnet.embedder.embedder", {"imagenet": 2, "cifar": 1}[config.stem_type])
        if not config.preactivation:
            h = act(self.batch_norm(h, "resnet.embedder.embedder"))
        if config.stem_type == "imagenet":
            h = F.max_pool2d(h, 3, 2, 1)
        for stage, (channels, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            for index in range(depth):
                halves = index == 0 and (stage > 0 or config.downsample_in_first_stage)
                h = self.block(h, f"resnet.encoder.stages.{stage}.layers.{index}", channels, 2 if halves else 1)
        if config.skip_type in ("pre_norm", "peri_norm"):
            h = self.skip_norm(h, "resnet.encoder.final_norm")
        if config.preactivation:
            h = act(self.batch_norm(h, "resnet.encoder.final_activation"))
        return h.mean((2, 3)) @ self.weights["classifier.1.weight"].T + self.weights["classifier.1.bias"]


@pytest.mark.parametrize(
    "shape",
    [
        {"stem_type": "imagenet"},
        {"shortcut_type": "A", "downsample_in_first_stage": True},
        {"layer_type": "bottleneck", "hidden_sizes": [8, 16]},
        {"layer_type": "bottleneck", "hidden_sizes": [8, 16], "shortcut_type": "A", "downsample_in_bottleneck": True},
    ],
    ids=["basic-B", "basic-A", "bottleneck-B", "bottleneck-A"],
)
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_its_formulas(kind, preactivation, shape):
    model = build(**kind, **shape, preactivation=preactivation, hidden_act="silu")
    x, labels = images()
    x.requires_grad_()
    parameters = dict(model.named_parameters())
    expected = Reference(model.config, parameters)(x)
    outputs = model(x, labels=labels)
    torch.testing.assert_close(outputs.logits, expected)
    expected_loss = -expected.log_softmax(-1)[range(4), labels].mean()
    torch.testing.assert_close(outputs.loss, expected_loss)
    leaves = [x, *parameters.values()]
    upstream = torch.randn_like(expected)
    actual, expected = (torch.autograd.grad(y, leaves, upstream) for y in (outputs.logits, expected))
    torch.testing.assert_close(actual, expected)
    unused = [name for name, gradient in zip(["x", *parameters], actual, strict=True) if gradient.abs().max() == 0]
    assert not unused


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64(kind, preactivation):
    x, labels = images()
    results = []
    for dtype in (torch.float64, torch.float32):
        model = build(dtype=dtype, **kind, preactivation=preactivation, hidden_act="silu")
        outputs = model(x.to(dtype), labels=labels)
        outputs.loss.backward()
        results.append([outputs.logits, outputs.loss, *(parameter.grad for parameter in model.parameters())])
    # Some gradients vanish but for rounding, as that of a bias before batch normalisation: these are seen against all.
    total = math.hypot(*(wide.norm().item() for wide in results[0]))
    for wide, narrow in zip(*results, strict=True):
        assert narrow.dtype == torch.float32
        assert (narrow - wide).norm() <= 1e-4 * wide.norm() + 1e-6 * total


@pytest.mark.parametrize("shape", [{}, {"layer_type": "bottleneck", "hidden_sizes": [8, 16]}])
def test_a_post_ln_block_is_one_recursion_and_scale_one(shape):
    """K = 1 with layer normalisation, xSkip with s = 1, and act(LN(shortcut + F)) with torch's group norm."""
    x, _ = images()
    rskip = build(skip_recursions=1, **shape)
    xskip = build(skip_type="xskip", **shape)
    xskip.load_state_dict({name.replace("norm.0", "norm"): value for name, value in rskip.state_dict().items()})
    torch.testing.assert_close(rskip(x).logits, xskip(x).logits, rtol=0, atol=0)
    block = rskip.resnet.encoder.stages[1].layers[0]
    h = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    norm = nn.GroupNorm(1, block.skip.norm[0].weight.numel(), eps=EPS).double()
    norm.load_state_dict(block.skip.norm[0].state_dict())
    torch.testing.assert_close(block(h), norm(block.shortcut(h) + block.layer(h)).relu())


# Transformers' ResNet


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("downsampling", [{}, {"downsample_in_first_stage": True, "downsample_in_bottleneck": True}])
def test_the_plain_network_is_that_of_transformers(layer_type, downsampling):
    shape = {"embedding_size": 6, "hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "layer_type": layer_type}
    options = {**shape, **downsampling, "num_labels": 5}
    torch.manual_seed(0)
    peer = ResNetForImageClassification(ResNetConfig(**options)).double()
    model = RSkipResNetForImageClassification(RSkipResNetConfig(**options, **PLAIN)).double()
    model.load_state_dict(peer.state_dict())
    for training in (True, True, False):
        model.train(training), peer.train(training)
        x, labels = images(size=64)
        outputs = [module(x, labels=labels, output_hidden_states=True) for module in (model, peer)]
        assert len(outputs[0].hidden_states) == 4
        for output in outputs:
            output.loss.backward()
        torch.testing.assert_close(*([output.logits, output.loss, *output.hidden_states] for output in outputs))
        torch.testing.assert_close(*([parameter.grad for parameter in m.parameters()] for m in (model, peer)))
    torch.testing.assert_close(model.state_dict(), peer.state_dict())
    torch.testing.assert_close(model.resnet(x).pooler_output, peer.resnet(x).pooler_output)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_weights_start_as_those_of_transformers(layer_type):
    options = {"hidden_sizes": [64, 128], "depths": [2, 2], "layer_type": layer_type, "num_labels": 50}
    torch.manual_seed(0)
    model = RSkipResNetForImageClassification(RSkipResNetConfig(**options, **PLAIN))
    peer = ResNetForImageClassification(ResNetConfig(**options))
    for name, parameter in peer.named_parameters():
        ours = model.get_parameter(name)
        assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.3, abs=1e-6), name
        # Six standard deviations of a mean of independent numbers.
        assert abs(ours.mean() - parameter.mean()) <= 6 * parameter.std() * (2 / parameter.numel()) ** 0.5, name
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), name


# What blocks do


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_zero_init_last_gain(layer_type, preactivation):
    torch.manual_seed(0)
    options = {"layer_type": layer_type, "hidden_sizes": [8, 16], "preactivation": preactivation}
    for zero_init_last_gain in (False, True):
        config = RSkipResNetConfig(**(TINY | PLAIN | options), zero_init_last_gain=zero_init_last_gain)
        model = RSkipResNetForImageClassification(config)
        for block in (module for module in model.modules() if isinstance(module, RSkipResNetLayer)):
            x = torch.randn(4, block.layer[0].convolution.in_channels, 6, 6)
            shortcut = block.shortcut(block.preactivation(x) if block.reshapes else x)
            starts_at_zero = torch.equal(block(x), block.activation(shortcut))
            assert starts_at_zero == zero_init_last_gain
        model(images(torch.float32)[0], labels=images()[1]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def drop_rates(**values):
    blocks = build(**values).modules()
    return [block.drop_path.rate for block in blocks if isinstance(block, RSkipResNetLayer)]


def test_drop_path_rates_grow_with_the_depth():
    assert drop_rates(depths=[2, 3], drop_path_rate=0.4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert drop_rates(depths=[2, 3]) == [0] * 5


def test_drop_path_drops_whole_samples_in_training():
    model = build(drop_path_rate=0.25)
    drop_path = model.resnet.encoder.stages[1].layers[0].drop_path
    assert drop_path.rate == 0.25
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        branch = torch.rand(4000, 2, 3, 3).to(dtype) + 1
        y = drop_path.train()(branch)
        assert y.dtype == dtype
        kept = (y != 0).flatten(1)
        assert torch.equal(kept.all(1), kept.any(1))
        # The standard deviation of this mean is 0.007.
        assert kept[:, 0].double().mean().item() == pytest.approx(0.75, abs=0.03)
        torch.testing.assert_close(y[kept[:, 0]], branch[kept[:, 0]] / 0.75)
        assert drop_path.eval()(branch) is branch


def test_a_dropped_branch_leaves_the_shortcut():
    block = build(**PLAIN, drop_path_rate=0.5).resnet.encoder.stages[1].layers[0]
    block.drop_path.rate = 1 - 1e-9
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), block.shortcut(x).relu(), rtol=0, atol=0)
    without = build(**PLAIN).eval()
    x, _ = images()
    assert torch.equal(build(**PLAIN, drop_path_rate=0.5).eval()(x).logits, without(x).logits)


# Losses


def test_the_loss_is_cross_entropy_in_nats():
    model, (x, labels) = build(dtype=torch.float32).eval(), images(torch.float32)
    outputs = model(x, labels=labels.byte())
    assert all(
        torch.equal(model(x, labels=labels.to(dtype)).loss, outputs.loss) for dtype in (torch.int32, torch.int64)
    )
    terms = -outputs.logits.log_softmax(-1)[range(4), labels]
    torch.testing.assert_close(outputs.loss, terms.mean())
    for items in (8, torch.tensor(8)):
        torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=items).loss, terms.sum() / 8)
    some = labels.clone()
    some[1] = -100
    torch.testing.assert_close(model(x, labels=some).loss, terms[[0, 2, 3]].mean())
    assert model.bfloat16()(x.bfloat16(), labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_losses_of_other_problems(problem_type, given):
    labels = {
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "multi_label_classification": torch.tensor([[0.0, 1.0, 1.0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        "single_label_classification": torch.tensor([0, 2, 1, 1]),
    }[problem_type]
    options = {"problem_type": problem_type} if given else {}
    model = build(num_labels=1 if problem_type == "regression" else 3, **options)
    x, _ = images()
    outputs = model(x, labels=labels)
    logits = outputs.logits
    terms = {
        "regression": lambda: (logits[:, 0] - labels).square(),
        "multi_label_classification": lambda: (1 + logits.exp()).log() - labels * logits,
        "single_label_classification": lambda: logits.exp().sum(-1).log() - logits[range(4), labels],
    }[problem_type]()
    torch.testing.assert_close(outputs.loss, terms.mean())
    halves = [
        model.loss_function(labels[part], logits[part], model.config, num_items_in_batch=terms.numel())
        for part in (slice(0, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(halves), outputs.loss)
    assert model.config.problem_type == problem_type
    whole = labels.long()
    losses = [model(x, labels=one).loss for one in (whole, whole if "single" in problem_type else whole.double())]
    losses[0].backward()
    torch.testing.assert_close(*losses)


# Inputs and outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preactivation", [False, True])
def test_memory_format_changes_nothing(kind, preactivation):
    x, labels = images()
    model = build(**kind, preactivation=preactivation)
    outputs = model(x, labels=labels)
    outputs.loss.backward()
    other = build(**kind, preactivation=preactivation).to(memory_format=torch.channels_last)
    other_outputs = other(x.contiguous(memory_format=torch.channels_last), labels=labels)
    other_outputs.loss.backward()
    torch.testing.assert_close(other_outputs.logits, outputs.logits)
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (other, model)))
    if kind.get("skip_norm_axes") != "channels":
        last = other.resnet(x.contiguous(memory_format=torch.channels_last)).last_hidden_state
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert model.resnet(x).last_hidden_state.is_contiguous()


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 16, 16), (4, 16, 16, 3)])
def test_wrong_shapes_are_one_sentence(shape):
    with pytest.raises(ValueError) as error:
        build()(torch.zeros(shape))
    assert str(error.value) == f"`pixel_values` must be of shape (batch, 3, height, width), not {shape}"


def test_outputs():
    x, labels = images(size=32)
    model = build(stem_type="imagenet").eval()
    outputs = model(x, labels=labels, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(4, 6, 8, 8), (4, 8, 8, 8), (4, 12, 4, 4)]
    base = model.resnet(x)
    assert base.hidden_states is None and torch.equal(base.last_hidden_state, outputs.hidden_states[-1])
    torch.testing.assert_close(base.pooler_output, base.last_hidden_state.mean((2, 3), keepdim=True))
    assert torch.equal(model.classifier(base.pooler_output), outputs.logits)
    as_tuple = model(x, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss) and torch.equal(as_tuple[1], outputs.logits)
    first, second, last = model(x, output_hidden_states=[0, -1]).hidden_states
    assert torch.equal(first, outputs.hidden_states[0]) and torch.equal(last, outputs.hidden_states[-1])
    assert second is None
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 3
    model.config.return_dict = False
    assert torch.equal(model(x)[0], outputs.logits)


def test_backbone():
    x, _ = images(size=32)
    config = RSkipResNetConfig(**TINY, preactivation=True, out_features=["stem", "stage2"])
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(config).double().eval()
    assert type(backbone) is RSkipResNetBackbone
    assert backbone.channels == [6, 12] and backbone.out_indices == [0, 2]
    model = RSkipResNetModel(config).double().eval()
    model.load_state_dict(backbone.state_dict())
    hidden_states = model(x, output_hidden_states=True).hidden_states
    outputs = backbone(x)
    torch.testing.assert_close(outputs.feature_maps, (hidden_states[0], hidden_states[2]), rtol=0, atol=0)
    assert outputs.hidden_states is None
    assert len(backbone(x, output_hidden_states=True).hidden_states) == 3


# Learning


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, preactivation):
    model = build(**kind, dtype=torch.float32, preactivation=preactivation)
    x, labels = images(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_every_kind_of_the_table_is_tested_here():
    possible = {name for name, kind in SKIP_CONNECTIONS.items() if kind.for_images}
    assert {RSkipResNetConfig(**param.values[0]).skip_type for param in KINDS} == possible


@pytest.mark.parametrize("kind", [name for name, kind in SKIP_CONNECTIONS.items() if not kind.for_images])
def test_kinds_that_are_not_for_a_resnet_are_named(kind):
    with pytest.raises(ValueError, match=f"^`skip_type` must be one of rskip, xskip, admin, .*, not '{kind}'$"):
        RSkipResNetConfig(skip_type=kind)
