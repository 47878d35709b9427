"""The convolutional video VAE of LTX-2: pixels to latents and back.

One network for all releases: the lists of blocks in the config decide. The encoder is causal in
time; the decoder sees the future too, unless `causal_decoder`. Both work on patches of pixels and
halve or double time and space by `compress_*` blocks, so F = st k + 1 frames of H x W pixels are
k + 1 latents of H / sh x W / sw; (st, sh, sw) = (8, 32, 32) in all releases.

Dims: B batch, F frames, H, W pixels, C latent channels, F', H', W' the latent grid.
Source: `ltx_core/model/video_vae/{video_vae,conv_video_decoder}.py`; block lists of the presets:
the `vae` config in the metadata of the released files.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.video_vae_blocks import (
    PADDING_MODES,
    CausalConv,
    ConvStyle,
    Downsample,
    Draw,
    FrameAttention,
    ResidualBlock,
    ResidualBlocks,
    TimestepMLP,
    Upsample,
    patchify,
    pixel_norm,
    shifts_and_scales,
    unpatchify,
)
from ltx2_jax.models.layers import Rngs, modulate

# A decoder conditioned on a timestep is told that its latents are this noisy, and they are made so.
DECODE_TIMESTEP = 0.05
DECODE_NOISE = 0.025
TIMESTEP_SCALE = 1000.0

_COMPRESS = {"time": (2, 1, 1), "space": (1, 2, 2), "all": (2, 2, 2)}
ENCODER_KINDS = (
    "res_x",
    "res_x_y",
    *(f"compress_{axes}" for axes in _COMPRESS),
    *(f"compress_{axes}_res" for axes in _COMPRESS),
    "compress_all_x_y",
    "attn",
)
DECODER_KINDS = ("res_x", "res_x_y", *(f"compress_{axes}" for axes in _COMPRESS), "attn")
# Channels that the encoder returns after C means, for each kind of log-variance.
_LOG_VAR_CHANNELS = {
    "uniform": lambda channels: 1,
    "constant": lambda channels: 1,
    "per_channel": lambda channels: channels,
}

Noise = Array | Sequence[Array]  # a typed PRNG key, or the draws themselves in the order of use


@dataclasses.dataclass(frozen=True)
class Block:
    """One entry of a block list.

    Kinds: `res_x` (a run of residual blocks), `res_x_y` (one that changes the width),
    `compress_{time,space,all}` (a strided convolution in the encoder, a depth-to-space in the
    decoder), `compress_..._res` (a space-to-depth with a skip, encoder), `compress_all_x_y` (a
    strided convolution that changes the width, encoder) and `attn` (attention within a frame).
    """

    kind: str
    layers: int = 1  # res_x
    multiplier: int = 1  # width: times this in the encoder, divided by it in the decoder
    residual: bool = False  # compress_all of the decoder
    inject_noise: bool = False  # res_x, res_x_y of the decoder

    @property
    def stride(self) -> tuple[int, int, int]:
        """Time, height, width."""
        name, _, rest = self.kind.partition("_")
        return _COMPRESS[rest.split("_")[0]] if name == "compress" else (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig:
    """Hyper-parameters, with the defaults that the official code has for absent keys."""

    latent_channels: int = 128
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 4
    encoder_blocks: tuple[Block, ...] | None = ()  # None: there is no encoder
    decoder_blocks: tuple[Block, ...] | None = ()  # None: no decoder; the last block comes first
    decoder_base_channels: int = 128  # times the multipliers of the blocks: width at the latents
    encoder_padding: str = "zeros"  # of height and width
    decoder_padding: str = "reflect"
    causal_decoder: bool = False
    timestep_conditioning: bool = True  # of the decoder
    latent_log_var: str = "uniform"  # channels after the means: read by nothing, but stored
    dtype: str = "bfloat16"  # of activations; norm statistics and latents are float32

    def __post_init__(self) -> None:
        for name, kinds in (("encoder", ENCODER_KINDS), ("decoder", DECODER_KINDS)):
            for block in getattr(self, f"{name}_blocks") or ():
                if block.kind not in kinds:
                    raise UserError(
                        f"{name}_blocks: {block.kind!r} is not supported, only {', '.join(kinds)}"
                    )
                if block.layers < 1 or block.multiplier < 1:
                    raise UserError(f"{name}_blocks: {block} needs layers and multiplier >= 1")
            padding = getattr(self, f"{name}_padding")
            if padding not in PADDING_MODES:
                raise UserError(f"{name}_padding {padding!r}: expected {', '.join(PADDING_MODES)}")
        if self.latent_log_var not in _LOG_VAR_CHANNELS:
            raise UserError(
                f"latent_log_var {self.latent_log_var!r}: expected {', '.join(_LOG_VAR_CHANNELS)}"
            )

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames per latent frame, pixels per latent row and column."""
        blocks = self.decoder_blocks if self.encoder_blocks is None else self.encoder_blocks
        strides = [1, self.patch_size, self.patch_size]
        for block in blocks or ():
            strides = [a * b for a, b in zip(strides, block.stride, strict=True)]
        return tuple(strides)

    @property
    def uses_noise(self) -> bool:
        """Whether decoding draws random numbers."""
        return self.decoder_blocks is not None and (
            self.timestep_conditioning or any(b.inject_noise for b in self.decoder_blocks)
        )


