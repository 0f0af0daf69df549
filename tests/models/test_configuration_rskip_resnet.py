"""Configuration of the ResNet: defaults, architectures of the literature, round trips, wrong values."""

import math

import pytest
import torch
from transformers import AutoConfig, ResNetConfig

from hf_rskip import SKIP_CONNECTIONS, RSkipResNetConfig, RSkipResNetForImageClassification
from hf_rskip.models.configuration_rskip_resnet import ARCHITECTURES


def test_defaults_are_those_of_transformers_with_a_recursive_skip_connection():
    config, peer = RSkipResNetConfig(), ResNetConfig()
    given = peer.to_dict().keys() & config.to_dict().keys() - {"model_type"}
    assert given >= {"hidden_sizes", "depths", "layer_type", "hidden_act", "stage_names", "out_features"}
    for field in given:
        value = getattr(peer, field)
        assert getattr(config, field) == (list(value) if isinstance(value, tuple) else value), field
    assert (config.skip_type, config.skip_recursions, config.skip_norm) == ("rskip", 2, "layer_norm")
    assert (config.skip_norm_axes, config.skip_norm_affine, config.layer_norm_eps) == ("sample", "per_step", 1e-5)
    assert (config.stem_type, config.shortcut_type, config.drop_path_rate) == ("imagenet", "B", 0)
    assert not config.preactivation and not config.zero_init_last_gain


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"skip_type": "xskip", "skip_scale": 2.414, "skip_norm": "rms_norm", "skip_norm_axes": "channels"},
        {"skip_recursions": 3, "skip_norm": "batch_norm", "skip_norm_affine": "last", "drop_path_rate": 0.1},
        {"layer_type": "basic", "hidden_sizes": [5, 6, 7], "embedding_size": 5, "depths": [1, 2, 3], "num_channels": 1},
        {"preactivation": True, "shortcut_type": "A", "stem_type": "cifar", "zero_init_last_gain": True},
        {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "out_features": ["stem", "stage3"]},
        {"problem_type": "multi_label_classification", "hidden_act": "gelu", "out_indices": [1, 2]},
        {"num_labels": 0},
    ],
)
def test_round_trip(values, tmp_path):
    config = RSkipResNetConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RSkipResNetConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert {name: getattr(loaded, name) for name in values} == values


# Architectures

PARAMETERS = {
    # 1.7M for 110 layers in table 6 of He et al. (2016), as for 164 in He et al. (2016b).
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "preact_resnet20_cifar": 269_722,
    "preact_resnet56_cifar": 853_018,
    "preact_resnet110_cifar": 1_727_962,
    "preact_resnet164_cifar": 1_703_258,
    # Those of torchvision.
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
}
DEPTH_OF_A_BLOCK = {"basic": 2, "bottleneck": 3}


def count_parameters(name, **values):
    with torch.device("meta"):
        model = RSkipResNetForImageClassification(RSkipResNetConfig.from_name(name, **values))
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_architecture_is_tested_here():
    assert PARAMETERS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures(name):
    assert count_parameters(name) == PARAMETERS[name]
    config = RSkipResNetConfig.from_name(name)
    layers = int("".join(filter(str.isdigit, name)))
    assert 2 + sum(config.depths) * DEPTH_OF_A_BLOCK[config.layer_type] == layers
    assert config.num_labels == (10 if "cifar" in name else 1000)
    assert config.preactivation == name.startswith("preact")
    # Gain and bias for each channel of each block's output and each step.
    norms = 2 * 2 * sum(size * depth for size, depth in zip(config.hidden_sizes, config.depths, strict=True))
    assert count_parameters(name, skip_type="rskip", skip_recursions=2) == PARAMETERS[name] + norms
    assert count_parameters(name, skip_type="rskip", skip_norm="rms_norm") == PARAMETERS[name] + norms // 2


def test_a_named_architecture_is_plain_unless_a_skip_type_is_given():
    config = RSkipResNetConfig.from_name("resnet18", num_labels=7, drop_path_rate=0.1)
    assert (config.skip_type, config.skip_norm, config.skip_scale) == ("xskip", "none", 1.0)
    assert (config.num_labels, config.drop_path_rate) == (7, 0.1)
    for skip_type in (name for name, kind in SKIP_CONNECTIONS.items() if kind.for_images):
        config = RSkipResNetConfig.from_name("resnet18", skip_type=skip_type)
        assert (config.skip_type, config.skip_norm) == (skip_type, "layer_norm")
    labels = {0: "cat", 1: "dog"}
    config = RSkipResNetConfig.from_name("resnet18", id2label=labels, label2id={"cat": 0, "dog": 1})
    assert (config.num_labels, config.id2label) == (2, labels)


def test_configurations_share_no_lists():
    RSkipResNetConfig.from_name("resnet18").depths.append(9)
    RSkipResNetConfig().hidden_sizes.append(9)
    assert RSkipResNetConfig.from_name("resnet18").depths == [2, 2, 2, 2]
    assert RSkipResNetConfig().hidden_sizes == [256, 512, 1024, 2048]


