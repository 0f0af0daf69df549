"""An exponential moving average of the weights, to evaluate and to save in place of the last ones."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

AVERAGE_NAME = "moving_average.safetensors"


class MovingAverage(TrainerCallback):
    """After each step, average <- decay * average + (1 - decay) * weights; running statistics likewise.

    The average begins as the weights after the first step.

    Args:
        model: without the wrappers of accelerate.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    @contextmanager
    def swapped_in(self):
        """The model computes with the average inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        average = self.average.module.state_dict()
        for name, value in self.model.state_dict().items():
            kept = value.clone()
            value.copy_(average[name])
            average[name].copy_(kept)

    def save(self, folder: str | Path) -> None:
        """Writes the average into a checkpoint."""
        save_file({name: value.contiguous() for name, value in self.average.state_dict().items()}, _path(folder))

    def load(self, folder: str | Path) -> None:
        """Goes on from the average of a checkpoint."""
        self.average.load_state_dict(load_file(_path(folder)))


def _path(folder: str | Path) -> Path:
    return Path(folder, AVERAGE_NAME)
