"""What Ctrl-C and SIGTERM do."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """While in context, SIGTERM and a closed terminal are what Ctrl-C is: half-written files go."""
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # else someone (nohup) wants it otherwise
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """While in context, SIGINT and SIGTERM set `requested`; a second SIGINT interrupts at once.

    So the training step that runs is finished and saved first.
    """

    def __enter__(self) -> "StopSignals":
        self.requested = False
        self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _stop(self, number: int, _frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
