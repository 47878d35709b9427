"""The processes of a run: the only file that knows that there may be more than one.

What hosts tell each other here goes over JAX's coordination service, not over the devices: it works
before any program is compiled, and while one hangs. Functions that wait for all hosts are called by
all of them, in the same order.

A run of several processes ends together: whatever happens on one of them, all leave with the same
exit code within seconds, by `os._exit`. The usual way out of Python would wait, up to five minutes,
for processes that hang.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import clusters, compilation_cache, compiler, distributed
from jax.experimental import multihost_utils

from ltx2_jax.errors import UserError
from ltx2_jax.files import last_words

T = TypeVar("T")

LOST, INTERRUPTED, STOPPED = 42, 130, 143  # exit codes: start me again; Ctrl-C; another signal
AGAIN = "the same command resumes"
# Detectors of JAX that are asked for the other hosts of a pod.
DETECTORS = ("gcetpu", "gketpu", "slurm")
BEAT = 2.0  # seconds between two signs of life of a host, at most

_ROOM = "ltx2_jax"  # of our keys
_calls = itertools.count()
_names: list[str] = []
_command = ""


class AgreedError(UserError):
    """A refusal that all hosts know of."""


class LostError(RuntimeError):
    """Another host did not come, or does not answer: to be started again."""


def index() -> int:
    """Which process this is; process 0 speaks, and writes what only one may write."""
    return distributed.global_state.process_id


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes if _client() is not None else 1


def name(process: int) -> str:
    """How a process is called in messages: "host-1 (its host name)"."""
    return f"host-{process} ({_names[process]})" if process < len(_names) else f"host-{process}"


def say(text: str) -> None:
    """Prints on process 0."""
    if index() == 0:
        print(text, flush=True)


def _client() -> Any:
    return distributed.global_state.client


# ------------------------------------------------------------------------------------------- start


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    seconds: float = 300,
    heartbeat: float = 60,
) -> None:
    """Joins the other processes of the run; does nothing if there are none.

    To be called before anything touches a device. What is not given, JAX's detectors say, on a TPU
    VM, in GKE and under SLURM.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which one this is.
      seconds: to wait for the others.
      heartbeat: seconds without a sign of life after which a host is lost.

    Raises:
      UserError: flags that do not fit together, or another number of processes than process 0 says.
      LostError: no coordinator there.
    """
    if distributed.is_initialized():  # by a launcher of its own
        if count() > 1 and not _names:
            _catch_aborts()
            _meet(count(), seconds)
            _Watch(heartbeat).start()
        return
    local = None
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    if any(value is not None for value in given.values()):
        if missing := [flag for flag, value in given.items() if value is None]:
            raise UserError(f"{' and '.join(missing)}: missing; all three or none")
    elif (found := _detected(seconds)) is not None:
        coordinator, processes, process, local = found
    else:
        return
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id={process}: with --num-processes={processes} it is from 0 to "
            f"{processes - 1}"
        )
    if processes == 1:
        return
    _find_coordinator(coordinator, process, seconds)
    _connect(coordinator, processes, process, local, seconds, heartbeat)
    _meet(processes, seconds)
    _Watch(heartbeat).start()


def _detected(seconds: float) -> tuple[str, int, int, Any] | None:
    """What the first detector that finds its kind of cluster says of it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "proxy" in platforms:  # one controller of all hosts
        return None
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.name not in DETECTORS or ("tpu" in kind.name and platforms == "cpu"):
            continue
        try:
            if kind.is_env_present():
                return clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, kind.name, int(seconds)
                )
        except Exception as error:
            text = " ".join(str(error).split())
            raise LostError(
                f"{kind.name}: the other hosts cannot be found ({text:.200})"
            ) from error
    return None


def _find_coordinator(coordinator: str, process: int, seconds: float) -> None:
    """Waits until somebody listens there: JAX would end the process with a stack trace."""
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    if process == 0:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise UserError(
                    f"--coordinator={coordinator}: host-0 cannot listen there ({error.strerror})"
                ) from None
        return
    deadline, why = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.2)
    raise LostError(f"--coordinator={coordinator}: nobody answers there in {seconds:.0f} s ({why})")


def _connect(
    coordinator: str, processes: int, process: int, local: Any, seconds: float, heartbeat: float
) -> None:
    late = threading.Timer(seconds, _too_few, (coordinator, processes, process, seconds))
    late.daemon = True
    late.start()
    _catch_aborts()
    # Signals are ours: JAX's service would know of SIGTERM alone, and only at the next step.
    jax.config.update("jax_enable_preemption_service", False)
    join = functools.partial(
        jax.distributed.initialize,
        coordinator,
        processes,
        process,
        local_device_ids=local,
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds) + 60,
        heartbeat_timeout_seconds=int(2 * heartbeat + 20),  # we find and name lost hosts before
    )
    wrong: list[Exception] = []

    def try_to() -> None:
        try:
            join()
        except Exception as error:
            wrong.append(error)

    joining = threading.Thread(target=try_to, daemon=True)  # so that this one hears Ctrl-C
    joining.start()
    try:
        while joining.is_alive():
            joining.join(0.1)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    late.cancel()
    if wrong:
        text = " ".join(str(wrong[0]).split())
        raise LostError(f"--coordinator={coordinator}: cannot be joined ({text:.300})")
    _cache_on_every_process()


