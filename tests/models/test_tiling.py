"""Tiles cover every latent, weigh one in sum, and give back what the codec gives for the whole."""

import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import tiling
from ltx2_jax.models.codecs.tiling import Span, TileCounts, TileSizes

STRIDES = (8, 32, 32)
SMALL = (4, 2, 2)  # strides of the fake codec
TILINGS = [
    None,
    TileSizes((8, 4), (8, 4), (6, 2)),
    TileSizes((16, 12), (0, 0), (6, 4)),  # three tiles over one latent
    TileSizes((0, 0), (8, 4), (6, 2)),  # time in one piece
    TileSizes((8, 0), (4, 0), (4, 0)),  # no overlap
    TileCounts((3, 1), (2, 1), (3, 0)),
    TileCounts((1, 0), (1, 0), (4, 1)),
]


def decode(latents):
    """[B, f', h', w', 4] -> [B, f, h, w, 3]; a latent decides its own pixels and no others.

    The last channel tells which latent frame of the clip it is. Where that is not the first one, a
    network would get its single frame wrong, so here it is far off.
    """
    xp = jnp if isinstance(latents, jax.Array) else np
    pixels, index = latents[..., :3], latents[..., :1, :1, :1, 3:]
    first = pixels[:, :1] + 1000 * (index[:, :1] > 0)
    pixels = xp.concatenate([first, xp.repeat(pixels[:, 1:], SMALL[0], axis=1)], axis=1)
    return xp.repeat(xp.repeat(pixels, SMALL[1], axis=2), SMALL[2], axis=3)


