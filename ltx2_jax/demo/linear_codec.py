"""A training-free audio-video codec: principal components of patches, for quickstarts on a CPU.

It has the geometry and the interface of LTX-2's VAEs, so that everything behind it (records,
training, sampling) is the code a released checkpoint uses, and it is fitted in seconds on the data
set itself.

Both halves group time causally: latent 0 stands for the first frame alone, treated as a group of
identical copies (a causal VAE pads with the first frame), and latent i > 0 for the next `stride`
frames. A group is flattened, projected on its leading principal components and scaled. Decoding is
the transpose; audio then goes from log-mel back to a waveform by non-negative inversion of the mel
filters and fast Griffin-Lim (Perraudin, Balazs, Søndergaard: "A fast Griffin-Lim algorithm",
WASPAA 2013).

Dims: B batch, F frames, H, W pixels, A audio latents, M mel-latent bins (1 here), C channels,
D numbers in a group, F' = (F - 1) / st + 1, H' = H / sh, W' = W / sw.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ltx2_jax.demo.config import LinearCodecConfig
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing
from ltx2_jax.models.codecs.inputs import as_pixels, as_stereo, legal_frames
from ltx2_jax.models.codecs.mel import MelConfig, istft, log_mel, mel_filter_bank, stft

_KIND = "ltx2_jax.linear_codec.1"  # the number changes with the file's layout


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSpace:
    """An affine map between groups [..., D] and latents [..., C]; float32 numpy arrays."""

    mean: np.ndarray  # [D]
    basis: np.ndarray  # [D, C], orthonormal columns, by falling variance
    scale: np.ndarray  # [C], what a latent of 1 is worth along its column

    @property
    def encoder(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and matrix [D, C] of latents = (group - mean) @ matrix."""
        return self.mean, self.basis / self.scale

    @property
    def decoder(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and matrix [C, D] of group = latents @ matrix + mean."""
        return self.mean, np.ascontiguousarray((self.basis * self.scale).T)


class LinearVideoCodec:
    """Pixels to latents and back by one linear map."""

    def __init__(self, config: LinearCodecConfig, space: LinearSpace):
        self.strides = config.video_strides
        self.channels = config.video_channels
        self.space = space

    def encode(self, video: ArrayLike) -> Array:
        """Latents float32 [B, F', H', W', C] of pixels [B, F, H, W, 3], uint8 or in [-1, 1].

        A frame count that is not st * k + 1 is cropped to the largest one that is.

        Raises:
            UserError: H or W is not a multiple of its stride, no frames, or not three colours.
        """
        frames = legal_frames(np.shape(video), self.strides)
        video = as_pixels(video[:, :frames])
        return _encode_video(video, *self.space.encoder, strides=self.strides)

    def decode(self, latents: ArrayLike) -> Array:
        """Pixels float32 [B, F, H, W, 3], clipped to [-1, 1], of latents [B, F', H', W', C]."""
        x = jnp.asarray(latents, jnp.float32)
        return _decode_video(x, *self.space.decoder, strides=self.strides)

    def decode_chunks(self, latents: ArrayLike) -> Iterator[np.ndarray]:
        """What `decode` gives, in pieces of whole frames in time order; here one piece."""
        yield np.asarray(self.decode(latents))


class LinearAudioCodec:
    """Waveforms to latents of log-mel frames and back."""

    bins = 1  # M: one group holds all mel bins

    def __init__(self, config: LinearCodecConfig, space: LinearSpace):
        self.config = config
        self.sample_rate = self.output_sample_rate = config.mel.sample_rate
        self.channels = config.audio_channels
        self.space = space

    @property
    def clock(self) -> AudioClock:
        """When each latent is."""
        mel = self.config.mel
        return AudioClock(mel.sample_rate, mel.hop, self.config.mel_frames_per_latent)

    @property
    def latents_per_second(self) -> float:
        return self.clock.latents_per_second

    def encode(self, audio: ArrayLike) -> Array:
        """Latents float32 [B, A, 1, C] of a waveform [B, samples, 2] in [-1, 1]; mono is doubled.

        A is `LinearCodecConfig.num_audio_latents(samples)`. Only the first 4A - 3 mel frames are
        used, the geometry of the released codec.

        Raises:
            UserError: no samples, a sample that is not finite, or neither one nor two channels.
        """
        audio = as_stereo(audio, "audio")
        return _encode_audio(audio, *self.space.encoder, config=self.config)

    def decode(self, latents: ArrayLike, num_samples: int | None = None) -> Array:
        """Waveform float32 [B, num_samples, 2] in [-1, 1] of latents [B, A, 1, C].

        num_samples is A / latents_per_second seconds when None. The mel frames end 40 ms before
        that; the last one is held up to there, and anything later is silence.
        """
        group = self.config.mel.hop * self.config.mel_frames_per_latent
        samples = latents.shape[1] * group if num_samples is None else num_samples
        x = jnp.asarray(latents, jnp.float32)
        mel = _decode_mel(x, *self.space.decoder, config=self.config)
        return waveform(mel, self.config, samples)


class LinearCodec:
    """Both codecs, fitted together: `.video`, `.audio`, and the variance that each keeps."""

    release = "linear"  # what a dataset of its latents is called

    def __init__(
        self,
        config: LinearCodecConfig,
        video: LinearSpace,
        audio: LinearSpace,
        explained: dict[str, float],
    ):
        self.config = config
        self.video = LinearVideoCodec(config, video)
        self.audio = LinearAudioCodec(config, audio)
        self.explained = explained  # fraction of the variance kept, under "video" and "audio"

    @classmethod
    def fit(cls, config: LinearCodecConfig, clips: Iterable) -> "LinearCodec":
        """Fits both halves in one pass; memory does not grow with the number of clips.

        Args:
            clips: objects with .video uint8 [F, H, W, 3], .audio float32 [samples, 1 or 2] or None,
                .sample_rate in Hz (the `Clip` of `ltx2_jax.media`). Sizes may differ.

        Raises:
            UserError: no clips, no audio at all, an illegal size or sample rate, bad audio, or more
                channels than a group has numbers.
        """
        video, audio = _Moments(), _Moments()
        for index, clip in enumerate(clips):
            video.add(_pixel_groups(clip, config))
            if clip.audio is not None:
                audio.add(_mel_groups(clip, config, f"clip {index}"))
        # _pixel_groups counts from 128, and pixel p stands for p / 127.5 - 1.
        video_space, kept = video.leading(
            "video", config.video_channels, config.whitening, origin=0.5, unit=1 / 127.5
        )
        audio_space, heard = audio.leading("audio", config.audio_channels, config.whitening)
        return cls(config, video_space, audio_space, {"video": kept, "audio": heard})

    def save(self, path: str | os.PathLike) -> None:
        """Writes one .safetensors file, config and explained variance in its metadata; atomic."""
        tensors = {
            f"{name}.{field}": np.ascontiguousarray(getattr(space, field))
            for name, space in (("video", self.video.space), ("audio", self.audio.space))
            for field in ("mean", "basis", "scale")
        }
        metadata = {
            "kind": _KIND,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "explained": json.dumps(self.explained),
        }
        # Not `save_file`, which makes files that only their owner can read.
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LinearCodec":
        """Reads what `save` wrote.

        Raises:
            UserError: the file is missing, unreadable, or not a linear codec of this version.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such codec file; `python -m ltx2_jax.prepare` writes one")
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        if (kind := metadata.get("kind")) != _KIND:
            raise UserError(f"{path}: kind {kind}, not {_KIND}; expected a file that prepare wrote")
        try:
            fields = json.loads(metadata["config"])
            fields["video_strides"] = tuple(fields["video_strides"])
            config = LinearCodecConfig(**(fields | {"mel": MelConfig(**fields["mel"])}))
            explained = json.loads(metadata["explained"])
            spaces = [
                LinearSpace(**{f: tensors[f"{name}.{f}"] for f in ("mean", "basis", "scale")})
                for name in ("video", "audio")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged linear codec ({error}); run prepare again") from error
        return cls(config, *spaces, explained)


# ---- video ---------------------------------------------------------------------------------------


def _group_frames(x: Array, stride: int) -> Array:
    """[B, stride * k + 1, ...] -> [B, k + 1, stride, ...]: frame 0 copied, then runs of frames."""
    first = jnp.repeat(x[:, :1], stride, axis=1)
    x = jnp.concatenate([first, x[:, 1:]], axis=1)
    return x.reshape(x.shape[0], -1, stride, *x.shape[2:])


def _ungroup_frames(x: Array) -> Array:
    """The inverse of `_group_frames`; copies of frame 0 that differ give their mean."""
    first = x[:, 0].mean(axis=1, keepdims=True)
    rest = x[:, 1:].reshape(x.shape[0], -1, *x.shape[3:])
    return jnp.concatenate([first, rest], axis=1)


def _patches(video: Array, strides: tuple[int, int, int]) -> Array:
    """[B, F, H, W, 3] -> [B, F', H', W', D] with D = (st, sh, sw, 3) flattened."""
    st, sh, sw = strides
    batch, _, height, width, colours = video.shape
    x = _group_frames(video, st)  # [B, F', st, H, W, 3]
    x = x.reshape(batch, -1, st, height // sh, sh, width // sw, sw, colours)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, F', H', W', st, sh, sw, 3]
    return x.reshape(*x.shape[:4], -1)


@partial(jax.jit, static_argnames=("strides",))
def _encode_video(video: Array, mean: Array, matrix: Array, strides: tuple[int, int, int]) -> Array:
    return jnp.matmul(_patches(video, strides) - mean, matrix, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("strides",))
def _decode_video(
    latents: Array, mean: Array, matrix: Array, strides: tuple[int, int, int]
) -> Array:
    st, sh, sw = strides
    batch, groups, rows, columns, _ = latents.shape
    x = jnp.matmul(latents, matrix, precision=jax.lax.Precision.HIGHEST) + mean
    x = x.reshape(batch, groups, rows, columns, st, sh, sw, 3)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B, F', st, H', sh, W', sw, 3]
    x = x.reshape(batch, groups, st, rows * sh, columns * sw, 3)
    return jnp.clip(_ungroup_frames(x), -1.0, 1.0)


# ---- audio ---------------------------------------------------------------------------------------


def _grouped_log_mel(audio: Array, config: LinearCodecConfig) -> Array:
    """[B, samples, 2] -> [B, A, D] with D = (mel frames of a latent, mels, 2) flattened."""
    stride, latents = config.mel_frames_per_latent, config.num_audio_latents(audio.shape[1])
    # The edges of the STFT are reflected, which takes half a window of samples.
    missing = max(0, config.mel.n_fft // 2 + 1 - audio.shape[1])
    mel = log_mel(_pad_time(audio, audio.shape[1] + missing), config.mel)
    mel = mel[:, : stride * (latents - 1) + 1]
    return _group_frames(mel, stride).reshape(audio.shape[0], latents, -1)


@partial(jax.jit, static_argnames=("config",))
def _encode_audio(audio: Array, mean: Array, matrix: Array, config: LinearCodecConfig) -> Array:
    groups = _grouped_log_mel(audio, config)
    x = jnp.matmul(groups - mean, matrix, precision=jax.lax.Precision.HIGHEST)
    return x[:, :, None, :]


@partial(jax.jit, static_argnames=("config",))
def _decode_mel(latents: Array, mean: Array, matrix: Array, config: LinearCodecConfig) -> Array:
    """[B, A, 1, C] -> log-mel [B, 4A - 3, mels, 2]."""
    x = jnp.matmul(latents[:, :, 0], matrix, precision=jax.lax.Precision.HIGHEST) + mean
    x = x.reshape(*x.shape[:2], config.mel_frames_per_latent, config.mel.bins, 2)
    return _ungroup_frames(x)


@partial(jax.jit, static_argnames=("config", "samples"))
def waveform(log_mels: Array, config: LinearCodecConfig, samples: int) -> Array:
    """A waveform float32 [B, samples, 2] in [-1, 1] with about the log-mels [B, frames, mels, 2].

    The last frame is held for at most one latent; samples after that are zero.
    """
    mel, frames = config.mel, log_mels.shape[1]
    needed = min(1 + -(-samples // mel.hop), frames + config.mel_frames_per_latent)
    log_mels = _pad_time(log_mels[:, :needed], needed, mode="edge")
    # The floor stands for silence: without the subtraction every gap would hiss at its level.
    magnitude = jnp.maximum(jnp.exp(log_mels) - mel.floor, 0.0)
    magnitude = jnp.moveaxis(magnitude, -1, 1)  # [B, 2, frames, mels]

    # Clip by clip, so that on a CPU the spectra of a clip stay in cache over all iterations.
    def one(clip: Array) -> Array:
        return _griffin_lim(_linear_magnitude(clip, config), config)

    audio = jnp.moveaxis(jax.lax.map(one, magnitude), 1, -1)
    return jnp.clip(_pad_time(audio[:, :samples], samples), -1.0, 1.0)


def _pad_time(x: Array, length: int, mode: str = "constant") -> Array:
    """[B, n, ...] -> [B, length, ...] by zeros or, with mode "edge", copies of the last entry."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), mode=mode)


def _linear_magnitude(mel: Array, config: LinearCodecConfig) -> Array:
    """Non-negative magnitudes [..., freqs] whose mel magnitudes are about mel [..., mels].

    Richardson-Lucy updates (Kullback-Leibler distance): they keep the result non-negative, weigh
    loud and quiet bins alike and sharpen a tone that the mel filters have spread.
    """
    bank = jnp.asarray(mel_filter_bank(config.mel))  # [freqs, mels]
    highest = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    weight = bank.sum(axis=1)
    reach = weight > 0.0  # the two end bins are in no filter
    gain = jnp.where(reach, 1.0 / jnp.where(reach, weight, 1.0), 0.0)

    def update(_: int, magnitude: Array) -> Array:
        ratio = mel / (highest(magnitude, bank) + 1e-12)
        return magnitude * highest(ratio, bank.T) * gain

    start = jnp.ones((*mel.shape[:-1], bank.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, config.mel_inversion_iterations, update, start)


def _griffin_lim(magnitude: Array, config: LinearCodecConfig) -> Array:
    """float32 [..., (frames - 1) * hop] with about the STFT magnitudes [..., frames, freqs]."""
    mel = config.mel
    frames, freqs = magnitude.shape[-2:]
    # Every bin starts as a steady sinusoid of its own frequency, so tones are in step from the
    # start and the result is the same on every call and for both channels of a mono signal.
    turns = (np.arange(frames)[:, None] * mel.hop * np.arange(freqs) % mel.n_fft) / mel.n_fft
    start = jnp.broadcast_to(jnp.exp(2j * jnp.pi * turns.astype(np.float32)), magnitude.shape)

    def update(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        phase, previous = state
        projected = stft(istft(magnitude * phase, mel), mel)
        # t_n = c_n + a (c_n - c_(n-1)); only the phase of it is used.
        ahead = projected + config.griffin_lim_momentum * (projected - previous)
        return ahead / (jnp.abs(ahead) + 1e-16), projected

    phase, _ = jax.lax.fori_loop(
        0, config.griffin_lim_iterations, update, (start, jnp.zeros_like(start))
    )
    return istft(magnitude * phase, mel)


# ---- fitting -------------------------------------------------------------------------------------


class _Moments:
    """Count, sum and second moment of rows, in float64."""

    def __init__(self):
        self.count, self.sum, self.gram, self.waiting = 0, 0.0, 0.0, []

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D]. Taken 1024 at a time: to add a [D, D] for each clip would take longer."""
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= 1024:
            self.flush()

    def flush(self) -> None:
        rows, self.waiting = np.concatenate(self.waiting) if self.waiting else (), []
        for start in range(0, len(rows), 1024):
            block = rows[start : start + 1024]
            self.count += len(block)
            self.sum = self.sum + block.sum(axis=0, dtype=np.float64)
            self.gram = self.gram + (block.T @ block).astype(np.float64)

    def leading(
        self, name: str, channels: int, whitening: float, origin: float = 0.0, unit: float = 1.0
    ) -> tuple[LinearSpace, float]:
        """The leading components of (row + origin) * unit; the fraction of variance they hold."""
        self.flush()
        if self.count == 0:
            raise UserError(f"cannot fit the codec: no {name} in the clips")
        mean = self.sum / self.count
        covariance = self.gram / self.count - np.outer(mean, mean)
        if channels > len(mean):
            raise UserError(f"{name}_channels {channels} is more than the {len(mean)} of a group")
        variance, basis = _leading_components(covariance, channels)
        std = np.sqrt(variance)
        # An eigenvector's sign is arbitrary; a positive largest entry makes refits agree.
        largest = np.argmax(np.abs(basis), axis=0)
        basis = basis * np.sign(basis[largest, np.arange(channels)])
        # Components that the clips do not have (too few clips, still ones) must not divide by zero.
        spread = np.maximum(std, max(1e-4 * std[0], 1e-6)) ** whitening
        scale = spread * (np.sqrt(np.mean((std / spread) ** 2)) or 1.0)
        arrays = (mean + origin) * unit, basis, scale * unit
        space = LinearSpace(*(np.ascontiguousarray(x, np.float32) for x in arrays))
        return space, float(variance.sum() / (np.trace(covariance) or 1.0))


def _leading_components(covariance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of [D, D] in falling order, [count], and their vectors [D, count]."""
    variance, basis = None, None
    if 10 * count < len(covariance):  # a second where all of 3072 take fifteen
        from scipy.sparse.linalg import ArpackError, eigsh  # slow to import

        start = np.random.default_rng(0).standard_normal(len(covariance))
        with contextlib.suppress(ArpackError):  # there is nothing to find in still clips
            variance, basis = eigsh(covariance, count, which="LA", v0=start)
    if basis is None:
        variance, basis = np.linalg.eigh(covariance)
    largest = np.argsort(-variance, stable=True)[:count]
    return np.maximum(variance[largest], 0.0), basis[:, largest]


def _pixel_groups(clip: object, config: LinearCodecConfig) -> np.ndarray:
    """Patches of a clip's pixels minus 128, float32 [n, D].

    They are whole numbers of at most 128, so sums of products over 1024 rows stay within 2**24 and
    float32 matrix multiplication is exact: fast, and the same in any order.
    """
    video = np.asarray(clip.video)[None]
    frames = legal_frames(video.shape, config.video_strides)
    pixels = video[:, :frames].astype(np.float32) - 128.0
    groups = _jit_patches(pixels, strides=config.video_strides)
    return np.asarray(groups).reshape(-1, groups.shape[-1])


def _mel_groups(clip: object, config: LinearCodecConfig, name: str) -> np.ndarray:
    """Groups of a clip's log-mel frames, float64 [n, D]."""
    if clip.sample_rate != config.mel.sample_rate:
        raise UserError(
            f"{name} has audio at {clip.sample_rate} Hz; the codec needs {config.mel.sample_rate}"
        )
    audio = as_stereo(np.asarray(clip.audio)[None], f"the audio of {name}")
    groups = _jit_grouped_log_mel(audio, config=config)
    return np.asarray(groups[0], np.float64)


_jit_patches = jax.jit(_patches, static_argnames=("strides",))
_jit_grouped_log_mel = jax.jit(_grouped_log_mel, static_argnames=("config",))
