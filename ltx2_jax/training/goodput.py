"""Where the time of a run goes, over all its starts.

`goodput.jsonl` in the workdir has one line for each start of the program, written anew while it
runs, so that a start that was killed has its line too:

    {"began": seconds since 1970, "now": when the line was written, "host": name, "hosts": number,
     "first": step it went on from, "step": step it reached, "num_steps": of the whole run,
     "lost_steps": steps of earlier starts that it takes again, "seconds": {part: seconds},
     "end": null, "finished", "stopped", "interrupted" or "failed: why"}

The parts of a line sum up to `now - began`: at any moment exactly one of them runs.
"""

import contextlib
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ltx2_jax import hosts
from ltx2_jax.errors import UserError
from ltx2_jax.files import Mirror, location, replacing, saying
from ltx2_jax.training import metrics

FILE_NAME = "goodput.jsonl"
PARTS = ("init", "restore", "compile", "step", "data", "checkpoint", "sampling")
# Seconds between two writings of the file.
OFTEN = 30.0

_current: "Goodput | None" = None


class Goodput:
    """One start of a run. While it is entered, the functions of this module are about it.

    The file is written by process 0.
    """

    def __init__(
        self,
        workdir: str | Path,
        num_steps: int,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`began`: by `clock`, when the program started; now if None."""
        self._clock, self._last = clock, clock() if began is None else began
        self._line: dict[str, Any] = {
            "began": self._last,
            "now": self._last,
            "host": socket.gethostname(),
            "hosts": hosts.count(),
            "first": 0,
            "step": 0,
            "num_steps": num_steps,
            "lost_steps": 0,
            "seconds": dict.fromkeys(PARTS, 0.0),
            "end": None,
        }
        self._parts, self._written, self._told = ["init"], -OFTEN, False
        self._mirror, self._before, self._said = None, [], contextlib.ExitStack()
        if hosts.index() == 0:
            self._mirror = Mirror(workdir, [FILE_NAME])
            self._before = read_starts(self._mirror.folder)
            if self._before:  # how far it was; until it is known where this one goes on
                # The metrics of a start that was killed say more than what it last wrote here.
                ends = self._before[-1]["step"], metrics.last_row(workdir).get("step", 0)
                self._line["first"] = self._line["step"] = max(ends)

    def __enter__(self) -> "Goodput":
        global _current
        _current = self
        self.write()
        self._said.enter_context(saying(lambda why: self._ended(f"failed: {why}")))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        global _current
        _current = None
        self._said.close()
        if kind is None:
            finished = self._line["step"] >= self._line["num_steps"]
            self._ended("finished" if finished else "stopped")
        elif issubclass(kind, KeyboardInterrupt):
            self._ended("interrupted")
        else:
            self._ended(f"failed: {str(error) or kind.__name__}")
        if self._mirror is not None:
            self._mirror.close()

    def _ended(self, how: str) -> None:
        self._line["end"] = " ".join(how.split())[:300]
        self.write()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the time in context is: one of PARTS; an inner context takes it from an outer."""
        self._pass()
        self._parts.append(name)
        try:
            yield
        finally:
            self._pass()
            self._parts.pop()

    @contextlib.contextmanager
    def waiting_for_data(self, running: Any = None) -> Iterator[None]:
        """Time in context is "data" from when the devices had nothing left to do.

        `running`: arrays that they are working on.
        """
        asked, done = self._clock(), []
        if running is None:
            done = [asked]
        else:
            threading.Thread(target=self._note_end, args=(running, done), daemon=True).start()
        yield
        self._pass()
        if done:
            idle = max(0.0, self._last - max(asked, done[0]))
            self._line["seconds"][self._parts[-1]] -= idle
            self._line["seconds"]["data"] += idle

    def _note_end(self, running: Any, done: list[float]) -> None:
        with contextlib.suppress(Exception):  # whoever uses the arrays meets it as well
            jax.block_until_ready(running)
            done.append(self._clock())

    def goes_on(self, step: int) -> None:
        """The steps begin, from `step`: what earlier starts did beyond it was lost."""
        self._pass()
        self._parts[0] = "step"
        if self._before:
            self._line["lost_steps"] = max(0, self._line["step"] - step)
        self._line["first"] = self._line["step"] = step
        self.write()

    def reached(self, step: int) -> None:
        """`step` is done; the file learns it after a while."""
        self._line["step"] = step
        if self._clock() - self._written >= OFTEN:
            self.write()

    def _pass(self) -> None:
        now, last = self._clock(), self._last
        self._last = now
        self._line["seconds"][self._parts[-1]] += now - last

    def write(self) -> None:
        """The file, with this start as it is now; a disk that is full is told once."""
        self._pass()
        self._line["now"] = self._written = self._last
        if self._mirror is None:
            return
        lines = "".join(json.dumps(line) + "\n" for line in (*self._before, self._line))
        try:
            with replacing(self._mirror.folder / FILE_NAME) as temporary:
                temporary.write_text(lines)
        except UserError as error:  # no reason to end a run
            if not self._told:
                print(error, file=sys.stderr)
            self._told = True

    def __str__(self) -> str:
        """What process 0 knows of all starts up to now, in one line."""
        self._pass()
        self._line["now"] = self._last
        return str(total([*self._before, self._line]))


def part(name: str) -> contextlib.AbstractContextManager[None]:
    """`Goodput.part` of the run that goes on; nothing without one, as for the three below."""
    return contextlib.nullcontext() if _current is None else _current.part(name)


def waiting_for_data(running: Any = None) -> contextlib.AbstractContextManager[None]:
    """`Goodput.waiting_for_data`."""
    return contextlib.nullcontext() if _current is None else _current.waiting_for_data(running)


def goes_on(step: int) -> None:
    """`Goodput.goes_on`."""
    if _current is not None:
        _current.goes_on(step)


def reached(step: int) -> None:
    """`Goodput.reached`."""
    if _current is not None:
        _current.reached(step)


# --------------------------------------------------------------------------------------- all starts


@dataclass(frozen=True)
class Total:
    """Seconds of a run: of the parts, of steps that were lost, and between the starts."""

    parts: dict[str, float]  # "step" without those that were lost, which are "lost"
    stopped: float
    lost_steps: int
    starts: int

    @property
    def share(self) -> float:
        """Of steps that count in the time that the program ran, from 0 to 1."""
        ran = sum(self.parts.values())
        return self.parts["step"] / ran if ran > 0 else 0.0

    def __str__(self) -> str:
        ran = sum(self.parts.values())
        # Together they are less than what rounding takes.
        shown = {name: duration(s) for name, s in self.parts.items() if s > ran / 1000}
        if self.lost_steps:
            steps = "1 step" if self.lost_steps == 1 else f"{self.lost_steps} steps"
            shown["lost"] = f"{duration(self.parts['lost'])} ({steps})"
        if self.starts > 1:
            shown["stopped"] = duration(self.stopped)
        starts = "" if self.starts == 1 else f" in {self.starts} starts"
        parts = ", ".join(f"{name} {text}" for name, text in shown.items())
        return f"goodput {100 * self.share:.0f} % of {duration(ran)}{starts}: {parts}"


def total(starts: Sequence[dict[str, Any]]) -> Total:
    """Of the lines of goodput.jsonl, at least one."""
    parts = {name: sum(line["seconds"][name] for line in starts) for name in PARTS}
    taken = sum(line["step"] - line["first"] for line in starts)
    lost = sum(line["lost_steps"] for line in starts)
    # Each as long as the others, as far as they can be told apart.
    parts["lost"] = parts["step"] * min(lost / taken, 1) if taken > 0 else 0.0
    parts["step"] -= parts["lost"]
    gaps = [b["began"] - a["now"] for a, b in itertools.pairwise(starts)]
    return Total(parts, sum(gaps), lost, len(starts))


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a workdir's goodput.jsonl, oldest first; what is not such a line is left out."""
    path = location(workdir) / FILE_NAME
    if not path.exists():
        return []
    starts = []
    for text in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            total([line])
            starts.append(line)
    return starts


def duration(seconds: float) -> str:
    """ "12 s", "3.4 min", "5.6 h", "7.8 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