# Released sizes. The convolutional VAE of 2.5 is that of 2.3.
VIDEO_VAE_2_0 = VideoVAEConfig(
    encoder_blocks=(
        Block("res_x", layers=4),
        Block("compress_space_res", multiplier=2),
        Block("res_x", layers=6),
        Block("compress_time_res", multiplier=2),
        Block("res_x", layers=6),
        Block("compress_all_res", multiplier=2),
        Block("res_x", layers=2),
        Block("compress_all_res", multiplier=2),
        Block("res_x", layers=2),
    ),
    decoder_blocks=(
        Block("res_x", layers=5),
        Block("compress_all", multiplier=2, residual=True),
        Block("res_x", layers=5),
        Block("compress_all", multiplier=2, residual=True),
        Block("res_x", layers=5),
        Block("compress_all", multiplier=2, residual=True),
        Block("res_x", layers=5),
    ),
    timestep_conditioning=False,
)
VIDEO_VAE_2_3 = VideoVAEConfig(
    encoder_blocks=(
        Block("res_x", layers=4),
        Block("compress_space_res", multiplier=2),
        Block("res_x", layers=6),
        Block("compress_time_res", multiplier=2),
        Block("res_x", layers=4),
        Block("compress_all_res", multiplier=2),
        Block("res_x", layers=2),
        Block("compress_all_res", multiplier=1),
        Block("res_x", layers=2),
    ),
    decoder_blocks=(
        Block("res_x", layers=4),
        Block("compress_space", multiplier=2),
        Block("res_x", layers=6),
        Block("compress_time", multiplier=2),
        Block("res_x", layers=4),
        Block("compress_all", multiplier=1),
        Block("res_x", layers=2),
        Block("compress_all", multiplier=2),
        Block("res_x", layers=2),
    ),
    decoder_padding="zeros",
    timestep_conditioning=False,
)


class LatentStatistics(nnx.Module):
    """Mean and deviation of every latent channel: what turns a network's latents into normal ones.

    Source: `ltx_core/model/video_vae/ops.py`.
    """

    def __init__(self, channels: int):
        self.mean = nnx.Param(jnp.zeros(channels))
        self.std = nnx.Param(jnp.ones(channels))

    def normalize(self, x: Array) -> Array:
        """x [..., C] -> float32 [..., C], zero mean and unit deviation over the training data."""
        return (x.astype(jnp.float32) - self._mean) / self._std

    def unnormalize(self, x: Array) -> Array:
        """x [..., C] -> float32 [..., C], the inverse of `normalize`."""
        return x.astype(jnp.float32) * self._std + self._mean

    @property
    def _mean(self) -> Array:
        return self.mean[...].astype(jnp.float32)

    @property
    def _std(self) -> Array:
        return self.std[...].astype(jnp.float32)


