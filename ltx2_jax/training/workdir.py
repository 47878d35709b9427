"""Whether the workdir is one place for all hosts, where they can write: known before any work."""

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from ltx2_jax import hosts
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, in_time, location


def opened(workdir: str | Path, seconds: float = 30.0) -> epath.Path:
    """The workdir, after process 0 has written, listed and removed a file that all hosts saw.

    One process with a disk needs no such test.

    Raises:
      UserError: its scheme cannot be served, it cannot be written to, it does not answer in
        `seconds`, or the hosts mean several places by its name.
    """
    place = hosts.agree(lambda: location(workdir))
    if hosts.count() == 1 and not in_bucket(place):
        return place
    probe = place / f".probe-{hosts.broadcast(secrets.token_hex(8))}"

    def write() -> None:
        place.mkdir(parents=True, exist_ok=True)
        probe.write_text(probe.name)
        if probe.name not in {path.name for path in place.iterdir()}:
            raise OSError("a file that was written is not listed")

    def read() -> None:
        end = time.monotonic() + seconds
        while not probe.exists() or probe.read_text() != probe.name:
            if time.monotonic() > end:
                raise UserError(
                    f"{workdir}: is not shared: this host does not see what host 0 wrote; give "
                    "gs://bucket/folder, or a file system that all hosts mount"
                )
            time.sleep(0.2)
        # What this host writes there itself: parts of checkpoints, logs.
        own = place / f"{probe.name}-{hosts.index()}"
        own.write_text("")
        own.unlink()

    first = hosts.index() == 0
    hosts.agree(lambda: _in_time(write, workdir, seconds) if first else None)
    try:
        hosts.agree(lambda: _in_time(read, workdir, seconds + 30))
    finally:
        if first:
            with contextlib.suppress(UserError):
                _in_time(probe.unlink, workdir, seconds)
    return place


def _in_time(work: Callable[[], object], workdir: str | Path, seconds: float) -> None:
    in_time(work, seconds, str(workdir), "cannot be a workdir")
