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
from jax import Array

from ltx2_jax.diffusion import flow
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
