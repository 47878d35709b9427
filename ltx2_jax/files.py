"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ltx2_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *errors: type[Exception]) -> Iterator[Path]:
    """A new name beside `path`, for the block to write; it takes the place of `path` at its end.

    If the block raises, `path` stays as it was and the new file is removed. Folders on the way are
    created. `errors`: what the writing library raises besides OSError.

    Raises:
      UserError: naming `path` and the reason, in place of an OSError or one of `errors`.
    """
    path = Path(path)
    # Not tempfile, whose files only their owner can read, whatever the umask says. The name ends in
    # no suffix, so that a search for "*.mp4" does not find what a killed program left.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, *errors) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def reason(error: Exception) -> str:
    """One line about an exception of a library or the system, without the path again."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
