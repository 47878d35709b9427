"""Signs of life of every host, and how all end together."""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from ltx2_jax.errors import UserError
from ltx2_jax.files import last_words
from ltx2_jax.hosts.agreement import (
    AGAIN,
    LOST,
    ROOM,
    AgreedError,
    LostError,
    client,
    count,
    hear,
    index,
    name,
    tell,
)

BEAT = 2.0  # seconds between two signs of life of a host, at most

_command = ""


# ---------------------------------------------------------------------------- signs of life


@dataclasses.dataclass
class _Progress:
    """What this process does, and since when."""

    phase: str = "start"
    step: int | None = None
    seconds: float | None = None  # after which it is stuck
    since: float = dataclasses.field(default_factory=time.monotonic)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        return f'"{self.phase}"' + ("" if self.step is None else f" of step {self.step}")


# Phases in which a host waits for the others, if these are behind.
WAITING = ("step", "save", "sample", "wait", "end")
_progress = _Progress()
_of_all: dict[int, dict[str, Any]] = {}  # on process 0: the last signs of life


def progress(
    phase: str, step: int | None = None, seconds: float | None = None, **numbers: float
) -> None:
    """Notes what this host does from now on; `seconds` is how long it may take.

    `numbers` are told to process 0 with it, see `slowest`.
    """
    global _progress
    _progress = _Progress(phase, step, seconds, numbers=_progress.numbers | numbers)


def slowest(number: str) -> tuple[int, float] | None:
    """On process 0: who told the largest number of this name lately, and which."""
    told = {p: row["numbers"][number] for p, row in _of_all.items() if number in row["numbers"]}
    return max(told.items(), key=lambda item: item[1]) if told else None


class Watch:
    """Threads that tell the others that this host lives, and find the one that does not."""

    def __init__(self, heartbeat: float):
        self._heartbeat, self._told = heartbeat, time.monotonic()
        self.beat = min(BEAT, heartbeat / 4)
        self._beats: dict[int, tuple[int, float]] = {}  # process -> its last beat, and when it came

    def start(self) -> None:
        for work in (self._tell, self._check):
            threading.Thread(target=work, name=f"hosts{work.__name__}", daemon=True).start()
        Watch.running = self

    def _tell(self) -> None:
        beat, told = 0, None
        while True:
            now, silent = _progress, time.monotonic() - self._told
            # Sooner than it must if there is news, so that a host that is lost has told them.
            if silent > self.beat or told is None or (now is not told and silent > self.beat / 4):
                beat, told = beat + 1, now
                row = dataclasses.asdict(now) | {"beat": beat, "age": time.monotonic() - now.since}
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    key = f"{ROOM}/progress/{index()}"
                    client().key_value_set(key, json.dumps(row), allow_overwrite=True)
                    if index() == 0:
                        self._read()
                    self._told = time.monotonic()
            time.sleep(self.beat / 8)

    def _read(self) -> None:
        for key, value in client().key_value_dir_get(f"{ROOM}/progress/"):
            process, row = int(key.rpartition("/")[2]), json.loads(value)
            _of_all[process] = row
            if self._beats.get(process, (-1, 0))[0] != row["beat"]:
                self._beats[process] = (row["beat"], time.monotonic())

    def _check(self) -> None:
        while True:
            time.sleep(self.beat)
            if lost := self.lost(self._heartbeat):
                if index() != 0:  # nobody can be told
                    _leave(LOST, _error(lost), stacks=True, patience=0)
                fail(LOST, _error(lost), stacks=True)

    def lost(self, seconds: float) -> str:
        """Who gave no sign of life for so long, in words; "" if nobody."""
        now = time.monotonic()
        if index() != 0:
            silent = now - self._told
            where = f"{name(0)}: no answer for {silent:.0f} s, here in {_progress.text()}; {AGAIN}"
            return where if silent > seconds else ""
        late = {p: now - at for p, (_, at) in self._beats.items() if p and now - at > seconds}
        if not late:
            return ""
        process = max(late, key=late.get)
        row = _Progress(_of_all[process]["phase"], _of_all[process]["step"])
        more = f" (and {len(late) - 1} more)" if len(late) > 1 else ""
        return (
            f"{name(process)}{more}: lost in {row.text()}, {late[process]:.0f} s ago; the others "
            f"wait in {_progress.text()}; {AGAIN}"
        )


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While in context, a phase that takes longer than it may ends the run, to be started again."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            now = _progress
            if now.seconds is not None and time.monotonic() - now.since > now.seconds:
                fail(LOST, _error(stuck(now)), stacks=True)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        progress("end")


def stuck(now: Any) -> str:
    """Names the host that is behind, of all that wait."""
    rows = {index(): dataclasses.asdict(now) | {"age": time.monotonic() - now.since}}
    if count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for key, value in client().key_value_dir_get(f"{ROOM}/progress/"):
                rows[int(key.rpartition("/")[2])] = json.loads(value)
    behind = min(rows, key=lambda p: (rows[p]["step"] or 0, rows[p]["phase"] in WAITING, p))
    row = rows[behind]
    where = _Progress(row["phase"], row["step"]).text()
    others = "" if len(rows) == 1 or behind == index() else f"; others wait in {now.text()}"
    who = f"{name(behind)}: " if count() > 1 else ""
    return f"{who}stuck in {where} for {row['age']:.0f} s{others}; {AGAIN}"


