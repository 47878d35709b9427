"""The audio VAE: log-mel frames to latents of four frames each, and back.

A small 2-D convolutional network over time and mel bins. Time is causal: every convolution looks
back only, so a latent does not depend on later sound, and a longer clip begins with the latents of
a shorter one. Everything is float32: the network is small, and errors in log-mels are audible.

Dims: B batch, T mel frames, A audio latents, M mel-latent bins (16 at release), C latent channels
(8), D features.
Source: `ltx_core/model/audio_vae` (audio_vae.py, causal_conv_2d.py, resnet.py, downsample.py,
upsample.py, attention.py, ops.py).
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.mel import MelConfig, log_mel
from ltx2_jax.models.layers import Rngs

# A latent stands for four mel frames, whatever the number of levels: the official constant, by
# which decoded frames are counted.
FRAMES_PER_LATENT = 4


@dataclasses.dataclass(frozen=True)
class AudioVAEConfig:
    """Sizes; the defaults are those of the official code."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)  # one per level; levels differ by a factor of 2
    num_blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int = 8
    in_channels: int = 2  # stereo
    out_channels: int = 2
    # Attention follows the blocks of the levels whose nominal size is listed; the first level has
    # `resolution`, the next half of it.
    resolution: int = 256
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    middle_attention: bool = True
    mel: MelConfig = dataclasses.field(default_factory=MelConfig)
    has_encoder: bool = True
    has_decoder: bool = True

    @property
    def latent_bins(self) -> int:
        """M."""
        return self.mel.bins // 2 ** (len(self.multipliers) - 1)

    @property
    def latents_per_second(self) -> float:
        return self.mel.sample_rate / (self.mel.hop * FRAMES_PER_LATENT)

    @property
    def attention(self) -> tuple[bool, ...]:
        """Level by level, whether attention follows each block."""
        sizes = [self.resolution // 2**level for level in range(len(self.multipliers))]
        return tuple(size in self.attention_resolutions for size in sizes)


# Every released checkpoint, 2.0 to 2.5.
AUDIO_VAE = AudioVAEConfig(attention_resolutions=(), middle_attention=False)


def pixel_norm(x: Array) -> Array:
    """x / rms(x) over the channels at every place, eps 1e-6."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _conv(
    n_in: int,
    n_out: int,
    size: int,
    *,
    stride: int = 1,
    bins_padding: tuple[int, int] | None = None,
    rngs: Rngs,
) -> nnx.Conv:
    """Over [B, T, M, D]: causal in time, centred in bins unless `bins_padding` says otherwise."""
    around = (size - 1) // 2, size // 2
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        strides=stride,
        padding=((size - 1, 0), bins_padding or around),
        dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """Two rounds of norm, SiLU and convolution around a skip."""

    def __init__(self, n_in: int, n_out: int, *, rngs: Rngs):
        self.conv_1 = _conv(n_in, n_out, 3, rngs=rngs)
        self.conv_2 = _conv(n_out, n_out, 3, rngs=rngs)
        self.shortcut = _conv(n_in, n_out, 1, rngs=rngs) if n_in != n_out else None

    def __call__(self, x: Array) -> Array:
        """[B, T, M, n_in] -> [B, T, M, n_out]."""
        y = self.conv_1(jax.nn.silu(pixel_norm(x)))
        y = self.conv_2(jax.nn.silu(pixel_norm(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class Attention(nnx.Module):
    """One head over all times and bins at once, without mask: not causal."""

    def __init__(self, features: int, *, rngs: Rngs):
        self.query = _conv(features, features, 1, rngs=rngs)
        self.key = _conv(features, features, 1, rngs=rngs)
        self.value = _conv(features, features, 1, rngs=rngs)
        self.out = _conv(features, features, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, T, M, D] -> the same."""
        batch, *grid, width = x.shape
        y = pixel_norm(x)
        q, k, v = (f(y).reshape(batch, -1, width) for f in (self.query, self.key, self.value))
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bqd,bkd->bqk", q, k, precision=highest) / math.sqrt(width)
        y = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), v, precision=highest)
        return x + self.out(y.reshape(batch, *grid, width))


