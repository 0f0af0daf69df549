"""What the Trainers of all tasks share: progress, throughput, and a resumed run that knows when it has ended."""

import os
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..errors import UserError
from ..hub.trainer import HubTrainerMixin
from .progress import TrainingBar, TrainingLog


class RecipeTrainerMixin(HubTrainerMixin):
    """For a Trainer. Logs gain the throughput over all processes, without the time of evaluations."""

    throughput_name: str
    """Its name in the logs: what labels count, a second."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingLog if self.args.disable_tqdm else TrainingBar)
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

    def _restart_clock(self) -> None:
        self._clock, self._items = time.perf_counter(), 0

    def get_batch_samples(self, *args, **kwargs):
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._items += 0 if num_items_in_batch is None else num_items_in_batch  # `None` where a stream has ended
        return batch_samples, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs[self.throughput_name] = round(float(self._items) / (time.perf_counter() - self._clock))
        super().log(logs, start_time)
        self._restart_clock()