class VideoEncoder(nnx.Module):
    """Pixels to the means of the latents' distribution, not normalised."""

    def __init__(self, cfg: VideoVAEConfig, *, rngs: Rngs):
        self.cfg = cfg
        style = ConvStyle(cfg.encoder_padding, causal=True, dtype=cfg.dtype)
        width = cfg.latent_channels
        self.conv_in = CausalConv(cfg.in_channels * cfg.patch_size**2, width, style, rngs=rngs)
        blocks = []
        for entry in cfg.encoder_blocks:
            block, width = _encoder_block(entry, width, style, rngs)
            blocks.append(block)
        self.blocks = nnx.List(blocks)
        out = cfg.latent_channels + _LOG_VAR_CHANNELS[cfg.latent_log_var](cfg.latent_channels)
        self.conv_out = CausalConv(width, out, style, rngs=rngs)

    def __call__(self, pixels: Array) -> Array:
        """pixels [B, F, H, W, 3] in [-1, 1] -> means float32 [B, F', H', W', C].

        Raises:
          UserError: F is not st k + 1, or H or W is not a multiple of its stride.
        """
        cfg = self.cfg
        st, sh, sw = cfg.strides
        frames, height, width, channels = pixels.shape[1:]
        if frames % st != 1 % st or height % sh or width % sw or channels != cfg.in_channels:
            raise UserError(
                f"video of {frames} frames of {height} x {width} pixels, {channels} channels: "
                f"expected {st} k + 1 frames, multiples of {sh} x {sw}, {cfg.in_channels} channels"
            )
        x = self.conv_in(patchify(pixels.astype(cfg.dtype), cfg.patch_size))
        for block in self.blocks:
            x = block(x)
        x = self.conv_out(jax.nn.silu(pixel_norm(x)))
        return x[..., : cfg.latent_channels].astype(jnp.float32)


def _encoder_block(
    entry: Block, width: int, style: ConvStyle, rngs: Rngs
) -> tuple[nnx.Module, int]:
    """The module of an entry of the list, and the width after it."""
    wider = width * entry.multiplier
    if entry.kind == "res_x":
        return ResidualBlocks(width, entry.layers, style, rngs=rngs), width
    if entry.kind == "res_x_y":
        return ResidualBlock(width, wider, style, rngs=rngs), wider
    if entry.kind == "attn":
        return FrameAttention(width, style, rngs=rngs), width
    if entry.kind.endswith("_res"):
        return Downsample(width, wider, entry.stride, style, rngs=rngs), wider
    if entry.kind == "compress_all_x_y":
        return CausalConv(width, wider, style, stride=entry.stride, rngs=rngs), wider
    return CausalConv(width, width, style, stride=entry.stride, rngs=rngs), width


class VideoDecoder(nnx.Module):
    """Latents, not normalised, to pixels."""

    def __init__(self, cfg: VideoVAEConfig, *, rngs: Rngs):
        self.cfg = cfg
        style = ConvStyle(cfg.decoder_padding, causal=cfg.causal_decoder, dtype=cfg.dtype)
        # The list runs from pixels to latents, as the encoder's does.
        entries = cfg.decoder_blocks[::-1]
        width = cfg.decoder_base_channels * math.prod(entry.multiplier for entry in entries)
        self.conv_in = CausalConv(cfg.latent_channels, width, style, rngs=rngs)
        blocks = []
        for entry in entries:
            block, width = _decoder_block(entry, width, style, cfg.timestep_conditioning, rngs)
            blocks.append(block)
        self.blocks = nnx.List(blocks)
        self.conv_out = CausalConv(width, cfg.out_channels * cfg.patch_size**2, style, rngs=rngs)
        if cfg.timestep_conditioning:
            self.timestep_scale = nnx.Param(jnp.float32(TIMESTEP_SCALE))
            self.timestep_mlp = TimestepMLP(2 * width, rngs=rngs)
            self.table = nnx.Param(jnp.zeros((2, width)))

    def __call__(
        self, latents: Array, timestep: Array | float | None = None, draw: Draw | None = None
    ) -> Array:
        """latents [B, F', H', W', C] -> pixels float32 [B, F, H, W, 3], about in [-1, 1].

        Args:
          latents: as the encoder returns them; noise is up to the caller (`VideoVAE.decode`).
          timestep: how noisy they are, one number or [B], DECODE_TIMESTEP when None; only for
            `timestep_conditioning`.
          draw: gives the next standard normal draw of a shape, where blocks inject noise: a map
            [rows, columns] for either convolution of every such residual block, in order.

        Raises:
          UserError: another number of channels than C.
        """
        cfg = self.cfg
        if latents.shape[-1] != cfg.latent_channels:
            raise UserError(
                f"latents of {latents.shape[-1]} channels: expected {cfg.latent_channels}"
            )
        if cfg.timestep_conditioning:
            timestep = jnp.asarray(DECODE_TIMESTEP if timestep is None else timestep, jnp.float32)
            timestep = jnp.broadcast_to(timestep, latents.shape[:1]) * self.timestep_scale[...]
        x = self.conv_in(latents.astype(cfg.dtype))
        for block in self.blocks:
            if isinstance(block, ResidualBlocks):
                x = block(x, timestep, draw)
            elif isinstance(block, ResidualBlock):
                x = block(x, draw=draw)
            else:
                x = block(x)
        x = pixel_norm(x)
        if cfg.timestep_conditioning:
            embedded = self.timestep_mlp(timestep)
            shift, scale = shifts_and_scales(self.table[...], embedded, x.dtype)
            x = modulate(x, scale, shift)
        x = self.conv_out(jax.nn.silu(x))
        return unpatchify(x, cfg.patch_size).astype(jnp.float32)


