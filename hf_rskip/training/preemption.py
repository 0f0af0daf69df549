"""The signals by which a scheduler, or a user by Ctrl-C, asks a run to stop."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Remembers SIGTERM and the first Ctrl-C, which would otherwise end the process at once; the second one does."""

    def __init__(self):
        self.received: int | None = None
        """The number of the signal."""

    @contextmanager
    def caught(self):
        """Inside this context a signal is only remembered; outside the main thread Python has no say in it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = None
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            if previous[number] != signal.SIG_IGN:  # a study's Ctrl-C is not for its cells
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, signum, frame) -> None:
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return
            # A signal may come while something else is being printed, which `print` does not allow.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")


def outlive_signal(dataloader: DataLoader) -> None:
    """Lets the workers of a loader ignore the signals, which reach them too: the last step needs them."""
    dataloader.worker_init_fn = partial(_ignore_signals, dataloader.worker_init_fn)


def _ignore_signals(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if worker_init_fn is not None:
        worker_init_fn(worker)
