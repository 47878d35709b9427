"""Building blocks of the diffusion video decoder: neighbourhood attention, SwiGLU, upsampling.

Everything is channels last, [B, T, H, W, C]. A block is a pre-norm transformer block whose
attention sees the neighbourhood of a cell only. Blocks of the diffusion stage are also given the
context and are modulated by the timestep.

Source: `ltx_core/model/video_vae/transformer/`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.models.codecs.neighborhood_attention import neighborhood_attention
from ltx2_jax.models.codecs.video_vae_blocks import unfold
from ltx2_jax.models.layers import Rngs, modulate, rms_norm

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
MLP_RATIO = 4
# Rows of a modulation: scale, shift and gate of the attention, the same of the MLP, and the gate of
# the context. Gates are stored but not read: they are in the weights.
MODULATION_ROWS = 7
_SCALE_ATTENTION, _SHIFT_ATTENTION, _, _SCALE_MLP, _SHIFT_MLP, _, _ = range(MODULATION_ROWS)

Size = tuple[int, int, int]  # time, height, width


# ---- rotary position embedding -------------------------------------------------------------------


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """How many features of a head turn with time, height and width; all even."""
    time = head_dim // 4 // 2 * 2
    if (head_dim - time) // 2 % 2:
        time -= 2
    rest = (head_dim - time) // 2
    return time, rest, rest


def rope_tables(time: Array, height: int, width: int, head_dim: int) -> tuple[Array, Array]:
    """cos and sin for the cells and features of one frame, float32 [H, W, 1, D].

    Neighbouring features are a pair with one angle; the sine has a minus for the first of a pair.
    Positions count from the corner of the tile at hand: attention only sees their differences.
    """
    parts = []
    positions = time[None, None], jnp.arange(height)[:, None], jnp.arange(width)
    for position, features in zip(positions, rope_split(head_dim), strict=True):
        rates = (1 / ROPE_THETA ** (np.arange(0, features, 2) / features)).astype(np.float32)
        angle = position.astype(jnp.float32)[..., None, None] * np.repeat(rates, 2)
        parts.append(jnp.broadcast_to(angle, (height, width, 1, features)))
    angle = jnp.concatenate(parts, axis=-1)
    sign = np.tile(np.float32([-1, 1]), head_dim // 2)
    return jnp.cos(angle), jnp.sin(angle) * sign


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """x [B, H, W, N, D], every pair of features turned by its angle; float32."""
    # Shifts along the features instead of a split into pairs, which would make an axis of two.
    first_of_pair = np.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(first_of_pair, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * rope[0] + partner * rope[1]


# ---- layers --------------------------------------------------------------------------------------


class NeighborhoodAttention(nnx.Module):
    """Self-attention of every cell to the box of `kernel` cells around it, no output projection."""

    def __init__(self, dim: int, kernel: Size, head_dim: int, *, dtype: str, rngs: Rngs):
        self.kernel, self.head_dim = kernel, head_dim
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.q_norm = nnx.Param(jnp.ones(head_dim))
        self.k_norm = nnx.Param(jnp.ones(head_dim))

    def __call__(self, x: Array, prepare: Callable[[Array], Array]) -> Array:
        """x [B, T, H, W, C] -> [B, T, H, W, C]; `prepare` is done to each frame [B, H, W, C].

        Raises:
          ValueError: the volume is smaller than the kernel.
        """
        q, k, v = by_frame(lambda time, x: self.project(time, prepare(x)), x)
        return neighborhood_attention(q, k, v, self.kernel).reshape(x.shape)

    def project(self, time: Array, x: Array) -> tuple[Array, Array, Array]:
        """q, k and v [B, H, W, N, D] of frame number `time`, x [B, H, W, C]."""
        heads = (*x.shape[:3], -1, self.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        rope = rope_tables(time, *x.shape[1:3], self.head_dim)
        q = rms_norm(q.astype(jnp.float32), NORM_EPS, self.q_norm[...]) * self.head_dim**-0.5
        k = rms_norm(k.astype(jnp.float32), NORM_EPS, self.k_norm[...])
        return apply_rope(q, rope).astype(v.dtype), apply_rope(k, rope).astype(v.dtype), v


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) up(x)), without biases."""

    def __init__(self, dim: int, *, dtype: str, rngs: Rngs):
        hidden = -(-MLP_RATIO * dim // 16) * 16
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate, self.up = linear(dim, hidden), linear(dim, hidden)
        self.down = linear(hidden, dim)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Upsample(nnx.Module):
    """A linear map to more channels, which become time, height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Size, *, dtype: str, rngs: Rngs
    ):
        self.stride = stride
        self.linear = nnx.Linear(
            in_channels, math.prod(stride) * out_channels, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Array, *, first: bool) -> Array:
        """x [B, T, H, W, C] -> [B, T st, H sh, W sw, C'], one frame less where time is doubled.

        Time is causal: frame 0 of a clip stands for one frame, so the first of the two it becomes
        is dropped. `first` tells whether x starts with it.
        """
        x = unfold(self.linear(x).reshape(*x.shape[:4], -1, *self.stride))
        return x[:, 1:] if first and self.stride[0] == 2 else x


# ---- blocks --------------------------------------------------------------------------------------


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, kernel: Size, head_dim: int, *, dtype: str, rngs: Rngs):
        self.attention_norm = nnx.Param(jnp.ones(dim))
        self.attention = NeighborhoodAttention(dim, kernel, head_dim, dtype=dtype, rngs=rngs)
        self.attention_out = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones(dim))
        self.mlp = SwiGLU(dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B, T, H, W, C] -> [B, T, H, W, C]."""
        y = self.attention(x, lambda x: rms_norm(x, NORM_EPS, self.attention_norm[...]))

        def rest(_: Array, x: Array, y: Array) -> Array:
            x = x + self.attention_out(y)
            return x + self.mlp(rms_norm(x, NORM_EPS, self.mlp_norm[...]))

        return by_frame(rest, x, y)


class DiffusionBlock(Block):
    """A block that is given the context and modulated by the timestep.

    Its windows are shifted inwards at the borders of time and height, but not of width: there the
    border column is repeated, so that windows stay centred. That is how the official pipelines run
    the released model (`chunked_eager`, their default: `transformer/chunked/attn.py`); another of
    their modes shifts windows on all axes and differs near the left and right border.
    """

    def __init__(
        self,
        dim: int,
        kernel: Size,
        head_dim: int,
        *,
        context_channels: int,
        strips: int,
        dtype: str,
        rngs: Rngs,
    ):
        super().__init__(dim, kernel, head_dim, dtype=dtype, rngs=rngs)
        self.strips = strips
        self.context = nnx.Linear(context_channels, dim, dtype=dtype, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((MODULATION_ROWS, dim)))

    def __call__(
        self,
        x: Array,  # [B, T, H, W, C]
        context: Array,  # [B, T, H, W, Cc]
        modulation: Array,  # float32 [MODULATION_ROWS, C]
    ) -> Array:  # [B, T, H, W, C]
        rows = (modulation + self.table[...]).astype(x.dtype)

        def normed(x: Array, norm: nnx.Param, scale: int, shift: int) -> Array:
            return modulate(rms_norm(x, NORM_EPS, norm[...]), rows[scale], rows[shift])

        def attend(x: Array) -> Array:
            norm = self.attention_norm
            return self.attention(x, lambda x: normed(x, norm, _SCALE_ATTENTION, _SHIFT_ATTENTION))

        x = by_frame(lambda _, x, context: x + self.context(context), x, context)
        y = in_strips(attend, x, self.strips, self.attention.kernel[2] // 2)

        def rest(_: Array, x: Array, y: Array) -> Array:
            x = x + self.attention_out(y)
            return x + self.mlp(normed(x, self.mlp_norm, _SCALE_MLP, _SHIFT_MLP))

        return by_frame(rest, x, y)


def run_blocks(blocks: Sequence[nnx.Module], x: Array, *given: Array) -> Array:
    """x through blocks of one structure, one after another, each called with (x, *given).

    One body is compiled for all, not one for each.
    """
    graphdef = nnx.graphdef(blocks[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(b) for b in blocks))

    def step(x: Array, params: nnx.State) -> tuple[Array, None]:
        return nnx.merge(graphdef, params)(x, *given), None

    return jax.lax.scan(step, x, params)[0]


def in_strips(function: Callable[[Array], Array], x: Array, count: int, edge: int) -> Array:
    """`function` of strips of columns of x [B, T, H, W, C], whose borders of `edge` are dropped.

    A strip borders on its neighbours' columns; the outer strips, on copies of the last column. So
    the result does not depend on `count` if a cell depends on no more than `edge` on either side.
    Fewer strips are made of columns that `count` does not divide into strips as wide as `edge`.

    Strips become batch entries: the one way to split a loop over blocks of cells over devices, as
    XLA gathers what is sliced at computed places along a split axis.
    """
    columns = x.shape[3]
    while count > 1 and (columns % count or columns // count < edge):
        count -= 1
    width = columns // count
    strips = jnp.moveaxis(x.reshape(*x.shape[:3], count, width, -1), 3, 0)
    number = jnp.arange(count).reshape(-1, *[1] * (strips.ndim - 1))
    first, last = (jnp.repeat(strips[:, :, :, :, i : i + 1], edge, axis=4) for i in (0, width - 1))
    # Without the barrier XLA cuts the borders out after it has moved whole strips.
    tail, head = jax.lax.optimization_barrier(
        (strips[:, :, :, :, width - edge :], strips[:, :, :, :, :edge])
    )
    before, after = jnp.roll(tail, 1, axis=0), jnp.roll(head, -1, axis=0)
    before = jnp.where(number == 0, first, before)
    after = jnp.where(number == count - 1, last, after)
    strips = jnp.concatenate([before, strips, after], axis=4)
    result = function(strips.reshape(-1, *strips.shape[2:])).reshape(strips.shape)
    return jnp.moveaxis(result[:, :, :, :, edge : edge + width], 0, 3).reshape(x.shape)


def by_frame(function: Callable[..., Any], *volumes: Array) -> Any:
    """`function(time, frame, ...)` of the frames [B, H, W, C] of volumes [B, T, H, W, C], in turn.

    The results are stacked along axis 1 again. What is wide on the way, such as the hidden layer of
    an MLP or float32 queries, is in memory for one frame only.
    """
    frames = [jnp.moveaxis(volume, 1, 0) for volume in volumes]
    results = jax.lax.map(lambda args: function(*args), (jnp.arange(len(frames[0])), *frames))
    return jax.tree.map(lambda result: jnp.moveaxis(result, 0, 1), results)
