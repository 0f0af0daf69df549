"""Runs the cells of a study, some at a time, each in a process of its own."""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing import connection

from ..errors import Preempted, UserError
from .cell import DIVERGED, FAILED, FINISHED, TAKEN, Surroundings, is_done, read_result, record, run_cell
from .study import Cell, find_difference

_PATIENCE = 30
"""Seconds that a cell gets to save a checkpoint when the study is stopped."""


def check_folders(cells: Sequence[Cell]) -> None:
    """Raises a [`UserError`] if a cell's folder holds a result, or a checkpoint, of another recipe."""
    for cell in cells:
        if is_done(cell) or any(cell.run_folder.glob("checkpoint-*")):
            difference = find_difference(cell)
            if difference:
                raise UserError(
                    f"{str(cell.folder)!r} was run with {difference}: remove it, or choose another output_dir."
                )


def run_cells(cells: Sequence[Cell], total: int, jobs: int, modules: Sequence[str], keep_models: bool) -> None:
    """Runs what is not done of `cells`, and says so, a line each; `total` is how many the study has.

    A cell that another process is running is left to it.

    Raises:
        [`Preempted`]: after SIGTERM, when the cells have saved their checkpoints.
        [`UserError`]: if cells have failed; it names them.
    """
    surroundings = Surroundings(tuple(modules), _find_commit(), keep_models)
    context = _start_server(jobs)
    waiting = [cell for cell in cells if not is_done(cell)]
    running: dict[multiprocessing.Process, Cell] = {}
    with _stopping(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                process = context.Process(target=run_cell, args=(cell, surroundings), name=str(cell))
                process.start()
                running[process] = cell
            ended = connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                cell = running.pop(process)
                if process.exitcode not in (0, TAKEN, Preempted.exit_code) and not is_done(cell):
                    how = f"exit code {process.exitcode}"
                    if process.exitcode < 0:
                        how = signal.Signals(-process.exitcode).name
                    record(cell, surroundings, {"state": FAILED, "message": f"its process was ended by {how}"})
                print(f"[{cell.number} of {total}] {cell}: {describe_state(cell)}", flush=True)
    failed = [str(cell) for cell in cells if (read_result(cell) or {}).get("state") == FAILED]
    if failed:
        raise UserError(f"{len(failed)} of {total} cells failed: {'; '.join(failed)}")


def describe_state(cell: Cell) -> str:
    """What has become of a cell, in a few words."""
    result = read_result(cell)
    if result is None:
        return "begun" if cell.recipe_path.exists() else "not run"
    if result["state"] == FINISHED:
        scores = [f"{name} {value:.4g}" for name, value in result["test"].items() if name in ("bleu", "accuracy")]
        return ", ".join([FINISHED, *scores, f"{result['seconds']:.0f} s"])
    if result["state"] == DIVERGED:
        return f"diverged at step {result['step']}"
    return f"failed: {result['message']}"


def _start_server(jobs: int) -> multiprocessing.context.BaseContext:
    """Starts the process from which those of the cells are forked, and which has imported what they need.

    The cells share the cores of the machine, unless `OMP_NUM_THREADS` says how many threads each is to have.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _count_cores() // jobs)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_rskip.studies.cell"])
    return context


@contextmanager
def _stopping(running: dict):
    """Whatever ends the study ends its cells; SIGTERM is turned into [`Preempted`]."""

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


def _find_commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
