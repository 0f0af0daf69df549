"""Records of trainings: the values of all keys beside the weights, compared when a run is resumed."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..errors import UserError
from ..manifest import check_model, read_json
from ..recipe.describe import describe_schedule
from ..recipe.keys import MAY_CHANGE, MUST_STAY
from ..recipe.parsing import Recipe
from ..recipe.training import DEFAULT_LOGGING_STEPS
from .checkpoints import checkpoint_step, list_checkpoints, read_state

RECORD_NAME = "recipe.json"
"""Name of the record in every checkpoint, and of the last file written to the folder of a run."""
_OF_A_DEVICE = {"processes", "per_device_train_batch_tokens", "gradient_accumulation_steps"}
"""Keys that change no step where `global_batch_tokens` is set."""
_OF_CONTENT = {"dataset_name", "train_files", "validation_files"}
"""Paths of data, which may change where the checksums are the same."""
_LENGTHEN = ("num_train_epochs", "max_steps", "early_stopping_patience")
"""Keys that can lengthen a finished run."""


def begin_record(recipe: Recipe, checkpoint: Path | None) -> dict[str, Any]:
    """Makes the record of a run: the value of every key, and how the run was resumed.

    Returns:
        `values` by key, with the number of `processes`; `data`, which [`check_data`] completes; and `resumed`: for each
        start from a checkpoint its `step` and what was `changed`, `[before, now]` by key.

    Raises:
        [`UserError`]: if the run cannot go on from the checkpoint with this recipe.
    """
    record = {"values": _values(recipe), "data": {}, "resumed": []}
    if checkpoint is not None:
        before = read_record(checkpoint)
        changed = _find_changes(before, record["values"], str(checkpoint))
        _check_end(recipe, checkpoint, changed)
        record["data"] = before.get("data", {})
        record["resumed"] = [*before["resumed"], {"step": read_state(checkpoint)["global_step"], "changed": changed}]
    return record


def check_data(record: dict[str, Any], checksums: dict[str, int]) -> None:
    """Adds the checksums of the data, by split, to a record; raises a [`UserError`] if it has others already."""
    for split, before in record["data"].items():
        if checksums.get(split) != before:
            raise UserError(
                f"The {split} data have changed since the checkpoint was written, so that the run cannot go on: a new "
                "run can start from its weights, by model_name_or_path."
            )
    record["data"] = checksums


def write_record(folder: str | Path, record: dict[str, Any], step: int) -> None:
    """Writes [`begin_record`]'s record with the number of steps after which it holds."""
    content = json.dumps({"step": step, **record}, indent=2, ensure_ascii=False)
    Path(folder, RECORD_NAME).write_text(content + "\n", encoding="utf-8")


