"""Measures on one batch what the skip connections of a model do to activations and gradients.

The measurement watches the calls of [`SkipConnection`] modules and of the norms inside them; it knows no residual kind,
so one of your own is probed as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError
from ..models import SkipConnection

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS)
_INFINITE = 1e6


@dataclass(frozen=True)
class SublayerProbe:
    """One sublayer y = skip(x, F). A token is a position that the mask keeps; of images, every position of a map."""

    name: str
    """Name of the skip connection among the modules of the model."""
    stack: str
    """`"encoder"` (the only one of a ResNet) or `"decoder"`."""
    layer: int
    """Index of the layer in its stack, from 0. The layer is the closest `GradientCheckpointingLayer` of Transformers
    around the skip connection, else the closest numbered module, such as `h.3`, else the module that has it."""
    sublayer: int
    """Index of the sublayer in its layer, from 0."""
    depth: int
    """Index of the sublayer in its stack, from 0, in the order of the forward pass."""
    tokens: int
    """Number of tokens of the batch: the root mean square gradient norm of a token is gradient norm / sqrt(tokens)."""
    loss: float
    """Loss of the batch, in nats a target token or image."""
    gradient_norm_x: float
    """Norm, over the batch, of the gradient of the loss with respect to the input of the sublayer, by all paths."""
    gradient_norm_y: float
    gradient_norm_branch: float
    """Gradient norm of the parameters used between the two steps of the skip connection: those of the branch,
    and of the few shortcuts of a ResNet that have some. NaN where there are none."""
    relative_gradient_norm_x: float
    """`gradient_norm_x` divided by the `gradient_norm_y` of the last sublayer of the stack."""
    relative_gradient_norm_y: float
    std_x: float
    """Standard deviation over the features of a token, mean over tokens."""
    std_branch: float
    std_y: float
    angle: float
    """Angle between x and y with centred features, in degrees; median over tokens."""
    angle_q1: float
    angle_q3: float
    skip_weight: float
    """The r for which y, without the gain and bias of a norm at its end, is closest to r x + F up to a factor and a
    constant: a least-squares fit over the features of each token, or where that norm is over the batch over the tokens
    of each feature; median. Infinite where F has no part in y, NaN where x and F cannot be told apart."""
    skip_weight_q1: float
    skip_weight_q3: float
    skip_weight_r2: float
    """Share of the variance of y that the fit explains, at most 1; median."""
    gain_mean: tuple[float, ...]
    """Mean of |gain| over the features, for each norm of the skip connection in the order of use."""
    gain_rms: tuple[float, ...]


def probe(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], label_smoothing: float | None = None
) -> list[SublayerProbe]:
    """Measures every sublayer of a model on one batch, in the order of the forward pass.

    The model is in evaluation mode, so that nothing is random, but batch norms use the statistics of the batch, as in
    training. The model is left as it was: weights, gradients, running statistics, mode and random state.

    Args:
        model: any whose output has a `loss` or, with `label_smoothing`, `logits`.
        inputs: what its `forward` takes, `labels` included.
        label_smoothing: of a cross-entropy in place of the model's own loss, as `label_smoothing_factor` of
            `TrainingArguments`; in the precision of the logits.

    Raises:
        [`UserError`]: if the model calls no skip connection, or the batch is empty.

    Example:

    ```python
    >>> import torch
    >>> from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
    >>> from hf_rskip.probing.probe import probe

    >>> config = RSkipConfig(vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=1)
    >>> tokens = torch.tensor([[5, 6, 7, 2]])
    >>> rows = probe(RSkipForConditionalGeneration(config), {"input_ids": tokens, "labels": tokens})
    >>> [(row.stack, row.layer, row.sublayer) for row in rows]
    [('encoder', 0, 0), ('encoder', 0, 1), ('encoder', 1, 0), ('encoder', 1, 1), ('decoder', 0, 0), ('decoder', 0, 1), \
('decoder', 0, 2)]

    ```
    """
    if not any(isinstance(module, SkipConnection) for module in model.modules()):
        raise UserError(f"{type(model).__name__} has no skip connection of hf_rskip to probe.")
    if not inputs or any(tensor.numel() == 0 for tensor in inputs.values()):
        raise UserError("The batch to probe on is empty.")
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with _preserved(model), torch.enable_grad(), _record_calls(model) as calls:
        outputs = model(**inputs)
        if label_smoothing is None:
            loss = outputs.loss
        else:
            logits = outputs.logits.flatten(0, -2)
            loss = F.cross_entropy(logits, inputs["labels"].flatten(), label_smoothing=label_smoothing)
        if not calls:
            raise UserError(f"{type(model).__name__} has called no skip connection of hf_rskip for this batch.")
        gradients = _differentiate(loss, calls)
        with torch.no_grad():
            return _measure(model, calls, gradients, float(loss))


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode but for batch norms, and gradients of all parameters; restores the model at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for module in modes:
                module.training = isinstance(module, _BATCH_NORMS)
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# Recording


@dataclass(eq=False)
class _Call:
    """A use of a skip connection, from its step before the branch to the end of its step after it."""

    name: str
    source: torch.Tensor | None = None
    """The input of both the branch and the shortcut."""
    x: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    y: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    norms: list["_NormCall"] = field(default_factory=list)
    parameters: dict[nn.Parameter, None] = field(default_factory=dict)


@dataclass
class _NormCall:
    module: nn.Module
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    output: torch.Tensor


@contextmanager
def _record_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Yields a list to which the calls of skip connections inside this context are added."""
    calls: list[_Call] = []
    begun: dict[SkipConnection, _Call] = {}
    open_branches: dict[SkipConnection, _Call] = {}

    def record_skip(name: str, skip: SkipConnection) -> None:
        before = skip.before

        def recorded_before(x, *args, **kwargs):
            begun[skip] = _Call(name, source=_base_of(x))
            result = before(x, *args, **kwargs)
            open_branches[skip] = begun[skip]
            return result

        def enter(module, args, kwargs):
            open_branches.pop(skip, None)
            begun.setdefault(skip, _Call(name))

        def leave(module, args, kwargs, y):
            call = begun.pop(skip)
            given = dict(zip(("x", "branch", "mask"), args, strict=False)) | kwargs
            call.x, call.branch, call.mask, call.y = given["x"], given["branch"], given.get("mask"), y
            if call.source is None:
                call.source = _base_of(call.x)
            calls.append(call)

        replace(skip, "before", recorded_before)
        remove_later(skip.register_forward_pre_hook(enter, with_kwargs=True))
        remove_later(skip.register_forward_hook(leave, with_kwargs=True))
        for module in skip.modules():
            if hasattr(module, "normalize"):
                record_normalize(skip, module)
            elif isinstance(module, _NORMS):
                remove_later(module.register_forward_hook(partial(record_norm, skip)))

    def record_normalize(skip: SkipConnection, norm: nn.Module) -> None:
        normalize = norm.normalize

        def recorded_normalize(hidden, weight, bias, *args, **kwargs):
            output = normalize(hidden, weight, bias, *args, **kwargs)
            if output is not hidden and skip in begun:  # an unchanged tensor means no norm
                begun[skip].norms.append(_NormCall(norm, weight, bias, output))
            return output

        replace(norm, "normalize", recorded_normalize)

    def record_norm(skip: SkipConnection, norm: nn.Module, args, output) -> None:
        if skip in begun:
            begun[skip].norms.append(_NormCall(norm, norm.weight, getattr(norm, "bias", None), output))

    def note_parameters(module, args):
        for call in open_branches.values():
            call.parameters |= dict.fromkeys(module.parameters(recurse=False))

    with ExitStack() as stack:

        def replace(module: nn.Module, method: str, replacement: Callable) -> None:
            own = vars(module).get(method)  # `None` where the method is that of the class
            setattr(module, method, replacement)
            stack.callback(*((setattr, module, method, own) if own else (delattr, module, method)))

        def remove_later(handle: RemovableHandle) -> None:
            stack.callback(handle.remove)

        skips = {name: module for name, module in model.named_modules() if isinstance(module, SkipConnection)}
        for name, skip in skips.items():
            record_skip(name, skip)
        inside = {module for skip in skips.values() for module in skip.modules()}
        for module in model.modules():
            if module not in inside and next(module.parameters(recurse=False), None) is not None:
                remove_later(module.register_forward_pre_hook(note_parameters))
        yield calls


