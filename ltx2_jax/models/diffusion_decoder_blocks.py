"""Building blocks of the diffusion video decoder: neighbourhood attention, SwiGLU, upsampling.

Everything is channels last, [B, T, H, W, C]. A block is a pre-norm transformer block whose
attention sees the neighbourhood of a cell only. Blocks of the diffusion stage are also given the
context and are modulated by the timestep.

Source: `ltx_core/model/video_vae/transformer/`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import modulate, rms_norm
from ltx2_jax.models.neighborhood_attention import neighborhood_attention
from ltx2_jax.models.video_vae_blocks import unfold

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


def rope_tables(size: Sequence[int], head_dim: int) -> tuple[Array, Array]:
    """cos and sin of every cell and feature, float32 [T, H, W, 1, D].

    Neighbouring features are a pair with one angle; the sine has a minus for the first of a pair.
    Positions count from the corner of the tile at hand: attention only sees their differences.
    """
    parts = []
    for axis, (length, width) in enumerate(zip(size, rope_split(head_dim), strict=True)):
        rates = (1 / ROPE_THETA ** (np.arange(0, width, 2) / width)).astype(np.float32)
        angle = jnp.arange(length, dtype=jnp.float32)[:, None] * np.repeat(rates, 2)
        shape = [length if i == axis else 1 for i in range(3)]
        parts.append(jnp.broadcast_to(angle.reshape(*shape, 1, width), (*size, 1, width)))
    angle = jnp.concatenate(parts, axis=-1)
    sign = np.tile(np.float32([-1, 1]), head_dim // 2)
    return jnp.cos(angle), jnp.sin(angle) * sign


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """x [B, T, H, W, N, D], every pair of features turned by its angle; float32."""
    # Shifts along the features instead of a split into pairs, which would make an axis of two.
    first_of_pair = np.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(first_of_pair, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * rope[0] + partner * rope[1]


# ---- layers --------------------------------------------------------------------------------------


class NeighborhoodAttention(nnx.Module):
    """Self-attention of every cell to the box of `kernel` cells around it."""

    def __init__(self, dim: int, kernel: Size, head_dim: int, *, dtype: str, rngs: nnx.Rngs):
        self.kernel, self.head_dim = kernel, head_dim
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.q_norm = nnx.Param(jnp.ones(head_dim))
        self.k_norm = nnx.Param(jnp.ones(head_dim))

    def __call__(self, x: Array) -> Array:
        """x [B, T, H, W, C] -> [B, T, H, W, C].

        Raises:
          ValueError: the volume is smaller than the kernel.
        """
        heads = (*x.shape[:4], -1, self.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        rope = rope_tables(x.shape[1:4], self.head_dim)
        # Float32 up to here, the activations' dtype from here on: q and k are sliced and copied.
        q = rms_norm(q.astype(jnp.float32), NORM_EPS, self.q_norm[...]) * self.head_dim**-0.5
        k = rms_norm(k.astype(jnp.float32), NORM_EPS, self.k_norm[...])
        q, k = (apply_rope(part, rope).astype(v.dtype) for part in (q, k))
        return self.out(neighborhood_attention(q, k, v, self.kernel).reshape(x.shape))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) up(x)), without biases."""

    def __init__(self, dim: int, *, dtype: str, rngs: nnx.Rngs):
        hidden = -(-MLP_RATIO * dim // 16) * 16
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate, self.up = linear(dim, hidden), linear(dim, hidden)
        self.down = linear(hidden, dim)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Upsample(nnx.Module):
    """A linear map to more channels, which become time, height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Size, *, dtype: str, rngs: nnx.Rngs
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

    def __init__(self, dim: int, kernel: Size, head_dim: int, *, dtype: str, rngs: nnx.Rngs):
        self.attention_norm = nnx.Param(jnp.ones(dim))
        self.attention = NeighborhoodAttention(dim, kernel, head_dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones(dim))
        self.mlp = SwiGLU(dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B, T, H, W, C] -> [B, T, H, W, C]."""
        x = x + self.attention(rms_norm(x, NORM_EPS, self.attention_norm[...]))
        return by_frame(lambda x: x + self.mlp(rms_norm(x, NORM_EPS, self.mlp_norm[...])), x)


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
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, kernel, head_dim, dtype=dtype, rngs=rngs)
        self.strips = strips
        self.context = nnx.Linear(context_channels, dim, dtype=dtype, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((MODULATION_ROWS, dim)))

    def __call__(
        self,
        x: Array,  # [B, T, H, W, C]
        context: Array,  # [B, T, H, W, Cc]
        modulation: Array,  # float32 [B, MODULATION_ROWS, C]
    ) -> Array:  # [B, T, H, W, C]
        rows = jnp.moveaxis((modulation + self.table[...]).astype(x.dtype), 1, 0)[:, :, None, None]

        def normed(x: Array, norm: nnx.Param, scale: Array, shift: Array) -> Array:
            return modulate(rms_norm(x, NORM_EPS, norm[...]), scale, shift)

        x = x + self.context(context)
        scale, shift = (rows[row][:, None] for row in (_SCALE_ATTENTION, _SHIFT_ATTENTION))
        y = normed(x, self.attention_norm, scale, shift)
        x = x + in_strips(self.attention, y, self.strips, self.attention.kernel[2] // 2)

        def mlp(x: Array) -> Array:
            return x + self.mlp(normed(x, self.mlp_norm, rows[_SCALE_MLP], rows[_SHIFT_MLP]))

        return by_frame(mlp, x)


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

    Strips are an axis in front: the one way to split a loop over blocks of cells over devices, as
    XLA gathers what is sliced at computed places along a split axis.
    """
    columns = x.shape[3]
    while columns % count or columns // count < edge:
        count -= 1
    width = columns // count
    strips = jnp.moveaxis(x.reshape(*x.shape[:3], count, width, -1), 3, 0)
    before = jnp.repeat(strips[:1, :, :, :, :1], edge, axis=4)
    after = jnp.repeat(strips[-1:, :, :, :, -1:], edge, axis=4)
    before = jnp.concatenate([before, strips[:-1, :, :, :, width - edge :]])
    after = jnp.concatenate([strips[1:, :, :, :, :edge], after])
    strips = jax.vmap(function)(jnp.concatenate([before, strips, after], axis=4))
    return jnp.moveaxis(strips[:, :, :, :, edge : edge + width], 0, 3).reshape(x.shape)


def by_frame(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` of the frames [B, H, W, C] of x [B, T, H, W, C], one after another.

    The hidden layer of an MLP is eight times its input; of one frame it is small.
    """
    return jnp.moveaxis(jax.lax.map(function, jnp.moveaxis(x, 1, 0)), 0, 1)
