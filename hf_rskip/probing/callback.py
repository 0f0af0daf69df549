"""Probes a model during training."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from .batches import Batch
from .probe import probe
from .table import ProbedModel, truncate_table, write_table

TABLE_NAME = "probe.csv"


class ProbeCallback(TrainerCallback):
    """Probes the model before the first step and after every so many, always on the same batch, on the main process.

    Rows are added to `probe.csv` in `output_dir`. A resumed run removes those after its checkpoint. The probes do not
    change the training: see [`probe`].

    Args:
        make_inputs: makes the batch, when a training begins.
        steps: between two probes.
        label_smoothing: see [`probe`].
    """

    def __init__(self, make_inputs: Callable[[], Batch], steps: int, label_smoothing: float | None = None):
        self.make_inputs, self.steps, self.label_smoothing = make_inputs, steps, label_smoothing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self.inputs = self.make_inputs()
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_table(path, state.global_step if state.global_step else -1)
        if state.global_step == 0:
            self._probe(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and state.global_step % self.steps == 0:
            self._probe(args, state, model)

    def _path(self, args) -> Path:
        return Path(args.output_dir, TABLE_NAME)

    def _probe(self, args, state, model) -> None:
        rows = probe(model, self.inputs, self.label_smoothing)
        name = Path(args.output_dir).absolute().name
        write_table([ProbedModel(name, args.seed, state.global_step, rows)], self._path(args), append=True)
