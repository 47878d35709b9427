"""What every codec takes: the checks and conversions of pixels and waveforms before encoding."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ltx2_jax.errors import UserError


def legal_frames(shape: Sequence[int], strides: tuple[int, int, int]) -> int:
    """The largest st * k + 1 not above F, for a video of shape [B, F, H, W, 3].

    Raises:
      UserError: H or W is not a multiple of its stride, no frames, or not three colours.
    """
    if len(shape) != 5 or shape[1] < 1 or shape[4] != 3:
        raise UserError(f"video of shape {tuple(shape)}: expected [B, F, H, W, 3] with F >= 1")
    (frames, height, width), (st, sh, sw) = shape[1:4], strides
    for axis, size, stride in (("height", height, sh), ("width", width, sw)):
        if size < stride or size % stride:
            near = max(1, round(size / stride)) * stride
            raise UserError(
                f"video {axis} {size} is not a multiple of the codec's stride {stride}; "
                f"{near} would be"
            )
    return (frames - 1) // st * st + 1


def as_pixels(video: ArrayLike) -> Array:
    """float32 in [-1, 1] of uint8 pixels; other pixels are taken to be there already."""
    video = jnp.asarray(video)
    if video.dtype == jnp.uint8:
        return video.astype(jnp.float32) / 127.5 - 1.0
    return video.astype(jnp.float32)


def to_uint8(pixels: ArrayLike) -> Array:
    """uint8 of pixels in [-1, 1], clipped, to the nearest."""
    return jnp.round((jnp.clip(jnp.asarray(pixels), -1, 1) + 1) * 127.5).astype(jnp.uint8)


def as_stereo(audio: ArrayLike, name: str = "audio") -> np.ndarray:
    """float32 [B, samples, 2] of a stereo or mono waveform; `name` is what errors call it.

    Raises:
      UserError: no samples, a sample that is not finite, or neither one nor two channels.
    """
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 3 or audio.shape[2] not in (1, 2):
        raise UserError(f"{name} of shape {audio.shape}: expected [B, samples, 2] or mono")
    if audio.shape[1] == 0:
        raise UserError(f"{name} is empty")
    if not np.isfinite(audio).all():
        raise UserError(f"{name} has samples that are not finite numbers")
    return np.repeat(audio, 2, axis=2) if audio.shape[2] == 1 else audio
