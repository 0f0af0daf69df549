"""The training keys of all tasks."""

import copy
import inspect
import re
import sys
from dataclasses import dataclass, fields, make_dataclass
from typing import Literal

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..errors import UserError
from ..models.configuration_skip import SkipConfig
from ..ranges import check_ranges


def make_model_arguments(name: str, config_class: type, excluded: set[str]) -> type:
    """Makes a dataclass of the fields that `config_class` adds to those of Transformers, with their defaults."""
    classes = [cls for cls in config_class.__mro__ if issubclass(cls, SkipConfig)]
    about = {name: text for cls in classes for name, text in _read_docstring(cls).items()}
    by_name = {part.name: part for part in fields(config_class)}
    own = [by_name[name] for cls in classes for name in cls.__annotations__]
    return make_dataclass(
        name,
        [
            # A command line has no tuples: `None` stands for the default of the configuration.
            (part.name, list[int] | None, HfArg(default=None, help=about[part.name]))
            if isinstance(part.default, tuple)
            else (part.name, part.type, HfArg(default=part.default, help=about[part.name]))
            for part in own
            if part.name not in excluded
        ],
        namespace={"__doc__": f"The fields of [`{config_class.__name__}`] under their own names."},
    )


def _read_docstring(config_class: type) -> dict[str, str]:
    """Reads the description of each field from the docstring of a configuration."""
    entries = re.findall(r"^    ([\w, ]+): (.+\n(?: {8}.+\n)*)", inspect.getdoc(config_class), re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


DEFAULT_LOGGING_STEPS = 50


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the keys that all tasks add."""

    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations without a better metric_for_best_model."
    )
    average_checkpoints: int | None = HfArg(
        default=None, help="End with the mean of so many checkpoints, which are kept whatever save_total_limit says."
    )
    average_checkpoints_by: Literal["last", "best"] = HfArg(
        default="last", help="Which: the last, or the best by metric_for_best_model."
    )
    ema_decay: float | None = HfArg(
        default=None, help="Evaluate and save an exponential moving average of the weights, with this decay a step."
    )
    loss_spike_factor: float | None = HfArg(
        default=None, help="Stop before an update whose loss or gradient norm exceeds its median so many times."
    )
    loss_spike_window: int = HfArg(default=100, help="Steps of which that median is.")
    probe_steps: int | None = HfArg(
        default=None, help="Probe the skip connections every so many steps, on 32 training examples, into probe.csv."
    )
    model_name_or_path: str | None = HfArg(
        default=None, help="Start from this model, with all that belongs to it; model keys override its configuration."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = HfArg(
        default="epoch", help="When to evaluate, if there is validation data."
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = HfArg(default="epoch", help="When to save.")
    save_total_limit: int | None = HfArg(default=2, help="Number of checkpoints to keep; 0 keeps all.")
    logging_steps: float = HfArg(
        default=DEFAULT_LOGGING_STEPS,
        help="Log every so many steps, or this fraction of all; the default, 50, is less in a short run.",
    )
    eval_steps: float | None = HfArg(
        default=None, help="Evaluate every so many steps, or this fraction of all, by eval_strategy steps."
    )
    disable_tqdm: bool | None = HfArg(
        default=None, help="Print lines in place of a progress bar; unless given, where there is no terminal."
    )
    restore_callback_states_from_checkpoint: bool = True

    def __post_init__(self):
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # no progress bar in a file
        # Without an accelerator the Trainer would not see the other processes, nor take bf16, unless it is told so.
        self.use_cpu |= not torch.accelerator.is_available()
        check_ranges(self)
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise UserError("eval_strategy steps needs eval_steps.")
        if self.fp16 and self.use_cpu:
            raise UserError("fp16 needs a GPU: on a CPU it is bf16 that trains in half precision.")
        super().__post_init__()
        self.logging_nan_inf_filter = False  # a loss that is not finite ends the run
        self._check_reporting()
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        self._check_combinations()
        self._check_optimization()
        if self.average_checkpoints is not None and (self.save_total_limit or 0) > 0:
            # With 1, the Trainer removes all but the best at the end.
            self.save_total_limit = max(self.save_total_limit, self.average_checkpoints, 2)

    def find_uses_of_evaluations(self) -> list[str]:
        """Finds the settings that need evaluations, each as its key, with the value where that matters."""
        uses = {
            "early_stopping_patience": self.early_stopping_patience is not None,
            "average_checkpoints_by best": self._averages_best(),
            "save_strategy best": self.save_strategy == SaveStrategy.BEST,
            f"lr_scheduler_type {self.lr_scheduler_type.value}": (
                self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
            ),
        }
        return [use for use, applies in uses.items() if applies]

    def _averages_best(self) -> bool:
        return self.average_checkpoints is not None and self.average_checkpoints_by == "best"

    def _check_combinations(self) -> None:
        if self.eval_strategy == IntervalStrategy.NO and (uses := self.find_uses_of_evaluations()):
            raise UserError(f"{uses[0]} needs evaluations, but eval_strategy is no.")
        averages, has_ema = self.average_checkpoints is not None, self.ema_decay is not None
        problems = {
            "dataloader_persistent_workers needs workers: set dataloader_num_workers.": (
                self.dataloader_persistent_workers and self.dataloader_num_workers == 0
            ),
            "ema_decay needs whole checkpoints, without save_only_model.": has_ema and self.save_only_model,
            "ema_decay and average_checkpoints are two averages to end with: choose one.": has_ema and averages,
            "average_checkpoints needs checkpoints, but save_strategy is no.": (
                averages and self.save_strategy == SaveStrategy.NO
            ),
            "average_checkpoints_by best needs a metric_for_best_model.": (
                self._averages_best() and self.metric_for_best_model is None
            ),
        }
        for message, applies in problems.items():
            if applies:
                raise UserError(message)

    def _check_reporting(self) -> None:
        installed = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in installed:
                package = "hf_rskip[tensorboard]" if name == "tensorboard" else name
                raise UserError(
                    f"report_to {name} is not installed (try `pip install '{package}'`); there is "
                    f"{', '.join(installed) or 'nothing'} here."
                )

    def _check_optimization(self) -> None:
        """Checks the keys of optimizer and schedule by making both for a model of one weight."""
        try:
            optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **options)
            without = copy.copy(self)
            without.optim_args = None
            if self.optim_args and Trainer.get_optimizer_cls_and_kwargs(without) == (optimizer_class, options):
                raise ValueError(f"it takes nothing from optim_args {self.optim_args!r}")
        except (ImportError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"optim {self.optim.value} cannot be used: {_one_line(error)}") from error
        steps = self.max_steps if self.max_steps > 0 else 1000
        try:
            get_scheduler(
                self.lr_scheduler_type, optimizer, self.get_warmup_steps(steps), steps, self.lr_scheduler_kwargs
            )
        except (ValueError, TypeError, OverflowError) as error:
            said = "" if self.lr_scheduler_kwargs is None else f" with lr_scheduler_kwargs {self.lr_scheduler_kwargs}"
            raise UserError(
                f"lr_scheduler_type {self.lr_scheduler_type.value}{said} cannot be used: {_one_line(error)}"
            ) from error

    def check_metric_for_best_model(self, metrics: tuple[str, ...], where: str = "") -> None:
        """Raises a [`UserError`] unless `metric_for_best_model` is unset or one of `metrics`."""
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in metrics:
            raise UserError(
                f"metric_for_best_model must be one of {', '.join(metrics)}{where}, not {self.metric_for_best_model!r}."
            )
