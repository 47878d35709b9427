"""Bandwidth extension: what lies above the top of a vocoder's waveform, guessed from below.

Dims: B batch, mels mel bins. Waveforms [B, samples, 2].
Source: `ltx_core/model/audio_vae/vocoder.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.codecs.mel import frame
from ltx2_jax.models.codecs.resample import sinc_taps

HIGHEST = jax.lax.Precision.HIGHEST
FLOOR = 1e-5  # smallest mel magnitude that the log sees


class BandwidthExtension(nnx.Module):
    """A waveform to one of `ratio` times the rate: interpolation plus a generated residual.

    The transform to log-mels is that of training, in tables that the checkpoint holds: the windowed
    cosines and sines and the mel filters.
    """

    def __init__(
        self, generator: Callable[[Array], Array], *, bins: int, n_fft: int, hop: int, ratio: int
    ):
        """
        Args:
            generator: log-mels [B, frames, bins, 2] to a waveform [B, frames * hop * ratio, 2].
            bins: of the log-mels.
            n_fft: samples of a window, at the lower rate.
            hop: samples from one mel frame to the next, at the lower rate.
            ratio: of the two sample rates.
        """
        self.n_fft, self.hop, self.ratio = n_fft, hop, ratio
        freqs = n_fft // 2 + 1
        self.waves = nnx.Param(jnp.zeros((2 * freqs, 1, n_fft)))  # cosines, then sines
        self.mel_filters = nnx.Param(jnp.zeros((bins, freqs)))
        self.generator = generator

    def __call__(self, waveform: Array) -> Array:
        """[B, samples, 2] -> [B, ratio * samples, 2] in [-1, 1]."""
        samples = waveform.shape[1]
        waveform = jnp.pad(waveform, ((0, 0), (0, -samples % self.hop), (0, 0)))
        extended = self.generator(self.log_mel(waveform)) + self.interpolate(waveform)
        return jnp.clip(extended, -1.0, 1.0)[:, : samples * self.ratio]

    def log_mel(self, waveform: Array) -> Array:
        """[B, frames * hop, 2] -> [B, frames, mels, 2]; a frame sees nothing after its own hop."""
        past = max(0, self.n_fft - self.hop)
        signal = jnp.pad(jnp.swapaxes(waveform, 1, 2), ((0, 0), (0, 0), (past, 0)))
        windows = frame(signal, self.n_fft, self.hop, waveform.shape[1] // self.hop)
        waves = self.waves[...].astype(jnp.float32)[:, 0]
        cosines, sines = jnp.split(jnp.matmul(windows, waves.T, precision=HIGHEST), 2, axis=-1)
        magnitude = jnp.sqrt(jnp.square(cosines) + jnp.square(sines))
        filters = self.mel_filters[...].astype(jnp.float32)
        mel = jnp.einsum("bctf,mf->btmc", magnitude, filters, precision=HIGHEST)
        return jnp.log(jnp.maximum(mel, FLOOR))

    def interpolate(self, waveform: Array) -> Array:
        """[B, samples, 2] -> [B, ratio * samples, 2], the first and last sample held outside."""
        batch, samples, channels = waveform.shape
        taps = jnp.asarray(sinc_taps(1, self.ratio))  # [ratio, number of taps]
        count = taps.shape[1]
        held = jnp.pad(waveform, ((0, 0), (count // 2 - 1, count // 2), (0, 0)), mode="edge")
        phases = sum(held[:, k : k + samples, None] * taps[:, k, None] for k in range(count))
        return phases.reshape(batch, samples * self.ratio, channels)
