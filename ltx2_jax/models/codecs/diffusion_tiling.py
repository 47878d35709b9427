"""Decoding in tiles with the diffusion video decoder, and the choice of tiles.

Stages 1 to 3 run once on the whole clip: at their resolution it is small. Stages 4 and 5, which
have nearly all of the work and memory, run on one tile of features at a time; the pixels are
blended. Tiles do not start early as those of the convolutional decoder do: the last upsampling
makes `cfg.tile_scale` pixels of every cell of the features; only the clip's first cell gives one
frame less.

Without the cells beyond its edge a tile's attention windows are shifted, and every block carries
that error inwards by half a window. Neighbours overlap by at least the longer of the two stages'
reaches, so that where one is wrong the other has more weight.

Source: `ltx_core/model/video_vae/{diffusion_video_decoder,diffusion_tiling}.py`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import tiling as tiles
from ltx2_jax.models.codecs.diffusion_decoder import (
    DiffusionDecoder,
    DiffusionDecoderConfig,
    Layout,
    fit_noise,
)
from ltx2_jax.models.codecs.diffusion_decoder_blocks import Size
from ltx2_jax.models.codecs.video_vae_blocks import Draw

# Of the last stage, in one tile on one device: 14 GB of activations in the released decoder.
MAX_CELLS = 2_000_000
# Overlaps are rounded up to whole latents of the released codec, as upstream does.
_OVERLAP_UNITS = (8, 32, 32)


def decode_chunks(
    decoder: DiffusionDecoder, latents: Array, draw: Draw, tiling: tiles.Tiling | None = None
) -> Iterator[np.ndarray]:
    """Pixels of latents [B, F', H', W', C], tile by tile, in pieces of whole frames in time order.

    Host memory is about two pieces. Tiles of one size share a compiled program, but those with the
    first or the last frame of the clip have their own.

    Args:
      decoder: with its weights.
      latents: as `DiffusionDecoder` takes them.
      draw: gives the next standard normal noise of a shape. Called for each tile, in the order of
        time, rows, columns, when `cfg.noise_per_tile`; else once, for all pixels.
      tiling: None decodes everything at once, in one piece.

    Yields:
      float32 [B, f, H, W, 3], about in [-1, 1].

    Raises:
      UserError: the wrong number of channels, or a tiling that does not fit (see `plan_tiles`).
    """
    layout = Layout(decoder.cfg, latents.shape)
    plan = plan_tiles(decoder.cfg, latents.shape, tiling)
    graphdef, params = nnx.split(decoder)
    features = _features(graphdef, params, latents)
    shared = None if decoder.cfg.noise_per_tile else draw(layout.noise_shape)

    def decode(tile: tiles.Tile) -> Array:
        source = tile.source[1:]
        first, last = source[0].start == 0, source[0].stop == layout.grid[0]
        cells = [part.stop - part.start for part in source]
        canvas = layout.canvas(cells, first=first, last=last)
        if shared is None:
            noise = draw((layout.batch, *canvas, decoder.cfg.out_channels))
        else:
            noise = fit_noise(shared[tile.target], canvas)
        if last:  # with what the repeated latent frame became
            cells[0] = features.shape[1] - source[0].start
        corner = np.array([part.start for part in source], np.int32)
        frames = tile.time.target.stop - tile.time.target.start
        place = {"cells": tuple(cells), "first": first, "frames": frames}
        return _tile(graphdef, params, features, corner, noise, **place)

    parts = ((tile, decode(tile)) for group in plan.groups for tile in group)
    done = 0
    for chunk in tiles.blend(plan, parts):
        wanted = layout.wanted[0] - done
        done += chunk.shape[1]
        if wanted > 0:
            yield layout.crop(chunk[:, :wanted])


@partial(jax.jit, static_argnames="graphdef")
def _features(graphdef: nnx.GraphDef, params: Any, latents: Array) -> Array:
    return nnx.merge(graphdef, params).features(latents)


@partial(jax.jit, static_argnames=("graphdef", "cells", "first", "frames"))
def _tile(
    graphdef: nnx.GraphDef,
    params: Any,
    features: Array,  # [B, T, H, W, C] of the clip
    corner: Array,  # int32 [3], the tile's first cell
    noise: Array,  # [B, f, h, w, 3]
    *,
    cells: Size,
    first: bool,
    frames: int,  # of the result: f may be more
) -> Array:
    batch, *_, channels = features.shape
    part = jax.lax.dynamic_slice(features, (0, *corner, 0), (batch, *cells, channels))
    return nnx.merge(graphdef, params).decode_tile(part, noise, first=first)[:, :frames]


# ---- where the tiles are -------------------------------------------------------------------------


def plan_tiles(
    cfg: DiffusionDecoderConfig, latent_shape: Sequence[int], tiling: tiles.Tiling | None
) -> tiles.Plan:
    """Tiles from cells of the features to pixels of padded latents [B, F', H', W', C].

    Sizes are in frames and pixels, multiples of `cfg.tile_scale`; the overlaps of counts are in
    cells of the features.

    Raises:
      UserError: the tiling does not fit the clip, a tile is smaller than an attention window, or a
        tiling by size overlaps by less than `min_overlap`.
    """
    layout = Layout(cfg, latent_shape)
    if isinstance(tiling, tiles.TileSizes):
        for name, least in zip(tiles.AXES, min_overlap(cfg), strict=True):
            tile, overlap = getattr(tiling, name)
            if tile and overlap < least:
                raise UserError(
                    f"tiling {name}=({tile}, {overlap}): for this decoder, overlap by {least}"
                )
    spans = tiles.tile_spans(
        tiling or tiles.TileCounts(),
        layout.grid,
        cfg.tile_scale,
        causal=False,
        minimum=_min_cells(cfg),
    )
    axes = []
    for axis, (sources, factor) in enumerate(zip(spans, cfg.tile_scale, strict=True)):
        dropped = axis == 0 and factor == 2
        targets = [_to_pixels(span, factor, dropped) for span in sources]
        axes.append(tiles.axis_tiles(sources, targets))
    return tiles.Plan(*axes)


def _to_pixels(span: tiles.Span, factor: int, dropped: bool) -> tiles.Span:
    """The pixels of a span of cells; `dropped` where the clip's first cell gives one less."""
    start = max(span.start * factor - dropped, 0)
    stop = span.stop * factor - dropped
    return tiles.Span(start, stop, span.fade_in * factor, span.fade_out * factor)


def min_overlap(cfg: DiffusionDecoderConfig) -> Size:
    """Frames, rows and columns of pixels by which tiles must overlap: the reach of stages 4 and 5.

    Rows and columns get the larger of the two.
    """
    reach, tiled = [], list(zip(cfg.depths[-2:], cfg.kernels[-2:], strict=True))
    for axis, scale in enumerate(cfg.tile_scale):
        fourth, fifth = (depth * (kernel[axis] // 2) for depth, kernel in tiled)
        cells = max(fourth, -(-fifth // cfg.strides_after[-1][axis]))
        reach.append(-(-cells * scale // _OVERLAP_UNITS[axis]) * _OVERLAP_UNITS[axis])
    time, rows, columns = reach
    return time, max(rows, columns), max(rows, columns)


def _min_cells(cfg: DiffusionDecoderConfig) -> Size:
    """The smallest tile of features that fills the attention windows of both stages."""
    return tuple(
        max(fourth, -(-fifth // stride))
        for fourth, fifth, stride in zip(
            cfg.kernels[3], cfg.kernels[4], cfg.strides_after[3], strict=True
        )
    )


def automatic_tiling(
    cfg: DiffusionDecoderConfig, latent_shape: Sequence[int], max_cells: int = MAX_CELLS
) -> tiles.TileCounts | None:
    """The tiles of least work that fit into memory; None if the whole does.

    Tiles of equal length, or one cell apart, so that few programs are compiled; each at least twice
    as long as its overlaps where it has two.

    Args:
      cfg: the decoder.
      latent_shape: [B, F', H', W', C].
      max_cells: of the last stage, B frames of rows and columns of patches: of one tile at once. In
        bfloat16 the released decoder takes about 7 KB for each beside weights and features.
    """
    layout = Layout(cfg, latent_shape)
    overlaps = [n // scale for n, scale in zip(min_overlap(cfg), cfg.tile_scale, strict=True)]
    per_axis = []
    for length, overlap, least in zip(layout.grid, overlaps, _min_cells(cfg), strict=True):
        options = [((1, 0), length)]
        while True:
            count = len(options) + 1
            size = -(-(length + overlap * (count - 1)) // count)
            if size < max(2 * overlap, least) or size <= overlap:
                break
            options.append(((count, overlap), size))
        per_axis.append(options)
    factor = layout.batch * math.prod(cfg.strides_after[-1])

    def cost(choice: Sequence[Any]) -> tuple[bool, int, int]:
        cells = factor * math.prod(size for _, size in choice)
        count = math.prod(count for (count, _), _ in choice)
        return cells > max_cells, cells * count if cells <= max_cells else cells, count

    counts = [entry for entry, _ in min(itertools.product(*per_axis), key=cost)]
    return None if all(count == 1 for count, _ in counts) else tiles.TileCounts(*counts)
