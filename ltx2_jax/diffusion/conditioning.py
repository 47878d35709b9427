"""What a stream is given and need not generate, token by token, for training and sampling alike.

A stream's tokens are those of its clip, and after them any that are appended: keyframes,
references. Each has a clean value, a strength with which that value is given (1: it stays as it is,
0: it is generated), a position and a mark. A condition is a function that gives some tokens or
appends some; several are applied one after another.

Sources: `ltx_core/conditioning/types/*.py`, `ltx_trainer/training_strategies/flexible.py`.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion import flow, geometry
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import pin


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("clean", "strength", "positions", "marks", "attention"),
    meta_fields=("clip_tokens", "frozen"),
)
@dataclass(frozen=True)
class Conditions:
    """What is known of every token of one stream, T tokens in all."""

    clean: Array  # [B, T, C] values; read only where something is given
    # [B, T]: bool, where tokens are either given or not, which costs the network less; or float
    # in [0, 1]. None: no token is given.
    strength: Array | None
    positions: Array  # [B or 1, axes, T, 2]
    marks: Array | None  # [B, T], 1 on keyframes; None for models without the embedding
    attention: Array | None  # [B, T, T] strengths in [0, 1]; None: every token sees all
    clip_tokens: int  # the clip's own tokens, which come first
    frozen: bool = False  # the whole stream is given: its noise level is 0


def levels(conditions: Conditions, sigma: Array) -> dict[str, Array | None]:
    """The noise levels of a stream at sigma [B], as fields of `Modality`."""
    if conditions.frozen:
        zero = jnp.zeros_like(sigma)
        return {"sigma": zero, "timesteps": zero[:, None], "clean": None}
    strength = conditions.strength
    if strength is None or strength.dtype == bool:
        return {"sigma": sigma, "timesteps": sigma[:, None], "clean": strength}
    timesteps = (1.0 - strength) * sigma[:, None]
    return {"sigma": sigma, "timesteps": timesteps, "clean": None}


def noised(
    conditions: Conditions,
    noise: Array,  # [B, T, C]
    sigma: Array | float,  # [] or [B]
    start: Array | None = None,  # [B, T, C] what is noised where nothing is given; None: `clean`
) -> Array:
    """Tokens [B, T, C] at noise level sigma; given ones are clean as far as they are given."""
    clean = conditions.clean
    return keep_given(conditions, flow.noised(clean if start is None else start, noise, sigma))


def keep_given(conditions: Conditions, x: Array) -> Array:
    """`x` [B, T, C] with the given tokens put back, as far as they are given."""
    strength = conditions.strength
    if conditions.frozen:
        return conditions.clean.astype(x.dtype)
    if strength is None:
        return x
    if strength.dtype == bool:
        return jnp.where(strength[..., None], conditions.clean.astype(x.dtype), x)
    return flow.noised(conditions.clean.astype(x.dtype), x, 1.0 - strength)


def give(
    conditions: Conditions,
    where: Array,  # [B, T] or [T], bool
    strength: Array | float | None = None,  # [] or [B]; None: fully, and the strengths stay bool
    clean: Array | None = None,  # [B, T, C]; None: the values that are there
) -> Conditions:
    """The tokens of `where` given; where several conditions give one, the last decides."""
    where = jnp.broadcast_to(where, conditions.clean.shape[:2])
    values = conditions.clean
    if clean is not None:
        values = jnp.where(where[..., None], clean.astype(values.dtype), values)
    before = conditions.strength
    if strength is None and (before is None or before.dtype == bool):
        given = where if before is None else before | where
    else:
        before = jnp.zeros(where.shape, jnp.float32) if before is None else before
        strength = flow.align(1.0 if strength is None else strength, where)
        given = jnp.where(where, strength, before.astype(jnp.float32))
    return replace(conditions, clean=values, strength=given)


def of_clip(conditions: Conditions, x: Array) -> Array:
    """The clip's own tokens of `x` [B, T, ...], without the appended ones."""
    return x[:, : conditions.clip_tokens]