# --------------------------------------------------------------------------------------------- end


def leaving() -> bool:
    """Whether this process is on its way out."""
    return _ending.code is not None


def catch_aborts() -> None:
    """What JAX's runtime ends with SIGABRT, as when process 0 is lost, ends as `LOST`."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_number: int) -> None:
        if _ending.code is None:
            where = f"host-{index()}, in {_progress.text()}"
            text = f"JAX ended this process ({where}), as it does where host-0 is lost; {AGAIN}\n"
            os.write(2, text.encode())
        os._exit(LOST if _ending.code is None else _ending.code)

    catch_aborts.kept = aborted  # or Python would free it
    ctypes.CDLL(None).signal(int(signal.SIGABRT), aborted)


class _Ending:
    """How this process ends, once that is known."""

    def __init__(self):
        self.code: int | None = None
        self.once = threading.Lock()


_ending = _Ending()


def end_with_others() -> None:
    """A thread: what one host says that ends all, ends this one too."""
    try:
        told = json.loads(hear("failed"))
    except LostError:
        here = f"here in {_progress.text()}"
        _leave(LOST, _error(f"{name(0)}: lost; {here}; {AGAIN}"), patience=0)
    _leave(**told)


def fail(code: int, line: str, stacks: bool = False) -> NoReturn:
    """Ends all hosts with this exit code; process 0 prints the line.

    The first that fails decides. `stacks` shows what every thread is doing.
    """
    if count() > 1:
        tell("failed", json.dumps({"code": code, "line": line, "stacks": stacks}))
        with contextlib.suppress(Exception):
            told = json.loads(client().key_value_try_get(f"{ROOM}/failed"))
            code, line, stacks = told["code"], told["line"], told["stacks"]
    _leave(code, line, stacks)


def end(code: int, line: str = "") -> NoReturn:
    """Ends this process as all others do by themselves: after work that is done, or a stop."""
    _leave(code, line, patience=float("inf") if code == 0 else 10)


def _leave(code: int, line: str = "", stacks: bool = False, patience: float = 5) -> NoReturn:
    """Waits a while until all leave, because they are cut off when process 0 does.

    No `patience` means that process 0 is gone, and that nobody else prints.
    """
    work_is_done = patience == float("inf")
    if work_is_done:  # until the last host comes, another end is possible
        _wait_for_leavers(patience)
    if not _ending.once.acquire(blocking=False):
        threading.Event().wait()  # another thread is on its way out
    if line and (index() == 0 or not patience):
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        print("\n" * bool(getattr(bars, "_instances", ())) + line, file=sys.stderr, flush=True)
    _ending.code = code
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if code:
        last_words(line, seconds=3)
    if not work_is_done:
        _wait_for_leavers(patience)
    if count() > 1 and index() == 0:
        time.sleep(0.3)
    os._exit(code)


def _wait_for_leavers(patience: float) -> None:
    if count() == 1 or not patience:
        return
    tell(f"left/{index()}", "")
    deadline = time.monotonic() + patience
    with contextlib.suppress(Exception):  # process 0 may be gone
        while time.monotonic() < deadline:
            if len(client().key_value_dir_get(f"{ROOM}/left/")) == count():
                return
            time.sleep(0.05)


@contextlib.contextmanager
def together(command: str = "") -> Iterator[None]:
    """What goes wrong within on one of several hosts ends all, before anything is waited for.

    Errors that all hosts meet at the same place pass, and whatever a single process raises.
    `command` begins the line that is printed, here and in a `together` within this one.
    """
    global _command
    _command = command or _command
    try:
        yield
    except (AgreedError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Exception as error:
        if count() == 1 or getattr(error, "everywhere", False):
            raise
        fail_of(error)


def fail_of(error: Exception) -> NoReturn:
    """Ends all hosts because of what was raised on this one."""
    if isinstance(error, LostError):
        fail(LOST, _error(str(error)))
    if isinstance(error, UserError):
        fail(error.exit_code, _error(f"{name(index())}: {error}"))
    of_a_program = re.match(r"[A-Z_]{5,}: ", str(error))  # a status of XLA, of whichever type
    if of_a_program and hasattr(Watch, "running"):
        # Of a host that is gone the devices of the others hear first: is there one?
        time.sleep(3 * Watch.running.beat)
        if lost := Watch.running.lost(2 * Watch.running.beat):
            fail(LOST, _error(lost))
    traceback.print_exception(error)
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    fail(LOST, _error(f"{name(index())}: {kind} in {_progress.text()}: {text}"))


def _error(text: str) -> str:
    return f"{_command}: error: {text}" if _command else f"error: {text}"
