"""Files that appear whole or not at all, and locks."""

import contextlib
import fcntl
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


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[bool | None]:
    """True: holds a file, which is made, or a folder that exists. False: somebody else holds it.

    None: the disk knows no such locks; those over a network have none of folders. The system lets
    go when the process ends, however it ends.
    """
    flags = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT
    descriptor, held = os.open(path, flags, 0o666), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = False if isinstance(error, BlockingIOError) else None
        yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_run(workdir: str | os.PathLike, process_index: int = 0) -> Iterator[None]:
    """Keeps a second run out of a workdir, which is made: each would destroy what the other saves.

    Only process 0 of a run looks.

    Raises:
      UserError: another run is writing there, or nobody can.
    """
    with contextlib.ExitStack() as stack:
        if process_index == 0:
            try:
                Path(workdir).mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(Path(workdir) / ".lock"))
            except OSError as error:
                raise UserError(f"{workdir}: cannot be a workdir ({reason(error)})") from None
            if held is False:
                raise UserError(f"{workdir}: another run is writing here")
        yield


def reason(error: Exception) -> str:
    """One line about an exception of a library or the system, without the path again."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