def _base_of(x: torch.Tensor) -> torch.Tensor:
    """In a ResNet, branch and shortcut each get a view of their own of the feature maps, through which only a part of
    the gradient flows: all of it reaches the maps themselves."""
    return x._base if x._is_view() and x._base.numel() == x.numel() else x


# Measuring


def _differentiate(loss: torch.Tensor, calls: list[_Call]) -> dict[int, torch.Tensor]:
    """Gradients by the `id` of what they are with respect to; zeros where the loss does not depend on it."""
    tensors = [tensor for call in calls for tensor in (call.source, call.y, *call.parameters)]
    wanted = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def _measure(
    model: nn.Module, calls: list[_Call], gradients: dict[int, torch.Tensor], loss: float
) -> list[SublayerProbe]:
    def norm(*tensors: torch.Tensor) -> float:
        norms = [torch.linalg.vector_norm(gradients[id(t)], dtype=_float64(t)) for t in tensors if id(t) in gradients]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else float("nan")

    stacks = ["decoder" if "decoder" in call.name.split(".") else "encoder" for call in calls]
    top = {stack: norm(call.y) or float("nan") for stack, call in zip(stacks, calls, strict=True)}
    layers: dict[str, dict[str, int]] = {stack: {} for stack in top}
    rows: list[SublayerProbe] = []
    for stack, call in zip(stacks, calls, strict=True):
        layer = layers[stack].setdefault(_layer_of(call.name, model), len(layers[stack]))
        earlier = [row for row in rows if row.stack == stack]
        at_x, at_y = norm(call.source), norm(call.y)
        gains = [torch.ones(1) if use.weight is None else use.weight.to(_float64(use.weight)) for use in call.norms]
        rows.append(
            SublayerProbe(
                name=call.name,
                stack=stack,
                layer=layer,
                sublayer=sum(row.layer == layer for row in earlier),
                depth=len(earlier),
                loss=loss,
                gradient_norm_x=at_x,
                gradient_norm_y=at_y,
                gradient_norm_branch=norm(*call.parameters),
                relative_gradient_norm_x=at_x / top[stack],
                relative_gradient_norm_y=at_y / top[stack],
                gain_mean=tuple(float(gain.abs().mean()) for gain in gains),
                gain_rms=tuple(float(gain.square().mean().sqrt()) for gain in gains),
                **_measure_activations(call),
            )
        )
    return rows


