"""The vocoder: log-mels to a stereo waveform.

One generator (HiFi-GAN: transposed convolutions, each followed by the mean of several dilated
residual blocks) in two forms. 2.0 has leaky ReLUs and gives 24 kHz. From 2.3 on the activations are
periodic and anti-aliased (BigVGAN v2), the generator gives 16 kHz, and a second generator of the
same kind, which reads the log-mels of that waveform, adds what lies above: 48 kHz.

Everything is float32 at the highest precision of matrix products: in a hundred convolutions in a
row, the rounding of bfloat16 adds up to an error that is heard.

Dims: B batch, T mel frames, C channels. Waveforms [B, samples, 2].
Source: `ltx_core/model/audio_vae` (vocoder.py, resnet.py, model_configurator.py).
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.bandwidth_extension import BandwidthExtension
from ltx2_jax.models.layers import Rngs

HIGHEST = jax.lax.Precision.HIGHEST
CHANNELS = 2  # of the waveform and of the mels: the official sizes are those of stereo


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """One generator; the defaults are those of the official code."""

    channels: int = 1024  # after the first convolution; each upsampling halves them
    upsample_rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 15, 8, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    periodic: bool = False  # anti-aliased snake activations instead of leaky ReLUs
    final_activation: str | None = "tanh"  # or "clip", or None
    final_bias: bool = True
    bins: int = 64

    def __post_init__(self) -> None:
        for first, second in (
            ("upsample_rates", "upsample_kernels"),
            ("block_kernels", "block_dilations"),
        ):
            a, b = getattr(self, first), getattr(self, second)
            if len(a) != len(b):
                raise UserError(f"vocoder {first} {a} and {second} {b} differ in length")
        if self.widths[-1] < 1:
            raise UserError(f"vocoder channels {self.channels} are too few to be halved so often")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate:
                raise UserError(f"vocoder upsample kernel {kernel} is shorter than its rate {rate}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before the first and after every upsampling."""
        return tuple(self.channels // 2**i for i in range(len(self.upsample_rates) + 1))

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.upsample_rates)


@dataclasses.dataclass(frozen=True)
class ExtensionConfig:
    """Bandwidth extension: the second generator and the log-mels that it reads."""

    generator: GeneratorConfig
    sample_rate: int = 48000  # Hz, of the result
    n_fft: int = 512  # samples at the lower rate, also the window length
    hop: int = 80


@dataclasses.dataclass(frozen=True)
class VocoderConfig:
    """A generator, and from 2.3 on an extension of its bandwidth."""

    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    sample_rate: int = 24000  # Hz, of the generator's waveform
    extension: ExtensionConfig | None = None

    def __post_init__(self) -> None:
        if self.extension is None:
            return
        ratio, rest = divmod(self.extension.sample_rate, self.sample_rate)
        if rest or ratio < 1:
            raise UserError(
                f"vocoder output rate {self.extension.sample_rate} Hz is not a multiple of the "
                f"{self.sample_rate} Hz before the bandwidth extension"
            )
        made, needed = self.extension.generator.samples_per_frame, self.extension.hop * ratio
        if made != needed:
            raise UserError(
                f"vocoder bandwidth extension makes {made} samples per mel frame; hop "
                f"{self.extension.hop} at {ratio} times the rate needs {needed}"
            )


VOCODER_2_0 = VocoderConfig()
# 2.3 and 2.5.
VOCODER_2_3 = VocoderConfig(
    generator=GeneratorConfig(
        channels=1536,
        upsample_rates=(5, 2, 2, 2, 2, 2),
        upsample_kernels=(11, 4, 4, 4, 4, 4),
        periodic=True,
        final_activation="clip",
        final_bias=False,
    ),
    sample_rate=16000,
    extension=ExtensionConfig(
        GeneratorConfig(
            channels=512,
            upsample_rates=(6, 5, 2, 2, 2),
            upsample_kernels=(12, 11, 4, 4, 4),
            periodic=True,
            final_activation=None,
            final_bias=False,
        )
    ),
)


# ---- activations ---------------------------------------------------------------------------------

TAPS = 12  # of the low-pass filters at twice the rate


def kaiser_sinc() -> np.ndarray:
    """The low-pass filter at half of the Nyquist frequency, sum 1, float32 [TAPS].

    It is BigVGAN's, with a Kaiser window for 51 dB, as six taps would need for a transition of 1.2
    Nyquist.
    """
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * 1.2 + 7.95
    window = np.kaiser(TAPS, 0.1102 * (attenuation - 8.7))
    taps = window * np.sinc((np.arange(TAPS) - (TAPS - 1) / 2) / 2)
    return (taps / taps.sum()).astype(np.float32)


class LeakyReLU(nnx.Module):
    def __init__(self, slope: float):
        self.slope = slope

    def __call__(self, x: Array) -> Array:
        return jax.nn.leaky_relu(x, self.slope)


