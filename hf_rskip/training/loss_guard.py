"""Aborts a training before an update if its loss is not finite or has jumped, and before saving such weights."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import Diverged


class LossGuard:
    """Checks the loss and the gradient norm of each step before its update.

    A value that is not finite aborts the training; so does one that exceeds `spike_factor` times its median over the
    last `window` steps. The median begins anew when a run is resumed.

    Args:
        describe_batch: says in a few words which examples a batch holds.
        spike_factor: above 1, or `None` to let jumps pass.
        window: steps of the median.
        scales_loss: whether a gradient norm that is not finite is left to the loss scaling for fp16.
    """

    def __init__(
        self, describe_batch: Callable[[dict], str], spike_factor: float | None, window: int, scales_loss: bool
    ):
        self.describe_batch, self.spike_factor, self.scales_loss = describe_batch, spike_factor, scales_loss
        self._batches: list[tuple[torch.Tensor, dict]] = []
        self._history = {name: deque(maxlen=window) for name in ("loss", "gradient norm")}

    def add(self, loss: torch.Tensor, inputs: dict) -> None:
        """Adds a batch of the step, with its part of the loss."""
        self._batches.append((loss, inputs))

    def check(self, step: int, gradient_norm: float) -> None:
        """Checks the step of the batches that were added since the last call; to be called on every process.

        Raises:
            [`Diverged`]: if the training must be aborted; on all processes at once, as the values are those of all.
        """
        batches, self._batches = self._batches, []
        if not batches:
            return
        loss = reduce(torch.stack([loss for loss, _ in batches]).sum(), "mean").item()
        for name, value in {"loss": loss, "gradient norm": gradient_norm}.items():
            history = self._history[name]
            is_full = self.spike_factor is not None and len(history) == history.maxlen
            if not math.isfinite(value):
                if name == "loss" or not self.scales_loss:
                    self._abort(step, f"the {name} is {value}", batches)
            elif is_full and value > self.spike_factor * median(history):
                usual = f"the median of the {history.maxlen} steps before is {median(history):.4g}"
                self._abort(step, f"the {name} is {value:.4g} where {usual}", batches)
            else:
                history.append(value)

    def _abort(self, step: int, what: str, batches: list[tuple[torch.Tensor, dict]]) -> None:
        bad = [inputs for loss, inputs in batches if not math.isfinite(loss)]
        described = "; ".join(self.describe_batch(inputs) for inputs in bad or [inputs for _, inputs in batches])
        found = [(bool(bad), described)]
        found = gather_object(found) if PartialState().num_processes > 1 else found
        named = [name for is_bad, name in found if is_bad] or [name for _, name in found]
        raise Diverged(
            step, f"{what}; the update was not made, and the checkpoints are from before it; batch: {'; '.join(named)}"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """Raises [`Diverged`] if a weight or a running statistic is not finite; to be called on every process.

    No loss is computed of the weights after the last update, at `step`, and of means of weights.
    """
    tensors = model.state_dict()
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    bad = [name for name, tensor in local.items() if not tensor.isfinite().all()]
    bad = gather_object(bad) if is_sharded else bad  # otherwise all processes have the same weights
    if bad:
        raise Diverged(
            step,
            f"after the update weights are not finite, such as {bad[0]}; they were not saved, and the checkpoints are "
            "from before it",
        )