def test_an_unknown_architecture():
    with pytest.raises(ValueError) as error:
        RSkipResNetConfig.from_name("resnet19")
    assert str(error.value) == f"`name` must be one of {', '.join(ARCHITECTURES)}, not 'resnet19'"


# Wrong values

FLAGS = ("preactivation", "downsample_in_first_stage", "downsample_in_bottleneck", "zero_init_last_gain")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(
            (field, value, "an integer from 1 to 10,000,000")
            for field in ("num_channels", "embedding_size")
            for value in (0, 10_000_001)
        ),
        *(
            (field, value, f"a list of integers of at least 1 whose sum is at most {most:,}")
            for field, most in (("hidden_sizes", 10_000_000), ("depths", 1000))
            for value in ([], [1, 2, 0, 4], [1, 2.0, 3, 4], [1, 2, True, 4], "1234", 4, None, [1, most])
        ),
        *(("drop_path_rate", value, "a number from 0 to below 1") for value in (1.0, -0.1, math.nan, "0.1", True)),
        *((field, value, "true or false") for field in FLAGS for value in ("false", 1, None)),
        *(("skip_norm_axes", value, "one of channels, sample") for value in ("batch", None)),
        *(("layer_type", value, "one of basic, bottleneck") for value in ("Basic", ["basic"])),
        ("stem_type", "cifar10", "one of imagenet, cifar"),
        ("shortcut_type", "C", "one of A, B"),
        ("hidden_act", "rleu", "a name of `transformers.activations.ACT2FN`"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_is_allowed(field, value, allowed):
    config = RSkipResNetConfig()
    setattr(config, field, value)
    for build in (lambda: RSkipResNetConfig(**{field: value}), lambda: RSkipResNetForImageClassification(config)):
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value) == f"`{field}` must be {allowed}, not {value!r}"


def test_a_problem_type_that_there_is_not():
    """By Transformers itself in some versions, with a class of error of its own."""
    with pytest.raises(Exception, match="problem_type.*multi_label"):
        RSkipResNetConfig(problem_type="multi_label")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"id2label": dict.fromkeys(range(10**6), "class")},
            "`id2label` must be of 0 to 100,000 classes, not 1000000",
        ),
        ({"depths": [1, 2]}, "`depths` must be a list of 4, as `hidden_sizes`, not [1, 2]"),
        (
            {"hidden_sizes": [8, 10], "depths": [1, 1]},
            "`hidden_sizes` must be multiples of 4 with `layer_type` 'bottleneck', not [8, 10]",
        ),
        (
            {"hidden_sizes": [32, 64], "depths": [1, 1], "shortcut_type": "A"},
            "`hidden_sizes` must be in ascending order from the stem's 64 on with `shortcut_type` 'A', which only adds "
            "channels, not [32, 64]",
        ),
    ],
)
def test_values_that_do_not_go_together(values, message):
    with pytest.raises(ValueError) as error:
        RSkipResNetConfig(**values)
    assert str(error.value) == message


@pytest.mark.parametrize("values", [{"out_features": ["stage5"]}, {"out_indices": [5]}])
def test_stages_that_do_not_exist(values):
    with pytest.raises(ValueError, match=f"^{next(iter(values))} must be .* stage_names"):
        RSkipResNetConfig(**values)


def test_a_wrong_value_in_a_checkpoint_is_an_error_too(tmp_path):
    RSkipResNetConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"skip_norm_axes": "sample"', '"skip_norm_axes": "samples"'))
    with pytest.raises(ValueError, match="`skip_norm_axes` must be one of channels, sample, not 'samples'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shortcut_type": "C"}, "`shortcut_type` must be one of A, B, not 'C'"),
        ({"depths": [1, 1]}, "`depths` must be a list of 4, as `hidden_sizes`"),
        ({"skip_type": "deep_norm"}, "`skip_type` must be one of rskip, xskip, .* not 'deep_norm'"),
    ],
)
def test_a_wrong_value_beside_a_checkpoint_is_an_error_too(values, message, tmp_path):
    RSkipResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **values)


def test_the_last_stage_follows_the_depths_beside_a_checkpoint(tmp_path):
    two = {"depths": [1, 1], "hidden_sizes": [8, 16]}
    for stored, found in (({}, ["stage2"]), ({"out_features": ["stem", "stage1"]}, ["stem", "stage1"])):
        RSkipResNetConfig(**stored).save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path, **two).out_features == found


@pytest.mark.parametrize("field", ["skip_recursions", "skip_norm_affine"])
def test_an_option_that_the_plain_network_does_not_have(field):
    with pytest.raises(ValueError, match=f"`{field}` has no effect on the plain network: give a `skip_type`"):
        RSkipResNetConfig.from_name("resnet20_cifar", **{field: "last"})
