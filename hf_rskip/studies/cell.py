"""One cell: its training in a process of its own, and its `result.json`."""

import datetime
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from .. import models
from ..atomic import replace_text
from ..environment import describe_device, read_versions
from ..errors import Diverged, Preempted, UserError
from ..evaluation.predictions import PREDICTIONS_NAME
from ..own_modules import import_modules
from ..probing.callback import TABLE_NAME
from ..recipe.parsing import Recipe, parse_recipe
from ..training.best_model import list_evaluations
from ..training.checkpoints import checkpoint_step, list_checkpoints
from ..training.resuming import read_record
from ..training.train import train
from .study import METRICS, Cell, write_recipe

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
TAKEN = 75
"""Exit code where another process is running the cell: EX_TEMPFAIL of sysexits.h."""
_ALWAYS = {"device": str, "versions": dict, "commit": str | None, "date": str}
_KEYS = {
    FINISHED: {"test": dict, "validation": list, "kept_step": int, "steps": int, "parameters": int}
    | {"seconds": float | int, "resumed": bool, **_ALWAYS},
    DIVERGED: {"step": int, "message": str, **_ALWAYS},
    FAILED: {"message": str},
}
"""Required keys of `result.json` in each state, with their types."""


def read_result(cell: Cell) -> dict[str, Any] | None:
    """Reads `result.json` of a cell, `None` if it does not exist; a failure stays there until the cell runs again.

    Raises:
        [`UserError`]: if the file is not JSON, lacks a key, or has a value of another type.
    """
    path = cell.folder / "result.json"
    try:
        return parse_result(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is not the result of a cell ({error}): remove it, and the cell is run again."
        ) from error


def parse_result(text: str) -> dict[str, Any]:
    """Parses the content of a `result.json`; raises a `ValueError` unless it is the result of a cell."""
    result = json.loads(text)
    kinds = _KEYS.get(str(result.get("state"))) if isinstance(result, dict) else None
    if kinds is None:
        raise ValueError("it has no proper state")
    for key, kind in kinds.items():
        if not isinstance(result.get(key, ...), kind):
            raise ValueError(f"it has no proper {key}")
    return result


def write_result(cell: Cell, **values) -> None:
    """Writes `result.json` atomically."""
    replace_text(cell.folder / "result.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def is_done(cell: Cell) -> bool:
    """Whether the cell has finished or diverged."""
    result = read_result(cell)
    return result is not None and result["state"] != FAILED


def run_cell(cell: Cell, modules: Sequence[str], commit: str | None, keep_models: bool, patience: float) -> None:
    """Trains a cell and writes its result; exits with `TAKEN` if another process holds the cell for `patience` seconds.

    Output goes to `log.txt`. The process stops, with a checkpoint where possible, when that of the study ends.

    Args:
        cell: of the study.
        modules: imported first, as by `--import_module`.
        commit: of the working tree, if it is one of git.
        keep_models: whether weights and checkpoints stay.
        patience: in seconds.
    """
    _follow_study()
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cell.folder / "lock", timeout=patience).acquire()
    except Timeout:
        sys.exit(TAKEN)
    except OSError as error:
        sys.exit(f"hf-rskip: {cell}: {error}")
    with lock:
        if not is_done(cell):
            _train(cell, modules, commit)
            if is_done(cell) and not keep_models:
                shutil.rmtree(cell.run_folder, ignore_errors=True)


def _train(cell: Cell, modules: Sequence[str], commit: str | None) -> None:
    with (cell.folder / "log.txt").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    logging.disable_progress_bar()
    write_recipe(cell)
    (cell.folder / "result.json").unlink(missing_ok=True)
    resumed = bool(list_checkpoints(cell.run_folder))
    if not resumed:
        shutil.rmtree(cell.run_folder, ignore_errors=True)
    try:
        import_modules(modules)
        recipe = parse_recipe(cell.recipe_path, ["--resume_from_checkpoint", "true"] if resumed else [])
        metrics = train(recipe)
        outcome = {"state": FINISHED, **_describe_run(recipe, metrics)}
        for name in (PREDICTIONS_NAME, TABLE_NAME):
            if (cell.run_folder / name).exists():
                shutil.copy(cell.run_folder / name, cell.folder)
    except Preempted as stop:
        print(f"hf-rskip: {stop}", file=sys.stderr, flush=True)
        sys.exit(stop.exit_code)
    except Diverged as stop:
        outcome = {"state": DIVERGED, "step": stop.step, "message": str(stop)}
    except Exception as error:
        traceback.print_exc()
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        outcome = {"state": FAILED, "message": name + " ".join(str(error).split())}
    outcome |= {"resumed": resumed, "device": describe_device(), "versions": read_versions()}
    record(cell, commit, outcome)


def record(cell: Cell, commit: str | None, outcome: dict[str, Any]) -> None:
    """Writes `result.json`: the outcome, the commit and the date."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_result(cell, **outcome, commit=commit, date=date)


def _follow_study() -> None:
    """Ignores Ctrl-C, for which the study sends SIGTERM; sends SIGTERM to this process when the study ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the fork server ignores
    study = parent_process()

    def watch():
        connection.wait([study.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    if study is not None:
        threading.Thread(target=watch, daemon=True).start()


def _describe_run(recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any]:
    training = recipe.training
    folder, keeps_best = Path(training.output_dir), training.load_best_model_at_end and not training.average_checkpoints
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    kept = state.best_model_checkpoint
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        parameters = getattr(models, config.architectures[0])(config).num_parameters()
    return {
        "test": {key.removeprefix("test_"): value for key, value in metrics.items() if key.startswith("test_")},
        "validation": [
            {"step": log["step"]}
            | {name: log[f"eval_{name}"] for name in ("loss", *METRICS[recipe.task]) if f"eval_{name}" in log}
            for log in list_evaluations(state)
        ],
        # The last scores at this step are those of the model that was kept, if it was evaluated: the best model if it
        # was saved, else the last one or the mean of checkpoints, which is evaluated when the training has ended.
        "kept_step": checkpoint_step(Path(kept)) if keeps_best and kept else state.global_step,
        "steps": state.global_step,
        "parameters": parameters,
        "seconds": round(metrics["train_runtime"], 1),
        "data": read_record(folder)["data"],
    }
