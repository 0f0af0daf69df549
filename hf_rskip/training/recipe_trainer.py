"""The Trainer of all tasks: whole checkpoints, runs that stop and resume, losses by label, throughput."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
)

from ..errors import UserError, first_line
from ..hub.checkpoints import PushCheckpoints
from ..hub.push import Pushed, push_folder
from ..manifest import MODEL_FILES, check_manifest, write_manifest
from ..probing.batches import Batch
from ..probing.callback import ProbeCallback
from .averaging import MovingAverage, average_weights, choose_checkpoints, is_out_of_turn
from .best_model import BestModelCallback
from .checkpoints import (
    STAGING_NAME,
    clear_staging,
    list_checkpoints,
    publish_checkpoint,
    remove_checkpoints,
    rotate_checkpoints,
)
from .loss_guard import LossGuard, check_weights
from .preemption import StopOnSignal, outlive_signal
from .progress import TrainingBar, TrainingLog
from .resuming import EarlyStopping, write_record


class RecipeTrainer(Trainer):
    """`Trainer` with the arguments of [`~hf_rskip.recipe.training.CommonTrainingArguments`].

    - A checkpoint is written under another name, and gets its own when every process has written its part and all of it
      has reached the disk: a folder `checkpoint-N` is complete.
    - SIGTERM and Ctrl-C stop a run with a checkpoint: see [`StopOnSignal`]. A resumed run ends as if it had not been
      interrupted.
    - Losses and weights that are not finite abort it: see [`LossGuard`].
    - With `ema_decay`, evaluations are of the moving average.
    - The loss of an evaluation is the mean over all labels (tokens, images), however they are batched and shared out;
      a training draws the same random numbers with and without evaluations.
    - Logs gain the throughput over all processes, without the time of evaluations.
    """

    throughput_name = "labels_per_second"
    """The throughput's name in the logs."""

    def __init__(self, *, callbacks: Sequence[TrainerCallback] | None = None, **kwargs):
        self._best_model = BestModelCallback()
        super().__init__(callbacks=[self._best_model, *(callbacks or [])], **kwargs)
        args = self.args
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingLog if args.disable_tqdm else TrainingBar)
        self.add_callback(_SamplerEpoch)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        if args.probe_steps is not None:
            smoothing = args.label_smoothing_factor or None
            self.add_callback(ProbeCallback(self.probe_batch, args.probe_steps, smoothing))
        self.moving_average = None
        if args.ema_decay is not None:
            self.moving_average = MovingAverage(self.model, args.ema_decay)
            self.add_callback(self.moving_average)
        if args.push_to_hub:
            self.add_callback(PushCheckpoints(self.hub_model_id))
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        scales_loss = self.accelerator.scaler is not None
        self.loss_guard = LossGuard(self.describe_batch, args.loss_spike_factor, args.loss_spike_window, scales_loss)
        self.record: dict | None = None
        """The record of the run ([`begin_record`]), written into every checkpoint."""
        self._resumed: TrainerState | None = None
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of the losses, and number of labels
        self._restart_clock()

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the client, or of its HTTP library, which differs between its versions
            reason = first_line(error.__cause__ or error)
            raise UserError(
                f"push_to_hub: no repository can be made on the Hub ({reason}); without it, `hf-rskip push` sends the "
                "finished model."
            ) from error

    def probe_batch(self) -> Batch:
        """Makes the batch of training examples for `probe_steps`."""
        raise NotImplementedError

    def describe_batch(self, inputs: dict) -> str:
        """Describes the examples of a batch in a few words, for an error."""
        return f"{len(next(iter(inputs.values())))} examples"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # On CPUs accelerate would forget FSDP without a word, and every process would hold the whole model.
        state = self.accelerator.state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # As accelerate itself does: a later `AcceleratorState()` takes it from there.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    # Training

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Trains as `Trainer.train` does; `resume_from_checkpoint` is a path or `None`.

        Raises:
            [`UserError`]: if the checkpoint was saved under FSDP and this run is not under it, or the reverse; if the
                best model is lost or damaged.
            [`Preempted`]: after a signal, with a checkpoint saved.
            [`Diverged`]: if the loss, the gradient or the weights are not finite, or have jumped.
        """
        self._resumed = None
        if resume_from_checkpoint is not None:
            self._prepare_to_resume(Path(resume_from_checkpoint))
        try:
            with self.stop.caught():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                # After a signal behind the last step, the resumed run does the rest.
                if self.stop.is_told_to_stop(self.args) and self._checkpoint().is_dir():
                    raise self.stop.preempted(self.state.global_step)
                return output
        except SafetensorError:
            if self.state.best_model_checkpoint is not None:
                check_manifest(self.state.best_model_checkpoint)
            raise

    def _prepare_to_resume(self, checkpoint: Path) -> None:
        sharded = any(checkpoint.glob(f"{FSDP_MODEL_NAME}*"))
        if sharded != self.is_fsdp_enabled:
            raise UserError(
                f"{checkpoint} was saved {'under' if sharded else 'without'} FSDP, and a run can go on from it only in "
                "the same way."
            )
        self._resumed = state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.args.eval_on_start = False  # which was made when the run began
        if self.moving_average is not None:
            self.moving_average.load(checkpoint)
        if state.best_model_checkpoint is None:
            return
        # The best checkpoint is the one beside this: at its old path there may be another run.
        best = checkpoint.parent / Path(state.best_model_checkpoint).name
        if best.is_dir():
            if self.args.load_best_model_at_end:
                check_manifest(best)
            self._best_model.resumed = str(best)
        elif self.args.load_best_model_at_end:
            raise UserError(f"The best model is lost: there is no {str(best)!r}.")

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        num_epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        # A run that was killed after its last checkpoint has nothing left to train.
        return (0 if self._has_finished(max_steps) else num_epochs), *others, max_steps

    def _has_finished(self, max_steps: int) -> bool:
        """Whether the checkpoint to resume from is the last one of its run."""
        if self._resumed is None:
            return False
        if self._resumed.global_step >= max_steps:
            return True
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                stored = self._resumed.stateful_callbacks.get(type(callback).__name__, {}).get("attributes", {})
                patience = self.args.early_stopping_patience or callback.early_stopping_patience
                if stored.get("early_stopping_patience_counter", 0) >= patience:
                    return True
        return False

    def get_train_dataloader(self) -> DataLoader:
        return outlive_signal(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        return outlive_signal(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        return outlive_signal(super().get_test_dataloader(*args, **kwargs))

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss_guard.add(loss, inputs)
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.loss_guard.check(self.state.global_step + 1, float(norm))
        return norm

    # Evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._evaluating(), torch.random.fork_rng([]):  # data loaders draw a seed for their workers
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        with self._evaluating():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Uses the averaged weights and keeps incomplete batches inside this context."""
        averaged = nullcontext() if self.moving_average is None else self.moving_average.swapped_in()
        with averaged, replaced(self.args, dataloader_drop_last=False):
            yield

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

    # Checkpoints and the final model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_weights(self.accelerator.unwrap_model(self.model), self.state.global_step)
        super().save_model(output_dir, _internal_call=_internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.is_dir() and folder.parent.name != STAGING_NAME:
            write_manifest(folder, MODEL_FILES)

    def _checkpoint(self) -> Path:
        return Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_checkpoint(self, model, trial) -> None:
        run, final = Path(self.args.output_dir), self._checkpoint()
        staged, best = run / STAGING_NAME / final.name, self.state.best_model_checkpoint
        try:
            with replaced(self.args, output_dir=str(staged.parent), push_to_hub=False):
                super()._save_checkpoint(model, trial)
            is_out_of_turn = self.stop.is_out_of_turn(self.args, self.state)
            if is_out_of_turn:
                self.state.best_model_checkpoint = best
            elif self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.moving_average is not None:
                    self.moving_average.save(staged)
                if self.record is not None:
                    write_record(staged, self.record, self.state.global_step)
                if is_out_of_turn:
                    self.state.stateful_callbacks["TrainerControl"]["args"]["should_save"] = False
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                publish_checkpoint(staged, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{str(final)!r} could not be written ({reason}): with this mended, go on with "
                "`--resume_from_checkpoint true`"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.process_index != 0 and self.args.local_process_index == 0 and staged.exists():
            publish_checkpoint(staged, final)  # on a machine without a shared folder
        if self.args.should_save:
            self._remove_checkpoints(run, final)

    def _remove_checkpoints(self, run: Path, last: Path) -> None:
        keep = {last}
        if self.state.best_model_checkpoint is not None:
            keep.add(Path(self.state.best_model_checkpoint))
        written = [path for path in list_checkpoints(run) if path not in keep and (path / TRAINER_STATE_NAME).exists()]
        remove_checkpoints(run, filter(is_out_of_turn, written))
        if self.args.average_checkpoints is not None:
            keep |= set(self._checkpoints_to_average(run))
        rotate_checkpoints(run, self.args.save_total_limit, keep)
        clear_staging(run)

    def _checkpoints_to_average(self, run: Path) -> list[Path]:
        args = self.args
        return choose_checkpoints(
            run, args.average_checkpoints, args.average_checkpoints_by, self.state, args.metric_for_best_model
        )

    def use_average(self) -> None:
        """Replaces the weights by the average that the arguments ask for, if any.

        A mean of checkpoints is evaluated; a moving average was.
        """
        if self.moving_average is not None:
            self.model.load_state_dict(self.moving_average.average.module.state_dict())
            self.remove_callback(self.moving_average)
            self.moving_average = None
        if self.args.average_checkpoints is not None:
            checkpoints = self._checkpoints_to_average(Path(self.args.output_dir))
            options = StateDictOptions(full_state_dict=True, strict=False)  # it has tied weights once
            set_model_state_dict(self.model, average_weights(checkpoints), options=options)
            if self.is_world_process_zero():
                print(f"the model is the mean of {', '.join(path.name for path in checkpoints)}", flush=True)
            if self.args.eval_strategy != IntervalStrategy.NO:
                self.evaluate()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> Pushed | Future | None:
        """Pushes what is in `output_dir`, after saving the model there.

        Returns:
            On the main process, what was done, or with `blocking=False` a future of it.

        Raises:
            [`UserError`]: if the upload fails.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        job = HfApi().run_as_future(
            push_folder,
            self.args.output_dir,
            self.hub_model_id,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message,
        )
        return job.result() if blocking else job

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
        # Wrong here: they assume per_device_train_batch_size examples a batch, and a token for each number of an image.
        for name in ("train_samples_per_second", "total_flos"):
            logs.pop(name, None)
        super().log(logs, start_time)
        self._restart_clock()


@contextmanager
def replaced(args: TrainingArguments, **values) -> Iterator[None]:
    """Sets values of `args` inside this context."""
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


class _SamplerEpoch(TrainerCallback):
    """Sets the epoch of the sampler through all its wrappers.

    The Trainer looks through one; in the first epoch after resuming under several processes there are two.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        for part in (sampler, getattr(sampler, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))
