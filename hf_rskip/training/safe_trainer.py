"""How a Trainer saves: whole checkpoints only, also when it is killed, told to stop, or out of space."""

import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate.utils import gather
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from ..errors import Preempted, UserError
from ..manifest import MODEL_FILES, check_manifest, write_manifest
from .averaging import average_weights, choose_checkpoints, is_out_of_turn
from .checkpoints import (
    STAGING_NAME,
    clear_staging,
    list_checkpoints,
    publish_checkpoint,
    read_state,
    remove_checkpoints,
    rotate_checkpoints,
)
from .preemption import StopSignal, outlive_signal
from .resuming import write_record


class SafeCheckpointMixin:
    """For a Trainer. A checkpoint is written under another name, and gets its own when every process has written its
    part and all of it has reached the disk: a folder `checkpoint-N` is complete.

    After SIGTERM or Ctrl-C to one of the processes all of them finish the step, save a checkpoint and raise
    [`Preempted`]. An evaluation that was due at that step is made up for by the run that goes on, which so ends as if
    it had not been interrupted.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._stop_signal = StopSignal()
        self._is_saving = False
        self.record: dict | None = None
        """What [`begin_record`] says of the run, for every checkpoint."""

    # Checkpoints

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING_NAME) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not self._is_saving and folder.is_dir():
            write_manifest(folder, MODEL_FILES)

    def _load_best_model(self) -> None:
        check_manifest(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _save_checkpoint(self, model, trial) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run / STAGING_NAME / name, run / name
        try:
            self._is_saving = True
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step and self.control.should_save:
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.record is not None:
                    write_record(staged, self.record, self.state.global_step)
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                publish_checkpoint(staged, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{str(final)!r} could not be written ({reason}): with this mended, go on with "
                "`--resume_from_checkpoint true`"
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.process_index != 0 and self.args.local_process_index == 0 and staged.exists():
            publish_checkpoint(staged, final)  # of a machine that does not share its folders with the first
        if self.args.should_save:
            self._remove_checkpoints(run, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _remove_checkpoints(self, run: Path, last: Path) -> None:
        written = [path for path in list_checkpoints(run) if path != last and (path / TRAINER_STATE_NAME).exists()]
        remove_checkpoints(run, filter(is_out_of_turn, written))
        keep = {last}
        if self.state.best_model_checkpoint is not None:
            keep.add(Path(self.state.best_model_checkpoint))
        if self.args.average_checkpoints is not None:
            keep |= set(self._checkpoints_to_average(run))
        rotate_checkpoints(run, self.args.save_total_limit, keep)
        clear_staging(run)

    def _checkpoints_to_average(self, run: Path) -> list[Path]:
        args = self.args
        return choose_checkpoints(
            run, args.average_checkpoints, args.average_checkpoints_by, self.state, args.metric_for_best_model
        )

    def use_average_of_checkpoints(self) -> None:
        """Ends with the mean of the checkpoints that the arguments ask for, if they do, and its validation scores."""
        if self.args.average_checkpoints is None:
            return
        checkpoints = self._checkpoints_to_average(Path(self.args.output_dir))
        options = StateDictOptions(full_state_dict=True, strict=False)  # tied weights are in it once
        set_model_state_dict(self.model, average_weights(checkpoints), options=options)
        if self.is_world_process_zero():
            print(f"the model is the mean of {', '.join(path.name for path in checkpoints)}", flush=True)
        if self.args.eval_strategy != IntervalStrategy.NO:
            self.evaluate()

    # Pre-emption

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            self._find_best(Path(resume_from_checkpoint))
        with self._stop_signal.caught():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _find_best(self, checkpoint: Path) -> None:
        """The best checkpoint is the one beside `checkpoint`: where it once was, another run may lie by now."""
        recorded = read_state(checkpoint).get("best_model_checkpoint")
        if recorded is None:
            return
        best = checkpoint.parent / Path(recorded).name
        if best.is_dir():
            if self.args.load_best_model_at_end:
                check_manifest(best)
            self.add_callback(_RememberBest(str(best)))
        elif self.args.load_best_model_at_end:
            raise UserError(f"The best model is lost: there is no {str(best)!r}.")

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        outlive_signal(dataloader)
        return dataloader

    def _told_to_stop(self) -> int | None:
        """The number of the signal that one of the processes has received."""
        received = self._stop_signal.received
        if self.args.world_size == 1:
            return received
        numbers = gather(torch.tensor([received or 0], device=self.args.device))
        return int(numbers.max()) or None

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        signum = self._told_to_stop()
        if signum is None:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            return
        step, is_last = self.state.global_step, self.state.global_step >= self.state.max_steps
        if float(self.state.epoch).is_integer():  # what is due at the end of the epoch is due now
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        if is_last:  # no step is left that could make up for anything
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not is_last or not Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{step}").exists():
            self._save_checkpoint(model, trial)  # with `self.control`, which says what was due
        how = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        raise Preempted(f"stopped by {how} after step {step}; go on with `--resume_from_checkpoint true`", signum)

    def _run_epoch(self, *, model, trial, ignore_keys_for_eval, resume_from_checkpoint, **kwargs) -> None:
        if resume_from_checkpoint is not None and self.control.should_evaluate:
            # As if the evaluation had come before the checkpoint: with its random numbers, and with its outcome.
            self._load_rng_state(resume_from_checkpoint)
            is_best = self._determine_best_metric(self._evaluate(trial, ignore_keys_for_eval), trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
            self._save_checkpoint(model, trial)
            resume_from_checkpoint = os.path.join(
                self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
        super()._run_epoch(
            model=model,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
            resume_from_checkpoint=resume_from_checkpoint,
            **kwargs,
        )


class _RememberBest(TrainerCallback):
    def __init__(self, best: str):
        self.best = best

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = self.best
