"""Sizes that clips are brought to: how they are written, and which one a clip takes.

The rules are those of the official preprocessing (`ltx_trainer`: `scripts/process_videos.py`).
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ltx2_jax.diffusion.geometry import VIDEO_STRIDES, video_latent_shape
from ltx2_jax.errors import UserError


class Bucket(NamedTuple):
    """A size of clips, in frames and pixels; an image is a clip of one frame."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


def parse_buckets(text: str, strides: tuple[int, int, int] = VIDEO_STRIDES) -> tuple[Bucket, ...]:
    """ "768x512x49;512x512x81", each width x height x frames, in the order given.

    Commas do as well, which a shell leaves alone.

    Args:
      text: the buckets.
      strides: of the codec: pixel frames, rows and columns behind a latent.

    Raises:
      UserError: naming the bucket that is malformed, that no latents have the size of, or that is
        there twice.
    """
    buckets = []
    for part in re.split("[;,]", text):
        match = re.fullmatch(r"\s*(\d{1,6})x(\d{1,6})x(\d{1,6})\s*", part, re.ASCII)
        if not match:
            raise UserError(f"bucket {part.strip()!r}: not width x height x frames as 768x512x121")
        width, height, frames = map(int, match.groups())
        try:
            video_latent_shape(frames, height, width, strides)
        except UserError as error:
            raise UserError(f"bucket {part.strip()}: {error}") from None
        buckets.append(Bucket(frames, height, width))
        if buckets.count(buckets[-1]) > 1:
            raise UserError(f"bucket {part.strip()} is there twice")
    return tuple(buckets)


def choose_bucket(buckets: Sequence[Bucket], num_frames: int, height: int, width: int) -> Bucket:
    """The bucket of a clip: of those no longer than it, the one nearest in aspect.

    Of equals the longest, of these the largest. Aspect comes before length: a square clip of 30
    frames takes a square bucket of one frame before an oblong one of 25.

    Raises:
      UserError: the clip is shorter than all of them.
    """
    fitting = [bucket for bucket in buckets if bucket.num_frames <= num_frames]
    if not fitting:
        shortest = min(bucket.num_frames for bucket in buckets)
        raise UserError(f"has only {num_frames} frames; the shortest bucket has {shortest}")
    aspect = math.log(width / height)

    def order(bucket: Bucket) -> tuple[float, int, int]:
        difference = abs(aspect - math.log(bucket.width / bucket.height))
        return difference, -bucket.num_frames, -bucket.height * bucket.width

    return min(fitting, key=order)


def smaller_bucket(
    bucket: Bucket, factor: int, strides: tuple[int, int, int] = VIDEO_STRIDES
) -> Bucket:
    """The bucket of a reference that is `factor` times smaller on both sides.

    Raises:
      UserError: no latents have that size.
    """
    _, rows, columns = strides
    if factor < 1 or bucket.height % (factor * rows) or bucket.width % (factor * columns):
        raise UserError(
            f"bucket {bucket}: a reference {factor} times smaller has no size in multiples of "
            f"{columns}x{rows}"
        )
    return Bucket(bucket.num_frames, bucket.height // factor, bucket.width // factor)


def reference_frames(num_frames: int, factor: int) -> tuple[int, ...]:
    """Indices of the frames that a reference keeps which is `factor` times slower.

    The first, which is a latent of its own, and every `factor`-th from the second on.

    Raises:
      UserError: `factor` is not above 0.
    """
    if factor < 1:
        raise UserError(f"a reference {factor} times slower: the factor must be at least 1")
    return (0, *range(1, num_frames, factor)) if num_frames else ()
