"""Ctrl-C and SIGTERM as a request: the step that runs is finished and saved first."""

import signal
from typing import Any


class StopSignals:
    """While in context, SIGINT and SIGTERM set `requested`; a second SIGINT interrupts at once."""

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