def finished_results(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the results of a finished run that is to be resumed, or `None` if there is something to train.

    Raises a [`UserError`] if the recipe asks a finished run for something else than a longer training.
    """
    training = recipe.training
    folder, resume = Path(training.output_dir), str(training.resume_from_checkpoint or "false").lower()
    if resume == "false" or not ((folder / RECORD_NAME).exists() and any(folder.glob("model*.safetensors"))):
        return None
    record = read_record(folder)
    named = [] if resume == "true" else [Path(training.resume_from_checkpoint)]
    if any(path not in list_checkpoints(path.parent) for path in named):
        return None  # [`find_checkpoint`] refuses it
    if any(checkpoint_step(path) > record["step"] for path in named or list_checkpoints(folder)[-1:]):
        return None  # a longer training has not finished
    changed = _find_changes(record, _values(recipe), str(folder))
    _check_end(recipe, folder, changed)
    if changed.keys() & {*_LENGTHEN, *_OF_CONTENT}:
        return None  # [`check_data`] and [`complete_metrics`] say whether there is something to train
    if changed:
        key, (before, now) = next(iter(changed.items()))
        raise UserError(
            f"{str(folder)!r} holds a finished run of {key} {before!r}, which cannot become {now!r}: "
            f"`hf-rskip evaluate` scores it otherwise, and {', '.join(_LENGTHEN)} train it on."
        )
    check_model(folder)
    results = read_json(folder / "all_results.json")
    if training.process_index == 0:
        print(f"{folder} holds a finished run of {record['step']:,} steps: nothing is left to do", flush=True)
    return results


def _check_end(recipe: Recipe, folder: Path, changed: dict[str, list]) -> None:
    """Raises a [`UserError`] if a recipe with another length ends before the checkpoint or finished run in `folder`.

    With the same length, a part of an epoch may end behind it: it is rounded up to whole steps.
    """
    if not changed.keys() & {"num_train_epochs", "max_steps"}:
        return
    training, state = recipe.training, read_state(folder)
    key, reached = "max_steps", state["global_step"]
    if training.max_steps <= 0:
        key, reached = "num_train_epochs", state.get("epoch") or 0
    most = getattr(training, key)
    if reached > most:
        raise UserError(f"{str(folder)!r} stands at {reached:g}, beyond {key} {most:g}.")


def complete_metrics(metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any], step: int) -> None:
    """Adds to the metrics of a resumed training the step from which it was resumed; drops the loss of no step.

    Args:
        step: at which the training has ended.

    Raises:
        [`UserError`]: if the finished run in `output_dir` had as many steps; its record stays.
    """
    folder = Path(recipe.training.output_dir)
    if (folder / RECORD_NAME).exists() and read_record(folder)["step"] >= step:
        raise UserError(
            f"{str(folder)!r} holds a finished run of {step:,} steps, and with this recipe nothing is left to train: "
            "its results stay as they are, and `hf-rskip evaluate` scores it otherwise."
        )
    metrics["train_resumed_at_step"] = start = record["resumed"][-1]["step"]
    if step == start:
        del metrics["train_loss"]


class CurrentSteps(TrainerCallback):
    """Evaluates, saves and logs as often as the recipe says; a resumed Trainer would take this from the checkpoint.

    Unless the recipe says how often to log, there are at least twenty logs, for a curve. Prints the schedule, and
    refuses an `eval_delay` beyond the end.

    Args:
        says_logging: whether the recipe says how often to log.
    """

    def __init__(self, says_logging: bool):
        self.says_logging = says_logging

    def on_train_begin(self, args, state, control, **kwargs):
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        end = state.max_steps if by_steps else state.num_train_epochs
        if args.eval_strategy != IntervalStrategy.NO and args.eval_delay > end > 0:
            unit = "steps" if by_steps else "epochs"
            raise UserError(f"eval_delay {args.eval_delay:g} would be after the end of {end:,} {unit}.")
        if state.is_world_process_zero:
            print(describe_schedule(args, state.max_steps), flush=True)
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.says_logging and state.max_steps < 20 * DEFAULT_LOGGING_STEPS:
            is_first = state.global_step == 1 and args.logging_first_step
            control.should_log = is_first or state.global_step % max(1, state.max_steps // 20) == 0


class EarlyStopping(EarlyStoppingCallback):
    """Stops after as many evaluations as the recipe says, also in a resumed run, which goes on counting."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience


def _values(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.values, "processes": recipe.training.world_size}


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a checkpoint or a finished run; raises a [`UserError`] if there is none."""
    record = read_json(path := folder / RECORD_NAME)
    if not record.keys() >= {"step", "values", "resumed"}:
        raise UserError(f"{str(path)!r} does not say how that was trained.")
    return record


def _find_changes(record: dict[str, Any], now: dict[str, Any], where: str) -> dict[str, list]:
    """Returns `[before, now]` of each changed key; raises a [`UserError`] for one that may not change."""
    before, may_change = record["values"], MAY_CHANGE
    differing = {key: [old, now[key]] for key, old in before.items() if key in now and _real(old) != _real(now[key])}
    if before.get("global_batch_tokens") is not None:
        may_change = may_change | _OF_A_DEVICE
    if record.get("data"):
        may_change = may_change | _OF_CONTENT
    for key in MUST_STAY | {"processes"}:
        if key in differing and key not in may_change:
            old, new = differing[key]
            raise UserError(
                f"{where} was trained with {key} {old!r} and cannot go on with {new!r}: a new run can start from its "
                "weights, by model_name_or_path."
            )
    return {key: values for key, values in differing.items() if key in may_change}


def _real(value: Any) -> Any:
    """Replaces each path that exists by its real path."""
    if isinstance(value, list):
        return [_real(item) for item in value]
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value
