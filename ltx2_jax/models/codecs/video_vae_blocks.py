"""Building blocks of the convolutional video VAE: causal convolution, residual, resampling.

Everything is channels last, [B, F, H, W, C]. The rules that are easy to miss:

- time is padded with copies of the end frames, space with zeros or by a padding mode;
- a block that halves time first doubles frame 0, one that doubles time drops the first frame of the
  result, so that 1 + n k frames stay legal;
- channels of a folded block are ordered (channel, time, height, width), those of the pixel patches
  at either end of the network (channel, width, height).

Source: `ltx_core/model/video_vae/{convolution,resnet,sampling,attention,ops}.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs, modulate, rms_norm, timestep_embedding

PIXEL_NORM_EPS = 1e-8
GROUP_NORM_EPS = 1e-6
ATTENTION_NORM_EPS = 1e-24  # only keeps zeros finite
TIMESTEP_FEATURES = 256

PADDING_MODES = {"zeros": None, "reflect": "reflect", "replicate": "edge"}  # -> mode of jnp.pad

Stride = tuple[int, int, int]  # time, height, width
Draw = Callable[[tuple[int, ...]], Array]  # shape -> the next standard normal draw


@dataclasses.dataclass(frozen=True)
class ConvStyle:
    """What all convolutions of one half of the VAE have in common."""

    padding: str  # of height and width: a key of PADDING_MODES
    causal: bool  # frames see only the past, else as much of the future
    dtype: str


# ---- folding space and time into channels, and back ----------------------------------------------


def fold(
    x: Array,  # [B, F, H, W, C]
    stride: Stride,
) -> Array:
    """Space-to-depth: [B, F / st, H / sh, W / sw, C, st, sh, sw]."""
    batch, frames, height, width, channels = x.shape
    st, sh, sw = stride
    x = x.reshape(batch, frames // st, st, height // sh, sh, width // sw, sw, channels)
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6)


def unfold(
    x: Array,  # [B, F, H, W, C, st, sh, sw]
) -> Array:
    """Depth-to-space, the inverse of `fold`: [B, F st, H sh, W sw, C]."""
    batch, frames, height, width, channels, st, sh, sw = x.shape
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, frames * st, height * sh, width * sw, channels)


def patchify(
    pixels: Array,  # [B, F, H, W, C]
    size: int,
) -> Array:
    """[B, F, H / size, W / size, C size size], the width offset before the height offset."""
    x = fold(pixels, (1, size, size)).swapaxes(-1, -2)
    return x.reshape(*x.shape[:4], -1)


def unpatchify(
    x: Array,  # [B, F, H, W, C size size]
    size: int,
) -> Array:
    """The inverse of `patchify`: [B, F, H size, W size, C]."""
    return unfold(x.reshape(*x.shape[:4], -1, 1, size, size).swapaxes(-1, -2))


# ---- layers --------------------------------------------------------------------------------------


class CausalConv(nnx.Module):
    """A 3 x 3 x 3 convolution over frames padded by repetition: causal or centred in time."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: ConvStyle,
        *,
        stride: Stride = (1, 1, 1),
        rngs: Rngs,
    ):
        self.style = style
        # Zeros are left to the convolution: it needs no padded copy of its input for them.
        space = (1, 1) if style.padding == "zeros" else (0, 0)
        self.conv = nnx.Conv(
            in_channels,
            out_channels,
            (3, 3, 3),
            strides=stride,
            padding=((0, 0), space, space),
            dtype=style.dtype,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """x [B, F, H, W, C] -> [B, ceil(F / st), ceil(H / sh), ceil(W / sw), C']."""
        first, last = x[:, :1], x[:, -1:]
        x = jnp.concatenate([first, first, x] if self.style.causal else [first, x, last], axis=1)
        mode = PADDING_MODES[self.style.padding]
        if mode is not None:
            x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode=mode)
        return self.conv(x)


def pixel_norm(x: Array) -> Array:
    """x divided by its root mean square over channels at every position."""
    return rms_norm(x, PIXEL_NORM_EPS)


