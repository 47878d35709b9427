"""The diffusion video decoder of LTX-2.5: latents to pixels, with noise.

Four stages of neighbourhood attention, each followed by an upsampling, turn latents into a context
at 1/4 of the pixels' resolution. A fifth stage starts from noise in the place of the pixels and
removes it, guided by the context: in one step that predicts the pixels (the released model), or in
several. The latent space is that of the convolutional VAE, and so is the encoder.

Two things happen at the borders. A latent grid smaller than an attention window is padded with its
edge and the pixels are cropped. And since windows are shifted inwards at the end of the clip, the
last latent frame is repeated through the first four stages and what it became is cut off.

The network splits into two halves so that large clips can be decoded in tiles
(`diffusion_tiling.py`): `features`, stages 1 to 3 at a low resolution, and `decode_tile`, the rest.

The release at 121 frames of 1280 x 704, 16 x 22 x 40 latents and two frames of them repeated
(attention counted densely, as `neighborhood_attention` computes it; its windows alone are 75):

    stage   cells             channels   blocks   window         TFLOPs, linear   attention
    1        18 x  22 x  40       2048        4    3 x  7 x  7                9           1
    2        18 x  44 x  80       1024        6    3 x  7 x  7               13           2
    3        35 x  44 x  80        512        4    3 x  5 x  5                5           1
    4        69 x  88 x 160        512        2    3 x  5 x  5               18           2
    5       121 x 176 x 320        256        8   11 x 11 x 11              122         261

Compiled for a TPU, stages 4 and 5 take 7 KB of memory per cell of stage 5: 47 GB at once, or
`diffusion_tiling.automatic_tiling`.

Dims: B batch, F frames, H, W pixels, C latent channels, F', H', W' the latent grid.
Source: `ltx_core/model/video_vae/diffusion_video_decoder.py`; sizes of the preset: the `vae` config
in the metadata of the released file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.diffusion_decoder_blocks import (
    MODULATION_ROWS,
    NORM_EPS,
    Block,
    DiffusionBlock,
    Size,
    Upsample,
    run_blocks,
)
from ltx2_jax.models.codecs.video_vae_blocks import Draw, TimestepMLP, patchify, unpatchify
from ltx2_jax.models.layers import Rngs, rms_norm

STAGES = 5  # the last is the diffusion stage
PREDICTIONS = ("v", "x0")


@dataclass(frozen=True)
class DiffusionDecoderConfig:
    """Hyper-parameters, with the defaults that the official code has for absent keys."""

    latent_channels: int = 128
    out_channels: int = 3
    patch_size: int = 4  # pixels per cell of the diffusion stage, rows and columns
    head_dim: int = 64
    # Of the five stages; the last width is that of the context that stage 4 makes.
    channels: tuple[int, ...] = (1024, 512, 256, 256, 128)
    depths: tuple[int, ...] = (4, 6, 4, 2, 8)
    kernels: tuple[Size, ...] = ((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5), (3, 7, 7))
    # After each of the first four stages: factors of time, height, width.
    strides_after: tuple[Size, ...] = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
    diffusion_channels: int | None = None  # width of the last stage; None: that of the context
    timestep_dim: int = 384
    timestep_scale: float = 1.0
    num_steps: int = 2
    prediction: str = "v"  # what the last stage predicts, of PREDICTIONS
    # The last stage's attention works on as many strips of columns at once: the number of devices
    # that the columns are split over. Results do not depend on it.
    strips: int = 1
    dtype: str = "bfloat16"  # of activations; norms, timesteps and pixels are float32

    def __post_init__(self) -> None:
        lengths = [len(x) for x in (self.channels, self.depths, self.kernels)]
        if lengths != [STAGES] * 3 or len(self.strides_after) != STAGES - 1:
            raise UserError(
                f"channels, depths, kernels, strides_after: expected {STAGES} stages and "
                f"{STAGES - 1} strides, got {lengths} and {len(self.strides_after)}"
            )
        for name in ("channels", "diffusion_channels"):
            widths = getattr(self, name) or ()
            for width in widths if isinstance(widths, tuple) else (widths,):
                if width % self.head_dim:
                    raise UserError(f"{name} {width}: expected a multiple of {self.head_dim}")
        if self.head_dim % 8 or self.head_dim < 16:  # some features for each axis of positions
            raise UserError(f"head_dim {self.head_dim}: expected a multiple of 8, at least 16")
        if any(stride[0] not in (1, 2) for stride in self.strides_after):
            raise UserError(f"strides_after {self.strides_after}: time is kept or doubled only")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"prediction {self.prediction!r}: expected {', '.join(PREDICTIONS)}")
        for name, least in (
            ("depths", min(self.depths)),
            ("num_steps", self.num_steps),
            ("strips", self.strips),
        ):
            if least < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected at least 1")

    @property
    def strides(self) -> Size:
        """Frames per latent frame, pixels per latent row and column."""
        time, height, width = (math.prod(axis) for axis in zip(*self.strides_after, strict=True))
        return time, height * self.patch_size, width * self.patch_size

    @property
    def tile_scale(self) -> Size:
        """Frames, rows and columns of pixels per cell of the features that are cut into tiles."""
        time, rows, columns = self.strides_after[-1]
        return time, rows * self.patch_size, columns * self.patch_size

    @property
    def min_latents(self) -> Size:
        """The smallest latent grid at which no stage is smaller than its attention window."""
        cells, factor = [1, 1, 1], [1, 1, 1]
        for kernel, stride in zip(self.kernels, (*self.strides_after, (1, 1, 1)), strict=True):
            for axis in range(3):
                cells[axis] = max(cells[axis], -(-kernel[axis] // factor[axis]))
                factor[axis] *= stride[axis]
        return tuple(cells)

    @property
    def repeats(self) -> int:
        """How often the last latent frame is repeated through stages 1 to 4."""
        return self.kernels[0][0] // 2 * 2

    @property
    def noise_per_tile(self) -> bool:
        """One step that predicts pixels forgets its noise: tiles draw their own, of any size."""
        return self.num_steps == 1 and self.prediction == "x0"


# The released sizes: `ltx-2.5-video-vae-bf16.safetensors`.
DIFFUSION_DECODER_2_5 = DiffusionDecoderConfig(
    channels=(2048, 1024, 512, 512, 256),
    kernels=((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5), (11, 11, 11)),
    timestep_scale=1000.0,
    num_steps=1,
    prediction="x0",
)


class Stage(nnx.Module):
    """Blocks of neighbourhood attention, then an upsampling."""

    def __init__(self, cfg: DiffusionDecoderConfig, index: int, *, rngs: Rngs):
        width, wider = cfg.channels[index : index + 2]
        self.blocks = nnx.List(
            Block(width, cfg.kernels[index], cfg.head_dim, dtype=cfg.dtype, rngs=rngs)
            for _ in range(cfg.depths[index])
        )
        stride = cfg.strides_after[index]
        self.upsample = Upsample(width, wider, stride, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Array, *, first: bool) -> Array:
        """x [B, T, H, W, C] -> [B, T', H', W', C']; `first` as in `Upsample`."""
        return self.upsample(run_blocks(self.blocks, x), first=first)


class DiffusionDecoder(nnx.Module):
    """Latents, not normalised, and noise to pixels."""

    def __init__(self, cfg: DiffusionDecoderConfig, *, rngs: Rngs):
        self.cfg = cfg
        context = cfg.channels[-1]
        width = cfg.diffusion_channels or context
        pixels = cfg.out_channels * cfg.patch_size**2
        self.latents_in = nnx.Linear(
            cfg.latent_channels, cfg.channels[0], dtype=cfg.dtype, rngs=rngs
        )
        self.stages = nnx.List(Stage(cfg, i, rngs=rngs) for i in range(STAGES - 1))
        self.pixels_in = nnx.Linear(pixels, width, dtype=cfg.dtype, rngs=rngs)
        self.timestep = TimestepMLP(cfg.timestep_dim, rngs=rngs)
        self.modulation = nnx.Linear(cfg.timestep_dim, MODULATION_ROWS * width, rngs=rngs)
        self.blocks = nnx.List(
            DiffusionBlock(
                width,
                cfg.kernels[-1],
                cfg.head_dim,
                context_channels=context,
                strips=cfg.strips,
                dtype=cfg.dtype,
                rngs=rngs,
            )
            for _ in range(cfg.depths[-1])
        )
        self.norm_out = nnx.Param(jnp.ones(width))
        self.pixels_out = nnx.Linear(width, pixels, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, latents: Array, draw: Draw) -> Array:
        """latents [B, F', H', W', C] -> pixels float32 [B, F, H, W, 3], about in [-1, 1].

        Args:
          latents: as an encoder returns them, without normalisation; of any size.
          draw: gives the standard normal noise of a shape; called once.

        Raises:
          UserError: another number of channels than C.
        """
        layout = Layout(self.cfg, latents.shape)
        noise = fit_noise(
            draw(layout.noise_shape), layout.canvas(layout.grid, first=True, last=True)
        )
        pixels = self.decode_tile(self.features(latents), noise, first=True)
        return layout.crop(pixels)

    def features(self, latents: Array) -> Array:
        """Stages 1 to 3: latents [B, F', H', W', C] -> [B, T, H, W, channels[3]].

        Smaller latents than `cfg.min_latents` are padded, and the last frame is repeated.
        """
        if latents.shape[-1] != self.cfg.latent_channels:
            raise UserError(
                f"latents of {latents.shape[-1]} channels: expected {self.cfg.latent_channels}"
            )
        latents = Layout(self.cfg, latents.shape).pad(latents)
        last = jnp.repeat(latents[:, -1:], self.cfg.repeats, axis=1)
        return self.first_stages(jnp.concatenate([latents, last], axis=1))

    def first_stages(self, latents: Array) -> Array:
        """Stages 1 to 3 of latents as they are: [B, F', H', W', C] -> [B, T, H, W, channels[3]]."""
        x = self.latents_in(latents.astype(self.cfg.dtype))
        for stage in self.stages[:-1]:
            x = stage(x, first=True)
        return x

    def decode_tile(self, features: Array, noise: Array, *, first: bool) -> Array:
        """Stages 4 and 5 of a tile of features.

        Args:
          features: [B, T, H, W, channels[3]].
          noise: float32 [B, f, h, w, 3] of the resolution of the result; f may be less than the
            features give: frames beyond are context that has served.
          first: whether the tile has the first frame of the clip.

        Returns:
          Pixels float32 [B, f, h, w, 3].
        """
        context = self.stages[-1](features, first=first)[:, : noise.shape[1]]
        steps = self.cfg.num_steps
        times = 1 - jnp.arange(steps + 1, dtype=jnp.float32) / steps

        def step(x: Array, times: Array) -> tuple[Array, None]:
            now, after = times
            predicted = self.predict(x, now, context)
            if self.cfg.prediction == "x0":  # exactly the prediction at the last step
                return predicted + (x - predicted) * (after / now), None
            return x - (now - after) * predicted, None

        pairs = jnp.stack([times[:-1], times[1:]], axis=1)
        return jax.lax.scan(step, noise.astype(jnp.float32), pairs)[0]

    def predict(self, pixels: Array, time: Array, context: Array) -> Array:
        """The pixels x0, or the velocity, seen in noisy pixels.

        Args:
          pixels: [B, F, H, W, 3].
          time: scalar, 1 for noise, 0 for none.
          context: [B, F, H / patch, W / patch, channels[4]].

        Returns:
          float32 [B, F, H, W, 3].
        """
        cfg = self.cfg
        embedded = jax.nn.silu(self.timestep(cfg.timestep_scale * time))
        modulation = self.modulation(embedded).reshape(MODULATION_ROWS, -1)
        x = self.pixels_in(patchify(pixels.astype(cfg.dtype), cfg.patch_size))
        x = run_blocks(self.blocks, x, context, modulation)
        x = self.pixels_out(rms_norm(x, NORM_EPS, self.norm_out[...]))
        return unpatchify(x, cfg.patch_size).astype(jnp.float32)


# ---- sizes ---------------------------------------------------------------------------------------


def grown(frames: int, stride: int, *, first: bool) -> int:
    """Frames that `frames` become where time is multiplied by `stride`."""
    return frames * stride - (first and stride == 2)


class Layout:
    """The sizes of everything in one decoding of latents of a shape [B, F', H', W', C]."""

    def __init__(self, cfg: DiffusionDecoderConfig, latent_shape: Sequence[int]):
        self.cfg = cfg
        self.batch, *self.latents, _ = latent_shape
        padded = [
            max(size, least) for size, least in zip(self.latents, cfg.min_latents, strict=True)
        ]
        missing = [full - size for full, size in zip(padded, self.latents, strict=True)]
        # Frames are added at the end only; of an odd number of rows the extra one is at the end.
        before = (0, missing[1] // 2, missing[2] // 2)
        self.padding = [(b, m - b) for b, m in zip(before, missing, strict=True)]
        self.grid = self._upsampled(padded, cfg.strides_after[:-1])  # features without repeats
        self.pixels = self._pixels(padded)
        self.wanted = self._pixels(self.latents)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the draw for the untiled decoding."""
        size = self.pixels
        if self.cfg.noise_per_tile:
            size = self.canvas(self.grid, first=True, last=True)
        return self.batch, *size, self.cfg.out_channels

    def canvas(self, cells: Sequence[int], *, first: bool, last: bool) -> Size:
        """Pixels that a tile of `cells` features is decoded to, before cropping.

        The last tile may need more frames than the clip has, for the attention window.
        """
        st, sh, sw = self.cfg.tile_scale
        frames = grown(cells[0], st, first=first)
        if last:
            with_repeats = frames + self.cfg.repeats * self.cfg.strides[0]
            frames = min(max(frames, self.cfg.kernels[-1][0]), with_repeats)
        return frames, cells[1] * sh, cells[2] * sw

    def pad(self, latents: Array) -> Array:
        return jnp.pad(latents, [(0, 0), *self.padding, (0, 0)], mode="edge")

    def crop(self, pixels: Array) -> Array:
        """Cuts [B, f, H, W, 3] of padded latents to the pixels of the latents, f to at most F."""
        (_, height, width), (_, sh, sw) = self.wanted, self.cfg.strides
        top, left = self.padding[1][0] * sh, self.padding[2][0] * sw
        return pixels[:, : self.wanted[0], top : top + height, left : left + width]

    def _upsampled(self, size: Sequence[int], strides: Sequence[Size]) -> Size:
        time, rows, columns = size
        for st, sh, sw in strides:
            time, rows, columns = grown(time, st, first=True), rows * sh, columns * sw
        return time, rows, columns

    def _pixels(self, latents: Sequence[int]) -> Size:
        time, rows, columns = self._upsampled(latents, self.cfg.strides_after)
        return time, rows * self.cfg.patch_size, columns * self.cfg.patch_size


def fit_noise(noise: Array, size: Size) -> Array:
    """Noise [B, F, H, W, 3] cut to a canvas of (f, h, w), or its last frame repeated up to f."""
    noise = noise[:, : size[0]]
    missing = size[0] - noise.shape[1]
    return jnp.pad(noise, [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
