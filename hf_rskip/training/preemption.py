"""Stops a run with a checkpoint at SIGTERM or Ctrl-C."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, forkserver, parent_process
from multiprocessing.util import Finalize

import torch
from accelerate.utils import gather
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy

from ..errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C to one of the processes, all of them finish the step, evaluate if that is due, save a
    checkpoint and raise [`Preempted`].

    Where only better models are saved and that evaluation finds none, the next step is made, too; after the last step
    the run then goes on to its end. It must be the last callback that changes the control of the training.
    """

    def __init__(self):
        self._received: int | None = None
        self._is_stopping = self._is_due = False  # the second: a checkpoint, also without the signal

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Defers SIGTERM and the first Ctrl-C inside this context to the end of the step; a second one interrupts."""
        self._received, self._is_stopping = None, False
        with _handled(_SIGNALS, self._handle):
            yield

    @contextmanager
    def raised(self, step: int) -> Iterator[None]:
        """Raises [`Preempted`] at SIGTERM inside this context, which begins after the last `step`."""
        self._received = None

        def stop(signum, frame):
            self._received = signum
            raise self.preempted(step)

        with _handled([signal.SIGTERM], stop):
            try:
                yield
            except Exception as error:  # a library may have turned that exception into another one
                if self._received is None:
                    raise
                raise self.preempted(step) from error
            if self._received is not None:  # or have caught it
                raise self.preempted(step)

    def _handle(self, signum, frame) -> None:
        self._received = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return
            # A signal may come while something else is being printed, which `print` does not allow.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    def on_step_end(self, args, state, control, **kwargs):
        self._is_due = control.should_save
        # The Trainer calls `on_epoch_end` next after the last step of an epoch or of all, with what is due there.
        if not (float(state.epoch).is_integer() or control.should_training_stop):
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.is_told_to_stop(args):
            self._is_stopping = True
            self._is_due |= control.should_save
            control.should_save = True

    def is_out_of_turn(self, args, state: TrainerState) -> bool:
        """Whether the checkpoint that is being written would not be without the signal."""
        is_best = args.save_strategy == SaveStrategy.BEST and state.best_global_step == state.global_step
        return self._is_stopping and not (self._is_due or is_best)

    def on_save(self, args, state, control, **kwargs):
        if self._is_stopping:
            raise self.preempted(state.global_step)

    def preempted(self, step: int) -> Preempted:
        """The exception for a run that has saved a checkpoint after that step."""
        how = "Ctrl-C" if self._received == signal.SIGINT else "SIGTERM"
        message = f"stopped by {how} after step {step}; go on with `--resume_from_checkpoint true`"
        return Preempted(message, self._received)

    def is_told_to_stop(self, args) -> bool:
        """Whether one of the processes has received a signal; to be called on every process."""
        received = self._received
        if args.world_size > 1:
            received = int(gather(torch.tensor([received or 0], device=args.device)).max()) or None
        if received is not None:  # a signal that came in the meantime is kept for the next call
            self._received = received
        return received is not None


@contextmanager
def _handled(numbers: Sequence[int], handler: Callable) -> Iterator[None]:
    """Handles signals inside this context if in the main thread; ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Studies make their cells ignore Ctrl-C.
    previous = {number: old for number in numbers if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def outlive_signal(dataloader: DataLoader) -> DataLoader:
    """Makes the workers of a data loader ignore the signals, as the last step and its evaluation still need them."""
    loader = getattr(dataloader, "base_dataloader", dataloader)  # accelerate wraps the one that starts them
    told = getattr(loader.worker_init_fn, "func", None) is _ignore_signals  # the Trainer keeps some loaders
    if loader.num_workers and not told:
        loader.worker_init_fn = partial(_ignore_signals, loader.worker_init_fn)
        Finalize(None, _kill_children, exitpriority=0)
        if (loader.multiprocessing_context or multiprocessing).get_start_method() == "forkserver":
            start_fork_server()
    return dataloader


def start_fork_server() -> None:
    """Starts the fork server of `multiprocessing`, which ignores SIGTERM then, and so do its children.

    A scheduler tells every process, and workers take the end of the server for that of the training.
    """
    with _handled([signal.SIGTERM], signal.SIG_IGN):
        forkserver.ensure_running()


def _kill_children() -> None:
    """Kills daemonic processes that are left at exit: Python sends them SIGTERM, which workers ignore, and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the handler of torch raises an error for a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _ignore_signals(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _end_with_parent() -> None:
    """Ends a worker when the training was killed, which torch does not see if a server has forked the worker."""
    connection.wait([parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
