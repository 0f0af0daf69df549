"""What Transformers' own tests demand of every vision model and backbone: weights, dtypes, devices, compilers."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

from hf_rskip import (
    RSkipResNetBackbone,
    RSkipResNetConfig,
    RSkipResNetForImageClassification,
    RSkipResNetModel,
)
from hf_rskip.models.modeling_rskip_resnet import RSkipResNetLayer
from hf_rskip.models.skip_connections import AFFINES

PLAIN = {"skip_type": "xskip", "skip_norm": "none"}
KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param({}, id="rskip"),
        pytest.param({"skip_norm": "batch_norm", "skip_norm_affine": "shared"}, id="rskip-batch_norm"),
        pytest.param({"preactivation": True, "zero_init_last_gain": True}, id="preactivation"),
        pytest.param({"skip_type": "pre_norm", "skip_norm": "rms_norm", "shortcut_type": "A"}, id="pre_norm"),
    ],
)
TINY = {
    "embedding_size": 10,
    "hidden_sizes": [12, 20, 32, 40],
    "depths": [1, 1, 2, 1],
    "num_labels": 3,
    "layer_type": "basic",
}
CLASSES = {
    AutoModel: RSkipResNetModel,
    AutoModelForImageClassification: RSkipResNetForImageClassification,
    RSkipResNetBackbone: RSkipResNetBackbone,  # `AutoBackbone` takes no folders; tests/hub loads with it
}


def build(cls=RSkipResNetForImageClassification, **values):
    """A tiny model in evaluation mode whose tensors are all away from where they start."""
    torch.manual_seed(0)
    model = cls(RSkipResNetConfig(**(TINY | values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


@pytest.fixture
def labels():
    return torch.tensor([0, 2, 1])


def first_output(model, images):
    outputs = model(images)
    return outputs.feature_maps[-1] if isinstance(model, RSkipResNetBackbone) else outputs[0]


def load(auto, folder, **options):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), info


# Weights


@KINDS
@pytest.mark.parametrize("auto", CLASSES)
def test_save_and_load(auto, kind, images, tmp_path):
    model = build(CLASSES[auto], **kind)
    model.save_pretrained(tmp_path)
    loaded, info = load(auto, tmp_path)
    assert type(loaded) is CLASSES[auto] and not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(first_output(loaded, images), first_output(model, images))


@KINDS
@pytest.mark.parametrize("auto", [AutoModel, RSkipResNetBackbone])
def test_the_parts_of_a_classifier_s_checkpoint(auto, kind, images, tmp_path):
    model = build(**kind)
    model.save_pretrained(tmp_path)
    part, info = load(auto, tmp_path)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # The head has no place in them; Transformers lists what is beside the base model for one class and not the other.
    assert set(info["unexpected_keys"]) <= {"classifier.1.weight", "classifier.1.bias"}
    torch.testing.assert_close(part.state_dict(), model.resnet.state_dict(), rtol=0, atol=0)
    assert torch.equal(first_output(part, images), model.resnet(images).last_hidden_state)


@pytest.mark.parametrize("cls", [RSkipResNetModel, RSkipResNetBackbone])
def test_a_classifier_on_the_weights_of_a_base_model(cls, tmp_path, uninitialized_memory_is_nan):
    base = build(cls)
    base.save_pretrained(tmp_path)
    model, info = load(AutoModelForImageClassification, tmp_path)
    assert set(info["missing_keys"]) == {"classifier.1.weight", "classifier.1.bias"} and not info["unexpected_keys"]
    torch.testing.assert_close(model.resnet.state_dict(), base.state_dict(), rtol=0, atol=0)
    assert all(0 < parameter.abs().max() <= 40**-0.5 for parameter in model.classifier.parameters())


def test_other_labels(images, tmp_path, uninitialized_memory_is_nan):
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(AutoModelForImageClassification, tmp_path, num_labels=7)
    loaded, info = load(AutoModelForImageClassification, tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.1.weight", "classifier.1.bias"}
    assert loaded(images).logits.shape == (3, 7) and loaded(images).logits.isfinite().all()
    torch.testing.assert_close(loaded.resnet.state_dict(), model.resnet.state_dict(), rtol=0, atol=0)


def test_missing_and_unexpected_weights(tmp_path, uninitialized_memory_is_nan):
    model = build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    block = "resnet.encoder.stages.2.layers.1."
    convolution, variance = block + "layer.0.convolution.weight", block + "layer.0.normalization.running_var"
    gain = block + "skip.norm.1.weight"
    weights["resnet.other"] = weights.pop(convolution)
    del weights[variance], weights[gain]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = load(AutoModelForImageClassification, tmp_path)
    assert set(info["missing_keys"]) == {convolution, variance, gain}
    assert set(info["unexpected_keys"]) == {"resnet.other"}
    state = loaded.state_dict()
    assert state[convolution].std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)
    assert torch.all(state[variance] == 1) and torch.all(state[gain] == 1)
    for name in state.keys() - {convolution, variance, gain}:
        assert torch.equal(state[name], model.state_dict()[name]), name


@KINDS
def test_every_tensor_is_filled_from_meta(kind, images, labels, uninitialized_memory_is_nan):
    config = RSkipResNetConfig(**(TINY | kind))
    with torch.device("meta"):
        model = RSkipResNetForImageClassification(config)
    model.to_empty(device="cpu")
    model.init_weights()
    reference = RSkipResNetForImageClassification(config)
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all(), name
        peer = reference.get_parameter(name)
        if tensor.numel() > 200:
            assert tensor.std().item() == pytest.approx(peer.std().item(), rel=0.3), name
        elif "normalization" in name or "norm" in name:
            assert torch.equal(tensor, peer), name
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), rtol=0, atol=0)
    assert model(images, labels=labels).loss.isfinite()


def test_a_seed_gives_the_weights():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(RSkipResNetModel(RSkipResNetConfig(**TINY)).state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    name = "embedder.embedder.convolution.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


def test_sharded_checkpoint(images, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, info = load(AutoModelForImageClassification, tmp_path)
    assert not any(info.values()) and torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_nothing(copied, images, labels):
    model = build()
    other = copied(model)
    assert torch.equal(other(images, labels=labels).loss, model(images, labels=labels).loss)
    ours, theirs = ({tensor.data_ptr() for tensor in one.state_dict().values()} for one in (model, other))
    assert not ours & theirs


# Precision and batches


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype, images, labels, tmp_path):
    model = build(**kind)
    model.save_pretrained(tmp_path)
    loaded, info = load(AutoModelForImageClassification, tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and not any(info.values())
    assert {tensor.dtype for tensor in loaded.buffers()} == {dtype, torch.int64}
    logits = loaded(images.to(dtype)).logits
    assert logits.dtype == dtype
    expected = model(images).logits
    assert (logits - expected).norm() < 0.1 * expected.norm()
    loss = loaded.train()(images.to(dtype), labels=labels).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())


@KINDS
def test_autocast(kind, images):
    model = build(**kind)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images).logits
    expected = model(images).logits
    assert (logits - expected).norm() < 0.1 * expected.norm()


@KINDS
def test_an_image_s_logits_do_not_depend_on_its_batch(kind, images):
    model = build(**kind)
    together = model(images).logits
    alone = torch.cat([model(images[index : index + 1]).logits for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (64, 64)])
def test_other_sizes_of_images(kind, size):
    model = build(**kind)
    outputs = model.resnet(torch.randn(2, 3, *size))
    assert outputs.last_hidden_state.shape == (2, 40, *(-(-side // 32) for side in size))
    assert outputs.pooler_output.shape == (2, 40, 1, 1)


# Outputs


@KINDS
def test_gradients_of_hidden_states_can_be_retained(kind, images, labels):
    model = build(**kind).train()
    outputs = model(images, labels=labels, output_hidden_states=True)
    for tensor in outputs.hidden_states:
        tensor.retain_grad()
    outputs.loss.backward()
    assert [tuple(h.shape[1:]) for h in outputs.hidden_states] == [
        (10, 8, 8),
        (12, 8, 8),
        (20, 4, 4),
        (32, 2, 2),
        (40, 1, 1),
    ]
    assert all(h.grad.isfinite().all() and h.grad.abs().max() > 0 for h in outputs.hidden_states)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("asked", "indices"),
    [({}, [4]), ({"out_features": ["stage1", "stage3"]}, [1, 3]), ({"out_indices": [0, 2, -1]}, [0, 2, -1])],
)
def test_backbone_s_features(asked, indices, images):
    backbone = build(RSkipResNetBackbone, **asked)
    sizes, sides = [10, 12, 20, 32, 40], [8, 8, 4, 2, 1]
    assert list(backbone.out_indices) == indices
    assert backbone.channels == [sizes[index] for index in indices]
    maps = backbone(images).feature_maps
    assert [tuple(one.shape) for one in maps] == [(3, sizes[i], sides[i], sides[i]) for i in indices]
    (as_tuple, *_) = backbone(images, return_dict=False)
    torch.testing.assert_close(as_tuple, maps, rtol=0, atol=0)


def test_detr_on_the_backbone(images):
    backbone = RSkipResNetConfig(**TINY, out_features=["stage4"])
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=2,
    )
    torch.manual_seed(0)
    detr = DetrForObjectDetection(config).eval()
    assert isinstance(next(m for m in detr.modules() if isinstance(m, RSkipResNetBackbone)), RSkipResNetBackbone)
    outputs = detr(images)
    assert outputs.logits.shape == (3, 5, 3) and outputs.pred_boxes.isfinite().all()


# Compilers and devices

TWO_STAGES = {"hidden_sizes": [12, 20], "depths": [1, 1]}


@KINDS
def test_compiled_as_one_graph(kind, images, labels):
    torch._dynamo.reset()
    model = build(**kind, **TWO_STAGES).train()
    expected = model(images, labels=labels)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(images, labels=labels)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-3, atol=1e-5)


@KINDS
def test_exported_with_a_dynamic_batch(kind, images):
    model = build(**kind, **TWO_STAGES)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(model, (), {"pixel_values": images}, dynamic_shapes=dynamic)
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(pixel_values=more).logits, model(more).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_blocks_off_the_device(affine, norm, images, tmp_path):
    pytest.importorskip("accelerate")
    model = build(skip_norm=norm, skip_norm_affine=affine)
    model.save_pretrained(tmp_path)
    stages = {f"resnet.encoder.stages.{index}": "disk" if index == 2 else "cpu" for index in range(4)}
    rest = dict.fromkeys(["resnet.embedder", "resnet.encoder.final_norm", "resnet.encoder.final_activation"], "cpu")
    device_map = stages | rest | {"resnet.pooler": "cpu", "classifier": "cpu"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    loaded = RSkipResNetForImageClassification.from_pretrained(tmp_path, **options)
    on_meta = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    assert on_meta == {name for name, _ in model.named_parameters() if name.startswith("resnet.encoder.stages.2.")}
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


def test_blocks_are_not_split():
    model = build()
    names = {module.__class__.__name__ for module in model.modules() if isinstance(module, RSkipResNetLayer)}
    assert names == set(model._no_split_modules)


# The Trainer


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_gradient_accumulation_is_one_large_batch(problem_type, tmp_path):
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 3} for index in range(8)]
    if problem_type:
        rows = [row | {"labels": torch.eye(3)[row["labels"]]} for row in rows]
    weights = []
    for batch_size, steps in ((8, 1), (2, 4)):
        # In evaluation mode batch normalisation does not look at the batch.
        model = build(problem_type=problem_type, **PLAIN, stem_type="cifar")
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0
                module.train = lambda mode=True, module=module: module
                module.training = False
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        before = copy.deepcopy(model.state_dict())
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append({name: tensor - before[name] for name, tensor in model.state_dict().items()})
    assert weights[0]["classifier.1.weight"].abs().max() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-6)


def test_configurations_of_transformers_resnet_are_understood():
    """Every field of `ResNetConfig` means the same here."""
    peer = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    fields = {name: value for name, value in peer.to_diff_dict().items() if name not in ("model_type", "out_indices")}
    fields.pop("transformers_version")
    config = RSkipResNetConfig(**fields, **PLAIN)
    assert (config.hidden_sizes, config.depths, config.num_labels) == ([8, 16], [1, 1], 4)