def _decoder_block(
    entry: Block, width: int, style: ConvStyle, conditioned: bool, rngs: Rngs
) -> tuple[nnx.Module, int]:
    """The module of an entry of the list, and the width after it."""
    narrower = width // entry.multiplier
    if entry.kind == "res_x":
        block = ResidualBlocks(
            width,
            entry.layers,
            style,
            conditioned=conditioned,
            inject_noise=entry.inject_noise,
            rngs=rngs,
        )
        return block, width
    if entry.kind == "res_x_y":
        block = ResidualBlock(width, narrower, style, inject_noise=entry.inject_noise, rngs=rngs)
        return block, narrower
    if entry.kind == "attn":
        return FrameAttention(width, style, rngs=rngs), width
    block = Upsample(width, narrower, entry.stride, style, residual=entry.residual, rngs=rngs)
    return block, narrower


class VideoVAE(nnx.Module):
    """Encoder, decoder (either may be absent, see the config) and statistics of the latents."""

    def __init__(self, cfg: VideoVAEConfig, *, rngs: Rngs):
        self.cfg = cfg
        self.statistics = LatentStatistics(cfg.latent_channels)
        self.encoder = None if cfg.encoder_blocks is None else VideoEncoder(cfg, rngs=rngs)
        self.decoder = None if cfg.decoder_blocks is None else VideoDecoder(cfg, rngs=rngs)

    def encode(self, pixels: Array) -> Array:
        """pixels [B, F, H, W, 3] in [-1, 1] -> normalised latents float32 [B, F', H', W', C].

        The last frames that are more than st k + 1 are left out.

        Raises:
          UserError: H or W is not a multiple of its stride, or not three colours.
        """
        frames = pixels.shape[1]
        frames -= (frames - 1) % self.cfg.strides[0]
        return self.statistics.normalize(self.encoder(pixels[:, :frames]))

    def decode(
        self,
        latents: Array,
        timestep: Array | float | None = None,
        noise: Noise | None = None,
    ) -> Array:
        """Normalised latents [B, F', H', W', C] -> pixels float32 [B, F, H, W, 3], not clipped.

        Args:
          latents: as `encode` returns them.
          timestep: see `VideoDecoder`.
          noise: for a config that `uses_noise`: a typed PRNG key, or all standard normal draws in
            the order of use. With `timestep_conditioning` the first has the shape of `latents`;
            the others are those of `VideoDecoder`.

        Raises:
          UserError: the wrong number of channels, no noise where it is needed, draws that do not
            fit.
        """
        cfg = self.cfg
        if cfg.uses_noise and noise is None:
            raise UserError("noise: this video decoder adds noise; pass a jax.random.key")
        draw = _draws(noise) if cfg.uses_noise else None
        latents = latents.astype(jnp.float32)
        if cfg.timestep_conditioning:
            latents = DECODE_NOISE * draw(latents.shape) + (1 - DECODE_NOISE) * latents
        return self.decoder(self.statistics.unnormalize(latents), timestep, draw)


def _draws(noise: Noise) -> Draw:
    if isinstance(noise, Array) and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        keys = (jax.random.fold_in(noise, i) for i in itertools.count())
        return lambda shape: jax.random.normal(next(keys), shape, jnp.float32)
    given = iter(noise)

    def draw(shape: tuple[int, ...]) -> Array:
        value = next(given, None)
        if value is None or value.shape != shape:
            got = "no more" if value is None else f"one of {value.shape}"
            raise UserError(f"noise: the decoder needs a draw of {shape}, got {got}")
        return value

    return draw