class TimestepMLP(nnx.Module):
    """A scaled timestep -> shifts and scales; float32, as sinusoids of large angles need it."""

    def __init__(self, dim: int, *, rngs: Rngs):
        self.linear_1 = nnx.Linear(TIMESTEP_FEATURES, dim, rngs=rngs)
        self.linear_2 = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, timestep: Array) -> Array:
        """timestep [B] (in 1/1000) -> [B, dim]."""
        x = timestep_embedding(timestep, TIMESTEP_FEATURES)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def shifts_and_scales(table: Array, embedded: Array, dtype: jnp.dtype) -> list[Array]:
    """The rows of table [rows, C] plus embedded [B, rows C], each [B, 1, 1, 1, C]."""
    rows, channels = table.shape
    values = (table + embedded.reshape(-1, rows, channels)).astype(dtype)
    return [values[:, row, None, None, None] for row in range(rows)]


# ---- blocks --------------------------------------------------------------------------------------


class ResidualBlock(nnx.Module):
    """norm, SiLU, convolution, twice, around a shortcut; the block kind `res_x_y` on its own.

    With `conditioned`, a timestep shifts and scales what the norms return. With `inject_noise`,
    a map of noise, the same for all frames, is added after either convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: ConvStyle,
        *,
        conditioned: bool = False,
        inject_noise: bool = False,
        rngs: Rngs,
    ):
        self.conv1 = CausalConv(in_channels, out_channels, style, rngs=rngs)
        self.conv2 = CausalConv(out_channels, out_channels, style, rngs=rngs)
        if in_channels == out_channels:
            self.shortcut_norm = self.shortcut = None
        else:
            self.shortcut_norm = nnx.GroupNorm(
                in_channels,
                num_groups=1,
                epsilon=GROUP_NORM_EPS,
                use_fast_variance=False,
                dtype=style.dtype,
                rngs=rngs,
            )
            self.shortcut = nnx.Conv(
                in_channels, out_channels, (1, 1, 1), dtype=style.dtype, rngs=rngs
            )
        if inject_noise and in_channels != out_channels:
            raise UserError("inject_noise in a res_x_y block: only where it keeps the width")
        shape = (in_channels, 1, 1)
        self.noise_scale1 = nnx.Param(jnp.zeros(shape)) if inject_noise else None
        self.noise_scale2 = nnx.Param(jnp.zeros(shape)) if inject_noise else None
        self.table = nnx.Param(jnp.zeros((4, in_channels))) if conditioned else None

    def __call__(self, x: Array, embedded: Array | None = None, draw: Draw | None = None) -> Array:
        """x [B, F, H, W, C], embedded timestep [B, 4 C] -> [B, F, H, W, C']."""
        y = pixel_norm(x)
        if self.table is not None:
            rows = shifts_and_scales(self.table[...], embedded, x.dtype)
            shift1, scale1, shift2, scale2 = rows
            y = modulate(y, scale1, shift1)
        y = _add_noise(self.conv1(jax.nn.silu(y)), self.noise_scale1, draw)
        y = pixel_norm(y)
        if self.table is not None:
            y = modulate(y, scale2, shift2)
        y = _add_noise(self.conv2(jax.nn.silu(y)), self.noise_scale2, draw)
        return y + (x if self.shortcut is None else self.shortcut(self.shortcut_norm(x)))


def _add_noise(x: Array, scale: nnx.Param | None, draw: Draw | None) -> Array:
    """x [B, F, H, W, C] plus one map of noise [H, W], times scale [C, 1, 1]."""
    if scale is None:
        return x
    noise = draw(x.shape[2:4])[..., None] * scale[:, 0, 0]
    return x + noise.astype(x.dtype)


class ResidualBlocks(nnx.Module):
    """A run of residual blocks of one width, the block kind `res_x`; they share a timestep MLP."""

    def __init__(
        self,
        channels: int,
        layers: int,
        style: ConvStyle,
        *,
        conditioned: bool = False,
        inject_noise: bool = False,
        rngs: Rngs,
    ):
        self.timestep_mlp = TimestepMLP(4 * channels, rngs=rngs) if conditioned else None
        self.inject_noise = inject_noise
        self.layers = nnx.List(
            ResidualBlock(
                channels,
                channels,
                style,
                conditioned=conditioned,
                inject_noise=inject_noise,
                rngs=rngs,
            )
            for _ in range(layers)
        )

    def __call__(self, x: Array, timestep: Array | None = None, draw: Draw | None = None) -> Array:
        """x [B, F, H, W, C], timestep [B] (in 1/1000) -> [B, F, H, W, C]."""
        embedded = None if self.timestep_mlp is None else self.timestep_mlp(timestep)
        if self.inject_noise:
            for layer in self.layers:
                x = layer(x, embedded, draw)
            return x
        # The TPU compiler takes its seconds for every convolution of a program, alike or not: a
        # scan has those of one layer. Stacking copies the weights of one run at a time.
        graphdef, first = nnx.split(self.layers[0])
        states = [first, *(nnx.state(layer) for layer in self.layers[1:])]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

        def layer(x: Array, state: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graphdef, state)(x, embedded), None

        return jax.lax.scan(layer, x, stacked)[0]


class Downsample(nnx.Module):
    """Space-to-depth after a convolution, plus the same of the input averaged to that width.

    The block kinds `compress_{time,space,all}_res` of the encoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride,
        style: ConvStyle,
        *,
        rngs: Rngs,
    ):
        folded = math.prod(stride)
        if out_channels % folded or in_channels * folded % out_channels:
            raise UserError(
                f"an encoder block cannot fold {in_channels} channels by {folded} to {out_channels}"
            )
        self.stride, self.out_channels = stride, out_channels
        self.conv = CausalConv(in_channels, out_channels // folded, style, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B, F, H, W, C] -> [B, ceil(F / st), H / sh, W / sw, C']."""
        if self.stride[0] == 2:
            x = jnp.concatenate([x[:, :1], x], axis=1)
        skip, x = fold(x, self.stride), fold(self.conv(x), self.stride)
        skip = skip.reshape(*skip.shape[:4], self.out_channels, -1).mean(axis=-1)
        return x.reshape(skip.shape) + skip


class Upsample(nnx.Module):
    """Depth-to-space after a convolution, optionally plus the input's own depth-to-space.

    The block kinds `compress_{time,space,all}` of the decoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride,
        style: ConvStyle,
        *,
        residual: bool = False,
        rngs: Rngs,
    ):
        folded = math.prod(stride)
        if residual and (in_channels % folded or out_channels * folded % in_channels):
            raise UserError(
                f"a residual decoder block cannot unfold {in_channels} channels by {folded} "
                f"to {out_channels}"
            )
        self.stride, self.residual = stride, residual
        self.conv = CausalConv(in_channels, out_channels * folded, style, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B, F, H, W, C] -> [B, F st - (st - 1), H sh, W sw, C']."""
        y = self._unfold(self.conv(x))
        if self.residual:
            skip = self._unfold(x)
            y = y + jnp.concatenate([skip] * (y.shape[-1] // skip.shape[-1]), axis=-1)
        return y

    def _unfold(self, x: Array) -> Array:
        return unfold(x.reshape(*x.shape[:4], -1, *self.stride))[:, self.stride[0] - 1 :]


class FrameAttention(nnx.Module):
    """Single-head self-attention over the positions of each frame; the block kind `attn`."""

    def __init__(self, channels: int, style: ConvStyle, *, rngs: Rngs):
        self.norm_scale = nnx.Param(jnp.ones((channels, 1, 1)))
        self.qkv = nnx.Conv(channels, 3 * channels, (1, 1), dtype=style.dtype, rngs=rngs)
        self.out = nnx.Conv(channels, channels, (1, 1), dtype=style.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B, F, H, W, C] -> [B, F, H, W, C]."""
        batch, frames, height, width, channels = x.shape
        y = rms_norm(x, ATTENTION_NORM_EPS, self.norm_scale[:, 0, 0])
        y = self.qkv(y).reshape(batch * frames, height * width, 3, channels)
        y = jax.nn.dot_product_attention(*(y[:, :, i, None] for i in range(3)))
        return x + self.out(y.reshape(x.shape))