def first_frame_mask(shape: tuple[int, int, int, int]) -> Array:
    """[B, T], 1 on latent frame 0: a keyframe to models that have the embedding.

    Official inference sets it, but `ltx_trainer/training_strategies/flexible.py` never does. Here
    both do.
    """
    batch, frames, height, width = shape
    first = jnp.arange(frames * height * width) < height * width
    return pin(jnp.tile(first.astype(jnp.float32), (batch, 1)), "batch", "video_tokens")


# ----------------------------------------------------------------------------------------- regions
# Of the tokens of a clip, [T]; `grid` is (F', H', W') of video, (A,) of audio.


def first_latents(grid: tuple[int, ...], count: int) -> np.ndarray:
    """bool [T], True in the first `count` latent frames, or latents of audio."""
    return np.indices(grid)[0].reshape(-1) < count


def last_latents(grid: tuple[int, ...], count: int) -> np.ndarray:
    """bool [T], True in the last `count` latent frames, or latents of audio."""
    return np.indices(grid)[0].reshape(-1) >= grid[0] - count


def rectangle(
    grid: tuple[int, int, int],
    region: tuple[int, int, int, int],  # top, left, bottom, right in pixels
    strides: tuple[int, int, int],
) -> np.ndarray:
    """bool [T], True in the latents of a rectangle in all frames; its bounds are rounded down."""
    _, row, column = np.indices(grid).reshape(3, -1)
    top, left, bottom, right = (x // s for x, s in zip(region, strides[1:] * 2, strict=True))
    return (top <= row) & (row < bottom) & (left <= column) & (column < right)


# -------------------------------------------------------------------------------------- references


def append(
    conditions: Conditions,
    clean: Array,  # [B, R, C]
    positions: Array,  # [B or 1, axes, R, 2], as many rows as those that are there
) -> Conditions:
    """R tokens more behind those that are there; they are given, and no keyframes."""
    kept = jax.typeof(clean[..., 0])  # [B, R]
    strength, marks = conditions.strength, conditions.marks
    if not conditions.frozen:
        if strength is None:
            strength = jnp.zeros_like(conditions.clean[..., 0], bool)
        ones = jnp.ones(kept.shape, strength.dtype, out_sharding=kept.sharding)
        strength = jnp.concatenate([strength, ones], axis=1)
    if marks is not None:
        zeros = jnp.zeros(kept.shape, marks.dtype, out_sharding=kept.sharding)
        marks = jnp.concatenate([marks, zeros], axis=1)
    return replace(
        conditions,
        clean=jnp.concatenate([conditions.clean, clean.astype(conditions.clean.dtype)], axis=1),
        strength=strength,
        positions=jnp.concatenate([conditions.positions, positions], axis=2),
        marks=marks,
    )


def without_appended(conditions: Conditions) -> Conditions:
    """The clip's own tokens alone, as if nothing had been appended."""
    own = partial(of_clip, conditions)
    return replace(
        conditions,
        clean=own(conditions.clean),
        strength=None if conditions.strength is None else own(conditions.strength),
        positions=conditions.positions[:, :, : conditions.clip_tokens],
        marks=None if conditions.marks is None else own(conditions.marks),
    )


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
    fps: Array,  # [B] of the clip
    reference_fps: Array,  # [B] of the reference: the clip's over `temporal`
    strides: tuple[int, int, int],
    *,
    spatial: int,
    temporal: int,
) -> Array:
    """Where the tokens of a reference lie in its clip: float32 [B, 3, R, 2].

    Rows and columns are stretched over the clip's pixels. A latent frame of the reference stands
    for `temporal` times as many frames, and ends where the last of them ends.
    """
    positions = geometry.video_positions(reference, reference_fps, strides)
    late = ((temporal - 1) / fps)[:, None, None]
    seconds = jnp.maximum(positions[:, 0] - late, 0)
    return jnp.concatenate([seconds[:, None], positions[:, 1:] * spatial], axis=1)
