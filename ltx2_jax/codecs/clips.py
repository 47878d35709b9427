"""Clips through a codec: to latents, and from latents to clips and files, in bounded memory.

    video, audio = encode_clip(codec, read_clip("dog.mp4"))
    write_clip("copy.mp4", codec, video, audio, fps=24)

For any codec of `ltx2_jax.codecs.codec`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from tqdm import tqdm

from ltx2_jax.codecs.interface import Codec
from ltx2_jax.diffusion.geometry import audio_latent_length
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip, resample, stream_mp4
from ltx2_jax.models.codecs.inputs import as_stereo, legal_frames, to_uint8


def encode_clip(codec: Codec, clip: Clip) -> tuple[np.ndarray, np.ndarray | None]:
    """Latents [F', H', W', C] and [A, M, C] of a clip; those of the sound are None without sound.

    Frames beyond the largest legal number st * k + 1 are left out, and the user is told. The sound
    is resampled, and cut or followed by silence, to the A latents of the frames that are left.

    Raises:
      UserError: what the codec's `encode` raises; a clip too short for one audio latent.
    """
    frames = legal_frames((1, *clip.video.shape), codec.video.strides)
    if frames < len(clip.video):
        print(
            f"{len(clip.video)} frames are not {codec.video.strides[0]} k + 1: "
            f"the first {frames} are encoded"
        )
    video = np.asarray(codec.video.encode(clip.video[None, :frames]))[0]
    if clip.audio is None:
        return video, None
    rate = codec.audio.latents_per_second
    latents = audio_latent_length(frames, clip.fps, rate)
    if latents == 0:
        raise UserError(f"{frames} frames at {clip.fps:g} fps are too short for one audio latent")
    samples = round(latents / rate * codec.audio.sample_rate)
    audio = as_stereo(resample(clip.audio, clip.sample_rate, codec.audio.sample_rate)[None])
    audio = np.pad(audio[:, :samples], ((0, 0), (0, max(0, samples - audio.shape[1])), (0, 0)))
    return video, np.asarray(codec.audio.encode(audio))[0]


def decode_clip(codec: Codec, video: ArrayLike, audio: ArrayLike | None, fps: float) -> Clip:
    """The clip of latents [F', H', W', C] and [A, M, C]; its sound lasts as long as its picture."""
    pixels = np.concatenate([*_frames(codec, video)])
    sound = _sound(codec, audio, len(pixels) / fps)
    return Clip(pixels, fps, sound, codec.audio.output_sample_rate)


def write_clip(
    path: str | os.PathLike,
    codec: Codec,
    video: ArrayLike,  # [F', H', W', C]
    audio: ArrayLike | None,  # [A, M, C]
    fps: float,
    *,
    crf: int = 18,
) -> None:
    """`decode_clip` straight into an mp4: finished frames are written while others are decoded.

    Host memory is bounded by tiles, not by the length of the clip; a progress bar counts frames.

    Raises:
      UserError: what `media.write_mp4` raises; nothing is left under `path` then.
    """
    total = (np.shape(video)[0] - 1) * codec.video.strides[0] + 1
    sound = _sound(codec, audio, total / fps)
    with tqdm(desc=f"decoding {Path(path).name}", total=total, unit="frame", disable=None) as bar:

        def counted() -> Iterator[np.ndarray]:
            for chunk in _frames(codec, video):
                yield chunk
                bar.update(len(chunk))

        rate = codec.audio.output_sample_rate
        stream_mp4(path, counted(), fps=fps, audio=sound, sample_rate=rate, crf=crf)


def _frames(codec: Codec, video: ArrayLike) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], in time order."""
    for chunk in codec.video.decode_chunks(np.asarray(video)[None]):
        yield np.asarray(to_uint8(chunk[0]))


def _sound(codec: Codec, audio: ArrayLike | None, seconds: float) -> np.ndarray | None:
    """float32 [samples, 2]."""
    if audio is None:
        return None
    samples = round(seconds * codec.audio.output_sample_rate)
    return np.asarray(codec.audio.decode(np.asarray(audio)[None], samples))[0]
