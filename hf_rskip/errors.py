"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave (file, configuration, command line).

    The message is one sentence that names it.
    """
