"""Exceptions whose messages are for users."""

import signal
from importlib import import_module
from types import ModuleType


class UserError(ValueError):
    """A mistake in the user's input (file, configuration, command line).

    The message is one sentence that names it.
    """

    def __str__(self) -> str:
        # torch raises an error of a data loader's worker again with its traceback for a message, which ends with ours.
        return super().__str__().rpartition(f"{__name__}.UserError: ")[2].rstrip("\n")


class Diverged(UserError):
    """A training was stopped because its loss, gradient or weights were not finite, or its loss had jumped.

    Attributes:
        step: the optimizer step, from 1, that was not made, or that made the weights so.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"Step {step}: {what}")
        self.step = step


class Preempted(Exception):
    """A run was asked to stop by a signal, and has saved a checkpoint to go on from.

    Attributes:
        exit_code: of a shell for a process that the signal has ended.
    """

    exit_code = 128 + signal.SIGTERM

    def __init__(self, message: str, signum: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + signum


def require(module: str, extra: str) -> ModuleType:
    """Imports a module; raises a [`UserError`] if it is not installed, which the `extra` of this package does."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"This needs {module}: `pip install 'hf_rskip[{extra}]'`.") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its last stop or colon, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
