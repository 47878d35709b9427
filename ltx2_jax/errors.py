"""Errors that are the user's to fix."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a file, a field, a clip.

    The message is one line that names the thing and, where it helps, what to do about it. Commands
    print it without a traceback and exit with code 2; library callers can catch it as `ValueError`.
    """

    exit_code = 2


class DivergedError(UserError):
    """A training that is lost: to start it again would not help. All hosts see it at once."""

    exit_code = 3
    everywhere = True
