"""Video VAEs at work: weights on devices, clips in tiles, tiles split over devices.

Dims: B batch, F frames, H, W pixels, F', H', W' the latent grid, C channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import diffusion_tiling
from ltx2_jax.models.codecs import tiling as tiles
from ltx2_jax.models.codecs.diffusion_decoder import DiffusionDecoderConfig
from ltx2_jax.models.codecs.inputs import as_pixels, legal_frames
from ltx2_jax.models.codecs.video_vae import VideoVAEConfig
from ltx2_jax.sharding import picture_mesh, picture_sharding, pin_picture, replicated_on
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import diffusion_decoder as decoder_weights
from ltx2_jax.weights.names import video_vae as video_weights

AUTOMATIC = "automatic"


class VideoCodec:
    """A released video VAE on one or more devices; its weights are read when first needed.

    Long and large clips are cut into tiles, and a tile is split over the devices: clips first, then
    columns, then rows. That split is exact: every convolution gets its neighbours' border.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        read: Callable[[Any], Any],
        *,
        devices: Sequence[jax.Device] | None = None,
        tiling: tiles.Tiling | str | None = AUTOMATIC,
    ):
        """
        Args:
          config: of the network.
          read: gives its weights with the sharding that it is called with.
          devices: to work on; all of this process when None.
          tiling: `AUTOMATIC` is the official choice, with tiles as many times larger as there are
            devices to share one, and of equal length. None never cuts.
        """
        self.config, self._create = config, partial(video_weights.create, config)
        self.strides, self.channels = config.strides, config.latent_channels
        self.devices = list(devices or jax.local_devices())
        self.tiling = tiling
        self._read = read

    @property
    def graph(self) -> Any:
        """Structure of the network."""
        return mapping.graph(self._create)

    def _abstract_params(self) -> dict[Any, Any]:
        return mapping.nested(mapping.abstract_params(self._create))

    @cached_property
    def params(self) -> Any:
        """The weights, whole on every device."""
        return self._read(replicated_on(self.devices))

    def encode(self, video: ArrayLike) -> np.ndarray:
        """Normalised latents float32 [B, F', H', W', C] of pixels [B, F, H, W, 3].

        Pixels are uint8, or float32 in [-1, 1]. A frame count that is not st * k + 1 is cropped to
        the largest one that is.

        Raises:
          UserError: H or W is not a multiple of its stride, no frames, or not three colours; there
            is no encoder.
        """
        if self.config.encoder_blocks is None:
            raise UserError(
                "this video VAE has no encoder (its file holds a decoder alone): clips cannot be "
                "encoded with it"
            )
        video = np.asarray(video)
        video = video[:, : legal_frames(video.shape, self.strides)]
        tiling = self._tiling(video.shape)

        def encode(tile: np.ndarray) -> Array:
            return self._on_devices(_encode, tile, tile.shape[1:4])

        parts = self._parts(video, video.shape)
        # Filled up with copies, so that a clip's numbers do not depend on which part it is in.
        copies = [parts[-1][-1:]] * (len(parts[0]) - len(parts[-1]))
        parts[-1] = np.concatenate([parts[-1], *copies])
        latents = [
            tiles.tiled_encode(
                encode, part, tiles.plan_encode(part.shape[1:4], self.strides, tiling)
            )
            for part in parts
        ]
        return np.concatenate(latents)[: len(video)]

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
          UserError: latents of another shape or number of channels; there is no decoder.
        """
        if self.config.decoder_blocks is None:
            raise UserError(
                "this video VAE has no decoder (its file holds an encoder alone): latents cannot "
                "be decoded with it"
            )
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
            self._abstract_params(),
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

    def at_once(self, pixel_shape: Sequence[int]) -> int:
        """Clips of pixels [B, F, H, W, 3] in a call: with the pixels of a tile for every device."""
        tile = tiles.TileSizes()
        budget = len(self.devices) * tile.frames[0] * tile.height[0] * tile.width[0]
        return max(1, budget // math.prod(pixel_shape[1:4]))

    def largest_tile(self, pixel_shape: Sequence[int]) -> tiles.Shape:
        """Frames, rows and columns of the largest tile that pixels [B, F, H, W, 3] are cut into."""
        plan = tiles.plan_encode(pixel_shape[1:4], self.strides, self._tiling(pixel_shape))
        axes = (plan.time, plan.rows, plan.columns)
        return tuple(max(t.source.stop - t.source.start for t in axis) for axis in axes)

    def num_tiles(self, pixel_shape: Sequence[int]) -> int:
        """Of pixels [B, F, H, W, 3], when they are decoded."""
        tiling = self._tiling(pixel_shape)
        plan = tiles.plan_decode(self._grid(pixel_shape[1:4]), self.strides, tiling)
        return math.prod(map(len, (plan.time, plan.rows, plan.columns)))

    def mesh_of(self, tile: tiles.Shape, batch: int = 1) -> jax.sharding.Mesh:
        """How the devices share a tile of (frames, rows, columns) pixels."""
        return picture_mesh(self.devices, batch, *self._grid(tile)[1:])

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._abstract_params()))

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
        params = self.params
        if mesh.shape["copies"] > 1:
            # XLA's partitioner gets the borders of convolutions wrong where a picture is split over
            # some devices and copied over others: those that would hold copies rest.
            mesh = Mesh(mesh.devices[..., :1], mesh.axis_names, axis_types=mesh.axis_types)
            params = _on_some(params, mesh.devices.ravel())
        with jax.set_mesh(mesh):
            x = jax.device_put(x, picture_sharding(mesh))
            return program(params, x, *rest, graph=self.graph)

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
        """A batch in parts for one call each."""
        count = self.at_once(pixels)
        return [array[i : i + count] for i in range(0, pixels[0], count)]


class DiffusionVideoCodec(VideoCodec):
    """The form of 2.5 whose decoder is a diffusion model; it encodes as `VideoCodec` does.

    Decoding draws noise: the same noise for the same latents, every time.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        decoder: DiffusionDecoderConfig,
        read: Callable[[Any], Any],
        read_decoder: Callable[[Any], Any],
        *,
        devices: Sequence[jax.Device] | None = None,
        tiling: tiles.Tiling | str | None = AUTOMATIC,
    ):
        """As `VideoCodec`; `read_decoder` gives the weights of the diffusion decoder."""
        super().__init__(config, read, devices=devices, tiling=tiling)
        self.strides = decoder.strides  # which a file of the decoder alone has nowhere else
        self.decoder_config = decoder
        self._read_decoder = read_decoder

    @cached_property
    def decoder_params(self) -> Any:
        """The decoder's weights, whole on every device."""
        return self._read_decoder(replicated_on(self.devices))

    def decode_chunks(self, latents: ArrayLike) -> Iterator[np.ndarray]:
        """As that of `VideoCodec`; the devices share columns only."""
        latents = self._checked(latents)
        mesh = picture_mesh(self.devices, 1, 1, latents.shape[3])
        config = dataclasses.replace(self.decoder_config, strips=mesh.shape["columns"])
        tiling = self.tiling
        if tiling == AUTOMATIC:
            cells = config.strips * diffusion_tiling.MAX_CELLS
            tiling = diffusion_tiling.automatic_tiling(config, latents.shape, cells)
        decoder = mapping.build(partial(decoder_weights.create, config), self.decoder_params)
        statistics = nnx.merge(self.graph, self.params).statistics
        numbers = itertools.count()

        def place(x: ArrayLike) -> Array:
            # A tile's columns need not divide; then every device has them all.
            split = x.shape[3] % config.strips == 0
            return jax.device_put(
                x, picture_sharding(mesh) if split else replicated_on(self.devices)
            )

        def draw(shape: tuple[int, ...]) -> Array:
            return place(jax.random.normal(jax.random.key(next(numbers)), shape, jnp.float32))

        with jax.set_mesh(mesh):
            raw = place(np.asarray(statistics.unnormalize(latents)))
            for chunk in diffusion_tiling.decode_chunks(decoder, raw, draw, tiling):
                yield np.clip(chunk, -1, 1)


def _on_some(params: Any, devices: np.ndarray) -> Any:
    """Weights that are whole on more devices, on some of them, in the memory where they are."""
    home = replicated_on(devices)

    def part(x: Array) -> Array:
        on = {shard.device: shard.data for shard in x.addressable_shards}
        shards = [on[device] for device in devices if device in on]
        return jax.make_array_from_single_device_arrays(x.shape, home, shards)

    return jax.tree.map(part, params)


@partial(jax.jit, static_argnames="graph")
def _encode(params: Any, pixels: Array, *, graph: Any) -> Array:
    return pin_picture(nnx.merge(graph, params).encode(as_pixels(pixels)))


@partial(jax.jit, static_argnames="graph")
def _decode(params: Any, latents: Array, key: Array, *, graph: Any) -> Array:
    return pin_picture(nnx.merge(graph, params).decode(latents, noise=key))
