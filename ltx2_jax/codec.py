"""The codecs between clips and latents: released ones, tiled and on many devices, or a linear one.

    codec = load_codec("ltx-2-19b-dev.safetensors")

Every codec has two halves with one interface; callers use nothing else:

    codec.generation             whose latents these are: "linear", "2.0", "2.3", "2.5"
    codec.video.strides          pixel frames, rows and columns behind a latent; .channels
    codec.video.encode(video)    uint8, or float in [-1, 1], [B, F, H, W, 3] -> [B, F', H', W', C]
    codec.video.decode(latents)  -> float32 [B, F, H, W, 3] in [-1, 1]
    codec.video.decode_chunks(latents)          the same in pieces, in time order
    codec.audio.encode(audio)    [B, samples, 2] at .sample_rate -> [B, A, .bins, .channels]
    codec.audio.decode(latents, num_samples)    -> [B, samples, 2] at .output_sample_rate
    codec.audio.latents_per_second

Dims: B batch, F frames, H, W pixels, F', H', W' the latent grid, A audio latents, C channels.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from safetensors.numpy import save

from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing
from ltx2_jax.models import tiling as tiles
from ltx2_jax.models.audio_vae import AudioVAEConfig
from ltx2_jax.models.codec_inputs import as_pixels, as_stereo, legal_frames
from ltx2_jax.models.linear_codec import LinearCodec
from ltx2_jax.models.video_vae import VideoVAEConfig
from ltx2_jax.models.vocoder import VocoderConfig
from ltx2_jax.sharding import picture_mesh, picture_sharding, replicated_on
from ltx2_jax.weights import audio_vae as audio_weights
from ltx2_jax.weights import files
from ltx2_jax.weights import video_vae as video_weights
from ltx2_jax.weights import vocoder as vocoder_weights

REFERENCE = "ltx2_jax.released_codec.1"  # the number changes with the file's layout
AUTOMATIC = "automatic"


class VideoCodec:
    """A released video VAE on one or more devices; its weights are read when first needed.

    Long and large clips are cut into tiles, and a tile is split over the devices: clips first, then
    columns, then rows. That split is exact: every convolution gets its neighbours' border.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        read: Callable[[], Any],
        *,
        devices: Sequence[jax.Device] | None = None,
        tiling: tiles.Tiling | str | None = AUTOMATIC,
    ):
        """
        Args:
          config: of the network.
          read: gives its weights.
          devices: to work on; all of this process when None.
          tiling: `AUTOMATIC` is the official choice, with tiles as many times larger as there are
            devices to share one, and of equal length. None never cuts.
        """
        self.config = config
        self.strides, self.channels = config.strides, config.latent_channels
        self.devices = list(devices or jax.local_devices())
        self.tiling = tiling
        self._read = read

    @cached_property
    def _abstract(self) -> tuple[Any, Any]:
        vae = nnx.eval_shape(partial(video_weights.create, self.config))
        return nnx.split(vae, nnx.Param)

    @property
    def graph(self) -> Any:
        """Structure of the network."""
        return self._abstract[0]

    @cached_property
    def params(self) -> Any:
        """The weights, whole on every device."""
        return jax.device_put(self._read(), replicated_on(self.devices))

    def encode(self, video: ArrayLike) -> np.ndarray:
        """Normalised latents float32 [B, F', H', W', C] of pixels [B, F, H, W, 3].

        Pixels are uint8, or float32 in [-1, 1]. A frame count that is not st * k + 1 is cropped to
        the largest one that is.

        Raises:
          UserError: H or W is not a multiple of its stride, no frames, or not three colours.
        """
        video = np.asarray(video)
        video = video[:, : legal_frames(video.shape, self.strides)]
        tiling = self._tiling(video.shape)

        def encode(tile: np.ndarray) -> Array:
            return self._on_devices(_encode, tile, tile.shape[1:4])

        return np.concatenate(
            [
                tiles.tiled_encode(
                    encode, part, tiles.plan_encode(part.shape[1:4], self.strides, tiling)
                )
                for part in self._parts(video, video.shape)
            ]
        )

    def decode(self, latents: ArrayLike) -> np.ndarray:
        """Pixels float32 [B, F, H, W, 3] in [-1, 1] of latents [B, F', H', W', C]."""
        latents = self._checked(latents)
        return np.concatenate(
            [
                np.concatenate([*self.decode_chunks(part)], axis=1)
                for part in self._parts(latents, self.pixel_shape(latents.shape))
            ]
        )

    def decode_chunks(self, latents: ArrayLike) -> Iterator[np.ndarray]:
        """What `decode` gives, in pieces of whole frames in time order.

        Host memory is about two pieces, whatever the length of the clip.

        Raises:
          UserError: latents of another shape or number of channels.
        """
        latents = self._checked(latents)
        tiling = self._tiling(self.pixel_shape(latents.shape))
        plan = tiles.plan_decode(latents.shape[1:4], self.strides, tiling)
        keys = (jax.random.key(number) for number in itertools.count())

        def decode(tile: np.ndarray) -> Array:
            return self._on_devices(_decode, tile, self.pixel_shape(tile.shape)[1:4], next(keys))

        for chunk in tiles.tiled_decode(decode, latents, plan):
            yield np.clip(chunk, -1, 1, out=chunk)

    def pixel_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """[B, F', H', W', C] -> [B, F, H, W, 3]."""
        batch, frames, rows, columns, _ = latent_shape
        st, sh, sw = self.strides
        return batch, (frames - 1) * st + 1, rows * sh, columns * sw, 3

    def lower(self, half: str, pixel_shape: Sequence[int]) -> jax.stages.Lowered:
        """The program that encodes or decodes the largest tile of pixels [B, F, H, W, 3].

        Nothing is computed and no weights are read; devices may be those of a slice that is not
        there. Matrices are taken to be stored in the dtype of the activations.

        Args:
          half: "encode" or "decode".
        """
        tile = self.largest_tile(pixel_shape)
        mesh = self.mesh_of(tile, pixel_shape[0])
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, self.config.dtype if leaf.ndim > 1 else leaf.dtype, sharding=everywhere
            ),
            nnx.to_pure_dict(self._abstract[1]),
        )
        where = picture_sharding(mesh)
        with jax.set_mesh(mesh):
            if half == "encode":
                x = jax.ShapeDtypeStruct((pixel_shape[0], *tile, 3), jnp.uint8, sharding=where)
                return _encode.lower(params, x, graph=self.graph)
            shape = (pixel_shape[0], *self._grid(tile), self.channels)
            x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
            key = jax.eval_shape(jax.random.key, 0)
            return _decode.lower(params, x, key, graph=self.graph)

    def largest_tile(self, pixel_shape: Sequence[int]) -> tiles.Shape:
        """Frames, rows and columns of the largest tile that pixels [B, F, H, W, 3] are cut into."""
        plan = tiles.plan_encode(pixel_shape[1:4], self.strides, self._tiling(pixel_shape))
        axes = (plan.time, plan.rows, plan.columns)
        return tuple(max(t.source.stop - t.source.start for t in axis) for axis in axes)

    def mesh_of(self, tile: tiles.Shape, batch: int = 1) -> jax.sharding.Mesh:
        """How the devices share a tile of (frames, rows, columns) pixels."""
        return picture_mesh(self.devices, batch, *self._grid(tile)[1:])

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._abstract[1]))

    def _grid(self, pixels: Sequence[int]) -> tiles.Shape:
        """(F, H, W) -> (F', H', W')."""
        (frames, height, width), (st, sh, sw) = pixels, self.strides
        return (frames - 1) // st + 1, height // sh, width // sw

    def _checked(self, latents: ArrayLike) -> np.ndarray:
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 5 or latents.shape[-1] != self.channels:
            raise UserError(
                f"video latents of shape {latents.shape}: expected [B, F', H', W', {self.channels}]"
            )
        return latents

    def _on_devices(
        self, program: Callable[..., Array], x: np.ndarray, pixels: Sequence[int], *rest: Any
    ) -> Array:
        """Runs `program` on a tile of (F, H, W) pixels, or its latents, split over the devices."""
        mesh = self.mesh_of(pixels, x.shape[0])
        with jax.set_mesh(mesh):
            x = jax.device_put(x, picture_sharding(mesh))
            return program(self.params, x, *rest, graph=self.graph)

    def _tiling(self, shape: Sequence[int]) -> tiles.Tiling | None:
        """For pixels [B, F, H, W, 3]."""
        if self.tiling != AUTOMATIC:
            return self.tiling
        batch, *pixels, _ = shape
        _, height, width = pixels
        sizes = tiles.automatic_tiling(height, width, self.strides)
        mesh = self.mesh_of(pixels, batch)
        sharing = mesh.shape["rows"] * mesh.shape["columns"]
        if height * width <= sharing * sizes.height[0] * sizes.width[0]:
            sizes = dataclasses.replace(sizes, height=(0, 0), width=(0, 0))
        return sizes.to_counts(self._grid(pixels), self.strides)

    def _parts(self, array: np.ndarray, pixels: Sequence[int]) -> list[np.ndarray]:
        """A batch in as many parts as keep a call within the pixels of one tile per device."""
        batch, *sizes = pixels[:4]
        tile = tiles.TileSizes()
        budget = len(self.devices) * tile.frames[0] * tile.height[0] * tile.width[0]
        count = max(1, budget // math.prod(sizes))
        return [array[i : i + count] for i in range(0, batch, count)]


@partial(jax.jit, static_argnames="graph")
def _encode(params: Any, pixels: Array, *, graph: Any) -> Array:
    return nnx.merge(graph, params).encode(as_pixels(pixels))


@partial(jax.jit, static_argnames="graph")
def _decode(params: Any, latents: Array, key: Array, *, graph: Any) -> Array:
    return nnx.merge(graph, params).decode(latents, noise=key)


class AudioCodec:
    """A released audio VAE with its vocoder, on one device; weights are read when first needed."""

    def __init__(
        self,
        config: AudioVAEConfig,
        vocoder: VocoderConfig,
        read: Callable[[], tuple[Any, Any]],
        *,
        device: jax.Device | None = None,
    ):
        """
        Args:
          config: of the VAE.
          vocoder: of the vocoder.
          read: gives the weights of both.
          device: to work on; the first of this process when None.
        """
        self.config, self.vocoder = config, vocoder
        self.sample_rate = config.mel.sample_rate
        self.output_sample_rate = (vocoder.extension or vocoder).sample_rate
        self.channels, self.bins = config.latent_channels, config.latent_bins
        self.latents_per_second = config.latents_per_second
        self.device = device or jax.local_devices()[0]
        self._read = read

    @cached_property
    def graph(self) -> tuple[Any, Any]:
        """Structure of both networks."""
        return (
            nnx.graphdef(nnx.eval_shape(partial(audio_weights.create, self.config))),
            nnx.graphdef(nnx.eval_shape(partial(vocoder_weights.create, self.vocoder))),
        )

    @cached_property
    def params(self) -> tuple[Any, Any]:
        return jax.device_put(self._read(), self.device)

    def encode(self, audio: ArrayLike) -> np.ndarray:
        """Normalised latents float32 [B, A, M, C] of a waveform [B, samples, 2]; mono is doubled.

        A is samples / sample_rate * latents_per_second, halves to even, at least one.

        Raises:
          UserError: no samples, a sample that is not finite, or neither one nor two channels.
        """
        audio = as_stereo(audio)
        count = max(1, round(audio.shape[1] / self.sample_rate * self.latents_per_second))
        with jax.set_mesh(replicated_on([self.device]).mesh):
            latents = _encode_audio(self.params[0], audio, graph=self.graph[0])
        return np.asarray(latents[:, :count])

    def decode(self, latents: ArrayLike, num_samples: int | None = None) -> np.ndarray:
        """Waveform float32 [B, num_samples, 2] in [-1, 1] at output_sample_rate of [B, A, M, C].

        num_samples is A / latents_per_second seconds when None. The sound ends 30 ms before that,
        with the last mel frame; silence follows.
        """
        count = round(latents.shape[1] / self.latents_per_second * self.output_sample_rate)
        count = count if num_samples is None else num_samples
        with jax.set_mesh(replicated_on([self.device]).mesh):
            audio = _decode_audio(self.params, jnp.asarray(latents), graph=self.graph)
        audio = np.asarray(audio)[:, :count]
        return np.pad(audio, ((0, 0), (0, count - audio.shape[1]), (0, 0)))

    def program(self, half: str, shape: Sequence[int]) -> tuple[Any, ...]:
        """The jitted "encode" or "decode" of an array of `shape`, and its arguments as shapes."""
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        if half == "encode":
            return partial(_encode_audio, graph=self.graph[0]), self.params[0], x
        return partial(_decode_audio, graph=self.graph), self.params, x


@partial(jax.jit, static_argnames="graph")
def _encode_audio(params: Any, audio: Array, *, graph: Any) -> Array:
    return nnx.merge(graph, params).encode_waveform(audio)


@partial(jax.jit, static_argnames="graph")
def _decode_audio(params: tuple[Any, Any], latents: Array, *, graph: tuple[Any, Any]) -> Array:
    vae, vocoder = (nnx.merge(g, p) for g, p in zip(graph, params, strict=True))
    return vocoder(vae.decode(latents))


class ReleasedCodec:
    """The video and audio networks of a release, from its files."""

    def __init__(
        self, video: VideoCodec, audio: AudioCodec, generation: str, paths: Sequence[Path]
    ):
        self.video, self.audio, self.generation = video, audio, generation
        self.paths = [Path(path).resolve() for path in paths]

    def save(self, path: str | os.PathLike) -> None:
        """Writes a small file that names the released ones; `load_codec` follows it.

        The weights are gigabytes and the same for every dataset: they stay where they are.
        """
        named = [{"path": str(p), "fingerprint": fingerprint(p)} for p in self.paths]
        metadata = {"kind": REFERENCE, "files": json.dumps(named)}
        with replacing(path) as temporary:
            temporary.write_bytes(save({}, metadata))


# ---- files ---------------------------------------------------------------------------------------


def load_codec(
    *paths: str | os.PathLike,
    devices: Sequence[jax.Device] | None = None,
    tiling: tiles.Tiling | str | None = AUTOMATIC,
    dtype: str = "bfloat16",
) -> Any:
    """The codec in one or more files.

    Args:
      paths: a checkpoint with all networks, or the video VAE and the audio VAE of the split pack;
        or one file that `prepare` wrote: a linear codec, or a name of released files.
      devices: see `VideoCodec`.
      tiling: see `VideoCodec`.
      dtype: of the video network's activations; the audio networks always compute in float32.

    Raises:
      UserError: a missing or unreadable file, none or two of a network, a config that is not
        supported, released files that are gone or changed since `prepare` named them.
    """
    if len(paths) == 1:
        metadata = files.metadata(paths[0])
        if metadata.get("kind", "").startswith("ltx2_jax.linear_codec"):
            return LinearCodec.load(paths[0])
        if metadata.get("kind") == REFERENCE:
            paths = _followed(Path(paths[0]), metadata)
    where = _components(paths)
    video_config = video_weights.video_vae_config(
        files.read_config(where["video_vae"], "video_vae"), dtype=dtype
    )
    audio_config = audio_weights.audio_vae_config(
        files.read_config(where["audio_vae"], "audio_vae")
    )
    vocoder_config = vocoder_weights.vocoder_config(files.read_config(where["vocoder"], "vocoder"))

    def read_video() -> Any:
        tensors = files.read_tensors(where["video_vae"], "video_vae")
        return video_weights.from_official(tensors, video_config)

    def read_audio() -> tuple[Any, Any]:
        vae = files.read_tensors(where["audio_vae"], "audio_vae")
        vocoder = files.read_tensors(where["vocoder"], "vocoder")
        return (
            audio_weights.from_official(vae, audio_config),
            vocoder_weights.from_official(vocoder, vocoder_config),
        )

    return ReleasedCodec(
        VideoCodec(video_config, read_video, devices=devices, tiling=tiling),
        AudioCodec(
            audio_config, vocoder_config, read_audio, device=devices[0] if devices else None
        ),
        generation(files.metadata(where["video_vae"]).get("model_version", "")),
        paths,
    )


def generation(model_version: str) -> str:
    """The release whose latents a version has: "2.3.rc1" -> "2.3"."""
    return ".".join(model_version.replace("-", ".").split(".")[:2])


def fingerprint(path: Path) -> str:
    """A hash that tells a released file from others without reading all of it.

    Of its size, its first megabyte with the header, and a megabyte at its middle and its end.
    """
    size, piece = path.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - piece)):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def _followed(path: Path, metadata: dict[str, str]) -> list[Path]:
    """The released files that a file of `ReleasedCodec.save` names."""
    try:
        named = [(Path(f["path"]), f["fingerprint"]) for f in json.loads(metadata["files"])]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); run prepare again") from error
    for released, expected in named:
        if not released.is_file():
            raise UserError(f"{path}: names {released}, which is not there; put it back")
        if fingerprint(released) != expected:
            raise UserError(f"{path}: {released} is not the file that the latents were made with")
    return [released for released, _ in named]


def _components(paths: Sequence[str | os.PathLike]) -> dict[str, str | os.PathLike]:
    """Network -> the file that holds it."""
    where: dict[str, str | os.PathLike] = {}
    for path in paths:
        for component in files.components(path):
            if component in where and component in ("video_vae", "audio_vae", "vocoder"):
                raise UserError(f"{path}: holds a {component}, and so does {where[component]}")
            where[component] = path
    missing = [name for name in ("video_vae", "audio_vae", "vocoder") if name not in where]
    if missing:
        raise UserError(f"no {' and no '.join(missing)} in {', '.join(map(str, paths))}")
    return where
