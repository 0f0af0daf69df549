"""What a probe measures, against forward passes and formulas written out by hand."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_rskip import (
    SKIP_CONNECTIONS,
    PreNorm,
    RSkip,
    RSkipConfig,
    RSkipForConditionalGeneration,
    RSkipResNetConfig,
    RSkipResNetForImageClassification,
    SkipConnection,
    XSkip,
)
from hf_rskip.errors import UserError
from hf_rskip.probing.probe import probe

SIZE = 12


def translation_model(**options) -> RSkipForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "dropout": 0.3}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = RSkipForConditionalGeneration(RSkipConfig(**{**sizes, **layers, **options})).double()
    with torch.no_grad():  # gains and biases as after a training
        for name, parameter in model.named_parameters():
            if "skip" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def sentences(padding: int = 0) -> dict[str, torch.Tensor]:
    """Three pairs of different lengths; `padding` more columns than needed."""
    generator = torch.Generator().manual_seed(1)
    lengths, labels_lengths = [7, 4, 5], [4, 6, 3]
    tokens = torch.zeros(3, 7 + padding, dtype=torch.long)
    labels = torch.full((3, 6 + padding), -100)
    for row, (length, labels_length) in enumerate(zip(lengths, labels_lengths, strict=True)):
        tokens[row, :length] = torch.randint(4, 40, (length,), generator=generator)
        labels[row, :labels_length] = torch.randint(4, 40, (labels_length,), generator=generator)
        labels[row, labels_length - 1] = 2  # the end token
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(4, 3, 16, 16, generator=generator).double(),
        "labels": torch.tensor([0, 1, 2, 3]),
    }


class Sublayer(nn.Module):
    """x and F as they are given, so that each can be chosen."""

    def __init__(self, skip: SkipConnection, x: torch.Tensor, branch: torch.Tensor):
        super().__init__()
        self.skip, self.x, self.branch = skip.to(x.dtype), nn.Parameter(x), nn.Parameter(branch)

    def forward(self, labels):
        self.skip.before(self.x)
        y = self.skip(self.x * 1, self.branch * 1)
        return SimpleNamespace(loss=(y * labels).sum())


def probe_sublayer(skip: SkipConnection, x: torch.Tensor, branch: torch.Tensor):
    torch.manual_seed(3)
    (row,) = probe(Sublayer(skip, x, branch), {"labels": torch.randn_like(x)})
    return row


def random_tokens(count: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, branch = torch.randn(2, count, SIZE, generator=generator, dtype=torch.float64)
    return 1.5 * x + 0.2, 0.7 * branch - 0.1 + 0.3 * x


def quartiles(values: torch.Tensor) -> list[float]:
    return np.quantile(values.detach().numpy(), [0.25, 0.5, 0.75], method="nearest").tolist()


# Gradients and activations


def attend(weights, name, query, source, visible):
    """Two heads; `visible` is true where a query `(batch, 1, queries, keys)` may look."""

    def project(part, states):
        states = states @ weights[f"{name}.{part}_proj.weight"].T + weights[f"{name}.{part}_proj.bias"]
        return states.unflatten(-1, (2, -1)).transpose(1, 2)

    q, k, v = project("q", query), project("k", source), project("v", source)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    joined = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return joined @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def test_gradients_and_activations_are_those_of_a_forward_pass_written_out_by_hand():
    model = translation_model(skip_type="xskip", skip_scale=1.3)
    batch, smoothing, eps = sentences(), 0.1, model.config.layer_norm_eps
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    embedding = weights["model.encoder.embed_tokens.weight"]
    real = batch["labels"] != -100
    starts = torch.full((3, 1), model.config.decoder_start_token_id)
    target = torch.cat([starts, batch["labels"][:, :-1].clamp(min=0)], 1)
    source_mask = batch["attention_mask"].bool()
    target_mask = (target != 0) & (target != 2)
    causal = torch.ones(target.shape[1], target.shape[1]).tril().bool()

    def embed(tokens):
        angle = torch.arange(tokens.shape[1])[:, None] / 10000 ** (torch.arange(8, dtype=torch.float64) / 8)
        return embedding[tokens] * 4 + torch.cat([angle.sin(), angle.cos()], 1).float()  # the table's precision

    seen = []

    def join(x, branch, name, mask, parameters):
        y = F.layer_norm(1.3 * x + branch, (16,), weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], eps)
        seen.append((name, x, branch, y, mask, [value for key, value in weights.items() if key.startswith(parameters)]))
        return y

    def feed_forward(x, name):
        hidden = F.relu(x @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"])
        return hidden @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]

    x = embed(batch["input_ids"])
    for layer in range(2):
        name = f"model.encoder.layers.{layer}"
        branch = attend(weights, f"{name}.self_attn", x, x, source_mask[:, None, None])
        x = join(x, branch, f"{name}.self_attn_skip", source_mask, f"{name}.self_attn.")
        x = join(x, feed_forward(x, f"{name}.mlp"), f"{name}.mlp_skip", source_mask, f"{name}.mlp.")
    memory, x = x, embed(target)
    for layer in range(2):
        name = f"model.decoder.layers.{layer}"
        branch = attend(weights, f"{name}.self_attn", x, x, causal)
        x = join(x, branch, f"{name}.self_attn_skip", target_mask, f"{name}.self_attn.")
        branch = attend(weights, f"{name}.encoder_attn", x, memory, source_mask[:, None, None])
        x = join(x, branch, f"{name}.encoder_attn_skip", target_mask, f"{name}.encoder_attn.")
        x = join(x, feed_forward(x, f"{name}.mlp"), f"{name}.mlp_skip", target_mask, f"{name}.mlp.")
    loss = F.cross_entropy((x @ embedding.T)[real], batch["labels"][real], label_smoothing=smoothing)

    rows = probe(model, batch, smoothing)
    assert [row.name for row in rows] == [name for name, *_ in seen]
    for row, (_, x, branch, y, mask, parameters) in zip(rows, seen, strict=True):
        at_x, at_y, *at_parameters = torch.autograd.grad(loss, [x, y, *parameters], retain_graph=True)
        assert row.loss == pytest.approx(loss.item(), rel=1e-10)
        assert row.tokens == mask.sum()
        assert row.gradient_norm_x == pytest.approx(at_x[mask].norm().item(), rel=1e-8)
        assert row.gradient_norm_y == pytest.approx(at_y[mask].norm().item(), rel=1e-8)
        squares = sum(gradient.square().sum() for gradient in at_parameters)
        assert row.gradient_norm_branch == pytest.approx(squares.sqrt().item(), rel=1e-8)
        for measured, tensor in ((row.std_x, x), (row.std_branch, branch), (row.std_y, y)):
            assert measured == pytest.approx(tensor[mask].std(-1, correction=0).mean().item(), rel=1e-8)
    for stack, size in (("encoder", 4), ("decoder", 6)):
        own = [row for row in rows if row.stack == stack]
        assert [row.depth for row in own] == list(range(size))
        assert [(row.layer, row.sublayer) for row in own] == [divmod(i, size // 2) for i in range(size)]
        assert own[-1].relative_gradient_norm_y == 1
        assert own[0].relative_gradient_norm_x == own[0].gradient_norm_x / own[-1].gradient_norm_y


@pytest.mark.parametrize("name", ["resnet20_cifar", "preact_resnet20_cifar", "preact_resnet164_cifar"])
@pytest.mark.parametrize("skip", [{"skip_recursions": 2}, {"skip_type": "xskip", "skip_norm": "none"}])
def test_gradients_of_a_resnet_are_those_of_its_blocks(name, skip):
    torch.manual_seed(0)
    config = RSkipResNetConfig.from_name(name, depths=[1, 2, 1], num_labels=4, **{"skip_type": "rskip", **skip})
    model = RSkipResNetForImageClassification(config).double().train()
    rows = probe(model, images())
    blocks = [layer for stage in model.resnet.encoder.stages for layer in stage.layers]
    inputs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), inputs.append(args[0]))[0])
    model(**images()).loss.backward()
    assert [(row.layer, row.sublayer, row.depth) for row in rows] == [(i, 0, i) for i in range(4)]
    for row, x, block in zip(rows, inputs, blocks, strict=True):
        assert row.gradient_norm_x == pytest.approx(x.grad.norm().item(), rel=1e-8)
        branch = [value.grad for key, value in block.named_parameters() if not key.startswith("skip.")]
        assert row.gradient_norm_branch == pytest.approx(
            math.sqrt(sum(gradient.square().sum().item() for gradient in branch)), rel=1e-8
        )


# The angle and the effective skip weight


@pytest.mark.parametrize("affine", ["per_step", "shared", "last"])
@pytest.mark.parametrize("recursions", range(1, 6))
def test_the_skip_weight_of_rskip_is_its_recursion(recursions, affine):
    x, branch = random_tokens()
    row = probe_sublayer(RSkip(SIZE, recursions, affine=affine, eps=0.0), x, branch)
    r = torch.ones(len(x), 1, dtype=torch.float64)
    for _ in range(recursions - 1):
        r = r + (r * x + branch).std(1, keepdim=True, correction=0)
    assert [row.skip_weight_q1, row.skip_weight, row.skip_weight_q3] == pytest.approx(quartiles(r), abs=1e-5)
    assert row.skip_weight_r2 == pytest.approx(1, abs=1e-9)
    assert row.gain_mean == row.gain_rms == (1.0,) * recursions


@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("recursions", range(1, 6))
def test_each_recursion_halves_the_angle_and_the_weight_follows(recursions, s):
    x, branch = random_tokens()
    x, branch = (tensor - tensor.mean(1, keepdim=True) for tensor in (x, branch))
    x = x / x.std(1, keepdim=True, correction=0)
    branch = branch - x * (x * branch).mean(1, keepdim=True)
    branch = s * branch / branch.std(1, keepdim=True, correction=0)
    row = probe_sublayer(RSkip(SIZE, recursions, eps=0.0), x, branch)
    angle = math.atan(s) / 2 ** (recursions - 1)
    assert row.angle_q1 == pytest.approx(math.degrees(angle), abs=1e-9)
    assert row.angle == pytest.approx(row.angle_q1) and row.angle == pytest.approx(row.angle_q3)
    assert row.skip_weight == pytest.approx(s / math.tan(angle), abs=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm", "none"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_skip_weight_of_xskip_is_its_scale_whatever_the_gains(norm, scale):
    x, branch = random_tokens()
    skip = XSkip(SIZE, scale, norm=norm)
    if norm != "none":
        with torch.no_grad():
            skip.norm.weight.copy_(torch.linspace(-1, 2, SIZE)[torch.randperm(SIZE)]).masked_fill_(
                torch.arange(SIZE) == 5, 0
            )
            if skip.norm.bias is not None:
                skip.norm.bias.copy_(torch.linspace(-3, 3, SIZE))
    row = probe_sublayer(skip, x, branch)
    assert [row.skip_weight_q1, row.skip_weight, row.skip_weight_q3] == pytest.approx([scale] * 3, abs=1e-6)
    assert row.skip_weight_r2 == pytest.approx(1, abs=1e-9)
    if norm == "none":
        assert row.gain_mean == row.gain_rms == ()
    else:
        weight = skip.norm.weight.detach()
        assert row.gain_mean == pytest.approx((weight.abs().mean().item(),))
        assert row.gain_rms == pytest.approx((weight.square().mean().sqrt().item(),))


def test_the_skip_weight_of_recursive_batch_norm_belongs_to_a_feature():
    x, branch = random_tokens(50)
    row = probe_sublayer(RSkip(SIZE, 2, norm="batch_norm", eps=1e-12), x, branch)
    r = 1 + (x + branch).std(0, correction=0)
    assert [row.skip_weight_q1, row.skip_weight, row.skip_weight_q3] == pytest.approx(quartiles(r), abs=1e-5)


def test_pre_norm_and_what_cannot_be_told():
    x, branch = random_tokens()
    row = probe_sublayer(PreNorm(SIZE), x, branch)
    assert row.skip_weight == pytest.approx(1) and row.gain_rms == (1.0,)
    # F in the direction of x has no weight of its own; one that is 0 leaves x alone.
    assert math.isnan(probe_sublayer(XSkip(SIZE), x, 2 * x).skip_weight)
    nothing = probe_sublayer(XSkip(SIZE), x, 0 * x)
    assert math.isnan(nothing.skip_weight) and nothing.angle == pytest.approx(0, abs=1e-6)


# A kind of one's own


class Damped(SkipConnection):
    """LN(x + a F(LN(x))) with norms of torch."""

    def __init__(self, size, damping=0.25):
        super().__init__()
        self.inner, self.outer = nn.LayerNorm(size), nn.LayerNorm(size)
        self.damping = damping

    @classmethod
    def from_config(cls, config, size, position):
        return cls(size)

    def before(self, x, mask=None):
        return self.inner(x)

    def forward(self, x, branch, mask=None):
        return self.outer(x + self.damping * branch)


def test_a_kind_of_ones_own_is_probed_without_further_change(monkeypatch):
    monkeypatch.setitem(SKIP_CONNECTIONS, "damped", Damped)
    rows = probe(translation_model(skip_type="damped"), sentences())
    assert len(rows) == 4 + 6
    for row in rows:
        assert row.skip_weight == pytest.approx(4, abs=1e-6) and row.skip_weight_r2 == pytest.approx(1)
        assert len(row.gain_rms) == 2 and row.gradient_norm_branch > 0
    assert math.isinf(probe_sublayer(Damped(SIZE, damping=0.0), *random_tokens()).skip_weight)


# What is left behind


def stripped(rows):
    return [{key: value for key, value in vars(row).items() if key != "name"} for row in rows]


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_padding_does_not_matter(norm):
    model = translation_model(skip_norm=norm)
    for short, long in zip(stripped(probe(model, sentences())), stripped(probe(model, sentences(5))), strict=True):
        assert short.pop("stack") == long.pop("stack")
        for key, value in short.items():
            assert long[key] == pytest.approx(value, rel=1e-7), key


@pytest.mark.parametrize("task", ["translation", "images"])
def test_a_probe_leaves_the_model_as_it_was_and_says_the_same_twice(task):
    if task == "translation":
        model, batch = translation_model(skip_norm="batch_norm"), sentences()
    else:
        torch.manual_seed(0)
        config = RSkipResNetConfig.from_name("resnet20_cifar", depths=[1, 1, 1], num_labels=4, drop_path_rate=0.5)
        model, batch = RSkipResNetForImageClassification(config).double(), images()
    model.train()
    model.get_submodule("model.encoder" if task == "translation" else "resnet.embedder").eval()
    next(model.parameters()).requires_grad_(False)
    model(**batch).loss.backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    attributes = [sorted(vars(module)) for module in model.modules()]
    given = {name: tensor.clone() for name, tensor in batch.items()}
    first = probe(model, batch)
    with torch.no_grad():
        assert probe(model, batch) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(batch[name], tensor) for name, tensor in given.items())


def test_two_skip_connections_may_share_a_norm():
    rows = []
    for is_shared in (False, True):
        model = translation_model()
        first, second, *_ = (module for module in model.modules() if isinstance(module, RSkip))
        second.norm.load_state_dict(first.norm.state_dict())
        if is_shared:
            second.norm = first.norm
        rows.append(probe(model, sentences()))
        assert not any("normalize" in vars(module) for module in model.modules())
    assert rows[0] == rows[1]


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="Linear has no skip connection"):
        probe(nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    with pytest.raises(UserError, match="batch to probe on is empty"):
        probe(translation_model(), {"input_ids": torch.empty(0, 3, dtype=torch.long)})
    with pytest.raises(UserError, match="batch to probe on is empty"):
        probe(translation_model(), {})