class Level(nnx.Module):
    """Residual blocks at one resolution, then a change of it by `resample` where there is one."""

    def __init__(
        self, widths: tuple[int, ...], *, attention: bool, resample: str | None, rngs: Rngs
    ):
        self.blocks = nnx.List(
            [ResidualBlock(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.attentions = nnx.List(
            [Attention(width, rngs=rngs) for width in widths[1:] if attention]
        )
        self.direction = resample
        stride, padding = (2, (0, 1)) if resample == "down" else (1, None)
        self.resample = (
            _conv(widths[-1], widths[-1], 3, stride=stride, bins_padding=padding, rngs=rngs)
            if resample
            else None
        )

    def __call__(self, x: Array) -> Array:
        """[B, T, M, D] -> ceil(T / 2) and M / 2 going down, 2 T - 1 and 2 M going up."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        if self.direction == "down":
            return self.resample(x)
        if self.direction == "up":
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            # Frame 0 stands for itself alone, as it did in the encoder: drop one of its copies.
            return self.resample(x)[:, 1:]
        return x


class Middle(nnx.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, width: int, *, attention: bool, rngs: Rngs):
        self.block_1 = ResidualBlock(width, width, rngs=rngs)
        self.attention = Attention(width, rngs=rngs) if attention else None
        self.block_2 = ResidualBlock(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.block_1(x)
        return self.block_2(x if self.attention is None else self.attention(x))


class Encoder(nnx.Module):
    """Log-mels to mean and log-variance of the latents."""

    def __init__(self, config: AudioVAEConfig, *, rngs: Rngs):
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = _conv(config.in_channels, config.channels, 3, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    (before, *[width] * config.num_blocks),
                    attention=config.attention[i],
                    resample="down" if i < last else None,
                    rngs=rngs,
                )
                for i, (before, width) in enumerate(
                    zip([config.channels, *widths[:-1]], widths, strict=True)
                )
            ]
        )
        self.middle = Middle(widths[-1], attention=config.middle_attention, rngs=rngs)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, mel: Array) -> Array:
        """[B, T, mels, channels] -> [B, ceil(T / 4), M, 2 C]."""
        x = self.conv_in(mel)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(pixel_norm(self.middle(x))))


class Decoder(nnx.Module):
    """Latents to log-mels. `levels` are counted as in the encoder and run from the last."""

    def __init__(self, config: AudioVAEConfig, *, rngs: Rngs):
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = _conv(config.latent_channels, widths[-1], 3, rngs=rngs)
        self.middle = Middle(widths[-1], attention=config.middle_attention, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    (before, *[width] * (config.num_blocks + 1)),
                    attention=config.attention[i],
                    resample="up" if i > 0 else None,
                    rngs=rngs,
                )
                for i, (before, width) in enumerate(
                    zip([*widths[1:], widths[-1]], widths, strict=True)
                )
            ]
        )
        self.conv_out = _conv(widths[0], config.out_channels, 3, rngs=rngs)

    def __call__(self, latents: Array) -> Array:
        """[B, A, M, C] -> [B, 4 A - 3, 4 M, channels]."""
        x = self.middle(self.conv_in(latents))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(jax.nn.silu(pixel_norm(x)))


class AudioVAE(nnx.Module):
    """Encoder, decoder and the statistics that latents are normalised by.

    The statistics are vectors of C * M numbers in the order of a latent token, channel-major.
    """

    def __init__(self, config: AudioVAEConfig, *, rngs: Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs) if config.has_encoder else None
        self.decoder = Decoder(config, rngs=rngs) if config.has_decoder else None
        size = config.latent_channels * config.latent_bins
        self.mean = nnx.Param(jnp.zeros(size))
        self.std = nnx.Param(jnp.ones(size))

    def encode(self, mel: Array) -> Array:
        """Normalised latents float32 [B, ceil(T / 4), M, C] of log-mels [B, T, mels, channels].

        The posterior's mean. A clip of F video frames uses the first round(F / fps * 25) latents.

        Raises:
            UserError: no frames, or other bins or channels than the config's.
        """
        expected = (self.config.mel.bins, self.config.in_channels)
        if mel.ndim != 4 or mel.shape[1] < 1 or mel.shape[2:] != expected:
            raise UserError(
                f"mel of shape {mel.shape}: expected [B, T, {expected[0]}, {expected[1]}], T >= 1"
            )
        mean = self.encoder(mel)[..., : self.config.latent_channels]
        return (mean - self._grid(self.mean)) / self._grid(self.std)

    def encode_waveform(self, waveform: Array) -> Array:
        """`encode` of the log-mels of a waveform [B, samples, channels] at config.mel.sample_rate.

        ceil((1 + samples // hop) / 4) latents. Sound that is shorter than the half window that the
        STFT reflects at its ends (32 ms) is followed by silence up to there; the official code
        fails.

        Raises:
            UserError: no samples, or another number of channels than the config's.
        """
        channels, mel = self.config.in_channels, self.config.mel
        if waveform.ndim != 3 or waveform.shape[1] < 1 or waveform.shape[2] != channels:
            raise UserError(
                f"waveform of shape {waveform.shape}: expected [B, samples, {channels}], "
                "with one sample or more"
            )
        missing = max(0, mel.n_fft // 2 + 1 - waveform.shape[1])
        return self.encode(log_mel(jnp.pad(waveform, ((0, 0), (0, missing), (0, 0))), mel))

    def decode(self, latents: Array) -> Array:
        """Log-mels float32 [B, 4 A - 3, mels, channels] of normalised latents [B, A, M, C].

        Raises:
            UserError: no latents, or other bins or channels than the config's.
        """
        expected = (self.config.latent_bins, self.config.latent_channels)
        if latents.ndim != 4 or latents.shape[1] < 1 or latents.shape[2:] != expected:
            raise UserError(
                f"audio latents of shape {latents.shape}: "
                f"expected [B, A, {expected[0]}, {expected[1]}], A >= 1"
            )
        x = latents.astype(jnp.float32) * self._grid(self.std) + self._grid(self.mean)
        mel = self.decoder(x)
        # This cuts nothing off with three levels and mel bins that are a multiple of four.
        frames = FRAMES_PER_LATENT * (latents.shape[1] - 1) + 1
        bins = self.config.mel.bins
        mel = mel[:, :frames, :bins]
        missing = frames - mel.shape[1], bins - mel.shape[2]
        return jnp.pad(mel, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))

    def _grid(self, statistics: nnx.Param) -> Array:
        """[C * M] -> [M, C], as the latents lie."""
        values = statistics[...].astype(jnp.float32)
        return values.reshape(self.config.latent_channels, self.config.latent_bins).T