class AntiAliasedSnake(nnx.Module):
    """x + sin(a x)^2 / b at twice the sample rate, a and b per channel.

    The sine of a signal has overtones above the Nyquist frequency; at twice the rate they fit, and
    the filter on the way back removes them. Both filters are read from the checkpoint.
    """

    def __init__(self, channels: int):
        self.log_alpha = nnx.Param(jnp.zeros(channels))
        self.log_beta = nnx.Param(jnp.zeros(channels))
        self.up_filter = nnx.Param(jnp.asarray(kaiser_sinc())[None, None])  # [1, 1, TAPS]
        self.down_filter = nnx.Param(jnp.asarray(kaiser_sinc())[None, None])

    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> the same."""
        parameters = (self.log_alpha, self.log_beta, self.up_filter, self.down_filter)
        return _anti_aliased_snake(x, *(p[...].astype(jnp.float32) for p in parameters))


@jax.jit  # jitted by itself, so that the 200 of a vocoder are traced once for each shape
def _anti_aliased_snake(
    x: Array,  # [B, T, C]
    log_alpha: Array,  # [C]
    log_beta: Array,  # [C]
    up_filter: Array,  # [1, 1, TAPS]
    down_filter: Array,  # [1, 1, TAPS]
) -> Array:
    """The signal at twice the rate is kept as its even and its odd samples.

    So all filtering is sums of shifted copies of [B, T, C], without interleaving and without
    convolutions of single channels, which no accelerator is good at.
    """
    alpha, beta = jnp.exp(log_alpha), jnp.exp(log_beta)
    up, down = 2 * up_filter[0, 0], down_filter[0, 0]  # doubled, as every other sample is zero

    def snake(u: Array) -> Array:
        return u + jnp.square(jnp.sin(u * alpha)) / (beta + 1e-9)

    # The sample at 2 t + i is the sum over m of x[t - m] times tap 5 + i + 2 m.
    x = jnp.concatenate([x[:, :1]] * 3 + [x] + [x[:, -1:]] * 3, axis=1)
    even, odd = snake(_slide(x[:, :-1], up[1::2][::-1])), snake(_slide(x[:, 1:], up[0::2][::-1]))
    # Beyond its ends the signal at twice the rate repeats its first sample, an even one, and its
    # last, an odd one. Tap k then meets the sample at 2 t + k - 5.
    first, last = even[:, :1], odd[:, -1:]
    even = jnp.concatenate([first] * 2 + [even] + [last] * 3, axis=1)
    odd = jnp.concatenate([first] * 3 + [odd] + [last] * 2, axis=1)
    return _slide(odd, down[0::2]) + _slide(even, down[1::2])


def _slide(x: Array, taps: Array) -> Array:
    """Sum over k of taps[k] x[:, t + k]: [B, T + K - 1, C] -> [B, T, C]."""
    count = taps.shape[0]
    length = x.shape[1] - count + 1
    return sum(taps[k] * x[:, k : k + length] for k in range(count))


# ---- the generator -------------------------------------------------------------------------------

# What nnx.Conv passes besides the arrays.
_SETTINGS = (
    "strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "precision",
    "out_sharding",
)


@partial(jax.jit, static_argnames=_SETTINGS)
def _convolve(
    x: Array,  # [B, T, n]
    kernel: Array,  # [K, n, m]
    strides: tuple[int],
    padding: str,
    *,
    rhs_dilation: tuple[int],
    **settings: Any,
) -> Array:
    """`lax.conv_general_dilated` to [B, T, m]; on a TPU the same by a product of matrices.

    For the six convolutions of a block with 96 channels and 80,000 samples, the compiler of TPU v5e
    needs 123 s of one core, and 11 s for the products (libtpu 0.0.42); there are 33 blocks. The
    products move fewer bytes, too, and a few channels times K fill the matrix unit better.
    """
    convolution = partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        rhs_dilation=rhs_dilation,
        **settings,
    )
    product = partial(product_of_shifted, dilation=rhs_dilation[0])
    return jax.lax.platform_dependent(x, kernel, tpu=product, default=convolution)


def product_of_shifted(x: Array, kernel: Array, dilation: int) -> Array:
    """The "SAME" convolution of [B, T, n] with [K, n, m]: K shifted copies of x, side by side."""
    size, length = kernel.shape[0], x.shape[1]
    margin = (size - 1) * dilation
    x = jnp.pad(x, ((0, 0), (margin // 2, margin - margin // 2), (0, 0)))
    shifted = [x[:, k * dilation : k * dilation + length] for k in range(size)]
    columns = jnp.concatenate(shifted, axis=-1)
    return jnp.matmul(columns, kernel.reshape(-1, kernel.shape[-1]), precision=HIGHEST)


_conv = partial(
    nnx.Conv,
    padding="SAME",
    dtype=jnp.float32,
    precision=HIGHEST,
    conv_general_dilated=_convolve,
)


class ResidualBlock(nnx.Module):
    """Pairs of a dilated and a plain convolution, an activation before each, around skips."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        dilations: tuple[int, ...],
        *,
        periodic: bool,
        rngs: Rngs,
    ):
        def activations() -> nnx.List:
            return nnx.List([activation(channels, periodic, 0.1) for _ in dilations])

        self.dilated = nnx.List(
            [_conv(channels, channels, kernel, kernel_dilation=d, rngs=rngs) for d in dilations]
        )
        self.plain = nnx.List([_conv(channels, channels, kernel, rngs=rngs) for _ in dilations])
        self.before_dilated, self.before_plain = activations(), activations()

    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> the same."""
        for i, (dilated, plain) in enumerate(zip(self.dilated, self.plain, strict=True)):
            y = dilated(self.before_dilated[i](x))
            x = x + plain(self.before_plain[i](y))
        return x


def activation(channels: int, periodic: bool, slope: float) -> nnx.Module:
    return AntiAliasedSnake(channels) if periodic else LeakyReLU(slope)


class Generator(nnx.Module):
    """Log-mels to a waveform, `config.samples_per_frame` samples for every frame."""

    def __init__(self, config: GeneratorConfig, *, rngs: Rngs):
        self.config = config
        widths = config.widths
        self.conv_in = _conv(CHANNELS * config.bins, widths[0], 7, rngs=rngs)
        upsamples, blocks = [], []
        for i, (rate, kernel) in enumerate(
            zip(config.upsample_rates, config.upsample_kernels, strict=True)
        ):
            margin = kernel - 1 - (kernel - rate) // 2
            upsamples.append(
                nnx.ConvTranspose(
                    widths[i],
                    widths[i + 1],
                    kernel,
                    strides=rate,
                    padding=((margin, margin),),
                    transpose_kernel=True,
                    dtype=jnp.float32,
                    precision=HIGHEST,
                    rngs=rngs,
                )
            )
            for size, dilations in zip(config.block_kernels, config.block_dilations, strict=True):
                blocks.append(
                    ResidualBlock(
                        widths[i + 1], size, dilations, periodic=config.periodic, rngs=rngs
                    )
                )
        self.upsamples, self.blocks = nnx.List(upsamples), nnx.List(blocks)
        # PyTorch's default slope, not that of all the others.
        self.last_activation = activation(widths[-1], config.periodic, 0.01)
        self.conv_out = _conv(widths[-1], CHANNELS, 7, use_bias=config.final_bias, rngs=rngs)

    def __call__(self, mel: Array) -> Array:
        """[B, T, mels, 2] -> [B, samples, 2]."""
        batch, frames, bins, channels = mel.shape
        x = jnp.swapaxes(mel, 2, 3).reshape(batch, frames, channels * bins)
        x = self.conv_in(x.astype(jnp.float32))
        each = len(self.config.block_kernels)
        for i, upsample in enumerate(self.upsamples):
            x = upsample(x if self.config.periodic else jax.nn.leaky_relu(x, 0.1))
            x = sum(block(x) for block in self.blocks[i * each : (i + 1) * each]) / each
        x = self.conv_out(self.last_activation(x))
        if self.config.final_activation == "tanh":
            return jnp.tanh(x)
        return jnp.clip(x, -1.0, 1.0) if self.config.final_activation == "clip" else x


# ---- the vocoder ---------------------------------------------------------------------------------


class Vocoder(nnx.Module):
    """Log-mels to the final waveform."""

    def __init__(self, config: VocoderConfig, *, rngs: Rngs):
        self.config = config
        self.generator = Generator(config.generator, rngs=rngs)
        self.extension = _extension(config, rngs) if config.extension else None

    @property
    def output_sample_rate(self) -> int:
        """Hz."""
        extension = self.config.extension
        return self.config.sample_rate if extension is None else extension.sample_rate

    def __call__(self, mel: Array) -> Array:
        """Waveform float32 [B, samples, 2] in [-1, 1] of log-mels [B, T, mels, 2].

        Raises:
            UserError: no frames, or other bins than the config's, or not two channels.
        """
        bins = self.config.generator.bins
        if mel.ndim != 4 or mel.shape[1] < 1 or mel.shape[2:] != (bins, CHANNELS):
            raise UserError(
                f"mel of shape {mel.shape}: expected [B, T, {bins}, {CHANNELS}], T >= 1"
            )
        waveform = self.generator(mel)
        return waveform if self.extension is None else self.extension(waveform)


def _extension(config: VocoderConfig, rngs: Rngs) -> BandwidthExtension:
    second = config.extension
    return BandwidthExtension(
        Generator(second.generator, rngs=rngs),
        bins=second.generator.bins,
        n_fft=second.n_fft,
        hop=second.hop,
        ratio=second.sample_rate // config.sample_rate,
    )
