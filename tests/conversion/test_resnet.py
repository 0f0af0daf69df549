"""A converted ResNet computes what the original does: Transformers' own, and torchvision's forward pass written out."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rskip import RSkipConfig, RSkipResNetBackbone, RSkipResNetForImageClassification
from hf_rskip.cli.main import main
from hf_rskip.conversion.resnet import convert_resnet_model
from hf_rskip.conversion.resnet_state_dicts import convert_resnet_state_dict, read_state_dict
from hf_rskip.errors import UserError

TINY = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [2, 1, 2], "num_labels": 5}
BASIC = {**TINY, "layer_type": "basic"}
BOTTLENECK = {**TINY, "hidden_sizes": [16, 24, 32], "layer_type": "bottleneck"}
VARIANTS = [
    pytest.param(BASIC, id="basic"),
    pytest.param(BOTTLENECK, id="bottleneck"),
    pytest.param({**BASIC, "downsample_in_first_stage": True}, id="basic-downsample-first"),
    pytest.param({**BOTTLENECK, "downsample_in_first_stage": True}, id="bottleneck-downsample-first"),
    pytest.param({**BOTTLENECK, "downsample_in_bottleneck": True}, id="downsample-in-bottleneck"),
    pytest.param({**BASIC, "hidden_sizes": [8, 8, 8]}, id="equal-widths"),
    pytest.param({**BOTTLENECK, "hidden_sizes": [8, 16], "depths": [1, 3], "num_channels": 1}, id="one-channel"),
    pytest.param({**BASIC, "hidden_sizes": [4, 6, 8, 10, 12], "depths": [1] * 5, "num_labels": 2}, id="five-stages"),
]


@torch.no_grad()
def randomize(tensors):
    """Every parameter and running statistic away from its first value; variances stay positive."""
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
    return tensors


def make_resnet(**values) -> ResNetForImageClassification:
    torch.manual_seed(0)
    resnet = ResNetForImageClassification(ResNetConfig(**values))
    randomize(resnet.state_dict())
    return resnet.eval()


def images(channels=3, size=64):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Transformers


@pytest.fixture(params=VARIANTS)
def resnet_and_model(request, tmp_path):
    """A random ResNet, and its conversion saved and loaded."""
    resnet = make_resnet(**request.param)
    convert_resnet_model(resnet).save_pretrained(tmp_path)
    return resnet, AutoModelForImageClassification.from_pretrained(tmp_path)


def test_logits_and_hidden_states(resnet_and_model):
    resnet, model = resnet_and_model
    assert isinstance(model, RSkipResNetForImageClassification)
    assert not model.training
    pixels = images(resnet.config.num_channels)
    with torch.no_grad():
        expected = resnet(pixels, output_hidden_states=True)
        actual = model(pixels, output_hidden_states=True)
    close(actual.logits, expected.logits)
    assert expected.logits.std() > 0.05
    assert len(actual.hidden_states) == len(resnet.config.depths) + 1
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)


def test_a_training_step(resnet_and_model):
    resnet, model = resnet_and_model
    pixels, labels = images(resnet.config.num_channels), torch.tensor([0, 1, 1, 0])
    expected, actual = (network.train()(pixels, labels=labels) for network in (resnet, model))
    close(actual.logits, expected.logits)
    close(actual.loss, expected.loss)
    expected.loss.backward(), actual.loss.backward()
    ours, theirs = dict(model.named_parameters()), dict(resnet.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.grad.abs().sum() > 0, name
        close(ours[name].grad, parameter.grad)
    for network in (resnet, model):
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    after = model.state_dict()
    for name, value in resnet.state_dict().items():  # running statistics too
        close(after[name], value)
    with torch.no_grad():
        close(model.eval()(pixels).logits, resnet.eval()(pixels).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(tmp_path, dtype):
    resnet = make_resnet(**BOTTLENECK).to(dtype)
    resnet.save_pretrained(tmp_path / "old")
    assert main(["convert", "resnet", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    assert model.dtype == dtype
    saved = load_file(tmp_path / "new/model.safetensors")
    for name, weight in resnet.state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_backbone(tmp_path):
    resnet = make_resnet(**BASIC, out_features=["stem", "stage2"])
    resnet.save_pretrained(tmp_path / "old")
    assert main(["convert", "resnet", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    expected = ResNetBackbone.from_pretrained(tmp_path / "old").eval()(images()).feature_maps
    actual = RSkipResNetBackbone.from_pretrained(tmp_path / "new").eval()(images()).feature_maps
    assert [tuple(feature_map.shape[1:]) for feature_map in actual] == [(8, 16, 16), (12, 8, 8)]
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    """A checkpoint as microsoft/resnet-50 is: classes with names, and the old key of its image processor."""
    folder = tmp_path_factory.mktemp("resnet")
    labels = ["tench", "goldfish", "shark", "ray", "cock"]
    resnet = make_resnet(**BASIC)
    resnet.config.id2label = dict(enumerate(labels))
    resnet.config.label2id = {label: index for index, label in enumerate(labels)}
    resnet.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875, resample=3).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    del fields["image_processor_type"]
    path.write_text(json.dumps({**fields, "feature_extractor_type": "ConvNextFeatureExtractor"}))
    return folder


def photo(width=100, height=80):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_the_command_and_the_pipeline(run_cli, resnet_folder, tmp_path):
    result = run_cli("convert", "resnet", resnet_folder, tmp_path / "new")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new'}: xskip, no norm\n"), result.err
    assert "image processor" not in result.err
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "manifest.json",
    }
    expected = pipeline("image-classification", model=str(resnet_folder), top_k=5)(photo())
    actual = pipeline("image-classification", model=str(tmp_path / "new"), top_k=5)(photo())
    assert [guess["label"] for guess in actual] == [guess["label"] for guess in expected]
    assert {guess["label"] for guess in actual} == {"tench", "goldfish", "shark", "ray", "cock"}
    close(torch.tensor([guess["score"] for guess in actual]), torch.tensor([guess["score"] for guess in expected]))
    processors = [AutoImageProcessor.from_pretrained(folder) for folder in (resnet_folder, tmp_path / "new")]
    theirs, ours = (processor(photo(), return_tensors="pt").pixel_values for processor in processors)
    assert torch.equal(ours, theirs) and ours.shape == (1, 3, 64, 64)


def test_without_an_image_processor(resnet_folder, tmp_path, caplog):
    shutil.copytree(resnet_folder, tmp_path / "old")
    (tmp_path / "old/preprocessor_config.json").unlink()
    assert main(["convert", "resnet", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors", "manifest.json"}
    assert "No image processor is written" in caplog.text


def test_a_checkpoint_without_counts_of_batches(resnet_folder, tmp_path):
    """Weights that came from other frameworks have none."""
    shutil.copytree(resnet_folder, tmp_path / "old")
    weights = load_file(tmp_path / "old/model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "resnet", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    with torch.no_grad():
        expected = ResNetForImageClassification.from_pretrained(resnet_folder)(images()).logits
        close(AutoModelForImageClassification.from_pretrained(tmp_path / "new")(images()).logits, expected)


def test_the_loss_of_another_problem_is_kept(caplog):
    resnet = make_resnet(**BASIC, problem_type="multi_label_classification")
    labels = torch.randint(2, (len(images()), resnet.config.num_labels)).float()
    losses = [model(images(), labels=labels).loss for model in (convert_resnet_model(resnet), resnet)]
    close(*losses)
    assert not caplog.text


# torchvision and timm


def random_state_dict(depths, widths, bottleneck=False, channels=3, stem=8, labels=5, dtype=torch.float32):
    """A state dict of torchvision's ResNet, in its order: `widths` are those of its `planes`."""
    torch.manual_seed(3)
    weights = {}

    def convolution(name, inputs, outputs, size):
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, size, size) * (2 / (outputs * size**2)) ** 0.5

    def norm(name, size):
        for part, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
            weights[f"{name}.{part}"] = torch.full((size,), float(value))
        weights[f"{name}.num_batches_tracked"] = torch.tensor(0)

    convolution("conv1", channels, stem, 7)
    norm("bn1", stem)
    inputs = stem
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        outputs = 4 * width if bottleneck else width
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            layers = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            if not bottleneck:
                layers = [(inputs, width, 3), (width, width, 3)]
            for index, shape in enumerate(layers, 1):
                convolution(f"{prefix}.conv{index}", *shape)
                norm(f"{prefix}.bn{index}", shape[1])
            if block == 0 and (stage > 1 or inputs != outputs):
                convolution(f"{prefix}.downsample.0", inputs, outputs, 1)
                norm(f"{prefix}.downsample.1", outputs)
            inputs = outputs
    weights["fc.weight"] = torch.randn(labels, inputs) / inputs**0.5
    weights["fc.bias"] = torch.zeros(labels)
    return {
        name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in randomize(weights).items()
    }


