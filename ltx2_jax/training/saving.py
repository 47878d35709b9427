"""A save that one host cannot finish: it says so at once, and the others wait for it no longer.

Orbax's hosts meet while they write. One that fails would wait there for the others, too, before it
lets anybody know, and these for it, all for 20 minutes.
"""

import re
import threading
from typing import Any

from ltx2_jax import hosts
from ltx2_jax.files import reason

OFTEN = 0.5  # seconds between two looks whether another host has failed


class Attempt:
    """The save that is going on."""

    def __init__(self) -> None:
        self._number, self._step, self._why = 0, 0, ""
        self._ended = threading.Event()

    def begin(self, step: int) -> None:
        """The next save, of `step`; all hosts have ended the one before, or left it."""
        self._number, self._step = self._number + 1, step
        self._ended, self._why = threading.Event(), ""

    def follow(self, pending: Any) -> None:
        """Waits for Orbax's `pending` in a thread, so that a failure is known when it happens."""
        ended = self._ended

        def wait() -> None:
            try:
                pending.result()
            except Exception as error:  # a full disk is a ValueError, a bucket has its own errors
                if ended is self._ended:  # else it was left, and another one is going on
                    self.fail(first_cause(error))
            ended.set()

        threading.Thread(target=wait, name="save", daemon=True).start()

    def fail(self, why: str) -> None:
        """This host cannot finish the save; process 0 says so, and no host waits for it."""
        self._why = why
        self._ended.set()
        if hosts.count() > 1 and hosts.told(self._key) is None:
            hosts.tell(self._key, why)
            hosts.report(f"checkpoint {self._step} cannot be written ({why})")

    @property
    def _key(self) -> str:
        return f"saves/{self._number}/failed"

    def end(self) -> tuple[str, bool]:
        """When the save has ended here or failed anywhere: why it failed here, if it has ended."""
        while not self._ended.wait(OFTEN):
            if hosts.count() > 1 and hosts.told(self._key) is not None:
                break
        return self._why, self._ended.is_set()


def first_said(found: list[str]) -> str:
    """What the first host says that says something, with its number if there are several.

    Where one fails the others may wait for it in vain: that they did comes last.
    """
    said = [(host, text) for host, text in enumerate(found) if text]
    if not said:
        return ""
    host, text = min(said, key=lambda pair: "timed out" in pair[1].lower())
    return text if len(found) == 1 else f"host {host}: {text}"


def first_cause(error: BaseException) -> str:
    """In one line, what went wrong first: Orbax reports it in the words of every layer above."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r" \[\w+='.*", "", reason(error))[:400]  # TensorStore ends with all its settings
