"""What the training keys of all tasks have in common."""

import math
import sys
from dataclasses import dataclass, field, fields, make_dataclass

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from ..errors import UserError


def check_at_least(key: str, value: float, least: float) -> None:
    """Raises a [`UserError`] that names the key unless its value is a number of at least `least`."""
    if not value >= least:  # a NaN is at least nothing
        raise UserError(f"{key} must be {'a number' if least == -math.inf else f'at least {least}'}, not {value}.")


def make_model_arguments(name: str, config_class: type, excluded: set[str]) -> type:
    """A dataclass of the fields that `config_class` itself defines, under their own names and with their defaults."""
    own = [part for part in fields(config_class) if part.name in config_class.__annotations__]
    return make_dataclass(
        name,
        [
            # A tuple is no default of a command line: `None` stands for that of the configuration.
            (part.name, list[int] | None, field(default=None))
            if isinstance(part.default, tuple)
            else (part.name, part.type, field(default=part.default))
            for part in own
            if part.name not in excluded
        ],
        namespace={"__doc__": f"The fields of [`{config_class.__name__}`] under their own names."},
    )


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "learning_rate": 0,
    "label_smoothing_factor": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
}


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every task adds."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Start from this model, with all that belongs to it; model keys override its configuration."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether early stopping goes on counting when a run is resumed."}
    )

    def __post_init__(self):
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a file is no place for a bar
        super().__post_init__()
        if "tensorboard" in self.report_to and not is_tensorboard_available():
            raise UserError("report_to: tensorboard needs the package: `pip install 'hf_rskip[tensorboard]'`.")
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        for key, least in _LEAST.items():
            check_at_least(key, getattr(self, key), least)
        if not self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor must be below 1, not {self.label_smoothing_factor}.")
        if self.early_stopping_patience is not None:
            check_at_least("early_stopping_patience", self.early_stopping_patience, 1)
            if self.eval_strategy == "no":
                raise UserError("early_stopping_patience needs evaluations, but eval_strategy is no.")

    def check_metric_for_best_model(self, metrics: tuple[str, ...], where: str = "") -> None:
        """Raises a [`UserError`] unless `metric_for_best_model` is unset or one of `metrics`."""
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in metrics:
            raise UserError(
                f"metric_for_best_model must be one of {', '.join(metrics)}{where}, not {self.metric_for_best_model!r}."
            )