def _too_few(coordinator: str, processes: int, process: int, seconds: float) -> None:
    print(
        f"host-{process} ({socket.gethostname()}): not all {processes} processes came to "
        f"{coordinator} in {seconds:.0f} s: start the command on every host, each with a "
        "--process-id of its own",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _meet(processes: int, seconds: float) -> None:
    """All learn each other's names; from here on one that fails ends all."""
    threading.Thread(target=_end_with_others, name="hosts end", daemon=True).start()
    key = f"{_ROOM}/processes"
    if index() == 0:
        _client().key_value_set(key, str(processes))
    expected = int(_client().blocking_key_value_get(key, int(seconds * 1000)))
    if processes != expected:
        refuse = f"--num-processes={processes} on host-{index()} ({socket.gethostname()})"
        raise UserError(f"{refuse}, but {expected} on host-0")
    _names[:] = gather(socket.gethostname(), seconds)


def _catch_aborts() -> None:
    """What JAX's runtime ends with SIGABRT, as when process 0 is lost, ends as `LOST`."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_number: int) -> None:
        if _ending.code is None:
            where = f"host-{index()}, in {_progress.text()}"
            text = f"JAX ended this process ({where}), as it does where host-0 is lost; {AGAIN}\n"
            os.write(2, text.encode())
        os._exit(LOST if _ending.code is None else _ending.code)

    _catch_aborts.kept = aborted  # or Python would free it
    ctypes.CDLL(None).signal(int(signal.SIGABRT), aborted)


def _cache_on_every_process() -> None:
    """On CPU each process reads compiled programs of its own alone; JAX lets process 0 write."""
    usual = compiler._cache_write

    @functools.wraps(usual)
    def write(key: str, seconds: float, module: str, backend: Any, program: Any, *rest: Any):
        if backend.platform != "cpu" or index() == 0:
            return usual(key, seconds, module, backend, program, *rest)
        if seconds >= jax.config.jax_persistent_cache_min_compile_time_secs and not any(rest):
            with contextlib.suppress(Exception):  # it would only have saved time
                put = compilation_cache.put_executable_and_time
                put(key, module, program, backend, int(seconds))

    compiler._cache_write = write


# ---------------------------------------------------------------------------- what all hosts know


def gather(value: str, seconds: float = 300, waiting: str = "") -> list[str]:
    """The strings that all hosts give, in order of the processes.

    Args:
      value: of this host.
      seconds: to wait for the others.
      waiting: what process 0 says it waits for, every half minute, with the hosts it waits for.

    Raises:
      LostError: a host did not come.
    """
    if count() == 1:
        return [value]
    call = next(_calls)
    if call >= 2:  # all have come to the call before this one, and so have read what was before it
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_delete(f"{_ROOM}/gather/{call - 2}/{index()}")
            if index() == 0:
                _client().key_value_delete(f"{_ROOM}/all/gather/{call - 2}")
    return exchange(f"gather/{call}", value, seconds, waiting)


def exchange(where: str, value: str, seconds: float, waiting: str = "") -> list[str]:
    """`gather` at a place of its own, for threads beside the one that works."""
    client, place = _client(), f"{_ROOM}/{where}"
    client.key_value_set(f"{place}/{index()}", json.dumps(value))
    if index() == 0:
        found = _collect(place, seconds, waiting)
        client.key_value_set(f"{_ROOM}/all/{where}", json.dumps(found))
        return found
    return json.loads(_get(f"{_ROOM}/all/{where}", seconds + 30))


def _collect(place: str, seconds: float, waiting: str) -> list[str]:
    """On process 0: waits for everybody's value."""
    began, told, pause = time.monotonic(), 0, 0.005
    while True:
        pairs = _client().key_value_dir_get(f"{place}/")
        found = {int(key.rpartition("/")[2]): json.loads(value) for key, value in pairs}
        if len(found) == count():
            return [found[process] for process in range(count())]
        missing = [name(process) for process in range(count()) if process not in found]
        late = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        waited = time.monotonic() - began
        if waited > seconds:
            raise LostError(
                f"{waiting or 'waited'}: {late} did not come in {seconds:.0f} s; {AGAIN}"
            )
        if waiting and waited // 30 > told:
            told = waited // 30
            say(f"{waiting}: {waited:.0f} s, still without {late}")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _get(key: str, seconds: float) -> str:
    """Waits for a key, in pieces: a signal is heard between two of them."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _client().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LostError(f"{name(0)} does not answer; {AGAIN}") from None
            if time.monotonic() > deadline:
                raise LostError(f"{name(0)} did not go on in {seconds:.0f} s; {AGAIN}") from None


def tell(key: str, value: str) -> None:
    """Says something once; what another host said before stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_ROOM}/{key}", value)


def hear(key: str) -> str:
    """What a host told, whenever it does; for a thread."""
    return _get(f"{_ROOM}/{key}", float("inf"))


