"""Latent shapes, token order, and where each token lies in seconds and pixels.

Everything here follows from shapes alone, so it is numpy and runs before anything is traced; only
the frame rate may be a traced array. A token carries half-open bounds `[start, end)` on each of its
axes, and the audio and video bounds share one clock: that clock is what lets the two streams find
each other in the cross-modal attention.

Sources: `ltx_core/types.py`, `ltx_core/tools.py`, `ltx_core/components/patchifiers.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ltx2_jax.errors import UserError

VIDEO_STRIDES = (8, 32, 32)  # pixel frames, rows and columns behind one latent of a released codec

# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class AudioClock:
    """What an audio latent lasts: `downsample` mel frames of `hop` samples at `sample_rate` Hz."""

    sample_rate: int
    hop: int
    downsample: int

    @property
    def latents_per_second(self) -> float:
        """25 in all releases."""
        return self.sample_rate / (self.hop * self.downsample)


AUDIO_CLOCK = AudioClock(sample_rate=16000, hop=160, downsample=4)  # of all releases


def video_latent_shape(
    frames: int, height: int, width: int, strides: tuple[int, int, int] = VIDEO_STRIDES
) -> tuple[int, int, int]:
    """Latent grid `(F', H', W')` of a clip of `frames` x `height` x `width` pixels.

    The codec is causal: the first frame stands alone, so `frames` is one more than a multiple of
    the time stride. Raises UserError for any other size, naming the nearest legal ones.
    """
    st, sh, sw = strides
    if frames < 1 or (frames - 1) % st:
        below = (frames - 1) // st * st + 1
        raise UserError(f"num_frames={frames} is not {st}*k+1: use {_either(below, below + st)}")
    for name, size, stride in (("height", height, sh), ("width", width, sw)):
        if size < 1 or size % stride:
            below = size // stride * stride
            choice = _either(below, below + stride)
            raise UserError(f"{name}={size} is not a multiple of {stride}: use {choice}")
    return (frames - 1) // st + 1, height // sh, width // sw


def audio_latent_length(frames: int, fps: float, latents_per_second: float = 25) -> int:
    """Audio latent frames beside `frames` video frames at `fps`; halves round to even."""
    if frames < 1 or not fps > 0:
        raise UserError(f"num_frames={frames} at fps={fps}: both must be positive")
    return round(frames / fps * latents_per_second)


def snap_frames(frames: int, stride: int = 8) -> int:
    """The largest legal frame count `stride*k+1` not above `frames` (at least 1)."""
    return max((frames - 1) // stride * stride + 1, 1)


def seconds_to_frames(
    seconds: float, fps: float, min_frames: int = 1, max_frames: int = 1024, stride: int = 8
) -> int:
    """A legal frame count for a duration in seconds, within `[min_frames, max_frames]`.

    Raises UserError when no legal count lies in that range.
    """
    lowest = -(-(max(min_frames, 1) - 1) // stride) * stride + 1
    highest = snap_frames(max_frames, stride)
    if max_frames < 1 or lowest > highest:
        raise UserError(f"no frame count {stride}*k+1 lies between {min_frames} and {max_frames}")
    return min(max(snap_frames(round(seconds * fps), stride), lowest), highest)


def evenly_spaced_keyframes(count: int, frames: int) -> list[int]:
    """Frame indices that cut `frames` frames into `count + 1` near-equal parts, ends excluded.

    Raises UserError when the clip is too short to hold that many between its ends.
    """
    if count > 0 and frames < count + 2:
        raise UserError(f"{count} keyframes need num_frames >= {count + 2}, not {frames}")
    return [round((frames - 1) * i / (count + 1)) for i in range(1, count + 1)]


# ---------------------------------------------------------------------------------------- tokens
# The one reordering needed at a codec's door: inside, channels come last, while the released
# projections were trained on channel-major features. Only unsharded axes are merged or split, one
# per reshape, which an explicit mesh follows by itself; callers shard the token axis of the result.


def patchify_video(latents, patch_size: int = 1):
    """Latents [B, F, H, W, C] to tokens [B, F*(H/p)*(W/p), C*p*p].

    Tokens run time, row, column; features run channel, row in the patch, column in the patch.
    """
    B, F, H, W, C = latents.shape
    p = patch_size
    if p == 1:
        return latents.reshape(B, F * H * W, C)
    x = latents.reshape(B, F, H // p, p, W, C).reshape(B, F, H // p, p, W // p, p, C)
    x = x.transpose(0, 1, 2, 4, 6, 3, 5)  # [B, F, H/p, W/p, C, p, p]
    T = F * (H // p) * (W // p)
    return x.reshape(B, T, C, p, p).reshape(B, T, C * p * p)


def unpatchify_video(tokens, latent_shape: tuple[int, int, int], patch_size: int = 1):
    """Tokens [B, T, C*p*p] back to latents [B, F, H, W, C]; `latent_shape` is `(F, H, W)`."""
    B, C = tokens.shape[0], tokens.shape[-1] // patch_size**2
    F, H, W = latent_shape
    p = patch_size
    if p == 1:
        return tokens.reshape(B, F, H, W, C)
    x = tokens.reshape(B, tokens.shape[1], C, p, p).reshape(B, F, H // p, W // p, C, p, p)
    x = x.transpose(0, 1, 2, 5, 3, 6, 4)  # [B, F, H/p, p, W/p, p, C]
    return x.reshape(B, F, H, W // p, p, C).reshape(B, F, H, W, C)


def patchify_audio(latents):
    """Audio latents [B, A, M, C] to tokens [B, A, C*M]: channel-major, mel bin inside."""
    B, A, M, C = latents.shape
    return latents.swapaxes(2, 3).reshape(B, A, C * M)


def unpatchify_audio(tokens, bins: int):
    """Tokens [B, A, C*M] back to audio latents [B, A, M, C]; `bins` is M."""
    B, A, CM = tokens.shape
    return tokens.reshape(B, A, CM // bins, bins).swapaxes(2, 3)


# ------------------------------------------------------------------------------------- positions


def grid_bounds(latent_shape: tuple[int, int, int]) -> np.ndarray:
    """Bounds of every video token on the latent grid: float32 [1, 3, T, 2], time, row, column."""
    start = np.indices(latent_shape).reshape(1, 3, -1)  # [1, 3, T]
    return np.stack([start, start + 1], axis=-1).astype(np.float32)


def pixel_bounds(
    latent_shape: tuple[int, int, int],
    strides: tuple[int, int, int] = VIDEO_STRIDES,
    causal: bool = True,
) -> np.ndarray:
    """Bounds of every video token in pixel frames, rows and columns: float32 [1, 3, T, 2].

    With `causal`, latent frame 0 covers pixel frame 0 alone and frame i the `st` frames ending at
    `st*i`, as the causal codec does.
    """
    bounds = grid_bounds(latent_shape) * np.asarray(strides, np.float32)[:, None, None]
    if causal:
        bounds[:, 0] = np.maximum(bounds[:, 0] + 1 - strides[0], 0)
    return bounds


def video_positions(
    latent_shape: tuple[int, int, int],
    fps: float | np.ndarray | jax.Array,
    strides: tuple[int, int, int] = VIDEO_STRIDES,
    causal: bool = True,
) -> np.ndarray | jax.Array:
    """Bounds of every video token in seconds, pixel rows and pixel columns.

    `fps` is a number, giving [1, 3, T, 2], or one rate per clip [B], giving [B, 3, T, 2]. The
    result is float32, a numpy array unless `fps` is a jax array. Keep it float32 up to the rotary
    angles: bfloat16 cannot tell neighbouring frames of a long clip apart.
    """
    return in_seconds(pixel_bounds(latent_shape, strides, causal), fps)


def in_seconds(bounds: np.ndarray, fps: float | np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Bounds [1, 3, T, 2] in pixel frames, rows and columns -> in seconds, rows and columns.

    [B, 3, T, 2] for one rate per clip; see `video_positions`.
    """
    xp = jnp if isinstance(fps, jax.Array) else np
    rate = xp.asarray(fps, np.float32).reshape(-1)  # [1] or [B]
    one = xp.ones_like(rate)
    divisor = xp.stack([rate, one, one], axis=-1)[:, :, None, None]  # [1 or B, 3, 1, 1]
    return bounds / divisor


