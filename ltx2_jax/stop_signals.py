"""What Ctrl-C, SIGTERM and a closed terminal do: to one process, or to all hosts of a run.

Of several hosts all stop when one is told to, at the same step. Threads do the talking, as the main
one may be inside of a program or the compiler for minutes, where Python hears no signal.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ltx2_jax import hosts

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What threads send to the main one: no signal of a user's, whose second Ctrl-C is another thing.
_WAKE = signal.SIGUSR2
# Seconds that the main thread has to put away what is half-written.
GRACE = 5.0


class _State:
    """What is known of signals in this process."""

    def __init__(self, stopped: int = hosts.INTERRUPTED, line: str = "") -> None:
        self.stopped = stopped  # exit code after another signal than Ctrl-C
        self.line = line  # to be printed at the end
        self.shared = False  # threads tell the other hosts
        self.number: int | None = None  # of the signal that stops the run, once all know of it
        self.heard = 0  # signals that this process got
        self.finishing = False  # in a loop, whose step is finished first
        self.asks = 0  # how often the loop asked
        self.at: int | None = None  # the ask to which the answer is yes, on all hosts
        self.lock = threading.RLock()


_state = _State()


def exit_code() -> int:
    """Of a run that a signal stopped."""
    return _state.stopped if _state.number not in (None, signal.SIGINT) else hosts.INTERRUPTED


@contextlib.contextmanager
def termination_interrupts(stopped: int = hosts.INTERRUPTED, line: str = "") -> Iterator[None]:
    """While in context, any of these signals is what Ctrl-C is: half-written files go.

    Within a loop under `StopSignals` it is finished first. `stopped` is for `exit_code`; `line`
    is what a host says that does not get to its end in time.
    """
    global _state
    _state, before = _State(stopped, line), {}
    for number in (*SIGNALS, _WAKE):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        if signal.getsignal(number) == usual:  # else someone (nohup) wants it otherwise
            before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: Any) -> None:
    """In the main thread, between two of Python's instructions."""
    state = _state
    if hosts.leaving():
        return
    if number != _WAKE:
        if state.shared:
            return  # a thread has told the others
        state.heard += 1
        state.number = state.number or number
        if state.finishing and not (state.heard > 1 and number == signal.SIGINT):
            return
    if frame is not None and frame.f_code.co_name.endswith("gc_callback"):
        threading.Timer(0.02, _wake).start()  # Python drops what is raised in there
        return
    raise KeyboardInterrupt


def _wake() -> None:
    """Interrupts the main thread, even where it waits for the system."""
    signal.pthread_kill(threading.main_thread().ident, _WAKE)


def of_all_hosts() -> None:
    """From now on a signal to one host stops all; for the main thread, after `hosts.start`."""
    if hosts.count() == 1:
        return
    _state.shared = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for work in (lambda: _listen(reading), _vote):
        threading.Thread(target=work, name="stop signals", daemon=True).start()


def _listen(pipe: int) -> None:
    """A thread: what the system writes there at the moment of a signal."""
    while True:
        for number in os.read(pipe, 64):
            if number not in SIGNALS:
                continue
            if number == signal.SIGINT and _state.heard:
                hosts.fail(hosts.INTERRUPTED, "interrupted twice: ended at once")
            _state.heard += 1
            hosts.note(f"heard {signal.Signals(number).name}")
            # In a thread of its own: process 0 may not answer, and a second Ctrl-C must be heard.
            tell = threading.Thread(target=hosts.tell, args=("stop", str(number)), daemon=True)
            tell.start()


def _vote() -> None:
    """A thread: once a host is told to stop, all agree when."""
    number = int(hosts.hear("stop"))
    state = _state
    with state.lock:  # no host goes on before all have said how far they are
        mine = state.asks if state.finishing else -1
        asks = [int(said) for said in hosts.exchange("stop at", str(mine), seconds=600)]
        state.number = number
        if min(asks) >= 0:
            state.at = max(asks) + 1
            return
    _wake()
    threading.Event().wait(GRACE)
    hosts.end(exit_code(), state.line)


class StopSignals:
    """From `begin` to `close`, signals are noted; a second Ctrl-C interrupts at once.

    So the training step that runs is finished and saved first.
    """

    def __init__(self) -> None:
        self._state = _state
        self._outside = contextlib.ExitStack()

    def begin(self) -> None:
        if signal.getsignal(signal.SIGTERM) is not _handle:  # of a caller who is no command
            self._outside.enter_context(termination_interrupts())
        self._state = _state
        with self._state.lock:
            self._state.finishing = True

    def asked(self) -> bool:
        """Whether to stop now; every host asks once a step, and gets the same answer."""
        state = self._state
        with state.lock:
            state.asks += 1
            if hosts.count() == 1:
                return state.number is not None
            return state.at is not None and state.asks >= state.at

    @property
    def number(self) -> int | None:
        """The signal that stops the run, if there was one."""
        return self._state.number

    def close(self) -> None:
        """From here on a signal interrupts."""
        with self._state.lock:
            self._state.finishing = False
        self._outside.close()
