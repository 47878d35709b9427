"""The fixed log-mel front end of LTX-2's audio codec.

Sound of 16 kHz goes through a periodic Hann window of 1024 samples with hop 160, centred, with
reflected edges. The magnitudes (power 1) fall into 64 slaney mel bins over 0-8000 Hz; the result is
log(max(mel, 1e-5)). These are the numbers of the torchaudio `MelSpectrogram` that the official
`ltx_core/model/audio_vae` sets up. All functions are pure functions of float32 arrays.

Dims: B batch, frames mel frames (one every hop), freqs = n_fft // 2 + 1 linear bins, mels mel bins.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.errors import UserError


@dataclass(frozen=True)
class MelConfig:
    """The front end's constants; the defaults are those of every released audio VAE."""

    sample_rate: int = 16000  # Hz
    n_fft: int = 1024  # samples, also the window length
    hop: int = 160  # samples between frames
    bins: int = 64
    f_min: float = 0.0  # Hz
    f_max: float = 8000.0  # Hz
    floor: float = 1e-5  # smallest mel magnitude that the log sees

    @property
    def freqs(self) -> int:
        """Number of linear-frequency bins."""
        return self.n_fft // 2 + 1

    def num_frames(self, samples: int) -> int:
        """Frames of a centred STFT over `samples` samples."""
        return 1 + samples // self.hop


# Slaney's scale (Auditory Toolbox): linear at 3 mels per 200 Hz up to 1 kHz = 15 mels, then
# 27 mels for each factor of 6.4 in frequency.
_HZ_PER_MEL = 200.0 / 3.0
_KNEE_HZ, _KNEE_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27.0


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney mels of frequencies in Hz, float64, any shape."""
    hz = np.asarray(hz, np.float64)
    upper = _KNEE_MEL + np.log(np.maximum(hz, _KNEE_HZ) / _KNEE_HZ) / _LOG_STEP
    return np.where(hz < _KNEE_HZ, hz / _HZ_PER_MEL, upper)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Frequencies in Hz of slaney mels, float64, any shape."""
    mel = np.asarray(mel, np.float64)
    upper = _KNEE_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _KNEE_MEL) - _KNEE_MEL))
    return np.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, upper)


