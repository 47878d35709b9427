"""Overlapping tiles of a clip: how to cut it, run a codec on one tile at a time, and blend.

A codec's activations grow with the clip, so long or large clips are encoded and decoded in tiles
whose overlaps are cross-faded. Tiles lie on a grid: every axis is split by itself, and a tile is
one piece of each axis. Its weight at a pixel is then the product of three one-dimensional masks.
They are scaled to sum to one on each axis, so that their products sum to one too and a weighted sum
of tiles needs no division.

Time is special, because the codecs are causal there: latent 0 stands for one frame, every other for
`stride` frames. A network run on a tile takes the tile's first latent for latent 0, so tiles after
the first start one latent early, and the one frame that this latent yields has weight zero.

Dims: B batch, F frames, H, W pixels, F', H', W' latent grid, C channels; f, h, w of a tile.
Source: `ltx_core/tiling.py`, `ltx_core/model/video_vae/{video_vae,conv_video_decoder}.py`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from ltx2_jax.errors import UserError

Shape = tuple[int, int, int]  # time, rows, columns

# ------------------------------------------------------------------------------- one axis


@dataclass(frozen=True)
class Span:
    """One tile along one axis: cells [start, stop), cross-faded with its neighbours."""

    start: int
    stop: int
    fade_in: int = 0  # cells at the start that the tile before covers as well
    fade_out: int = 0  # cells at the end that the next tile covers as well

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def indices(self) -> slice:
        return slice(self.start, self.stop)


def split_by_size(length: int, size: int, overlap: int, minimum: int = 1) -> list[Span]:
    """Tiles of `size` cells that share `overlap`; the last one takes what is left.

    An axis that fits into one tile, or is shorter than `minimum`, stays whole. If less than
    `minimum` is left for the last tile, it starts earlier and shares more with the one before.

    Raises:
        UserError: the overlap is negative or not below size, or size is below minimum.
    """
    if not 0 <= overlap < size:
        raise UserError(f"tiles of {size} latent cells cannot share {overlap}")
    if length <= max(size, minimum - 1):
        return [Span(0, length)]
    step = size - overlap
    count = -((overlap - length) // step)
    spans = [Span(i * step, i * step + size, overlap, overlap) for i in range(count)]
    spans[0] = replace(spans[0], fade_in=0)
    spans[-1] = replace(spans[-1], stop=length, fade_out=0)
    return _at_least(minimum, spans)


def split_by_count(length: int, count: int, overlap: int, minimum: int = 1) -> list[Span]:
    """`count` tiles that share `overlap` cells; equally long, or the first ones longer by one cell.

    Raises:
        UserError: the axis is too short for that many tiles with that overlap.
    """
    if count < 1 or overlap < 0:
        raise UserError("use at least one tile and an overlap of at least 0 latent cells")
    if count == 1:
        return [Span(0, length)]
    size, longer = divmod(length + overlap * (count - 1), count)
    if size <= overlap:
        raise UserError(f"{length} latent cells are too few for such tiles")
    spans = []
    for i in range(count):
        start = i * (size - overlap) + min(i, longer)
        stop = start + size + (i < longer)
        spans.append(Span(start, stop, overlap if i else 0, overlap if i < count - 1 else 0))
    return _at_least(minimum, spans)


def _at_least(minimum: int, spans: list[Span]) -> list[Span]:
    """`spans`, the last one of `minimum` cells or more, for which it may start earlier."""
    before, last = spans[-2:]
    if last.length < minimum:
        shared = before.stop - (last.stop - minimum)
        last = Span(last.stop - minimum, last.stop, shared, 0)
        spans = [*spans[:-2], replace(before, fade_out=shared), last]
    shortest = min(span.length for span in spans)
    if shortest < minimum:
        raise UserError(f"tiles of {shortest} latent cells are too small: {minimum} are needed")
    return spans


def start_early(spans: Sequence[Span]) -> list[Span]:
    """Causal time tiles: those after the first start one cell earlier, faded in from zero there."""
    early = [replace(s, start=s.start - 1, fade_in=s.fade_in + 1) for s in spans[1:]]
    return [spans[0], *early]


def trapezoid(span: Span, *, from_zero: bool = False) -> np.ndarray:
    """The mask of a tile: float32 [span.length], 1 with linear ramps over the overlaps.

    A ramp of n cells is 1/(n+1) ... n/(n+1), and so is the falling one reversed. With `from_zero`
    the rising ramp is 0/n ... (n-1)/n: for tiles made by `start_early`, whose first cell is to be
    dropped and whose rising ramp is one longer than the falling one it meets.
    """
    mask = np.ones(span.length, np.float64)
    rising, falling = min(span.fade_in, span.length), min(span.fade_out, span.length)
    if rising:
        first = 0 if from_zero else 1
        mask[:rising] = np.arange(first, first + rising) / (rising + first)
    if falling:
        mask[span.length - falling :] *= np.arange(falling, 0, -1) / (falling + 1)
    return mask.astype(np.float32)


@dataclass(frozen=True, eq=False)
class AxisTile:
    """One tile along one axis: what the codec reads and where its result goes."""

    source: slice
    target: slice
    weight: np.ndarray  # float32 [target length]; those of an axis sum to one at every cell


def axis_tiles(
    sources: Sequence[Span], targets: Sequence[Span], *, from_zero: bool = False
) -> tuple[AxisTile, ...]:
    """Pairs the tiles of an axis on the codec's two sides; masks follow the targets' fades.

    Where the trapezoids do not sum to one (three tiles over one cell), they are scaled to.
    """
    masks = [trapezoid(span, from_zero=from_zero) for span in targets]
    total = np.zeros(max(span.stop for span in targets), np.float32)
    for span, mask in zip(targets, masks, strict=True):
        total[span.indices] += mask
    total = np.maximum(total, 1e-8)
    return tuple(
        AxisTile(source.indices, target.indices, mask / total[target.indices])
        for source, target, mask in zip(sources, targets, masks, strict=True)
    )


# ------------------------------------------------------------------------------- three axes

AXES = ("frames", "height", "width")
Spans = tuple[list[Span], list[Span], list[Span]]  # along time, rows and columns


@dataclass(frozen=True)
class TileSizes:
    """Tiling by size: (tile, overlap) per axis, in frames and pixels; (0, 0) leaves an axis whole.

    Both are multiples of the codec's stride on the axis, and a tile is at least two strides. The
    defaults are the official ones.
    """

    frames: tuple[int, int] = (80, 24)
    height: tuple[int, int] = (768, 64)
    width: tuple[int, int] = (768, 64)

    def __post_init__(self) -> None:
        for name, tile, overlap in _per_axis(self):
            if not 0 <= overlap < tile and (tile, overlap) != (0, 0):
                raise UserError(
                    f"tiling {name}=({tile}, {overlap}): the overlap must be smaller than the tile;"
                    " (0, 0) leaves the axis whole"
                )

    def to_counts(self, latent_shape: Shape, strides: Shape) -> "TileCounts":
        """As many tiles with the same overlaps, but of equal length, or one cell apart.

        One shape to compile where sizes give up to eight, and no last tile that is mostly overlap.
        """
        counts = [len(spans) for spans in tile_spans(self, latent_shape, strides)]
        axes = zip(_per_axis(self), strides, strict=True)
        overlaps = [overlap // stride for (_, _, overlap), stride in axes]
        return TileCounts(*zip(counts, overlaps, strict=True))


@dataclass(frozen=True)
class TileCounts:
    """Tiling by number: (tiles, overlap in latent cells) per axis; (1, 0) leaves an axis whole."""

    frames: tuple[int, int] = (1, 0)
    height: tuple[int, int] = (1, 0)
    width: tuple[int, int] = (1, 0)


Tiling = TileSizes | TileCounts


def tile_spans(
    tiling: Tiling,
    latent_shape: Shape,
    strides: Shape,
    *,
    causal: bool = True,
    minimum: Shape = (1, 1, 1),
) -> Spans:
    """Tiles of the latent grid (F', H', W').

    Args:
        strides: frames, rows and columns of pixels behind one cell of the grid.
        causal: time tiles after the first start one cell early.
        minimum: the fewest cells of a tile that the network takes, per axis.

    Raises:
        UserError: a size is no multiple of its stride or below two strides or `minimum`, or an axis
            is too short for the number of tiles.
    """
    spans = []
    for (name, tile, overlap), length, stride, least in zip(
        _per_axis(tiling), latent_shape, strides, minimum, strict=True
    ):
        try:
            if isinstance(tiling, TileCounts):
                spans.append(split_by_count(length, tile, overlap, least))
            elif tile % stride or overlap % stride or 0 < tile < 2 * stride:
                raise UserError(f"use multiples of {stride}, for the tile at least {2 * stride}")
            else:
                size = tile // stride or length
                spans.append(split_by_size(length, size, overlap // stride, least))
        except UserError as error:
            raise UserError(f"tiling {name}=({tile}, {overlap}): {error}") from None
    return (start_early(spans[0]) if causal else spans[0], *spans[1:])


def _per_axis(tiling: Tiling) -> list[tuple[str, int, int]]:
    return [(name, *getattr(tiling, name)) for name in AXES]


def automatic_tiling(height: int, width: int, strides: Shape = (8, 32, 32)) -> TileSizes:
    """The official pipelines' choice for a convolutional decoder at `height` x `width` pixels.

    768 pixels on the longer side and as large a part of the shorter one, rounded to the latent
    grid; overlaps of 64 pixels; 80 frames with an overlap of 24.
    Source: `ltx_pipelines/utils/helpers.py` (`tiling_config_for_vae`).
    """
    default = TileSizes()
    tile, overlap = default.width
    longer = max(height, width)

    def side(length: int, stride: int) -> tuple[int, int]:
        cells = round((tile // stride) * (length // stride) / (longer // stride))
        return max(cells, 2, overlap // stride + 1) * stride, overlap

    return TileSizes(default.frames, side(height, strides[1]), side(width, strides[2]))


# ------------------------------------------------------------------------------- plans


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of a plan: indices of [B, time, rows, columns, ...] on either side, and masks."""

    time: AxisTile
    rows: AxisTile
    columns: AxisTile

    @property
    def source(self) -> tuple[slice, ...]:
        """Cuts out what the network reads."""
        return slice(None), self.time.source, self.rows.source, self.columns.source

    @property
    def target(self) -> tuple[slice, ...]:
        """Where the result goes."""
        return slice(None), self.time.target, self.rows.target, self.columns.target


@dataclass(frozen=True, eq=False)
class Plan:
    """All tiles of a clip: every combination of one tile per axis."""

    time: tuple[AxisTile, ...]
    rows: tuple[AxisTile, ...]
    columns: tuple[AxisTile, ...]

    @property
    def target_shape(self) -> Shape:
        """Frames, rows and columns of the whole result."""
        return tuple(axis[-1].target.stop for axis in (self.time, self.rows, self.columns))

    @property
    def groups(self) -> list[list[Tile]]:
        """The tiles by time, in order; within a group by rows, then columns."""
        return [
            [Tile(time, *place) for place in itertools.product(self.rows, self.columns)]
            for time in self.time
        ]

    @property
    def chunk_frames(self) -> list[int]:
        """Frames that are finished with each group: those before the next group's first.

        The first can be zero, where causal tiles start at the same frame.
        """
        starts = [tile.target.start for tile in self.time] + [self.time[-1].target.stop]
        return [stop - start for start, stop in itertools.pairwise(starts)]


def plan_decode(latent_shape: Shape, strides: Shape, tiling: Tiling | None) -> Plan:
    """Tiles for decoding a latent grid (F', H', W') to pixels; None is one tile for all.

    Args:
        strides: frames, rows and columns of pixels behind one latent, such as (8, 32, 32).

    Raises:
        UserError: the tiling does not fit the strides or the grid.
    """
    axes = _both_sides(latent_shape, strides, tiling)
    return Plan(*(axis_tiles(latents, pixels, from_zero=zero) for latents, pixels, zero in axes))


# A tile sees padding where its neighbours are; with less overlap that shows in the latents.
MIN_ENCODE_OVERLAP = (16, 64, 64)  # frames, rows, columns of pixels


def plan_encode(pixel_shape: Shape, strides: Shape, tiling: Tiling | None) -> Plan:
    """Tiles for encoding a clip of (F, H, W) pixels; the mirror image of `plan_decode`.

    A frame count that is not st * k + 1 is cut to the largest one that is.

    Raises:
        UserError: H or W is not a multiple of its stride, the tiling does not fit the clip, or a
            tiling by size overlaps by less than `MIN_ENCODE_OVERLAP`, the official floors.
    """
    frames, height, width = pixel_shape
    if frames < 1:
        raise UserError(f"{frames} frames: expected at least one")
    for name, length, stride in (("height", height, strides[1]), ("width", width, strides[2])):
        if length < 1 or length % stride:
            raise UserError(f"{name} {length}: expected a multiple of {stride}")
    if isinstance(tiling, TileSizes):
        for (name, tile, overlap), least in zip(_per_axis(tiling), MIN_ENCODE_OVERLAP, strict=True):
            if tile and overlap < least:
                raise UserError(f"tiling {name}=({tile}, {overlap}): to encode, overlap by {least}")
    latent_shape = ((frames - 1) // strides[0] + 1, height // strides[1], width // strides[2])
    axes = _both_sides(latent_shape, strides, tiling)
    return Plan(*(axis_tiles(pixels, latents, from_zero=zero) for latents, pixels, zero in axes))


def _both_sides(
    latent_shape: Shape, strides: Shape, tiling: Tiling | None
) -> list[tuple[list[Span], list[Span], bool]]:
    """Per axis the latent spans, their pixel spans, and whether masks rise from zero."""
    spans = tile_spans(tiling or TileCounts(), latent_shape, strides)
    to_pixels = (_frames, _pixels, _pixels)
    return [
        (cells, [convert(span, stride) for span in cells], convert is _frames)
        for cells, stride, convert in zip(spans, strides, to_pixels, strict=True)
    ]


def _frames(span: Span, stride: int) -> Span:
    # The first latent of a tile stands for one frame, in the tile and in its rising ramp.
    fade_in = 1 + (span.fade_in - 1) * stride if span.fade_in else 0
    stop = 1 + (span.stop - 1) * stride
    return Span(span.start * stride, stop, fade_in, span.fade_out * stride)


def _pixels(span: Span, stride: int) -> Span:
    return Span(*(stride * cells for cells in astuple(span)))


# ------------------------------------------------------------------------------- running a plan


def tiled_decode(
    decode: Callable[[np.ndarray], Any], latents: Any, plan: Plan
) -> Iterator[np.ndarray]:
    """Pixels of latents [B, F', H', W', C], decoded tile by tile: see `blend` for what it yields.

    Args:
        decode: latents [B, f', h', w', C] -> pixels [B, f, h, w, 3]; jitted by the caller, so that
            tiles of one shape share a program.
        latents: a numpy array, or a jax array that this host can read.
        plan: from `plan_decode`.
    """
    return blend(plan, _results(decode, np.asarray(latents), plan))


def tiled_encode(encode: Callable[[np.ndarray], Any], pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """Latents float32 [B, F', H', W', C] of pixels [B, F, H, W, 3], encoded tile by tile.

    Args:
        encode: pixels [B, f, h, w, 3] -> latents [B, f', h', w', C]; jitted by the caller.
        pixels: a numpy array or memory map of any type that `encode` takes; only tiles are read.
        plan: from `plan_encode`.
    """
    return np.concatenate([*blend(plan, _results(encode, pixels, plan))], axis=1)


def _results(
    network: Callable[[np.ndarray], Any], array: np.ndarray, plan: Plan
) -> Iterator[tuple[Tile, Any]]:
    return ((tile, network(array[tile.source])) for group in plan.groups for tile in group)


def blend(plan: Plan, parts: Iterable[tuple[Tile, Any]]) -> Iterator[np.ndarray]:
    """Finished frames of the whole result, in time order, from the results of the tiles.

    Args:
        parts: (tile, array [B, f, h, w, C] of the tile's target shape) for every tile, in the order
            of `plan.groups`; within a group in any order. Pulled as they are needed, but one early:
            the device works on a tile while the host adds the one before.

    Yields:
        float32 numpy arrays [B, f, H, W, C] of `plan.chunk_frames` frames; none is empty.

    The sums live on the host: whole frames of them would take memory from the tiles on the device,
    to save little. One core adds a tile of the default size in about 0.2 s, while the device works
    on the next. Alive at most are the results of two tiles and two buffers of one temporal tile:
    the one being filled, and the one before it while its frames are in use.
    """
    parts = _one_early(iter(parts))
    _, H, W = plan.target_shape
    carried = None  # weighted frames of the last group that this one covers too
    for finished in plan.chunk_frames:
        buffer = None
        for _ in range(len(plan.rows) * len(plan.columns)):
            tile, part = next(parts)
            part = np.asarray(part)
            if buffer is None:
                B, f, C = *part.shape[:2], part.shape[-1]
                buffer = np.zeros((B, f, H, W * C), np.float32)
                if carried is not None:
                    buffer[:, : carried.shape[1]] = carried
                    carried = None
            _add(buffer, tile, part)
            del part  # before the next one is made
        carried = buffer[:, finished:]
        if finished:
            yield buffer[:, :finished].reshape(B, finished, H, W, C)


def _add(buffer: np.ndarray, tile: Tile, part: np.ndarray) -> None:
    """Adds a weighted tile [B, f, h, w, C] to the buffer [B, f, H, W * C] of its group."""
    B, f, h, w, C = part.shape
    if (f, h, w) != _shape(tile.target):
        raise ValueError(f"the result of a tile is {(f, h, w)}, not {_shape(tile.target)}")
    columns = slice(tile.columns.target.start * C, tile.columns.target.stop * C)
    place = buffer[:, :, tile.rows.target, columns]
    mask = np.repeat(np.outer(tile.rows.weight, tile.columns.weight), C, axis=1)  # [h, w * C]
    # Frame by frame, in place: temporaries as large as the tile would double the time.
    scratch = np.empty((B, h, w * C), np.float32)
    for i, weight in enumerate(tile.time.weight):
        np.multiply(part[:, i].reshape(scratch.shape), mask, out=scratch)
        scratch *= weight
        place[:, i] += scratch


def _one_early(items: Iterator[Any]) -> Iterator[Any]:
    current = next(items)
    for following in itertools.chain(items, [None]):
        yield current
        current = following


def _shape(place: tuple[slice, ...]) -> Shape:
    return tuple(part.stop - part.start for part in place[1:])