def torchvision_forward(weights, pixels, training=False):
    """The logits by torchvision's definition; in training the running statistics in `weights` change."""

    def norm(name, states):
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        affine = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.batch_norm(states, mean, variance, *affine, training=training, momentum=0.1, eps=1e-5)

    states = F.conv2d(pixels, weights["conv1.weight"], stride=2, padding=3)
    states = F.max_pool2d(F.relu(norm("bn1", states)), kernel_size=3, stride=2, padding=1)
    blocks = dict.fromkeys(".".join(name.split(".")[:2]) for name in weights if name.startswith("layer"))
    for block in blocks:
        stride = 2 if block.endswith(".0") and block != "layer1.0" else 1
        shortcut = states
        if f"{block}.downsample.0.weight" in weights:
            shortcut = F.conv2d(states, weights[f"{block}.downsample.0.weight"], stride=stride)
            shortcut = norm(f"{block}.downsample.1", shortcut)
        count = 3 if f"{block}.conv3.weight" in weights else 2
        for index in range(1, count + 1):
            weight = weights[f"{block}.conv{index}.weight"]
            strided = index == (1 if count == 2 else 2)
            states = F.conv2d(states, weight, stride=stride if strided else 1, padding=weight.shape[-1] // 2)
            states = norm(f"{block}.bn{index}", states)
            if index < count:
                states = F.relu(states)
        states = F.relu(states + shortcut)
    return F.linear(states.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


SMALL = {
    "basic": {"depths": [2, 1, 2, 1], "widths": [8, 12, 16, 20]},
    "bottleneck": {"depths": [1, 2, 1, 2], "widths": [4, 6, 8, 10], "bottleneck": True},
    "one-channel": {"depths": [1, 1], "widths": [6, 10], "channels": 1, "stem": 4, "labels": 11},
    "equal-widths": {"depths": [2, 2], "widths": [8, 8]},
    "bottleneck-as-wide-as-the-stem": {"depths": [1, 2], "widths": [2, 2], "bottleneck": True},
}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_state_dict(shape, tmp_path):
    weights = random_state_dict(**shape)
    convert_resnet_state_dict(copy.deepcopy(weights)).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = images(shape.get("channels", 3))
    with torch.no_grad():
        expected = torchvision_forward(weights, pixels)
        close(model(pixels).logits, expected)
        assert expected.std() > 0.05
        expected = torchvision_forward(weights, pixels, training=True)
        close(model.train()(pixels).logits, expected)
        close(model.eval()(pixels).logits, torchvision_forward(weights, pixels))  # by the running statistics
    assert int(model.resnet.embedder.embedder.normalization.num_batches_tracked) == 8


@pytest.mark.parametrize(
    ("depths", "bottleneck", "parameters"),
    [
        pytest.param([2, 2, 2, 2], False, 11_689_512, id="resnet18"),
        pytest.param([3, 4, 6, 3], False, 21_797_672, id="resnet34"),
        pytest.param([3, 4, 6, 3], True, 25_557_032, id="resnet50"),
        pytest.param([3, 4, 23, 3], True, 44_549_160, id="resnet101"),
    ],
)
def test_the_networks_of_torchvision(depths, bottleneck, parameters):
    """At their real sizes; the numbers of parameters are those that torchvision's documentation gives."""
    with torch.device("meta"):
        weights = random_state_dict(depths, [64, 128, 256, 512], bottleneck, stem=64, labels=1000)
        model = convert_resnet_state_dict(weights)
    trained = (weight for name, weight in weights.items() if "running" not in name and "num_batches" not in name)
    assert sum(weight.numel() for weight in trained) == parameters
    assert model.num_parameters() == parameters
    assert model.config.depths == depths
    assert model.config.hidden_sizes == [width * (4 if bottleneck else 1) for width in (64, 128, 256, 512)]
    assert (model.config.layer_type, model.config.num_labels) == ("bottleneck" if bottleneck else "basic", 1000)


def test_a_real_size():
    weights = random_state_dict([3, 4, 6, 3], [64, 128, 256, 512], True, stem=64, labels=1000)
    pixels = images()[:1]
    with torch.no_grad():
        expected = torchvision_forward(weights, pixels)
        close(convert_resnet_state_dict(weights)(pixels).logits, expected)


def test_dtypes_of_a_state_dict(tmp_path):
    """One dtype stays; of several it is the widest, which changes no value. No memory is shared with the original."""
    half = random_state_dict(**SMALL["basic"], dtype=torch.float16)
    assert convert_resnet_state_dict(half).dtype == torch.float16
    half["bn1.weight"] = half["bn1.weight"].float()
    half["layer1.0.conv1.weight"] = torch.nn.Parameter(
        half["layer1.0.conv1.weight"].to(memory_format=torch.channels_last)
    )
    model = convert_resnet_state_dict(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        converted = AutoModelForImageClassification.from_pretrained(tmp_path)(images()).logits
        full = {name: weight.float() if weight.is_floating_point() else weight for name, weight in half.items()}
        close(converted, torchvision_forward(full, images()))
    half["bn1.weight"].zero_()
    assert model.resnet.embedder.embedder.normalization.weight.abs().sum() > 0


@pytest.fixture(scope="module")
def weights():
    return random_state_dict(**SMALL["bottleneck"])


FILES = {
    "plain.pth": lambda weights: weights,
    "entry.pt": lambda weights: {"state_dict": weights, "epoch": 3, "arch": "resnet50"},
    "parallel.pth.tar": lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    "compiled.bin": lambda weights: {"model": {f"module._orig_mod.{name}": value for name, value in weights.items()}},
    "early.pth": lambda weights: {name: value for name, value in weights.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_torch(name, weights, tmp_path):
    torch.save(FILES[name](weights), tmp_path / name, _use_new_zipfile_serialization=name != "early.pth")
    read = read_state_dict(tmp_path / name)
    with torch.no_grad():
        close(convert_resnet_state_dict(read)(images()).logits, torchvision_forward(weights, images()))


def test_a_file_by_the_command(weights, tmp_path, capsys, caplog):
    save_file(weights, tmp_path / "resnet.safetensors")
    assert main(["convert", "resnet", str(tmp_path / "resnet.safetensors"), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}: xskip, no norm\n"
    assert "is taken for a ResNet of torchvision" in caplog.text
    guesses = pipeline("image-classification", model=str(tmp_path / "new"))(photo(300, 260))
    assert {guess["label"] for guess in guesses} == {f"LABEL_{index}" for index in range(5)}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new")
    pixels = processor(photo(300, 260), return_tensors="pt").pixel_values
    # The reference: shorter edge to 256 (300 x 260 becomes 295 x 256), the centre, and ImageNet's statistics.
    resized = photo(300, 260).resize((295, 256), Image.Resampling.BILINEAR).crop((35, 16, 35 + 224, 16 + 224))
    expected = torch.tensor(list(resized.tobytes())).view(224, 224, 3).permute(2, 0, 1) / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    torch.testing.assert_close(pixels[0], (expected - mean) / deviation, rtol=1e-5, atol=1e-5)


TIMM = {
    "architecture": "resnet50",
    "num_classes": 5,
    "num_features": 40,
    "global_pool": "avg",
    "label_names": ["a", "b", "c", "d", "e"],
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 176, 176],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
    },
}


@pytest.fixture
def make_timm(weights, tmp_path):
    def make_timm(weights=weights, safetensors=True, **changes):
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm/config.json").write_text(json.dumps(TIMM | changes))
        if safetensors:
            save_file(weights, tmp_path / "timm/model.safetensors")
        else:
            torch.save(weights, tmp_path / "timm/pytorch_model.bin")
        return tmp_path / "timm"

    return make_timm


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_folder_of_timm(make_timm, weights, tmp_path, safetensors):
    assert main(["convert", "resnet", str(make_timm(safetensors=safetensors)), str(tmp_path / "new")]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        close(model(images()).logits, torchvision_forward(weights, images()))
    assert model.config.id2label == dict(enumerate("abcde"))
    assert model.config.label2id["c"] == 2
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new")
    assert dict(processor.size) == {"shortest_edge": 185}  # 176 / 0.95, rounded down
    assert dict(processor.crop_size) == {"height": 176, "width": 176}
    assert (*processor.image_mean, *processor.image_std) == (0.5, 0.4, 0.3, 0.1, 0.2, 0.3)
    assert processor.resample == Image.Resampling.BICUBIC


def test_an_early_folder_of_timm(make_timm, weights, tmp_path):
    """Before there was a `pretrained_cfg` its fields stood beside the architecture."""
    folder = make_timm()
    fields = {"architecture": "swsl_resnet18", "num_classes": 5, "crop_pct": 0.5, "input_size": [3, 32, 32]}
    (folder / "config.json").write_text(json.dumps(fields))
    assert main(["convert", "resnet", str(folder), str(tmp_path / "new")]) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new")
    assert processor(photo(), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert dict(processor.size) == {"shortest_edge": 64}


@pytest.mark.parametrize("changes", [{"crop_mode": "squash"}, {"input_size": [3, 96, 64]}], ids=str)
def test_unusual_preprocessing_is_not_written(make_timm, tmp_path, caplog, changes):
    assert (
        main(
            [
                "convert",
                "resnet",
                str(make_timm(pretrained_cfg=TIMM["pretrained_cfg"] | changes)),
                str(tmp_path / "new"),
            ]
        )
        == 0
    )
    assert not (tmp_path / "new/preprocessor_config.json").exists()
    assert "No image processor is written" in caplog.text


# What is refused: one sentence with the source, and nothing is written


def rename(old, new):
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def widen(weights):
    """Twice as wide 3x3 convolutions, as in a wide ResNet-50-2."""
    wide = random_state_dict(**SMALL["bottleneck"] | {"widths": [8, 12, 16, 20]})
    return {name: wide[name] if "conv2" in name or "bn2" in name else value for name, value in weights.items()} | {
        "layer1.0.conv1.weight": wide["layer1.0.conv1.weight"]
    }


def replace(name, value):
    return lambda weights: {**weights, name: value}


def resnet_d_shortcuts(weights):
    return {
        name.replace("downsample.1", "downsample.2").replace("downsample.0", "downsample.1"): value
        for name, value in weights.items()
    }


UNFIT = {
    "deep-stem": (rename("conv1.weight", "conv1.0.weight"), "it lacks conv1.weight"),
    "cifar-stem": (replace("conv1.weight", torch.ones(8, 3, 3, 3)), "conv1.weight has the shape (8, 3, 3, 3), that"),
    "average-pooling-shortcut": (resnet_d_shortcuts, "layer1.0.downsample.1.weight has the shape (16, 8, 1, 1)"),
    "wide": (widen, "layer1.0.conv1.weight has the shape (8, 8, 1, 1), that of a plain ResNet (4, 8, 1, 1)"),
    "groups": (replace("layer1.0.conv2.weight", torch.ones(4, 1, 3, 3)), "layer1.0.conv2.weight has the shape (4, 1,"),
    "squeeze-and-excitation": (replace("layer1.0.se.fc1.weight", torch.ones(1)), "layer1.0.se.fc1.weight has no place"),
    "efficient-channel-attention": (
        replace("layer2.1.eca.conv.weight", torch.ones(1)),
        "layer2.1.eca.conv.weight has no place",
    ),
    "group-norm": (
        lambda weights: {n: w for n, w in weights.items() if "running" not in n},
        "it lacks bn1.running_mean",
    ),
    "preactivation": (rename("bn1.", "norm1."), "norm1.weight has no place"),
    "no-classifier": (without("fc.weight", "fc.bias"), "it has no classifier, fc.weight"),
    "no-bias": (without("fc.bias"), "it lacks fc.bias"),
    "convolutional-classifier": (
        replace("fc.weight", torch.ones(5, 40, 1, 1)),
        "fc.weight has the shape (5, 40, 1, 1)",
    ),
    "a-shortcut-missing": (without("layer2.0.downsample.0.weight"), "it lacks layer2.0.downsample.0.weight"),
    "a-shortcut-more": (replace("layer2.1.downsample.0.weight", torch.ones(1)), "layer2.1.downsample.0.weight has no"),
    "a-stage-missing": (rename("layer2", "layer7"), "layer7.0.conv1.weight has no place"),
    "a-block-missing": (rename("layer2.0", "layer2.9"), "layer2.9.conv1.weight has no place"),
    "no-stage": (lambda weights: {name: w for name, w in weights.items() if "layer" not in name}, "it lacks layer1.0"),
    "quantised": (replace("layer1.0.conv1.weight", torch.ones(4, 8, 1, 1, dtype=torch.int8)), "of type torch.int8"),
    "quantised-floats": (replace("fc.bias", torch.ones(5, dtype=torch.float8_e5m2)), "of type torch.float8_e5m2"),
    "scalar": (replace("conv1.weight", torch.tensor(1.0)), "conv1.weight has the shape (), not 4 dimensions"),
    "another-network": (lambda weights: {"features.0.weight": torch.ones(3)}, "it lacks conv1.weight"),
}


def error_of(capsys, source, output):
    assert main(["convert", "resnet", str(source), str(output)]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("hf-rskip: error: ") and str(source) in line and not captured.out
    assert not output.exists()
    return line


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_weights(capsys, weights, tmp_path, change, message):
    torch.save(change(weights), tmp_path / "unfit.pth")
    assert f"cannot be converted: {message}"[:20] in (
        line := error_of(capsys, tmp_path / "unfit.pth", tmp_path / "new")
    )
    assert message in line


class Foreign:
    pass


def test_unfit_files(capsys, weights, tmp_path):
    def error(name, write):
        write(tmp_path / name)
        return error_of(capsys, tmp_path / name, tmp_path / "new")

    assert "without running code" in error("module.pth", lambda file: torch.save({"a": Foreign()}, file))
    assert "without running code" in error("text.pth", lambda file: file.write_text("weights"))
    assert "cannot be read" in error("empty.pth", lambda file: file.touch())
    torch.save(weights, tmp_path / "whole.pth")
    save_file(weights, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        half = content[: len(content) // 2]
        assert "cannot be read" in error(f"half-{name}", lambda file, half=half: file.write_bytes(half))
    assert "contains a list" in error("list.pth", lambda file: torch.save([torch.ones(1)], file))
    line = error("optimizer.pth", lambda file: torch.save({"optimizer": {"lr": 1}, "epoch": 3}, file))
    assert "there is no state dict in it, only optimizer, epoch" in line
    parts = {"state_dict": weights, "state_dict_ema": weights, "optimizer": {"state": {}}}
    line = error("averaged.pth", lambda file: torch.save(parts, file))
    assert "it has several state dicts, state_dict, state_dict_ema: save the one that is meant alone" in line
    assert "only nothing" in error("nothing.pth", lambda file: torch.save({}, file))
    blurred = {"arch": "resnetblur50", "state_dict": weights}
    assert "'resnetblur50' is not a plain ResNet" in error("blur.pth", lambda file: torch.save(blurred, file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnetaa50"}, "timm's architecture 'resnetaa50' is not a plain ResNet"),
        ({"architecture": "resnet50_gn"}, "'resnet50_gn' is not"),
        ({"architecture": "resnet50d.ra2_in1k"}, "'resnet50d' is not"),
        ({"model_args": {"output_stride": 8, "num_classes": 5}}, "changed by the `model_args` output_stride"),
        ({"global_pool": "max"}, "its `global_pool` is 'max', not 'avg'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_unfit_folders_of_timm(capsys, make_timm, tmp_path, changes, message):
    assert message in error_of(capsys, make_timm(**changes), tmp_path / "new")


def test_unfit_folders(capsys, resnet_folder, make_timm, tmp_path):
    def error(change):
        shutil.rmtree(tmp_path / "old", ignore_errors=True)
        shutil.copytree(resnet_folder, tmp_path / "old")
        change(tmp_path / "old")
        return error_of(capsys, tmp_path / "old", tmp_path / "new")

    assert "There is no model" in error_of(capsys, tmp_path / "missing", tmp_path / "new")
    assert "No model could be loaded" in error(lambda folder: (folder / "model.safetensors").unlink())
    assert "No model could be loaded" in error(lambda folder: (folder / "config.json").write_text("{"))
    half = (resnet_folder / "model.safetensors").read_bytes()[:5000]
    assert "No model could be loaded" in error(lambda folder: (folder / "model.safetensors").write_bytes(half))
    line = error(lambda folder: RSkipConfig().save_pretrained(folder))
    assert "it is a model of type 'rskip', not 'resnet'" in line
    line = error(lambda folder: ResNetModel(ResNetConfig(**BASIC)).save_pretrained(folder))
    assert "it has no classifier" in line

    def change_weights(change):
        def write(folder):
            changed = change(load_file(folder / "model.safetensors"))
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

        return error(write)

    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert f"lacks weights of a ResNet, or has others: {name}" in change_weights(without(name))
    assert "or has others: resnet.more" in change_weights(replace("resnet.more", torch.ones(1)))
    assert "No model could be loaded" in change_weights(replace(name, torch.ones(1)))
    timm = make_timm()
    (timm / "model.safetensors").unlink()
    line = error_of(capsys, timm, tmp_path / "new")
    assert "there is neither model.safetensors nor pytorch_model.bin" in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**BASIC, "hidden_act": "gelu"}, "with `hidden_act` 'gelu' the ResNet of Transformers still has ReLU inside"),
        ({**BOTTLENECK, "hidden_sizes": [18, 24, 32]}, "`hidden_sizes` must be multiples of 4 with `layer_type`"),
        ({**BASIC, "num_labels": 0}, "it has no classifier"),
    ],
)
def test_unfit_configurations(values, message):
    with pytest.raises(UserError, match=message):
        convert_resnet_model(make_resnet(**values))


def test_the_output_and_options(capsys, resnet_folder, tmp_path):
    (tmp_path / "kept").write_text("kept")
    for output in (tmp_path, tmp_path / "kept"):
        assert main(["convert", "resnet", str(resnet_folder), str(output)]) == 2
        assert f"{str(output)!r} already exists and is not an empty folder" in capsys.readouterr().err
    words = ["convert", "resnet", str(resnet_folder), str(tmp_path / "new"), "--skip_recursions", "2"]
    assert main(words) == 2
    assert "`--skip_recursions` is for marian" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