@lru_cache(maxsize=8)
def mel_filter_bank(config: MelConfig) -> np.ndarray:
    """Triangular slaney filters of equal area, float32 [freqs, mels] (read-only: it is cached).

    Filter m rises from edge m to edge m + 1 and falls to edge m + 2, the bins + 2 edges being
    equally spaced in mels; its area over frequency in Hz is one ("slaney" normalisation).
    """
    frequencies = np.linspace(0.0, config.sample_rate / 2, config.freqs)
    edges = mel_to_hz(np.linspace(*hz_to_mel([config.f_min, config.f_max]), config.bins + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise = (frequencies[:, None] - low) / (centre - low)
    fall = (high - frequencies[:, None]) / (high - centre)
    bank = np.maximum(0.0, np.minimum(rise, fall)) * (2.0 / (high - low))
    bank = bank.astype(np.float32)
    bank.flags.writeable = False
    return bank


@lru_cache(maxsize=8)
def hann_window(length: int) -> np.ndarray:
    """The periodic Hann window (period `length`), float32 [length] (read-only: it is cached)."""
    window = (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)).astype(np.float32)
    window.flags.writeable = False
    return window


def stft(signal: Array, config: MelConfig) -> Array:
    """Centred STFT with reflected edges, unscaled: complex64 [..., 1 + samples // hop, freqs].

    Args:
        signal: [..., samples], real; n_fft // 2 + 1 samples or more, for the reflected edges.

    Raises:
        UserError: the signal is too short.
    """
    samples, half = signal.shape[-1], config.n_fft // 2
    if samples <= half:
        raise UserError(
            f"the signal has {samples} samples; an STFT of {config.n_fft} needs {half + 1} or more"
        )
    frames = config.num_frames(samples)
    edges = [(0, 0)] * (signal.ndim - 1) + [(half, half)]
    padded = jnp.pad(signal.astype(jnp.float32), edges, mode="reflect")
    framed = frame(padded, config.n_fft, config.hop, frames)
    return jnp.fft.rfft(framed * hann_window(config.n_fft), axis=-1)


def frame(signal: Array, length: int, hop: int, frames: int) -> Array:
    """[..., samples] -> [..., frames, length]: windows that start hop samples apart.

    Where the signal ends before the last window does, zeros follow.
    """
    # A window is a run of hop-sized blocks, so framing is a few shifted slices instead of a gather
    # by sample index.
    blocks = -(-length // hop)
    needed = (frames + blocks - 1) * hop
    signal = signal[..., :needed]
    no_pad = [(0, 0)] * (signal.ndim - 1)
    signal = jnp.pad(signal, [*no_pad, (0, needed - signal.shape[-1])])
    signal = signal.reshape(*signal.shape[:-1], frames + blocks - 1, hop)
    shifted = [signal[..., i : i + frames, :] for i in range(blocks)]
    return jnp.concatenate(shifted, axis=-1)[..., :length]


def istft(spectrum: Array, config: MelConfig, samples: int | None = None) -> Array:
    """The least-squares inverse of `stft`: float32 [..., samples].

    Args:
        spectrum: [..., frames, freqs], complex.
        samples: length of the result; (frames - 1) * hop when None. Samples after the middle of the
            last window (frames * hop - hop + n_fft // 2) are zero.
    """
    lead, frames = spectrum.shape[:-2], spectrum.shape[-2]
    samples = (frames - 1) * config.hop if samples is None else samples
    window = hann_window(config.n_fft)
    framed = jnp.fft.irfft(spectrum, n=config.n_fft, axis=-1).astype(jnp.float32) * window
    signal = _overlap_add(framed, config.hop)
    envelope = _window_envelope(config, frames)
    half = config.n_fft // 2
    signal = (signal / envelope)[..., half : half + samples]
    missing = samples - signal.shape[-1]
    return jnp.pad(signal, [(0, 0)] * len(lead) + [(0, missing)]) if missing > 0 else signal


def log_mel(audio: Array, config: MelConfig) -> Array:
    """Log-mel magnitudes of a waveform: float32 [B, frames, mels, channels], floor log(1e-5).

    Args:
        audio: [B, samples, channels] in [-1, 1] at config.sample_rate. frames = 1 + samples // hop.

    Raises:
        UserError: fewer than n_fft // 2 + 1 samples.

    Source: `ltx_core/model/audio_vae` (there [B, channels, frames, mels]).
    """
    magnitude = jnp.abs(stft(jnp.moveaxis(audio, -1, 1), config))  # [B, channels, frames, freqs]
    # HIGHEST: accelerators multiply float32 matrices in fewer bits by default, and the log turns a
    # relative error of a quiet bin into an absolute one.
    mel = jnp.einsum(
        "bctf,fm->btmc", magnitude, mel_filter_bank(config), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.log(jnp.maximum(mel, config.floor))


def _overlap_add(framed: Array, hop: int) -> Array:
    """Sums frames that lie hop apart: [..., frames, n_fft] -> [..., (frames - 1 + blocks) * hop],
    blocks being n_fft / hop rounded up.
    """
    *lead, frames, n_fft = framed.shape
    blocks = -(-n_fft // hop)
    no_pad = [(0, 0)] * len(lead)
    framed = jnp.pad(framed, [*no_pad, (0, 0), (0, blocks * hop - n_fft)])
    framed = framed.reshape(*lead, frames, blocks, hop)
    rows = [
        jnp.pad(framed[..., i, :], [*no_pad, (i, blocks - 1 - i), (0, 0)]) for i in range(blocks)
    ]
    return sum(rows).reshape(*lead, (frames + blocks - 1) * hop)


@lru_cache(maxsize=64)
def _window_envelope(config: MelConfig, frames: int) -> np.ndarray:
    """Sum of squared windows at each sample of `_overlap_add`'s result, float32; never zero."""
    blocks = -(-config.n_fft // config.hop)
    envelope = np.zeros((frames + blocks - 1) * config.hop)
    squared = hann_window(config.n_fft).astype(np.float64) ** 2
    for frame in range(frames):
        envelope[frame * config.hop : frame * config.hop + config.n_fft] += squared
    # Only the very first and last samples, which no window reaches, are below this.
    return np.maximum(envelope, 1e-8).astype(np.float32)
