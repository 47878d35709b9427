"""The one error that is the user's to fix."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a file, a field, a clip.

    The message is one line that names the thing and, where it helps, what to do about it. Commands
    print it without a traceback and exit with code 2; library callers can catch it as `ValueError`.
    """
