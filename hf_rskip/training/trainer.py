"""The Seq2SeqTrainer with token-budget batches, scores of real translations, and throughput."""

import time
from collections.abc import Callable

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, Seq2SeqTrainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data.batching import TokenBatchSampler
from ..hub.trainer import HubTrainerMixin
from .progress import TrainingBar, TrainingLog


class RSkipTrainer(HubTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` for datasets with `source_length` and `target_length` columns.

    Training batches are those of [`TokenBatchSampler`]. An evaluation adds the scores of translations to the loss. Logs
    gain `target_tokens_per_second`, over all processes and without the time of evaluations.

    Args:
        compute_translation_metrics: scores of the model in evaluation mode, by name; called on every process.
        kwargs: of `Seq2SeqTrainer`.
    """

    def __init__(
        self, *, compute_translation_metrics: Callable[[PreTrainedModel], dict[str, float]] | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        # The Trainer turns the cache off in the configuration, with which checkpoints are then saved.
        self.model.config.use_cache = True
        self.compute_translation_metrics = compute_translation_metrics
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingLog if self.args.disable_tqdm else TrainingBar)
        self._restart_clock()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TokenBatchSampler:
        # By now `train_dataset` has lost the columns that the model does not take, lengths included.
        lengths = self.train_dataset.with_format("numpy", columns=["source_length", "target_length"])[:]
        return TokenBatchSampler(
            lengths["source_length"],
            lengths["target_length"],
            max_tokens=self.args.per_device_train_batch_tokens,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        # A run that was killed after its last checkpoint has nothing left to train.
        if self._has_finished():
            self.control.should_training_stop = True
            return
        # The Trainer looks through one wrapper only, but in the first epoch after resuming under several processes the
        # sampler has two: accelerate's shard of a sampler, and the one that skips batches.
        sampler = train_dataloader.batch_sampler
        while not isinstance(sampler, TokenBatchSampler):
            sampler = sampler.batch_sampler
        sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _has_finished(self) -> bool:
        early_stopping = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)
        ]
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in early_stopping
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_translation_metrics is not None:
            scores = self.compute_translation_metrics(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def _restart_clock(self) -> None:
        self._clock, self._target_tokens = time.perf_counter(), 0

    def get_batch_samples(self, *args, **kwargs):
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._target_tokens += num_items_in_batch
        return batch_samples, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["target_tokens_per_second"] = round(float(self._target_tokens) / (time.perf_counter() - self._clock))
        super().log(logs, start_time)
        self._restart_clock()
