"""The Trainer for images: augmentation on the device, step schedules, averages of running statistics."""

from bisect import bisect_right

import numpy as np
import torch
from accelerate.utils import reduce
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.trainer_utils import EvalLoopOutput

from ..data.images.arguments import ImageDataArguments
from ..data.images.augmentation import normalize, random_crop, random_flip
from ..data.images.pixels import collate
from ..errors import UserError
from ..evaluation.image_metric import ImageClassificationMetric, rank_classes
from ..probing.batches import Batch, training_images
from .recipe_trainer import RecipeTrainer


class ImageTrainer(RecipeTrainer):
    """[`RecipeTrainer`] for batches of `pixel_values` in uint8, `(batch, channels, height, width)`, and `labels`.

    Images are augmented and normalised here, a whole batch at a time, on the device. What is drawn for a batch depends
    on the seed, the step and the process alone, so that a resumed run draws the same. Logs gain `images_per_second`,
    evaluations `accuracy` and, of more than five classes, `top5_accuracy`, from 0 to 1.

    With several processes, each has seen its own images when it comes to the running statistics of batch normalisation;
    before they are used or saved, they are averaged over the processes.

    Args:
        data_args: how to augment and normalise.
        kwargs: of [`RecipeTrainer`].
    """

    throughput_name = "images_per_second"

    def __init__(self, *, data_args: ImageDataArguments, **kwargs):
        self.data_args = data_args
        super().__init__(
            data_collator=collate,
            compute_metrics=lambda prediction: ImageClassificationMetric().compute(
                predictions=prediction.predictions, references=prediction.label_ids
            ),
            preprocess_logits_for_metrics=lambda logits, labels: rank_classes(logits),
            **kwargs,
        )
        if self.is_fsdp_enabled:
            raise UserError("Models of images are not sharded: launch with ddp, not with FSDP.")
        self._generator = torch.Generator(self.args.device)
        self._batch_of_step = (-1, 0)

    # Input

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        images, data = inputs["pixel_values"].to(self.args.device), self.data_args
        self._seed_augmentation()
        if data.crop_padding and not data.random_resized_crop:
            images = random_crop(images, data.crop_padding, self._generator)
        if data.horizontal_flip:
            images = random_flip(images, self._generator)
        return super().training_step(model, {**inputs, "pixel_values": images}, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        images = normalize(inputs["pixel_values"], self.data_args.image_mean, self.data_args.image_std)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        inputs = {**inputs, "pixel_values": images}
        inputs.pop("row", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _seed_augmentation(self) -> None:
        step, batch = self._batch_of_step
        batch = batch + 1 if step == self.state.global_step else 0
        self._batch_of_step = (self.state.global_step, batch)
        entropy = (self.args.seed, self.state.global_step, batch, self.args.process_index)
        self._generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def probe_batch(self) -> Batch:
        return training_images(self.train_dataset, self.data_args)

    def describe_batch(self, inputs: dict) -> str:
        return f"rows {', '.join(map(str, inputs['row'].tolist()))} of the training split"

    # Optimisation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        super().create_scheduler(num_training_steps, optimizer)
        if self.args.lr_milestones is None or not is_new:
            return self.lr_scheduler
        steps_per_epoch = num_training_steps / self.args.num_train_epochs
        milestones = [round(epoch * steps_per_epoch) for epoch in self.args.lr_milestones]
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return min(1, (step + 1) / max(1, warmup)) * self.args.lr_gamma ** bisect_right(milestones, step)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # Running statistics

    def average_running_statistics(self) -> None:
        """Gives every process the mean of the running statistics of all; to be called by every process."""
        if self.args.world_size == 1:
            return
        models = [self.accelerator.unwrap_model(self.model)]
        if self.moving_average is not None:
            models.append(self.moving_average.average)
        for model in models:
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(reduce(buffer, "mean"))

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        self.average_running_statistics()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.average_running_statistics()
        super().save_model(output_dir, _internal_call=_internal_call)
