"""Rotary position embedding of LTX-2: fractional positions, one frequency grid for all axes.

This is not the RoPE of language models: the angles of all position axes are interleaved over the
whole attention width before it is cut into heads, so different heads see different frequencies.
Source: paper section 3; `ltx_core/model/transformer/rope.py`.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.rounding import linspace
from ltx2_jax.sharding import pin

Rope = tuple[Array, Array]  # cos, sin: [B, T, N, H/2]


@cache
def frequency_grid(
    width: int, num_axes: int, theta: float, precision: str = "float64"
) -> np.ndarray:
    """float32 [width // (2 num_axes)]: (pi/2) theta^(k / (K-1)).

    `precision` is that of the computation, "float64" or "float32"; released models use float64.
    """
    count = width // (2 * num_axes)
    if precision == "float64":
        return (theta ** np.linspace(0.0, 1.0, count) * (np.pi / 2)).astype(np.float32)
    powers = np.power(theta, linspace(0.0, 1.0, count).astype(np.float64)).astype(np.float32)
    return powers * np.float32(np.pi) / np.float32(2)


def rope_tables(
    positions: Array,  # [B, axes, T, 2] bounds (the middle is used) or [B, axes, T] values
    *,
    heads: int,
    width: int,
    max_pos: tuple[float, ...],  # one per axis: the position that maps to fraction 1
    theta: float,
    precision: str = "float64",
    tokens: str | None = None,  # logical name of the T axis, for sharding
    axis: str | None = "heads",  # and of the heads
) -> Rope:
    """cos and sin, float32 [B, T, heads, width / heads / 2].

    Angle k of axis a is frequency[k] * (2 position[a] / max_pos[a] - 1), laid out frequency-major
    over the width; what the frequencies do not fill is identity (cos 1, sin 0) at the front.
    Angles reach 1.6e4 rad: below float32 they would lose whole turns.
    """
    positions = positions.astype(jnp.float32)
    if positions.ndim == 4:
        positions = positions.mean(-1)
    # XLA would multiply by the reciprocal of a divisor that it sees is constant: the last bit of a
    # fraction turns the fastest angle by 1e-3.
    limits = jnp.zeros_like(positions) + jnp.asarray(max_pos, jnp.float32)[:, None]
    fraction = 2 * positions / jax.lax.optimization_barrier(limits) - 1  # [B, axes, T]
    axes, shape = len(max_pos), (heads, width // heads // 2)
    grid = frequency_grid(width, axes, theta, precision)
    slots = np.arange(width // 2) - (width // 2 - axes * grid.size)  # negative: identity
    rate = np.where(slots >= 0, grid[slots // axes], 0).reshape(shape)
    which = pin(jnp.asarray(slots % axes).reshape(shape), axis, None)
    # The axis of a slot is selected, not laid out by a reshape of [..., frequencies, axes]: three
    # of 128 lanes would be in use.
    batch = "batch" if positions.shape[0] > 1 else None
    values = [pin(fraction[:, i], batch, tokens)[..., None, None] for i in range(axes)]
    value = values[0]
    for i in range(1, axes):
        value = jnp.where(which == i, values[i], value)
    angle = value * pin(jnp.asarray(rate), axis, None)  # [B, T, heads, H/2]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, rope: Rope, *, interleaved: bool = False) -> Array:
    """Rotate x [B, T, N, H] by its tables; the result has the dtype of x.

    Split (LTX-2): the first and second half of each head are the two coordinates of the rotated
    pairs. Interleaved (earlier models): neighbouring features are.
    """
    # Back to the activation dtype, or float32 q and k would reach the kernel and the wire.
    cos, sin = rope[0].astype(x.dtype), rope[1].astype(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
