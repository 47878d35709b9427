"""Files of clips: found by name, on a disk or in a bucket, and told apart by what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from etils import epath

from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, of_bucket
from ltx2_jax.media.copies import copied

_BLOCK = 2**16


def found(path: Path) -> Path:
    """The path on this disk: macOS spells é as two characters in names, most tables as one.

    Raises UserError, without the path, where there is no such file under either spelling.
    """
    if path.exists() or path.parent == path:
        return path
    with contextlib.suppress(OSError, ValueError, UserError):
        wanted = unicodedata.normalize("NFC", path.name)
        for other in found(path.parent).iterdir():
            if unicodedata.normalize("NFC", other.name) == wanted and other.exists():
                return other
    raise UserError("no such file")


@contextlib.contextmanager
def here(path: Path | epath.Path) -> Iterator[Path]:
    """The file on this disk, in a bucket its copy. Raises UserError as `found` does."""
    with copied(path) if in_bucket(path) else contextlib.nullcontext(found(path)) as file:
        yield file


def fingerprints(paths: Iterable[Path | epath.Path]) -> list[str | None]:
    """Of each file; None for one that cannot be read.

    Of its size and of its first, middle and last 64 KiB, so that films need not be read whole; its
    date plays no part, because copies have another one.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_fingerprint, paths))


def _fingerprint(path: Path | epath.Path) -> str | None:
    try:
        with _bucket_file(path) if in_bucket(path) else open(found(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for begin in (0, (size - _BLOCK) // 2, size - _BLOCK):
                file.seek(max(0, begin))
                digest.update(file.read(_BLOCK))
    except (OSError, ValueError, UserError):
        return None
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _bucket_file(path: epath.Path) -> Iterator[BinaryIO]:
    """Of which is fetched what is read, and no more."""
    with of_bucket() as bucket:
        with bucket.open(os.fspath(path), "rb", cache_type="none") as file:
            yield file