def audio_positions(
    length: int,
    clock: AudioClock = AUDIO_CLOCK,
    *,
    shift: int = 0,
    causal: bool = True,
) -> np.ndarray:
    """Bounds of `length` audio tokens in seconds: float32 [1, 1, A, 2].

    A latent covers `clock.downsample` mel frames; with `causal` the first covers one only.
    `shift` is the index of the first token, for audio that starts inside a longer clip.
    """
    mel = np.arange(shift, shift + length + 1, dtype=np.float64) * clock.downsample
    if causal:
        mel = np.maximum(mel + 1 - clock.downsample, 0)
    seconds = mel * clock.hop / clock.sample_rate
    return np.stack([seconds[:-1], seconds[1:]], axis=-1).astype(np.float32)[None, None]


def spatial_factor(grid: tuple[int, int, int], reference: tuple[int, int, int]) -> int:
    """How many pixels of a clip lie behind one of its reference, both given as (F', H', W').

    Raises:
      UserError: the reference is larger, or the sides are not the same whole multiple of its own.
    """
    for factor in range(1, grid[1] + 1):
        if grid[1:] == (reference[1] * factor, reference[2] * factor):
            return factor
    raise UserError(
        f"a reference of {reference[1]}x{reference[2]} latents for a clip of {grid[1]}x{grid[2]}: "
        "both sides must be the same whole multiple of the reference's"
    )


