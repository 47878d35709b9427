"""The frames of a clip by their timestamps: at the file's own rate, or at another one.

Frames are whatever the caller decodes. Files are not trusted: where two recordings stand in one
file, timestamps run backwards, and where frames are missing they leave a hole. Neither is made up
for, because pictures that stand still, or the sound of another recording, teach a model something
wrong. A clip that is complete before such a place is not affected by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from ltx2_jax.errors import UserError

# Films with a varying rate have gaps of several frames. Longer ones than these two are holes.
HOLE_SECONDS = 0.2
HOLE_PERIODS = 3

Frame = TypeVar("Frame")


class FrameClock:
    """Turns the timestamps of a stream into seconds since its first frame.

    Attributes:
      start: the first timestamp, in seconds; None before it.
    """

    def __init__(self, rate: float):
        """rate: frames per second that the file states, or 0."""
        self.start: float | None = None
        self._rate = rate
        self._time = 0.0
        self._gaps: list[float] = []

    @property
    def longest(self) -> float:
        """Seconds that one frame may stand, by those before."""
        period = float(np.median(self._gaps)) if self._gaps else 1 / (self._rate or 1)
        return max(HOLE_SECONDS, HOLE_PERIODS * period) + 0.002  # milliseconds are rounded

    def tick(self, stamp: float | None) -> float:
        """The time of the next frame. A frame without a stamp follows the one before at the rate.

        Raises UserError for a stamp that lies before the last or leaves a hole after it, and for
        frames that nothing dates.
        """
        if stamp is None and not self._rate:
            raise UserError("the file does not say its frame rate; convert it to mp4 first")
        if self.start is None:
            self.start = 0.0 if stamp is None else stamp
            return 0.0
        time = self._time + 1 / self._rate if stamp is None else stamp - self.start
        gap = time - self._time
        if gap < -1e-6:
            raise UserError(
                f"its timestamps run backwards, from {self._time:.2f} to {time:.2f} s, as where "
                "two recordings were joined; split it there or encode it anew"
            )
        if gap > HOLE_SECONDS and gap > self.longest:
            raise UserError(
                f"frames are missing: no picture between {self._time:.2f} and {time:.2f} s; "
                "cut the clip there"
            )
        self._gaps.append(gap)
        self._time = time
        return time


def paced(
    frames: Iterable[tuple[float | None, Frame]], clock: FrameClock, rate: float, limit: float
) -> Iterator[tuple[Frame, int]]:
    """The first `limit` of (timestamp, frame), each to be shown once, at the file's own rate.

    Raises UserError as `FrameClock.tick` does and for frames that do not keep to the rate.
    """
    for index, (stamp, frame) in enumerate(frames):
        time = clock.tick(stamp)
        if rate and abs(time * rate - index) > 0.5:
            raise UserError(
                f"its frames do not keep to {rate:g} per second: number {index} is at {time:.2f} "
                f"s, not {index / rate:.2f} s; give one frame rate for all (--fps)"
            )
        yield frame, 1
        if index + 1 >= limit:
            return


def resampled(
    frames: Iterable[tuple[float | None, Frame]],
    clock: FrameClock,
    rate: float,
    fps: float,
    limit: float,
) -> Iterator[tuple[Frame, int]]:
    """At every time k / fps, for k < limit, the frame nearest in time: (frame, how many times).

    Raises UserError as `FrameClock.tick` does, unless there are `limit` frames before that place.
    """
    taken, last = 0, None  # last: time and frame

    def until(time: float) -> int:
        """How many output times that are not taken lie before `time`."""
        return max(0, int(min(limit, np.ceil(time * fps - 1e-9))) - taken)

    problem = None
    try:
        for stamp, frame in frames:
            time = clock.tick(stamp)
            if last is not None and (count := until((last[0] + time) / 2)):
                yield last[1], count
                taken += count
                if taken >= limit:
                    return
            last = time, frame
    except UserError as error:
        problem = error
    if last is not None:
        # A hair less than the end, so that rounding does not add one frame to an exact length.
        stands = min(1 / (rate or fps), clock.longest)
        if count := until(last[0] + stands - 1e-6):
            yield last[1], count
            taken += count
    if problem is not None and taken < limit:
        raise problem
