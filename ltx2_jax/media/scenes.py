"""Where a film is cut: the pictures that begin a new scene.

A picture begins a scene if it and the two after it all differ from each of the three before, by so
much on average, and by several times what pictures nearby change. So a flash is no cut, because the
picture returns; nor is a pan or a shaking camera, which changes as much all the time; nor a fade or
a dissolve, which is spread over many pictures. Quick whip pans of up to three pictures are cuts.

A rule of our own: the well-kept library for this, PySceneDetect, asks for an OpenCV that cannot be
imported on machines without a display (it needs libGL and libX11) and brings a second libav. Its
AdaptiveDetector compares with neighbours in a similar way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.files import is_passing
from ltx2_jax.media.reading import small_frames

HEIGHT, WIDTH = 36, 64  # pixels that pictures are averaged to: noise and small things vanish
CHANGE = 12.0  # of 255, on average over pixels and colours; scenes differ by 20 to 80
RATIO = 2.5  # times what pictures nearby change, on average of both sides: where a pan begins, 2
NEAR = 6  # pictures on each side; the third largest change counts: a flash makes two large ones
FLASH = 3  # pictures on each side of a cut that all differ from all on the other
# What a dataset says of how its scenes were found.
RULE = (
    f"{WIDTH}x{HEIGHT} pixels change by {CHANGE:g} and by {RATIO:g} times the third of {NEAR} "
    f"on each side; {FLASH} differ"
)


@dataclasses.dataclass(frozen=True)
class Film:
    """What decoding a whole film tells of it.

    Attributes:
      cuts: of each, the times of the last picture before it and of the first after it, in seconds
        after the film's first picture.
      end: when the last picture ends; 0 without pictures.
      fault: why it could not be read to its end; "" if it was.
      passing: whether that may be gone the next time.
    """

    cuts: tuple[tuple[float, float], ...]
    end: float
    fault: str = ""
    passing: bool = False

    def scenes(
        self, start: float, end: float, fps: float, rate: float
    ) -> Iterator[tuple[float, int]]:
        """The scenes between two times: where each begins, and its frames at `rate` a second.

        fps: the file's own rate. No clip of a scene that is read from there on (`read_clip`) holds
        a picture of another one: at another rate than the file's, which takes the nearest picture,
        the last clip may begin half a picture late and end half a picture late.
        """
        late = 0.0 if abs(rate / fps - 1) < 1e-4 else 0.5 / fps
        for before, after in self.cuts:
            middle = (before + after) / 2
            if middle >= end:
                break
            if middle > start:
                yield start, max(0, math.ceil((middle - late - start) * rate - 1e-3))
            # `read_clip` takes a picture that is up to half a period early, too.
            start = max(start, after, before + 0.5 / fps + 1e-6)
        if start < end:
            yield start, int((end - start) * rate + 1e-3)


def watch(path: Path, alive: Callable[[], None] = lambda: None) -> Film:
    """Decodes a film from its beginning to its end, or to where that is not possible.

    `alive` is called with every picture, and may raise to end it.
    """
    times, fault, passing = array("d"), "", False

    def images() -> Iterable[np.ndarray]:
        nonlocal fault, passing
        try:
            for time, image in small_frames(path, HEIGHT, WIDTH):
                alive()
                times.append(time)
                yield image
        except UserError as error:
            fault, passing = str(error).removeprefix(f"{path}: "), is_passing(error)

    found = find_cuts(images())
    period = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.04
    end = times[-1] + period if times else 0.0
    return Film(tuple((times[k - 1], times[k]) for k in found), end, fault, passing)


def find_cuts(images: Iterable[np.ndarray]) -> list[int]:
    """Which of a film's pictures, uint8 [HEIGHT, WIDTH, 3] each, begin a new scene."""
    changes = array("f")  # of every picture against the one before
    apart: dict[int, float] = {}  # of candidates: the least between both sides
    recent: deque[np.ndarray | None] = deque(maxlen=2 * FLASH)
    for image in itertools.chain(images, [None] * (FLASH - 1)):
        if image is not None:
            changes.append(_difference(image, recent[-1]) if recent else 0.0)
        recent.append(image)
        place = len(changes) - FLASH + sum(there is None for there in recent)
        if place > 0 and changes[place] >= CHANGE:
            before, after = list(recent)[:-FLASH], list(recent)[-FLASH:]
            pairs = itertools.product(before, filter(lambda there: there is not None, after))
            apart[place] = min(_difference(*pair) for pair in pairs)
    return [place for place, least in apart.items() if least >= _needed(changes, place)]


def _needed(changes: Sequence[float], place: int) -> float:
    """How much a cut must change, where the pictures nearby change as they do."""
    sides = changes[max(1, place - NEAR) : place], changes[place + 1 : place + 1 + NEAR]
    thirds = [sorted(side)[-3] if len(side) >= 3 else 0.0 for side in sides]
    return max(CHANGE, RATIO * sum(thirds) / 2)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())
