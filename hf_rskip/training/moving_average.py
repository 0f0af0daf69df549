"""An exponential moving average of the weights, evaluated and saved in place of the last ones."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

AVERAGE_NAME = "moving_average.safetensors"


class MovingAverage(TrainerCallback):
    """After each step, average <- decay * average + (1 - decay) * weights; running statistics likewise.

    The average begins as the weights after the first step. Where the best model is loaded at the end of a training, the
    average becomes the one of its checkpoint.

    Args:
        model: without the wrappers of accelerate.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint)

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
        swapped = set()
        for name, value in self.model.state_dict().items():
            if value.data_ptr() not in swapped:  # tied weights go by several names
                swapped.add(value.data_ptr())
                kept = value.clone()
                value.copy_(average[name])
                average[name].copy_(kept)

    def save(self, folder: str | Path) -> None:
        """Writes the average into a checkpoint."""
        save_model(self.average, str(Path(folder, AVERAGE_NAME)))  # tied weights once

    def load(self, folder: str | Path) -> None:
        """Goes on from the average of a checkpoint."""
        load_model(self.average, Path(folder, AVERAGE_NAME))
