"""Progress of a training: a bar in a terminal, and a short line for each log."""

import time
from datetime import timedelta

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerState

_FORMS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.3f}",
    "grad_norm": "gradient norm {:.2f}",
    "learning_rate": "learning rate {:.2e}",
    "target_tokens_per_second": "{:,} target tokens/s",
    "images_per_second": "{:,} images/s",
    "eval_loss": "validation loss {:.3f}",
    "eval_bleu": "BLEU {:.2f}",
    "eval_chrf": "chrF {:.2f}",
    "eval_accuracy": "top-1 {:.2%}",
    "eval_top5_accuracy": "top-5 {:.2%}",
}


def describe_log(state: TrainerState, logs: dict[str, float]) -> str | None:
    """Formats a log of the Trainer as one line; returns `None` for its summary at the end."""
    if "train_runtime" in logs:
        return None
    values = [form.format(logs[name]) for name, form in _FORMS.items() if name in logs]
    return f"step {state.global_step:,} of {state.max_steps:,}: " + ", ".join(values)


class TrainingBar(ProgressCallback):
    """Progress in a terminal: the bar of Transformers, and short lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = describe_log(state, logs)
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class TrainingLog(TrainerCallback):
    """Progress in a file: short lines, with the time left at the pace so far."""

    def __init__(self):
        self._start, self._first_step = time.perf_counter(), 0  # of an evaluation without a training

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = describe_log(state, logs)
        if line and state.is_world_process_zero:
            pace = (time.perf_counter() - self._start) / max(1, state.global_step - self._first_step)
            left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
            print(f"{line}, {left} left", flush=True)
