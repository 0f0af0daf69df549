"""The exceptions a user is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave (file, configuration, command line).

    The message is one sentence that names it.
    """


class Preempted(Exception):
    """A run was asked to stop by SIGTERM, and has saved a checkpoint to go on from."""

    exit_code = 143
    """Of a shell for a process that SIGTERM has ended."""
