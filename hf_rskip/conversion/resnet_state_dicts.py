"""Converts state dicts of plain ResNets of torchvision and timm, whose architecture shows in the shapes of weights.

Only the plain network is taken: the 7x7 stem, basic blocks or bottlenecks a quarter as wide as their output, batch
normalisation with torch's settings, ReLU, and strides in the 3x3 convolution. What differs in a weight is refused. What
has no weights, such as dilation and anti-aliasing, cannot be seen in a state dict, except by a name that goes with it.
"""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..errors import UserError, first_line
from ..models import RSkipResNetConfig, RSkipResNetForImageClassification

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # prefixes by data parallelism and torch.compile
_ANTIALIASED = re.compile(r"resnet(?:aa|blur)\d")  # timm's; their weights look like those of the plain ones
_COUNT = "num_batches_tracked"
_RENAMES = (  # from our names to those of torchvision
    (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
    (r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
    (r"^resnet\.encoder\.stages\.(\d+)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^classifier\.1\.", "fc."),
)


def read_state_dict(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights in a `.safetensors` file or one of `torch.save`, without running code from it.

    Of a training script's checkpoint it is the only state dict in it. Prefixes that `DistributedDataParallel` and
    `torch.compile` give to names are removed.

    Raises:
        [`UserError`]: a clause on why the file cannot be read, or on what is in it instead of a plain state dict.
    """
    try:
        if Path(file).suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError("it is not a file of weights that could be read without running code from it") from error
    except Exception as error:  # the unpickler raises errors of any class
        raise UserError(f"the file cannot be read ({first_line(error)})") from error
    if not isinstance(weights, Mapping):
        raise UserError(f"it contains a {type(weights).__name__}, not a state dict")
    if _ANTIALIASED.search(str(weights.get("arch"))):
        raise UserError(f"timm's architecture {weights['arch']!r} is not a plain ResNet")
    entries = {name: part for name, part in weights.items() if _is_state_dict(part)}
    if len(entries) > 1:
        raise UserError(f"it has several state dicts, {', '.join(map(str, entries))}: save the one that is meant alone")
    weights = next(iter(entries.values()), weights)
    if not _is_state_dict(weights):
        raise UserError(f"there is no state dict in it, only {', '.join(map(str, weights)) or 'nothing'}")
    return {_WRAPPERS.sub("", str(name)): weight for name, weight in weights.items()}


def _is_state_dict(part: object) -> bool:
    return isinstance(part, Mapping) and bool(part) and all(isinstance(each, torch.Tensor) for each in part.values())


def convert_resnet_state_dict(
    weights: Mapping[str, torch.Tensor], label_names: Sequence[str] | None = None
) -> RSkipResNetForImageClassification:
    """The plain ResNet with these weights, in evaluation mode and of the widest dtype among them.

    Args:
        weights: by the names of torchvision and timm, such as `layer1.0.conv1.weight`.
        label_names: the classes; ignored where the classifier has another number of them.

    Raises:
        [`UserError`]: a clause on the first weight that a plain ResNet cannot have, or lacks.
    """
    fields = _read_fields(weights)
    if label_names is not None and len(label_names) == fields["num_labels"]:
        fields["id2label"] = dict(enumerate(label_names))
        fields["label2id"] = {label: index for index, label in enumerate(label_names)}
    try:
        config = RSkipResNetConfig(**fields, skip_type="xskip", skip_norm="none")
    except ValueError as error:
        raise UserError(str(error)) from error
    model = RSkipResNetForImageClassification(config)
    expected = {_torchvision_name(name): (name, tuple(weight.shape)) for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if name not in expected:
            raise UserError(f"{name} has no place in a plain ResNet with blocks {config.depths}")
        _, shape = expected[name]
        if tuple(weight.shape) != shape:
            raise UserError(f"{name} has the shape {tuple(weight.shape)}, that of a plain ResNet {shape}")
        is_float = weight.is_floating_point() and weight.dtype.itemsize > 1  # those of 8 bits are quantised
        if not (is_float or name.endswith(_COUNT)):
            raise UserError(f"{name} is of type {weight.dtype}")
    # Before torch 0.4.1, and so in torchvision's first checkpoints, nothing counted the batches.
    missing = next((name for name in expected if name not in weights and not name.endswith(_COUNT)), None)
    if missing is not None:
        raise UserError(f"it lacks {missing}")
    dtype = reduce(torch.promote_types, {w.dtype for w in weights.values() if w.is_floating_point()})
    model.to(dtype).load_state_dict({expected[name][0]: weight for name, weight in weights.items()})
    return model.eval()


def _read_fields(weights: Mapping[str, torch.Tensor]) -> dict:
    """Reads the configuration from the shapes of a few weights, without checking those of the others."""

    def sizes(name: str, dimensions: int) -> torch.Size:
        if name not in weights:
            raise UserError(f"it lacks {name}")
        if weights[name].ndim != dimensions:
            raise UserError(f"{name} has the shape {tuple(weights[name].shape)}, not {dimensions} dimensions")
        return weights[name].shape

    embedding_size, num_channels, *_ = sizes("conv1.weight", 4)
    layer_type, last = "basic", "conv2"
    if "layer1.0.conv3.weight" in weights:
        layer_type, last = "bottleneck", "conv3"
    depths, hidden_sizes = [], []
    for stage in count(1):
        if stage > 1 and f"layer{stage}.0.conv1.weight" not in weights:
            break
        hidden_sizes.append(sizes(f"layer{stage}.0.{last}.weight", 4)[0])
        depths.append(next(block for block in count(1) if f"layer{stage}.{block}.conv1.weight" not in weights))
    if "fc.weight" not in weights:
        raise UserError("it has no classifier, fc.weight")
    return {
        "num_channels": num_channels,
        "embedding_size": embedding_size,
        "hidden_sizes": hidden_sizes,
        "depths": depths,
        "layer_type": layer_type,
        "num_labels": sizes("fc.weight", 2)[0],
    }


def _torchvision_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
