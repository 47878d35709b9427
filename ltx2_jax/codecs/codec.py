"""The codecs between clips and latents: released ones, tiled and on many devices, or a linear one.

    codec = load_codec("ltx-2-19b-dev.safetensors")

What they have in common is in `interface.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ltx2_jax.codecs.audio import AudioCodec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.codecs.video import AUTOMATIC, DiffusionVideoCodec, VideoCodec
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import tiling as tiles
from ltx2_jax.weights import hub, references
from ltx2_jax.weights.names import diffusion_decoder as decoder_weights
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.tensor_files import read_metadata

REFERENCE = "ltx2_jax.released_codec.1"  # the number changes with the file's layout


class ReleasedCodec:
    """The video and audio networks of a release, from its files."""

    def __init__(self, video: VideoCodec, audio: AudioCodec, release: str, paths: Sequence[Path]):
        self.video, self.audio, self.release = video, audio, release
        self.paths = [Path(path).resolve() for path in paths]

    def save(self, path: str | os.PathLike) -> None:
        """Writes a small file that names the released ones; `load_codec` follows it.

        The weights are gigabytes and the same for every dataset: they stay where they are.
        """
        references.write(path, REFERENCE, self.paths)


# ---- files ---------------------------------------------------------------------------------------


def load_codec(
    *paths: str | os.PathLike,
    devices: Sequence[jax.Device] | None = None,
    tiling: tiles.Tiling | str | None = AUTOMATIC,
    dtype: str = "bfloat16",
) -> Codec:
    """The codec in one or more files.

    Args:
      paths: a checkpoint with all networks, or the video VAE and the audio VAE of the split pack,
        as `open_release` takes them; or one file that `prepare` wrote: a linear codec, or a name
        of released files.
      devices: see `VideoCodec`.
      tiling: see `VideoCodec`.
      dtype: of the video network's activations; the audio networks always compute in float32.

    Raises:
      UserError: a missing or unreadable file, none or two of a network, a config that is not
        supported, released files that are gone or changed since `prepare` named them.
    """
    if len(paths) == 1 and (path := hub.fetch(paths[0])).is_file():
        metadata = read_metadata(path)
        if metadata.get("kind", "").startswith("ltx2_jax.linear_codec"):
            return LinearCodec.load(path)
        if metadata.get("kind") == REFERENCE:
            paths = references.follow(path, metadata)
    release = open_release(*paths)  # open as long as the codec, which reads weights when it works
    audio_config = release.config("audio_vae") if "audio_vae" in release.networks else None
    sound = ["audio_vae", "vocoder"]
    if audio_config is not None and not audio_config.has_decoder:
        sound = ["audio_vae"]
    if missing := [n for n in ("video_vae", *sound) if n not in release.networks]:
        raise UserError(f"no {' and no '.join(missing)} in {release.name}")
    audio = AudioCodec(
        audio_config,
        release.config("vocoder") if "vocoder" in sound else None,
        lambda where: tuple(release.load(name, where)[1] for name in sound),
        device=devices[0] if devices else None,
    )
    video = _video_codec(release, dtype, devices=devices, tiling=tiling)
    paths = [file.path for file in release.files]
    return ReleasedCodec(video, audio, release.release_of("video_vae"), paths)


def _video_codec(release: Release, dtype: str, **options: Any) -> VideoCodec:
    """With the decoder that the files have."""
    config = release.config("video_vae", dtype=dtype)

    def read(where: Any) -> Any:
        return release.load("video_vae", where, config=config)[1]

    if "diffusion_decoder" not in release.networks:
        return VideoCodec(config, read, **options)
    decoder = release.config("diffusion_decoder", dtype=dtype)

    def read_decoder(where: Any) -> Any:
        _, params = release.load("diffusion_decoder", where, config=decoder)
        return decoder_weights.fold_gates(params, decoder)

    return DiffusionVideoCodec(config, decoder, read, read_decoder, **options)