def broadcast(value: str, seconds: float = 300) -> str:
    """What process 0 gives."""
    return gather(value if index() == 0 else "", seconds)[0]


def barrier(waiting: str, seconds: float = 3600) -> None:
    """Waits for all hosts; process 0 says for what and for whom."""
    gather("", seconds, waiting)


def agree(check: Callable[[], T], seconds: float = 300, waiting: str = "") -> T:
    """What `check` returns here; if it is refused on any host, all hosts refuse.

    Raises:
      UserError: that of the first host that refuses, with its name if not all say the same.
    """
    refusal, result = "", None
    try:
        result = check()
    except UserError as error:
        if count() == 1:
            raise
        refusal = str(error) or "refused"
    refusals = gather(refusal, seconds, waiting)
    if not any(refusals):
        return result
    first = next(process for process, found in enumerate(refusals) if found)
    others = sum(bool(found) for found in refusals) - 1
    more = f" (and {others} more host{'s' if others > 1 else ''})" if others else ""
    same = len(set(refusals)) == 1
    raise AgreedError(refusals[0] if same else f"{name(first)}: {refusals[first]}{more}")


def agree_on_first(work: Callable[[], Any], seconds: float, waiting: str) -> None:
    """Process 0 works, the others wait; they refuse what it refuses."""
    agree(work if index() == 0 else lambda: None, seconds, waiting)


def same_everywhere(values: dict[str, str]) -> None:
    """Refuses unless all hosts give the same values under the same names.

    Raises:
      UserError: names host, key, and what it and process 0 have.
    """
    if count() == 1:
        return
    first = json.loads(broadcast(json.dumps(values)))

    def check() -> None:
        for key in {**first, **values}:
            if (ours := values.get(key)) != (theirs := first.get(key)):
                raise UserError(f"{key} is {ours}, but {theirs} on {name(0)}")

    agree(check)


def whole(x: jax.Array) -> np.ndarray:
    """An array that may lie on the devices of several hosts, all of which call this."""
    here = count() == 1 or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))


def rows_of_host(
    sharding: jax.sharding.Sharding, batch_size: int, process: int | None = None
) -> tuple[int, ...]:
    """Rows of a global batch that the devices of one process hold, in ascending order.

    They lie apart where the mesh follows the torus of a slice, of which a host is a block; hosts
    that share a shard of the batch, as along a sequence axis, hold the same rows.

    Args:
      sharding: of an array [batch_size].
      batch_size: rows of the global batch.
      process: whose devices; None is this process.
    """
    process = jax.process_index() if process is None else process
    spans = sharding.devices_indices_map((batch_size,)).items()
    here = [span for device, (span,) in spans if device.process_index == process]
    return tuple(sorted({row for span in here for row in range(batch_size)[span]}))


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


class _Watch:
    """Threads that tell the others that this host lives, and find the one that does not."""

    def __init__(self, heartbeat: float):
        self._heartbeat, self._told = heartbeat, time.monotonic()
        self.beat = min(BEAT, heartbeat / 4)
        self._beats: dict[int, tuple[int, float]] = {}  # process -> its last beat, and when it came

    def start(self) -> None:
        for work in (self._tell, self._check):
            threading.Thread(target=work, name=f"hosts{work.__name__}", daemon=True).start()
        _Watch.running = self

    def _tell(self) -> None:
        beat, told = 0, None
        while True:
            now, silent = _progress, time.monotonic() - self._told
            # Sooner than it must if there is news, so that a host that is lost has told them.
            if silent > self.beat or told is None or (now is not told and silent > self.beat / 4):
                beat, told = beat + 1, now
                row = dataclasses.asdict(now) | {"beat": beat, "age": time.monotonic() - now.since}
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    key = f"{_ROOM}/progress/{index()}"
                    _client().key_value_set(key, json.dumps(row), allow_overwrite=True)
                    if index() == 0:
                        self._read()
                    self._told = time.monotonic()
            time.sleep(self.beat / 8)

    def _read(self) -> None:
        for key, value in _client().key_value_dir_get(f"{_ROOM}/progress/"):
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
            for key, value in _client().key_value_dir_get(f"{_ROOM}/progress/"):
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


class _Ending:
    """How this process ends, once that is known."""

    def __init__(self):
        self.code: int | None = None
        self.once = threading.Lock()


_ending = _Ending()


def _end_with_others() -> None:
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
            told = json.loads(_client().key_value_try_get(f"{_ROOM}/failed"))
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
            if len(_client().key_value_dir_get(f"{_ROOM}/left/")) == count():
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
    if of_a_program and hasattr(_Watch, "running"):
        # Of a host that is gone the devices of the others hear first: is there one?
        time.sleep(3 * _Watch.running.beat)
        if lost := _Watch.running.lost(2 * _Watch.running.beat):
            fail(LOST, _error(lost))
    traceback.print_exception(error)
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    fail(LOST, _error(f"{name(index())}: {kind} in {_progress.text()}: {text}"))


def _error(text: str) -> str:
    return f"{_command}: error: {text}" if _command else f"error: {text}"
