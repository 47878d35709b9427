"""Several processes of one command on this machine, as several hosts would run it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
    with contextlib.ExitStack() as files:
        for index in range(processes):
            flags = [address, f"--num-processes={processes}", f"--process-id={index}"]
            stdout, stderr = (
                files.enter_context(open(folder / f"{name}-{index}", "w"))
                for name in ("out", "err")
            )
            own_flags = [*(own or {}).get(index, []), *flags]
            given = {"env": environment(devices), "stdout": stdout, "stderr": stderr}
            running.append(subprocess.Popen([sys.executable, *command, *own_flags], **given))
        first, deadline = None, time.monotonic() + timeout
        while (left := [p for p in running if p.poll() is None]) and time.monotonic() < deadline:
            if len(left) < processes:
                first = first or time.monotonic()
            if first and all(stopped(p.pid) for p in left):
                break
            time.sleep(0.05)
        seconds = time.monotonic() - (first or time.monotonic())
        for process in left:
            process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in running]
    read = lambda name: [(folder / f"{name}-{i}").read_text() for i in range(processes)]  # noqa: E731
    return Ended(codes, read("out"), read("err"), seconds)


def stopped(pid: int) -> bool:
    """Whether a process is one that SIGSTOP has stopped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
