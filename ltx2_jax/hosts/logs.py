"""What this host says where process 0 alone speaks on the terminal: `logs/host-NN.log`.

The file is for who wants to know, afterwards, what happened on host 37. In a bucket it is sent
whole, every minute and at the end.
"""

import contextlib
import faulthandler
import os
import time
from typing import TextIO

from ltx2_jax.files import Mirror, location

FOLDER = "logs"  # in a workdir


class _Log:
    """The file, once it is known where it goes; what is said before waits."""

    file: TextIO | None = None
    mirror: Mirror | None = None
    waiting: list[str] | None = None  # None: no log is kept


_log = _Log()


def begin() -> None:
    """From now on what this host says is kept, for the file that `keep_log` opens."""
    _log.waiting = []


def keep_log(workdir: str | os.PathLike, process: int) -> None:
    """Opens the log of a process until this one ends; nothing where there is but one."""
    if _log.waiting is None or _log.file is not None:
        return
    name = f"host-{process:02d}.log"
    with contextlib.suppress(Exception):  # a run does not end for its log; buckets raise anything
        _log.mirror = Mirror(location(workdir) / FOLDER, [name])
        _log.file = open(_log.mirror.folder / name, "a", encoding="utf-8")
        for line in _log.waiting:
            _write(line)


def note(text: str) -> None:
    """Into the log alone, with the time."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC  {text}\n"
    if _log.file is not None:
        _write(line)
    elif _log.waiting is not None:
        _log.waiting.append(line)


def note_stacks() -> None:
    """What all threads are doing, into the log."""
    if _log.file is not None:
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(_log.file, all_threads=True)


def close() -> None:
    """The end of the log; what is left of one in a bucket is sent."""
    for part in (_log.file, _log.mirror):
        if part is not None:
            with contextlib.suppress(OSError):  # a full disk is told of by others
                part.close()
    _log.file = _log.mirror = _log.waiting = None


def _write(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk is told of by others
        _log.file.write(line)
        _log.file.flush()
