"""Several processes of one command on this machine, as several hosts would run it.

They are forked from one that has imported what all of them need: that takes two seconds of a core.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How the processes ended: exit codes, and what each printed."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float  # from the end of the first to that of the last

    def lines(self, process: int = 0) -> list[str]:
        """Of stderr, without progress bars."""
        bar = re.compile(r"\d+/\d+ \[")
        return [line for line in self.err[process].splitlines() if line and not bar.search(line)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", f"device_count={devices}")
    paths = f"{TESTS.parent}{os.pathsep}{TESTS}"
    more = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    return os.environ | more | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


@functools.cache
def forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltx2_jax.sample", "ltx2_jax.train"])
    with mock.patch.dict(os.environ, environment(1)):  # JAX reads some of it as it is imported
        forkserver.ensure_running()
    return context


def pod(
    folder: Path,
    processes: int,
    devices: int,
    *command: str,
    own: dict[int, list[str]] | None = None,
    timeout: float = 300,
) -> Ended:
    """Runs `python COMMAND` as so many processes of so many devices; see `Ended`.

    `own` are flags that one process alone gets. Of processes that a test has stopped or killed,
    the others decide how long it takes; whoever is left then is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address, running = f"--coordinator=127.0.0.1:{free_port()}", []
    for index in range(processes):
        flags = [address, f"--num-processes={processes}", f"--process-id={index}"]
        argv = [*command, *(own or {}).get(index, []), *flags]
        printed = folder / f"out-{index}", folder / f"err-{index}"
        running.append(forks().Process(target=_python, args=(argv, environment(devices), *printed)))
        running[-1].start()
    first, deadline = None, time.monotonic() + timeout
    while (left := [p for p in running if p.is_alive()]) and time.monotonic() < deadline:
        if len(left) < processes:
            first = first or time.monotonic()
        if first and all(stopped(p.pid) for p in left):
            break
        time.sleep(0.05)
    seconds = time.monotonic() - (first or time.monotonic())
    for process in left:
        process.kill()
    for process in running:
        process.join()
    codes = [process.exitcode for process in running]
    read = lambda name: [(folder / f"{name}-{i}").read_text() for i in range(processes)]  # noqa: E731
    return Ended(codes, read("out"), read("err"), seconds)


def _python(argv: list[str], environ: dict[str, str], out: Path, err: Path) -> None:
    """`python ARGV`, in this process."""
    for path, number in ((out, 1), (err, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environ)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1], None)  # imported already; it is to run as if it were not
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def stopped(pid: int) -> bool:
    """Whether a process is one that SIGSTOP has stopped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