def _layer_of(name: str, model: nn.Module) -> str:
    """The name of the layer around a skip connection; see [`SublayerProbe`]."""
    parts = name.split(".")[:-1]
    around = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    layers = [name for name in around if isinstance(model.get_submodule(name), GradientCheckpointingLayer)]
    numbered = [name for name in around if name.rpartition(".")[2].isdigit()]
    return [*layers, *numbered, *around][0]


def _float64(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _measure_activations(call: _Call) -> dict[str, float]:
    x, branch, y = (_real_tokens(tensor, call.mask) for tensor in (call.x, call.branch, call.y))
    angles = _quartiles(_angle(_centre(x), _centre(y)))
    weights, r2 = _fit_skip_weight(x, branch, y, next((use for use in call.norms if use.output is call.y), None))
    weights = _quartiles(weights)
    return {
        "tokens": len(x),
        "std_x": float(x.std(1, correction=0).mean()),
        "std_branch": float(branch.std(1, correction=0).mean()),
        "std_y": float(y.std(1, correction=0).mean()),
        **dict(zip(("angle_q1", "angle", "angle_q3"), angles, strict=True)),
        **dict(zip(("skip_weight_q1", "skip_weight", "skip_weight_q3"), weights, strict=True)),
        "skip_weight_r2": _quartiles(r2)[1],
    }


def _real_tokens(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`(tokens, features)` of a tensor with the features last, without padding, in float64."""
    tensor = tensor if mask is None else tensor[mask.expand(tensor.shape[:-1]).bool()]
    return tensor.reshape(-1, tensor.shape[-1]).to(_float64(tensor))


def _centre(tensor: torch.Tensor) -> torch.Tensor:
    return tensor - tensor.mean(1, keepdim=True)


def _angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Angles in degrees, row by row; exact for small ones too (Kahan), where the arc cosine is not."""
    x, y = (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, y))
    half = torch.atan2(torch.linalg.vector_norm(x - y, dim=1), torch.linalg.vector_norm(x + y, dim=1))
    return torch.rad2deg(2 * half)


def _fit_skip_weight(
    x: torch.Tensor, branch: torch.Tensor, y: torch.Tensor, end: _NormCall | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The skip weight r = a / c and the R^2 of y - bias ~ gain (a x + c F + d), for each row of the fit.

    The gain is multiplied to the other side instead of being divided out: it may be 0.
    """
    gain = torch.ones_like(y[:1])
    if end is not None:
        gain = gain if end.weight is None else end.weight.to(y).expand_as(gain)
        y = y if end.bias is None else y - end.bias.to(y)
        if isinstance(end.module, _BATCH_NORMS):  # each feature has a scale of its own
            x, branch, y, gain = x.T, branch.T, y.T, gain.T
    weight = gain.square().expand_as(y)
    total = weight.sum(1, keepdim=True)

    def centre(rows):
        return gain * (rows - (weight * rows).sum(1, keepdim=True) / total)

    x, branch = centre(x), centre(branch)
    y = y - gain * ((gain * y).sum(1, keepdim=True) / total)
    xx, xf, ff = (x * x).sum(1), (x * branch).sum(1), (branch * branch).sum(1)
    xy, fy, yy = (x * y).sum(1), (branch * y).sum(1), (y * y).sum(1)
    determinant = xx * ff - xf * xf
    a, c = (xy * ff - fy * xf) / determinant, (fy * xx - xy * xf) / determinant
    r2 = 1 - (y - a[:, None] * x - c[:, None] * branch).square().sum(1) / yy
    ratio = torch.where(c.abs() * ff.sqrt() * _INFINITE < a.abs() * xx.sqrt(), torch.inf, a / c)
    collinear = ~(determinant > 1e-12 * xx * ff)
    return ratio.masked_fill(collinear, torch.nan), r2.masked_fill(collinear, torch.nan)


def _quartiles(values: torch.Tensor) -> list[float]:
    """Lower quartile, median and upper quartile without NaNs, each one of the values."""
    values = values[~values.isnan()].cpu().numpy()
    if not len(values):
        return [float("nan")] * 3
    return np.quantile(values, [0.25, 0.5, 0.75], method="nearest").tolist()
