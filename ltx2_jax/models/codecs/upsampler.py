"""Latent upsamplers: video latents to latents of a larger or a longer clip, before the last steps.

Residual blocks come before and after one step up. The config decides the step: twice the size by a
pixel shuffle of every frame; another ratio by a pixel shuffle and a fixed blur with a stride; twice
the frames; or twice both at once. Doubled time loses its first frame, because the first latent
stands for a single pixel frame.

They were trained on latents as the video VAE's encoder makes them, before normalisation: use
`upsample_latents` around them for everything that samplers handle.

Dims: B batch, F, H, W latent frames, rows and columns, C latent channels, D inner width.
Source: `ltx_core/model/upsampler/`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.video_vae_blocks import unfold
from ltx2_jax.models.layers import Rngs

GROUPS = 32
NORM_EPS = 1e-5
RATIOS = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}  # of the rational resampler
BLUR = (1, 4, 6, 4, 1)  # binomial, along rows and columns


@dataclass(frozen=True)
class UpsamplerConfig:
    """Hyper-parameters, named and defaulted as in the official code."""

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: int = 4
    dims: int = 3  # of the convolutions; 2 treats every frame by itself
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    spatial_scale: float = 2.0  # read by the rational resampler; a pixel shuffle alone doubles
    rational_resampler: bool = False  # for a purely spatial step
    dtype: str = "bfloat16"  # of activations; norm statistics are float32

    def __post_init__(self) -> None:
        if self.dims not in (2, 3):
            raise UserError(f"upsampler dims={self.dims}: only 2 and 3 are supported")
        if not (self.spatial_upsample or self.temporal_upsample):
            raise UserError("upsampler: one of spatial_upsample and temporal_upsample must be true")
        if self.temporal_upsample and self.dims != 3:
            raise UserError("upsampler: temporal_upsample needs dims=3")
        if self.rational and self.spatial_scale not in RATIOS:
            known = ", ".join(map(str, RATIOS))
            raise UserError(f"upsampler spatial_scale={self.spatial_scale}: use one of {known}")
        if self.mid_channels % GROUPS:
            raise UserError(
                f"upsampler mid_channels={self.mid_channels}: not a multiple of {GROUPS}"
            )

    @property
    def rational(self) -> bool:
        """Whether the step up is the rational resampler."""
        return self.rational_resampler and self.spatial_upsample and not self.temporal_upsample

    @property
    def scale(self) -> tuple[float, float, float]:
        """Growth of frames (doubled ones lose their first), rows and columns."""
        space = self.spatial_scale if self.rational else 1.0 + self.spatial_upsample
        return 1.0 + self.temporal_upsample, space, space


def _conv(config: UpsamplerConfig, n_in: int, n_out: int, dims: int, rngs: Rngs) -> nnx.Conv:
    return nnx.Conv(n_in, n_out, (3,) * dims, padding=1, dtype=config.dtype, rngs=rngs)


def _norm(config: UpsamplerConfig, rngs: Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        config.mid_channels,
        GROUPS,
        epsilon=NORM_EPS,
        dtype=config.dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def _per_frame(layer: Callable[[Array], Array], x: Array) -> Array:
    """Applies a layer of [B * F, H, W, D] to [B, F, H, W, D]."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class ResBlock(nnx.Module):
    """Two convolutions with group norms; the residual joins before the last activation."""

    def __init__(self, config: UpsamplerConfig, *, rngs: Rngs):
        width = config.mid_channels
        self.conv1 = _conv(config, width, width, config.dims, rngs)
        self.norm1 = _norm(config, rngs)
        self.conv2 = _conv(config, width, width, config.dims, rngs)
        self.norm2 = _norm(config, rngs)

    def __call__(self, x: Array) -> Array:
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        return jax.nn.silu(x + self.norm2(self.conv2(y)))


class RationalResampler(nnx.Module):
    """Every frame `up` times larger by a pixel shuffle, then blurred and every `down`-th kept."""

    def __init__(self, config: UpsamplerConfig, *, rngs: Rngs):
        self.up, self.down = RATIOS[config.spatial_scale]
        width = config.mid_channels
        self.conv = _conv(config, width, self.up**2 * width, 2, rngs)
        # Never trained, but stored in released files, even where `down` is 1 and nothing reads it.
        blur = np.outer(BLUR, BLUR) / sum(BLUR) ** 2
        self.blur_kernel = nnx.Param(jnp.asarray(blur[:, :, None, None], jnp.float32))

    def __call__(self, x: Array) -> Array:
        """x [B, F, H, W, D] -> [B, F, ceil(H up / down), ceil(W up / down), D]."""
        x = _shuffle(_per_frame(self.conv, x), (1, self.up, self.up))
        return x if self.down == 1 else _per_frame(self._blur, x)

    def _blur(self, x: Array) -> Array:
        width = x.shape[-1]
        kernel = self.blur_kernel[...].astype(x.dtype)
        return jax.lax.conv_general_dilated(
            x,
            jnp.broadcast_to(kernel, (*kernel.shape[:3], width)),
            window_strides=(self.down, self.down),
            padding=[(len(BLUR) // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=width,
        )


def _shuffle(x: Array, factors: tuple[int, int, int]) -> Array:
    """[B, F, H, W, D ft fh fw] -> [B, F ft, H fh, W fw, D]."""
    return unfold(x.reshape(*x.shape[:4], -1, *factors))


class LatentUpsampler(nnx.Module):
    """The network on latents that are not normalised."""

    def __init__(self, config: UpsamplerConfig, *, rngs: Rngs):
        self.config = config
        width, blocks = config.mid_channels, range(config.num_blocks_per_stage)
        self.conv_in = _conv(config, config.in_channels, width, config.dims, rngs)
        self.norm_in = _norm(config, rngs)
        self.before = nnx.List([ResBlock(config, rngs=rngs) for _ in blocks])
        if config.rational:
            self.resampler = RationalResampler(config, rngs=rngs)
        else:
            time, space = 1 + config.temporal_upsample, 1 + config.spatial_upsample
            self.factors = (time, space, space)
            copies = time * space**2
            dims = 3 if config.temporal_upsample else 2
            self.expand = _conv(config, width, copies * width, dims, rngs)
        self.after = nnx.List([ResBlock(config, rngs=rngs) for _ in blocks])
        self.conv_out = _conv(config, width, config.in_channels, config.dims, rngs)

    def __call__(self, latents: Array) -> Array:
        """latents [B, F, H, W, C] -> [B, F or 2F - 1, H', W', C], of the compute dtype."""
        run = (lambda layer, x: layer(x)) if self.config.dims == 3 else _per_frame
        x = jax.nn.silu(run(self.norm_in, run(self.conv_in, latents)))
        for block in self.before:
            x = run(block, x)
        x = self._step_up(x)
        for block in self.after:
            x = run(block, x)
        return run(self.conv_out, x)

    def _step_up(self, x: Array) -> Array:
        if self.config.rational:
            return self.resampler(x)
        if not self.config.temporal_upsample:
            return _shuffle(_per_frame(self.expand, x), self.factors)
        return _shuffle(self.expand(x), self.factors)[:, 1:]


def upsample_latents(
    upsampler: LatentUpsampler, latents: ArrayLike, mean: ArrayLike, std: ArrayLike
) -> Array:
    """Upsamples normalised latents [B, F, H, W, C]; float32, normalised again.

    Args:
        mean, std: the video VAE's statistics per channel, [C].
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    x = jnp.asarray(latents, jnp.float32) * std + mean
    return (upsampler(x).astype(jnp.float32) - mean) / std
