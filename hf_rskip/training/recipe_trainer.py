"""What the Trainers of all tasks share: progress, throughput, and a resumed run that knows when it has ended."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..errors import UserError
from ..hub.trainer import HubTrainerMixin
from .best_model import BestModelCallback
from .progress import TrainingBar, TrainingLog


class RecipeTrainerMixin(HubTrainerMixin):
    """For a Trainer. Logs gain the throughput over all processes, without the time of evaluations.

    The loss of an evaluation is the mean over all labels (tokens, images), however they are batched and shared out.
    """

    throughput_name: str
    """Its name in the logs: what labels count, a second."""

    def __init__(self, *, callbacks: Sequence[TrainerCallback] | None = None, **kwargs):
        super().__init__(callbacks=[BestModelCallback(), *(callbacks or [])], **kwargs)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingLog if self.args.disable_tqdm else TrainingBar)
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # the sum of the losses of all labels, and their number
        self._restart_clock()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # On CPUs accelerate would forget FSDP without a word, and every process would hold the whole model.
        state = self.accelerator.state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # As accelerate itself does: a later `AcceleratorState()` takes it from there.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """As that of the Trainer.

        Raises:
            [`UserError`]: if the checkpoint was saved under FSDP and this run is not under it, or the reverse.
        """
        if resume_from_checkpoint is not None:
            sharded = any(Path(resume_from_checkpoint).glob(f"{FSDP_MODEL_NAME}*"))
            if sharded != self.is_fsdp_enabled:
                raise UserError(
                    f"{resume_from_checkpoint} was saved {'under' if sharded else 'without'} FSDP, and a run can go on "
                    "from it only in the same way."
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *, train_dataloader: DataLoader, **kwargs) -> None:
        # A run that was killed after its last checkpoint has nothing left to train.
        if self._has_finished():
            self.control.should_training_stop = True
            return
        super()._run_epoch(train_dataloader=train_dataloader, **kwargs)

    def _has_finished(self) -> bool:
        early_stopping = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)
        ]
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in early_stopping
        )

    # Evaluation

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if model.training or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, last = inputs["labels"], self.accelerator.gradient_state
        if last.end_of_dataloader and last.remainder > 0:  # accelerate fills the last batches with examples from before
            labels = labels.clone()
            labels[max(0, last.remainder - self.args.process_index * len(labels)) :] = -100
        # Without `num_items_in_batch`, the mean over the labels of this process.
        loss, outputs = super().compute_loss(model, {**inputs, "labels": labels}, return_outputs=True)
        count = (labels != -100).sum()
        loss_and_count = torch.stack([torch.where(count > 0, loss.detach() * count, 0), count]).cpu()
        self._evaluated += loss_and_count.double()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = sum(gather_object([self._evaluated]) if self.args.world_size > 1 else [self._evaluated]).tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    # Logs

    def _restart_clock(self) -> None:
        self._clock, self._items = time.perf_counter(), 0

    def get_batch_samples(self, *args, **kwargs):
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._items += 0 if num_items_in_batch is None else num_items_in_batch  # `None` where a stream has ended
        return batch_samples, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs[self.throughput_name] = round(float(self._items) / (time.perf_counter() - self._clock))
        # Guesses: that a batch has per_device_train_batch_size examples, and that a number of an image is a token.
        for name in ("train_samples_per_second", "total_flos"):
            logs.pop(name, None)
        super().log(logs, start_time)
        self._restart_clock()
