"""Files of clips on disk: found by name, and told apart by what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ltx2_jax.errors import UserError

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


def fingerprints(paths: Iterable[Path]) -> list[str | None]:
    """Of each file; None for one that cannot be read.

    Of its size and of its first, middle and last 64 KiB, so that films need not be read whole; its
    date plays no part, because copies have another one.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_fingerprint, paths))


def _fingerprint(path: Path) -> str | None:
    try:
        path = found(path)
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for begin in (0, (size - _BLOCK) // 2, size - _BLOCK):
                file.seek(max(0, begin))
                digest.update(file.read(_BLOCK))
    except (OSError, ValueError, UserError):
        return None
    return digest.hexdigest()[:16]
