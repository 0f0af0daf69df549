"""Runs the cells of a study in parallel, each in a process of its own."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection

from ..environment import find_commit
from ..errors import Preempted, UserError
from ..recipe.parsing import parse_values
from ..training.checkpoints import list_checkpoints
from ..training.preemption import start_fork_server
from .cell import DIVERGED, FAILED, FINISHED, TAKEN, is_done, read_result, record, run_cell
from .evidence import EVIDENCE_NAME
from .study import Cell, find_difference

_PATIENCE = 30
"""Seconds for a cell to save a checkpoint and end after its study is stopped."""
_SERVER_LOST = 255
"""Exit code that `multiprocessing` reports, even of a running process, when the process that forked it has ended."""


def check_recorded(cells: Sequence[Cell]) -> None:
    """Raises a [`UserError`] if a cell's folder holds a result, or a checkpoint, of another recipe, or if the data of
    the same recipe keys changed between the trainings of two cells."""
    first: dict[str, tuple[Cell, dict]] = {}
    for cell in cells:
        begun = is_done(cell) or any(cell.run_folder.glob("checkpoint-*"))
        if begun and (difference := find_difference(cell)):
            raise UserError(f"{str(cell.folder)!r} was run with {difference}: remove it, or choose another output_dir.")
        if checksums := (read_result(cell) or {}).get("data"):
            data = str(parse_values(cell.keys, [], str(cell)).data)
            other, before = first.setdefault(data, (cell, checksums))
            for split in checksums:
                if checksums[split] != before.get(split):
                    raise UserError(
                        f"The {split} data changed between the trainings of {str(other.folder)!r} and "
                        f"{str(cell.folder)!r}, which cannot be compared: remove the folders of the old ones, and "
                        f"{EVIDENCE_NAME}."
                    )


def run_cells(cells: Sequence[Cell], total: int, jobs: int, modules: Sequence[str], keep_models: bool) -> list[Cell]:
    """Runs the cells that are not done, and prints a line at the start and at the end of each.

    A cell that another process is running is left to it. Models of finished cells that a killed study did not remove
    are removed.

    Args:
        total: number of cells of the study.
        jobs: cells at once.
        modules, keep_models: see [`run_cell`].

    Returns:
        The cells that have failed or were stopped.

    Raises:
        [`Preempted`]: after SIGTERM, when the running cells have saved their checkpoints.
        [`UserError`]: if the process from which those of the cells are forked was killed.
    """
    commit = find_commit()
    waiting, taken, failed = [cell for cell in cells if not is_done(cell)], [], []
    for cell in cells:
        if is_done(cell) and not keep_models:
            shutil.rmtree(cell.run_folder, ignore_errors=True)
    context = _start_server(jobs) if waiting else None
    running: dict[multiprocessing.Process, tuple[Cell, float]] = {}
    with _stopping(running):
        while waiting or taken or running:
            while (waiting or (taken and not running)) and len(running) < jobs:
                # A taken cell is tried again at the end: its process may be that of a study that was just killed.
                cell, patience = (waiting.pop(0), 0) if waiting else (taken.pop(0), _PATIENCE)
                process = context.Process(target=run_cell, args=(cell, modules, commit, keep_models, patience))
                try:
                    process.start()
                except (EOFError, ConnectionError) as error:
                    raise _lost_server() from error
                running[process] = cell, patience
                if not patience:
                    doing = "goes on" if list_checkpoints(cell.run_folder) else "starts"
                    print(f"[{cell.number} of {total}] {cell}: {doing}", flush=True)
            ended = connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                cell, patience = running.pop(process)
                process.join()
                if process.exitcode == _SERVER_LOST:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)  # the cell may still run
                    raise _lost_server()
                if process.exitcode == TAKEN and not patience:
                    taken.append(cell)
                    continue
                if process.exitcode != TAKEN and not is_done(cell):
                    failed.append(cell)
                    _record_crash(cell, commit, process.exitcode)
                said = "run by another process" if process.exitcode == TAKEN else describe_state(cell)
                print(f"[{cell.number} of {total}] {cell}: {said}", flush=True)
    return failed


def _lost_server() -> UserError:
    return UserError(
        "The process that starts the cells was killed, maybe for want of memory; the same command goes on, "
        "perhaps with fewer --jobs."
    )


def _record_crash(cell: Cell, commit: str | None, code: int) -> None:
    """Records a failure for a process that wrote no result, unless it was stopped with a checkpoint."""
    if read_result(cell) is None and code != Preempted.exit_code:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        record(cell, commit, {"state": FAILED, "message": f"its process was ended by {how}"})


def describe_state(cell: Cell) -> str:
    """Describes the state of a cell in a few words."""
    result = read_result(cell)
    if result is None:
        return "begun" if cell.recipe_path.exists() else "not run"
    if result["state"] == FINISHED:
        test = result["test"]
        scores = [f"{name} {test[name]:.4g}" for name in ("bleu", "chrf") if name in test]
        scores += [f"accuracy {100 * test['accuracy']:.4g}%"] if "accuracy" in test else []
        return ", ".join([FINISHED, *scores, f"{result['seconds']:.0f} s"])
    if result["state"] == DIVERGED:
        return f"diverged at step {result['step']}"
    return f"failed: {result['message']}"


def _start_server(jobs: int) -> multiprocessing.context.BaseContext:
    """Starts the process, with all imports done, from which those of the cells are forked.

    The cells share the cores of the machine, unless `OMP_NUM_THREADS` gives the number of threads of each.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _count_cores() // jobs)))
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # the process is a `python -c`, which would look in the current folder
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_rskip.studies.cell", "matplotlib.figure", "matplotlib.backends.backend_agg"])
    start_fork_server()
    return context


@contextmanager
def _stopping(running: dict):
    """Terminates the running cells on leaving this context; SIGTERM raises [`Preempted`]."""

    def stop(signum, frame):
        raise Preempted("stopped by SIGTERM; the same command goes on")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        for process in running:
            process.terminate()
        for process in running:
            process.join(_PATIENCE)
            process.kill()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
