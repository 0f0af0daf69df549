"""The signal by which a scheduler takes a machine away."""

import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

from torch.utils.data import DataLoader


class TerminationSignal:
    """Remembers SIGTERM, which would otherwise end the process at once."""

    def __init__(self):
        self.received = False

    @contextmanager
    def caught(self):
        """Inside this context the signal is only remembered; outside the main thread Python has no say in it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = False
        previous = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _handle(self, signum, frame) -> None:
        self.received = True


def outlive_signal(dataloader: DataLoader) -> None:
    """Lets the workers of a loader ignore the signal, which schedulers send to them too: the last step needs them."""
    dataloader.worker_init_fn = partial(_ignore_signal, dataloader.worker_init_fn)


def _ignore_signal(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if worker_init_fn is not None:
        worker_init_fn(worker)
