"""Stops a training whose loss is not finite, or has jumped, before the update; saves no weights that are not finite."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

import torch
from accelerate.utils import gather_object, reduce
from torch.distributed.tensor import DTensor

from ..errors import Diverged


class LossGuardMixin:
    """For a Trainer. Loss and gradient norm are looked at before each update, weights before they are saved.

    What is not finite stops the run; so does what exceeds `loss_spike_factor` times its median over the last
    `loss_spike_window` steps, if there is such a factor. The median begins anew when a run is resumed. A gradient norm
    that is not finite is what loss scaling for fp16 looks for, and is left to it.
    """

    describe_batch: Callable[[dict], str]
    """Which examples a batch holds, for a sentence; a method of the Trainer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._batches: list[tuple[torch.Tensor, dict]] = []
        self._history = {name: deque(maxlen=self.args.loss_spike_window) for name in ("loss", "gradient norm")}

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((loss, inputs))
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        batches, self._batches = self._batches, []
        if batches:
            loss = reduce(torch.stack([loss for loss, _ in batches]).sum(), "mean").item()
            self._check({"loss": loss, "gradient norm": float(norm)}, batches)
        return norm

    def save_model(self, *args, **kwargs) -> None:
        self._check_weights()
        super().save_model(*args, **kwargs)

    def _check_weights(self) -> None:
        """For the last update, after which no loss is computed, and for means of weights."""
        tensors = self.accelerator.unwrap_model(self.model).state_dict()
        bad = [name for name, tensor in tensors.items() if not _local(tensor).isfinite().all()]
        bad = gather_object(bad) if self.is_fsdp_enabled else bad  # otherwise all processes have the same weights
        if bad:
            raise Diverged(
                self.state.global_step,
                f"after the update weights are not finite, such as {bad[0]}; they were not saved, and the checkpoints "
                "are from before it",
            )

    def _check(self, values: dict[str, float], batches: list[tuple[torch.Tensor, dict]]) -> None:
        for name, value in values.items():
            history, factor = self._history[name], self.args.loss_spike_factor
            if not math.isfinite(value):
                if name == "loss" or self.accelerator.scaler is None:
                    self._stop(f"the {name} is {value}", batches)
            elif factor is not None and len(history) == history.maxlen and value > factor * median(history):
                usual = f"the median of the {history.maxlen} steps before is {median(history):.4g}"
                self._stop(f"the {name} is {value:.4g} where {usual}", batches)
            else:
                history.append(value)

    def _stop(self, what: str, batches: list[tuple[torch.Tensor, dict]]) -> None:
        # All processes get here at once, as the values are those of all.
        finite = all(math.isfinite(loss) for loss, _ in batches)
        found = [(finite, self._name_batches(batches))]
        found = gather_object(found) if self.args.world_size > 1 else found
        bad = [name for finite, name in found if not finite] or [name for _, name in found]
        raise Diverged(
            self.state.global_step + 1,
            f"{what}; the update was not made, and the checkpoints are from before it; batch: {'; '.join(bad)}",
        )

    def _name_batches(self, batches: Iterable[tuple[torch.Tensor, dict]]) -> str:
        """The batches without a number for a loss, or else all."""
        batches = list(batches)
        bad = [inputs for loss, inputs in batches if not math.isfinite(loss)] or [inputs for _, inputs in batches]
        return "; ".join(self.describe_batch(inputs) for inputs in bad)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
