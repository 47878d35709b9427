"""When a run saves."""

import time
from collections.abc import Callable

from ltx2_jax import hosts
from ltx2_jax.config import CheckpointConfig


class Cadence:
    """When to save: every so many steps, and every so many minutes by the clock of process 0.

    All hosts call `due` after the same steps and get the same answers. Its clock is asked when half
    of the time that was left must have passed, so that hosts seldom wait for one another.
    """

    def __init__(
        self, config: CheckpointConfig, start: int, clock: Callable[[], float] = time.monotonic
    ):
        self._every, self._clock = config.every_steps, clock
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._saved = self._asked = clock()
        self._asked_at, self._ask_at = start, start + 1

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        due = step % self._every == 0
        if self._seconds is not None and (due or step >= self._ask_at):
            now = self._clock()
            pace = (now - self._asked) / max(step - self._asked_at, 1)
            self._saved = now if due else self._saved
            left = self._seconds - (now - self._saved)
            # The save that is nearest in time: half a step early rather than half a step late.
            steps = 0 if left <= pace / 2 else max(1, int(left / max(pace, 1e-9) / 2))
            steps = int(hosts.broadcast(str(steps)))
            self._asked, self._asked_at = now, step
            if steps == 0 and not due:
                due, self._saved, steps = True, now, 1
            self._ask_at = step + max(steps, 1)
        return due
