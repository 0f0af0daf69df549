"""An exponential moving average of the weights, to evaluate and to save in place of the last ones."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PredictionOutput

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
        swapped = set()
        for name, value in self.model.state_dict().items():
            if value.data_ptr() not in swapped:  # tied weights go by several names
                swapped.add(value.data_ptr())
                kept = value.clone()
                value.copy_(average[name])
                average[name].copy_(kept)

    def save(self, folder: str | Path) -> None:
        """Writes the average into a checkpoint."""
        save_model(self.average, str(_path(folder)))  # tied weights once

    def load(self, folder: str | Path) -> None:
        """Goes on from the average of a checkpoint."""
        load_model(self.average, _path(folder))


def _path(folder: str | Path) -> Path:
    return Path(folder, AVERAGE_NAME)


class MovingAverageMixin:
    """For a Trainer. With `ema_decay`, evaluations are of the average, and [`use_moving_average`] ends with it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moving_average = None
        if self.args.ema_decay is not None:
            self.moving_average = MovingAverage(self.model, self.args.ema_decay)
            self.add_callback(self.moving_average)

    def use_moving_average(self) -> None:
        """Ends with the average as the model, if there is one."""
        if self.moving_average is not None:
            self.model.load_state_dict(self.moving_average.average.module.state_dict())
            self.remove_callback(self.moving_average)
            self.moving_average = None

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.moving_average is None else self.moving_average.swapped_in()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.moving_average is not None and self.args.should_save:
            self.moving_average.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.moving_average is not None and checkpoint is not None:
            self.moving_average.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.moving_average is not None:
            self.moving_average.load(self.state.best_model_checkpoint)