def encode(pixels):
    """The inverse: the mean of a latent's pixels."""
    st, sh, sw = SMALL
    B, F, H, W, C = pixels.shape
    x = pixels.reshape(B, F, H // sh, sh, W // sw, sw, C).mean(axis=(3, 5))
    later = x[:, 1:].reshape(B, (F - 1) // st, st, *x.shape[2:]).mean(axis=2)
    return np.concatenate([x[:, :1], later], axis=1)


def some_latents(frames=7, rows=9, columns=10, batch=1):
    latents = np.random.default_rng(0).normal(size=(batch, frames, rows, columns, 4))
    latents[..., 3] = np.arange(frames)[:, None, None]
    return latents.astype(np.float32)


# --------------------------------------------------------------------------- masks and places


def test_ramps_of_neighbours_meet():
    np.testing.assert_allclose(tiling.trapezoid(Span(5, 9, 2, 1)), [1 / 3, 2 / 3, 1, 1 / 2])
    np.testing.assert_allclose(tiling.trapezoid(Span(5, 9, 2), from_zero=True), [0, 1 / 2, 1, 1])
    falling, rising = tiling.trapezoid(Span(0, 9, 0, 3)), tiling.trapezoid(Span(6, 12, 3, 0))
    np.testing.assert_allclose(falling[6:] + rising[:3], 1)
    causal = tiling.trapezoid(Span(5, 12, 4, 0), from_zero=True)
    assert causal[0] == 0
    np.testing.assert_allclose(falling[5:] + causal[:4], 1)


def every_tiling():
    """Latent grids of all small sizes, with tilings that fit them."""
    for cells in range(1, 20):
        grid = (cells, cells, cells)
        for size, overlap in ((2, 0), (2, 1), (5, 2), (5, 4), (7, 3)):
            yield grid, TileSizes(*((s * size, s * overlap) for s in STRIDES))
        for count in range(1, min(cells, 5) + 1):
            for overlap in {0, 1, cells - count} & set(range(cells - count + 1)):
                yield grid, TileCounts(*[(count, overlap)] * 3)


def test_weights_sum_to_one_at_every_cell():
    for grid, tiles in every_tiling():
        pixels = (8 * (grid[0] - 1) + 1, 32 * grid[1], 32 * grid[2])
        plans = [(tiling.plan_decode(grid, STRIDES, tiles), pixels)]
        if isinstance(tiles, TileCounts):
            plans.append((tiling.plan_encode(pixels, STRIDES, tiles), grid))
        for plan, shape in plans:
            assert plan.target_shape == shape
            for axis, length in zip((plan.time, plan.rows, plan.columns), shape, strict=True):
                total = np.zeros(length)
                for tile in axis:
                    total[tile.target] += tile.weight
                np.testing.assert_allclose(total, 1, atol=1e-6, err_msg=f"{grid} {tiles}")


def test_tiles_lie_where_the_official_ones_do():
    """121 frames of 1280 x 704 with the default overlaps, written down from the official rules."""
    tiles = tiling.automatic_tiling(704, 1280)
    assert tiles == TileSizes((80, 24), (416, 64), (768, 64))
    time, rows, columns = tiling.tile_spans(tiles, (16, 22, 40), STRIDES)
    assert time == [Span(0, 10, 0, 3), Span(6, 16, 4, 0)]
    assert rows == [Span(0, 13, 0, 2), Span(11, 22, 2, 0)]
    assert columns == [Span(0, 24, 0, 2), Span(22, 40, 2, 0)]
    plan = tiling.plan_decode((16, 22, 40), STRIDES, tiles)
    assert plan.chunk_frames == [48, 73]
    assert [tile.target for tile in plan.time] == [slice(0, 73), slice(48, 121)]
    assert plan.time[1].weight[0] == 0


def test_a_clip_that_fits_into_a_tile_is_not_cut():
    for height, width in ((512, 768), (768, 768), (32, 32)):
        grid = (10, height // 32, width // 32)
        plan = tiling.plan_decode(grid, STRIDES, tiling.automatic_tiling(height, width))
        assert len(plan.groups) == len(plan.groups[0]) == 1


def test_automatic_tiles_of_a_thin_picture_are_longer_than_their_overlap():
    """Two cells of 24 are its part of the longer side, which the overlap alone would fill."""
    assert tiling.automatic_tiling(64, 1024) == TileSizes((80, 24), (96, 64), (768, 64))
    assert tiling.automatic_tiling(1024, 64) == TileSizes((80, 24), (768, 64), (96, 64))


def test_counts_instead_of_sizes_make_tiles_equal():
    grid = (16, 22, 40)
    counts = tiling.automatic_tiling(704, 1280).to_counts(grid, STRIDES)
    assert counts == TileCounts((2, 3), (2, 2), (2, 2))
    shapes = {
        tuple(s.stop - s.start for s in tile.source[1:])
        for group in tiling.plan_decode(grid, STRIDES, counts).groups
        for tile in group
    }
    assert shapes == {(10, 12, 21)}


def test_a_last_tile_below_the_minimum_grows_to_the_left():
    assert tiling.split_by_size(11, 5, 1) == [Span(0, 5, 0, 1), Span(4, 9, 1, 1), Span(8, 11, 1, 0)]
    grown = [Span(0, 5, 0, 1), Span(4, 9, 1, 2), Span(7, 11, 2, 0)]
    assert tiling.split_by_size(11, 5, 1, minimum=4) == grown
    assert tiling.split_by_size(3, 2, 1, minimum=4) == [Span(0, 3)]


# ------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("tiles", TILINGS)
def test_decoding_in_tiles_gives_the_same_clip(tiles):
    latents = some_latents(batch=2)
    plan = tiling.plan_decode(latents.shape[1:4], SMALL, tiles)
    chunks = list(tiling.tiled_decode(decode, latents, plan))
    assert [chunk.shape[1] for chunk in chunks] == [n for n in plan.chunk_frames if n]
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), decode(latents), atol=2e-6)


def test_an_overlap_fades_linearly_from_one_tile_to_the_next():
    plan = tiling.plan_decode((1, 1, 7), (1, 1, 3), TileSizes((0, 0), (0, 0), (12, 3)))
    ((left, right),) = plan.groups
    parts = [(left, np.zeros((1, 1, 1, 12, 3))), (right, np.full((1, 1, 1, 12, 3), 10.0))]
    (video,) = tiling.blend(plan, parts)
    expected = [0] * 9 + [2.5, 5, 7.5] + [10] * 9
    np.testing.assert_allclose(video[0, 0, 0, :, 1], expected, rtol=1e-6)


def test_tiles_of_one_shape_share_a_program():
    latents = some_latents(frames=13, rows=8, columns=12)
    plan = tiling.plan_decode((13, 8, 12), SMALL, TileCounts((3, 1), (2, 2), (3, 1)))
    shapes = []

    @jax.jit
    def traced(x):
        shapes.append(x.shape)
        return decode(x)

    assert sum(chunk.shape[1] for chunk in tiling.tiled_decode(traced, latents, plan)) == 49
    # Of 13, 8 and 12 latents: 5, 6 or 6 in time, 5 rows, 5, 5 or 4 columns.
    assert len(shapes) == len(set(shapes)) == 4


def test_at_most_two_results_are_alive():
    alive, most = set(), 0

    class Result(np.ndarray):
        pass

    def counted(latents):
        nonlocal most
        result = decode(latents).view(Result)
        alive.add(id(result))
        weakref.finalize(result, alive.discard, id(result))
        most = max(most, len(alive))
        return result

    plan = tiling.plan_decode((9, 8, 8), SMALL, TILINGS[1])
    for _ in tiling.tiled_decode(counted, some_latents(9, 8, 8), plan):
        pass
    assert most == 2


def test_host_memory_does_not_grow_with_the_clip():
    def peak(frames):
        latents = some_latents(frames, 40, 40)
        plan = tiling.plan_decode(latents.shape[1:4], SMALL, TileSizes((32, 8), (16, 8), (16, 8)))
        tracemalloc.start()
        for _ in tiling.tiled_decode(decode, latents, plan):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    temporal_tile = 33 * 80 * 80 * 3 * 4
    short, long = peak(30), peak(90)
    assert long < 1.05 * short
    assert long < 2.5 * temporal_tile


def test_bfloat16_results_are_summed_in_float32():
    latents = some_latents()
    plan = tiling.plan_decode(latents.shape[1:4], SMALL, TILINGS[1])

    def rounded(x):
        return jnp.asarray(decode(x), jnp.bfloat16)

    video = np.concatenate(list(tiling.tiled_decode(rounded, latents, plan)), axis=1)
    np.testing.assert_allclose(video, np.asarray(rounded(latents), np.float32), atol=2e-6)


def test_a_result_of_another_size_is_an_error():
    plan = tiling.plan_decode((7, 9, 10), (4, 2, 4), None)
    with pytest.raises(ValueError, match=r"\(25, 18, 20\), not \(25, 18, 40\)"):
        next(tiling.tiled_decode(decode, some_latents(), plan))


# ------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("tiles", [t for t in TILINGS if not isinstance(t, TileSizes)])
def test_encoding_in_tiles_gives_the_same_latents(tiles):
    pixels = np.random.default_rng(2).integers(0, 256, (2, 25, 18, 20, 3), np.uint8)
    plan = tiling.plan_encode(pixels.shape[1:4], SMALL, tiles)
    seen = []

    def to_latents(tile):
        seen.append(tile)
        return encode(tile / np.float32(127.5) - 1)

    latents = tiling.tiled_encode(to_latents, pixels, plan)
    np.testing.assert_allclose(latents, encode(pixels / np.float32(127.5) - 1), atol=1e-6)
    assert latents.dtype == np.float32
    assert {tile.dtype for tile in seen} == {np.dtype(np.uint8)}


def test_encoding_reads_only_tiles_of_a_file(tmp_path):
    path = tmp_path / "pixels.npy"
    pixels = np.random.default_rng(3).random((1, 41, 96, 160, 3), np.float32)
    np.save(path, pixels)
    file = np.load(path, mmap_mode="r")
    plan = tiling.plan_encode((41, 96, 160), SMALL, TileSizes((24, 16), (0, 0), (96, 64)))
    tracemalloc.start()
    latents = tiling.tiled_encode(encode, file, plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(latents, encode(pixels), atol=1e-6)
    assert peak < 0.75 * pixels.nbytes


def test_frames_beyond_the_last_whole_latent_are_cut():
    pixels = np.random.default_rng(4).random((1, 28, 8, 8, 3), np.float32)
    plan = tiling.plan_encode((28, 8, 8), SMALL, TileCounts((3, 1)))
    latents = tiling.tiled_encode(encode, pixels, plan)
    np.testing.assert_allclose(latents, encode(pixels[:, :25]), atol=1e-6)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileSizes(frames=(16, 16)), r"tiling frames=\(16, 16\).*smaller"),
        (lambda: TileSizes(width=(0, 32)), r"tiling width=\(0, 32\)"),
        (
            lambda: tiling.plan_decode((4, 4, 4), STRIDES, TileSizes(height=(100, 32))),
            r"tiling height=\(100, 32\): use multiples of 32, for the tile at least 64",
        ),
        (
            lambda: tiling.plan_decode((4, 4, 4), STRIDES, TileSizes(frames=(8, 0))),
            r"tiling frames=\(8, 0\): .* at least 16",
        ),
        (
            lambda: tiling.plan_decode((4, 4, 4), STRIDES, TileCounts(width=(3, 2))),
            r"tiling width=\(3, 2\): 4 latent cells are too few",
        ),
        (
            lambda: tiling.plan_decode((4, 4, 4), STRIDES, TileCounts(frames=(0, 0))),
            r"tiling frames=\(0, 0\): use at least one tile",
        ),
        (
            lambda: tiling.plan_encode((17, 64, 64), STRIDES, TileSizes(frames=(16, 8))),
            r"tiling frames=\(16, 8\): to encode, overlap by 16",
        ),
        (lambda: tiling.plan_encode((17, 64, 70), STRIDES, None), "width 70: expected a multiple"),
        (lambda: tiling.plan_encode((0, 64, 64), STRIDES, None), "0 frames"),
        (lambda: tiling.split_by_size(10, 3, 1, minimum=4), "3 latent cells are too small: 4"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