def temporal_factor(grid: tuple[int, int, int], reference: tuple[int, int, int]) -> int:
    """How many frames of a clip pass in one of its reference; 1 for a reference of one frame.

    Raises:
      UserError: the frames behind the first are not a whole multiple of the reference's.
    """
    ours, theirs = grid[0] - 1, reference[0] - 1
    if theirs == 0:
        return 1
    if ours < theirs or ours % theirs:
        raise UserError(
            f"a reference of {theirs + 1} latent frames for a clip of {ours + 1}: the frames "
            "behind the first must be a whole multiple of the reference's"
        )
    return ours // theirs


def reference_positions(
    reference: tuple[int, int, int],  # F', H', W' of the reference
    fps: float | jax.Array,  # of the clip: one for all, or [B]
    reference_fps: float | jax.Array,  # of the reference: the clip's over `temporal`
    strides: tuple[int, int, int],
    *,
    spatial: int,
    temporal: int,
) -> np.ndarray | jax.Array:
    """Where the tokens of a reference lie in its clip: float32 [B or 1, 3, R, 2].

    Rows and columns are stretched over the clip's pixels. A latent frame of the reference stands
    for `temporal` times as many frames, and ends where the last of them ends. A numpy array unless
    a rate is a jax array.
    """
    positions = video_positions(reference, reference_fps, strides)
    xp = jnp if isinstance(positions, jax.Array) or isinstance(fps, jax.Array) else np
    late = (temporal - 1) / xp.asarray(fps, np.float32).reshape(-1, 1, 1)
    seconds = xp.maximum(positions[:, 0] - late, 0)  # [B or 1, R, 2]
    pixels = xp.broadcast_to(positions[:, 1:] * spatial, (len(seconds), 2, *seconds.shape[1:]))
    return xp.concatenate([seconds[:, None], pixels], axis=1)


# ------------------------------------------------------------------------------------------ masks


def latent_mask(mask: np.ndarray, latent_shape: tuple[int, int, int]) -> np.ndarray:
    """A mask of pixels [B, F, H, W] in [0, 1] -> of latents, the mean of what is behind each.

    float32 [B, F', H', W']. The first frame stands alone, as in the codec.
    """
    batch, frames, height, width = mask.shape
    F, H, W = latent_shape
    if height % H or width % W or (frames - 1) % max(F - 1, 1):
        raise UserError(
            f"a mask of {frames} frames of {width}x{height} does not divide into {F} of {W}x{H}"
        )
    cells = np.asarray(mask, np.float32).reshape(batch, frames, H, height // H, W, width // W)
    cells = cells.mean((3, 5))
    if F == 1:
        return cells[:, :1]
    later = cells[:, 1:].reshape(batch, F - 1, (frames - 1) // (F - 1), H, W).mean(2)
    return np.concatenate([cells[:, :1], later], 1)


def first_latents(latent_shape: tuple[int, ...], count: int) -> np.ndarray:
    """bool [T], True in the first latent frames of video (F', H', W'), or latents of audio (A,)."""
    return np.indices(latent_shape)[0].reshape(-1) < count


def last_latents(latent_shape: tuple[int, ...], count: int) -> np.ndarray:
    """bool [T], True in the last latent frames of video (F', H', W'), or latents of audio (A,)."""
    return np.indices(latent_shape)[0].reshape(-1) >= latent_shape[0] - count


def rectangle(
    latent_shape: tuple[int, int, int],
    region: tuple[int, int, int, int],
    strides: tuple[int, int, int] = VIDEO_STRIDES,
) -> np.ndarray:
    """bool [1, F', H', W']: the latents of the pixels from (top, left) up to (bottom, right).

    `region` is top, left, bottom, right; a latent counts by its first pixel. Raises UserError if
    nothing of the clip lies in it.
    """
    top, left, bottom, right = (edge // strides[1 + i % 2] for i, edge in enumerate(region))
    inside = np.zeros((1, *latent_shape), bool)
    inside[:, :, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    if not inside.any():
        raise UserError(f"no latents lie in the region {region} (top, left, bottom, right)")
    return inside


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else f"{max(above, 1)}"
