"""The training keys of image classification."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from transformers import SchedulerType
from transformers.hf_argparser import HfArg
from transformers.training_args import OptimizerNames

from ..errors import UserError
from ..models import RSkipResNetConfig
from ..models.configuration_rskip_resnet import ARCHITECTURES
from .training import CommonTrainingArguments, make_model_arguments

# Set by the data.
_NOT_IN_RECIPES = {"num_channels", "image_column", "label_column"}


@dataclass
class ImageModelArguments(make_model_arguments("ImageModelArguments", RSkipResNetConfig, _NOT_IN_RECIPES)):
    """The fields of [`RSkipResNetConfig`] under their own names, or an architecture of the literature."""

    architecture: str | None = HfArg(
        default=None,
        help="Such as resnet20_cifar: the defaults of the other model keys, with the plain skip connection "
        "unless there is a skip_type.",
    )

    def __post_init__(self):
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise UserError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {self.architecture!r}.")

    def config_fields(self, said: Collection[str]) -> dict[str, Any]:
        """The values of the fields in `said`."""
        return {key: value for key, value in asdict(self).items() if key in said and key != "architecture"}

    def make_config(self, said: Collection[str], **others) -> RSkipResNetConfig:
        """The configuration of all fields; of an architecture with those in `said`. `others` are not in recipes."""
        if self.architecture is not None:
            return RSkipResNetConfig.from_name(self.architecture, **self.config_fields(said), **others)
        given = {key for key, value in asdict(self).items() if value is not None}
        return RSkipResNetConfig(**self.config_fields(given), **others)


@dataclass
class ImageTrainingArguments(CommonTrainingArguments):
    """Training keys of image classification, with its usual defaults."""

    momentum: float = HfArg(default=0.9, help="Momentum of SGD.")
    nesterov: bool = HfArg(default=False, help="Whether the momentum of SGD is Nesterov's.")
    lr_milestones: list[float] | None = HfArg(
        default=None, help="Epochs after which the learning rate is multiplied by lr_gamma, in place of a schedule."
    )
    lr_gamma: float = HfArg(default=0.1, help="What the learning rate is multiplied by at lr_milestones.")
    channels_last: bool = HfArg(default=False, help="Whether tensors of images lie in memory with the channels last.")
    optim: OptimizerNames = HfArg(default=OptimizerNames.SGD, help="The optimizer.")
    learning_rate: float = HfArg(default=0.1, help="Peak learning rate, reached after warmup_steps.")
    lr_scheduler_type: SchedulerType = HfArg(
        default=SchedulerType.COSINE, help="Learning-rate schedule, where there are no lr_milestones."
    )
    weight_decay: float = HfArg(default=1e-4, help="Weight decay of all parameters, as in He et al. (2016).")
    max_grad_norm: float = HfArg(default=0.0, help="Longest gradient; 0 is any.")
    per_device_train_batch_size: int = HfArg(default=128, help="Images in a batch on one device.")
    per_device_eval_batch_size: int = HfArg(default=256, help="Images in an evaluation batch.")
    metric_for_best_model: str | None = HfArg(
        default="accuracy", help="By which metric the best model is chosen, where it is."
    )
    remove_unused_columns: bool = False

    def __post_init__(self):
        if self.nesterov and self.momentum == 0:
            raise UserError("nesterov needs a momentum above 0.")
        if self.optim == OptimizerNames.SGD:
            own = f"momentum={self.momentum},nesterov={str(self.nesterov).lower()}"
            self.optim_args = own if self.optim_args is None else f"{own},{self.optim_args}"
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # the Trainer averages the running statistics of all processes
        super().__post_init__()
        if self.lr_milestones is not None and (
            sorted(set(self.lr_milestones)) != list(self.lr_milestones)
            or not all(0 < epoch < float("inf") for epoch in self.lr_milestones)
        ):
            raise UserError(f"lr_milestones must be rising numbers of epochs, not {self.lr_milestones}.")
        if self.lr_milestones is not None and self.max_steps > 0:
            raise UserError("lr_milestones are epochs: set num_train_epochs, not max_steps, or lr_milestones null.")
        self.check_metric_for_best_model(("accuracy", "top5_accuracy", "loss"))
