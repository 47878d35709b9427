"""Films in a bucket: copied to this disk for as long as they are read."""

import atexit
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ltx2_jax.errors import UserError
from ltx2_jax.files import download, location, saying

ROOM = 8 * 2**30  # bytes of copies that nobody reads now: a film may give more clips


class _Copy:
    """Of one film; `file` is None until it is here."""

    def __init__(self):
        self.lock, self.users = threading.Lock(), 0
        self.file: Path | None = None


_copies: dict[epath.Path, _Copy] = {}  # the one that was asked for last is last
_lock = threading.Lock()


def placed(path: str | os.PathLike) -> Path | epath.Path:
    """A path on this disk, or in a bucket if it says so."""
    return location(path) if os.fspath(path).startswith("gs://") else Path(path)


@contextlib.contextmanager
def copied(path: epath.Path) -> Iterator[Path]:
    """The copy of a film in a bucket. Raises UserError, without the path, where there is none."""
    with _lock:
        copy = _copies[path] = _copies.pop(path, None) or _Copy()
        copy.users += 1
    try:
        with copy.lock:
            copy.file = copy.file or _fetched(path)
        yield copy.file
    finally:
        with _lock:
            copy.users -= 1
            _remove_unused(ROOM)


def _fetched(path: epath.Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="ltx2-jax-", suffix=path.suffix)
    os.close(descriptor)
    with contextlib.ExitStack() as stack:
        stack.callback(Path(name).unlink, missing_ok=True)
        try:
            download(path, Path(name))
        except FileNotFoundError:
            raise UserError("no such file") from None
        except OSError as error:
            raise UserError(f"cannot be copied ({error})") from error
        stack.pop_all()
    return Path(name)


def _remove_unused(room: int) -> None:
    """The oldest copies that nobody reads, until the others take no more than `room` bytes."""
    unused = {path: copy for path, copy in _copies.items() if not copy.users and copy.file}
    sizes = {path: copy.file.stat().st_size for path, copy in unused.items()}
    for path, copy in unused.items():
        if sum(sizes.values()) > room:
            del _copies[path], sizes[path]
            copy.file.unlink(missing_ok=True)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """At its end no copies are left."""
    try:
        with saying(lambda _: _remove_unused(-1)):
            yield
    finally:
        _remove_unused(-1)


atexit.register(_remove_unused, -1)  # of who reads films without `kept`
