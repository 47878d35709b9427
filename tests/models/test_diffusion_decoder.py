"""The diffusion video decoder: its sizes, its steps, its tiles and its weights."""

import dataclasses
import itertools
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import release_of, tensors_of

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.diffusion_decoder import (
    DIFFUSION_DECODER_2_5,
    DiffusionDecoder,
    DiffusionDecoderConfig,
    Layout,
    fit_noise,
)
from ltx2_jax.models.codecs.diffusion_decoder_blocks import apply_rope, rope_split, rope_tables
from ltx2_jax.models.codecs.diffusion_tiling import (
    automatic_tiling,
    decode_chunks,
    min_overlap,
    plan_tiles,
)
from ltx2_jax.models.codecs.tiling import TileCounts, TileSizes
from ltx2_jax.sharding import picture_mesh, picture_sharding, replicated_on
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.diffusion_decoder import create, diffusion_decoder_config, fold_gates

GOLDEN = Path(__file__).parents[1] / "golden/v2.5/split/video_vae_diffusion.safetensors"

TINY = DiffusionDecoderConfig(
    latent_channels=4,
    head_dim=16,
    channels=(32, 16, 16, 16, 16),
    depths=(1, 1, 1, 1, 1),
    kernels=((3, 3, 3), (3, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    diffusion_channels=32,
    timestep_dim=16,
    timestep_scale=1000.0,
    num_steps=1,
    prediction="x0",
    dtype="float32",
)


@cache
def decoder(cfg: DiffusionDecoderConfig = TINY) -> DiffusionDecoder:
    """Drawn by numpy, the same for all configs of equal shapes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        scale = leaf.shape[0] ** -0.5 if "kernel" in name else 0.3
        value = rng.normal(size=leaf.shape, scale=scale) + ("norm" in name)
        return jnp.asarray(np.float32(value))

    graphdef, params = nnx.split(nnx.eval_shape(partial(create, cfg)))
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, params))


def change(**fields) -> DiffusionDecoder:
    return decoder(dataclasses.replace(TINY, **fields))


def latents(*size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(1, *size, 4)), jnp.float32)


class Drawing:
    """A `draw` that remembers what it gave."""

    def __init__(self):
        self.given = []

    def __call__(self, shape):
        rng = np.random.default_rng(len(self.given))
        self.given.append(jnp.asarray(np.float32(rng.normal(size=shape))))
        return self.given[-1]


def decode(model: DiffusionDecoder, latents: jax.Array, tiling=None) -> np.ndarray:
    return np.concatenate(list(decode_chunks(model, latents, Drawing(), tiling)), axis=1)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (4, 3, 2)])
def test_pixels_are_8_32_32_times_the_latents_but_for_the_first_frame(size):
    frames, rows, columns = size
    model = decoder()
    shape = jax.eval_shape(lambda z: model(z, jnp.zeros), latents(*size)).shape
    assert shape == (1, 8 * (frames - 1) + 1, 32 * rows, 32 * columns, 3)


def test_small_latents_are_padded_with_their_edge_and_the_pixels_cropped():
    small = latents(1, 2, 3)
    padded = np.pad(small, [(0, 0), (0, 2), (0, 1), (0, 0), (0, 0)], mode="edge")
    assert TINY.min_latents == (3, 3, 3)
    layout = Layout(TINY, small.shape)
    np.testing.assert_array_equal(layout.pad(small), padded)
    pixels = np.arange(17 * 96 * 96).reshape(1, 17, 96, 96, 1)
    np.testing.assert_array_equal(layout.crop(pixels), pixels[:, :1, :64])
    # In the middle of a window of 7: one row before and after, two columns.
    layout = Layout(DIFFUSION_DECODER_2_5, (1, 3, 5, 3, 128))
    pixels = np.arange(17 * 224 * 224).reshape(1, 17, 224, 224, 1)
    np.testing.assert_array_equal(layout.crop(pixels), pixels[:, :, 32:192, 64:160])


def test_a_window_that_is_begun_needs_a_latent_or_an_overlap_more():
    """A latent has 8 rows and columns of the last stage: 29 need four, 17 three."""
    wide = (*TINY.kernels[:4], (3, 29, 17))
    assert dataclasses.replace(TINY, kernels=wide).min_latents == (3, 4, 3)
    # One cell of the last stage is half of one that is cut, and that is shared as a whole.
    short = (*TINY.kernels[:3], (1, 1, 1), (3, 3, 3))
    assert min_overlap(dataclasses.replace(TINY, kernels=short)) == (8, 32, 32)


def test_a_long_window_keeps_frames_beyond_the_clip_as_context():
    layout = Layout(DIFFUSION_DECODER_2_5, (1, 2, 7, 7, 128))
    assert layout.pixels == (17, 224, 224)  # the first window needs three latent frames
    assert layout.canvas((5, 56, 56), first=True, last=True) == (11, 448, 448)  # 9 frames are few
    assert layout.canvas((5, 56, 56), first=True, last=False) == (9, 448, 448)


def test_noise_is_cut_to_a_canvas_or_its_last_frame_repeated():
    noise = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 4, 3)
    np.testing.assert_array_equal(fit_noise(noise, (2, 4, 4)), noise[:, :2])
    np.testing.assert_array_equal(fit_noise(noise, (5, 4, 4)), noise[:, [0, 1, 2, 2, 2]])


def test_the_release_has_its_weights_and_limits():
    leaves = mapping.abstract_params(partial(create, DIFFUSION_DECODER_2_5)).values()
    count = sum(np.prod(leaf.shape, dtype=int) for leaf in leaves)
    # 834,268,000 bytes of bfloat16 in the released file with `type_emb` and two statistics.
    assert 2 * (count + 3 * 128) == 834_268_000
    assert DIFFUSION_DECODER_2_5.strides == (8, 32, 32)
    assert DIFFUSION_DECODER_2_5.min_latents == (3, 7, 7)
    assert min_overlap(DIFFUSION_DECODER_2_5) == (40, 160, 160)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (32, 16, 16)}, "expected 5 stages"),
        ({"channels": (32, 16, 16, 16, 12)}, "channels 12: expected a multiple of 16"),
        ({"diffusion_channels": 20}, "diffusion_channels 20"),
        ({"strides_after": ((4, 2, 2), (2, 1, 1), (1, 2, 2), (1, 2, 2))}, "kept or doubled"),
        ({"head_dim": 8}, "head_dim 8: expected a multiple of 8, at least 16"),
        ({"prediction": "epsilon"}, "'epsilon': expected v, x0"),
        ({"num_steps": 0}, "num_steps 0"),
    ],
)
def test_what_is_not_a_decoder_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **fields)


def test_latents_of_another_width_are_refused():
    with pytest.raises(UserError, match="latents of 5 channels: expected 4"):
        decode(decoder(), jnp.zeros((1, 3, 3, 3, 5)))


# ---- positions -----------------------------------------------------------------------------------


def test_rotated_pairs_are_complex_numbers_turned_by_the_position():
    x = np.random.default_rng(0).normal(size=(1, 3, 5, 2, 16)).astype(np.float32)
    got = apply_rope(x, rope_tables(jnp.int32(7), 3, 5, 16))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    times, rows, columns = np.broadcast_arrays(7, *np.mgrid[:3, :5])
    for start, stop, position in ((0, 2, times), (2, 5, rows), (5, 8, columns)):
        rates = 10000.0 ** (-np.arange(stop - start) / (stop - start))
        pairs[..., start:stop] *= np.exp(1j * position[..., None, None] * rates)
    np.testing.assert_allclose(got[..., 0::2], pairs.real, atol=1e-5)
    np.testing.assert_allclose(got[..., 1::2], pairs.imag, atol=1e-5)


def test_a_head_is_split_over_the_axes_as_in_the_release():
    assert rope_split(64) == (16, 24, 24)
    assert rope_split(16) == (4, 6, 6)
    assert rope_split(24) == (4, 10, 10)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "steps"), [("v", 2), ("x0", 3)])
def test_steps_follow_the_velocity_from_noise_to_pixels(prediction, steps):
    model = change(prediction=prediction, num_steps=steps)
    features, noise = Drawing()((1, 3, 4, 4, 16)), Drawing()((1, 5, 32, 32, 3))

    @nnx.jit
    def velocity(model, x, t):
        predicted = model.predict(x, t, model.stages[-1](features, first=True))
        return predicted if prediction == "v" else (x - predicted) / t

    x = noise
    for i in range(steps):
        x = x - velocity(model, x, jnp.float32(1 - i / steps)) / steps
    got = nnx.jit(DiffusionDecoder.decode_tile, static_argnames="first")(
        model, features, noise, first=True
    )
    np.testing.assert_allclose(got, x, atol=2e-4)


def test_the_timestep_and_the_noise_count():
    model = decoder()
    context = Drawing()((1, 3, 4, 4, 16))
    predict = nnx.jit(DiffusionDecoder.predict)
    pixels = Drawing()((1, 3, 16, 16, 3))
    base, later = (predict(model, pixels, jnp.float32(t), context) for t in (1.0, 0.5))
    assert np.abs(base - later).max() > 0.01
    assert np.abs(base - predict(model, -pixels, jnp.float32(1.0), context)).max() > 0.1


# ---- strips and devices --------------------------------------------------------------------------


def test_columns_split_over_devices_give_the_same_pixels():
    model, z, draw = change(prediction="v", strips=8), latents(3, 3, 8), Drawing()
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, replicated_on(jax.devices()))
    mesh = picture_mesh(jax.devices(), 1, 1, 8)
    where = picture_sharding(mesh)
    inputs = jax.device_put((z, draw((1, 17, 96, 256, 3))), where)

    def decode_all(params, z, noise):
        return nnx.merge(graphdef, params)(z, lambda shape: noise)

    with jax.set_mesh(mesh):
        compiled = jax.jit(decode_all, out_shardings=where).lower(params, *inputs).compile()
        got = compiled(params, *inputs)
    np.testing.assert_allclose(got, decode(change(prediction="v"), z), atol=1e-4)
    # The last stage, nearly all of the work, exchanges borders only; the others gather.
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers
    assert not any("[1,17,24,64," in line for line in gathers)


# ---- tiles ---------------------------------------------------------------------------------------


def test_tiles_are_exact_where_their_edge_is_out_of_reach():
    model = change(prediction="v")  # whose tiles share the noise
    z, tiling = latents(3, 3, 8), TileCounts((2, 3), (1, 0), (2, 4))
    plan = plan_tiles(model.cfg, z.shape, tiling)
    chunks = list(decode_chunks(model, z, Drawing(), tiling))
    assert [chunk.shape[1] for chunk in chunks] == plan.chunk_frames == [5, 12]
    error = np.abs(np.concatenate(chunks, axis=1) - decode(model, z))
    # The windows of stages 4 and 5 reach less far than the overlap, into which a tile fades.
    alone = [
        sum(np.isin(range(length), range(tile.target.start, tile.target.stop)) for tile in axis)
        == 1
        for length, axis in zip(
            plan.target_shape, (plan.time, plan.rows, plan.columns), strict=True
        )
    ]
    assert error[0][np.ix_(*alone)].max() < 1e-4
    assert error.max() > 1e-3


@pytest.mark.parametrize(("fourth", "side"), [((3, 5, 5), 160), ((3, 5, 31), 256)])
@pytest.mark.parametrize("turned", [False, True])
def test_tiles_overlap_by_the_longest_reach_of_two_stages_and_two_sides(fourth, side, turned):
    """Of two blocks of stage 4, or of eight of stage 5, whose cells are half as large.

    Half a window of 11 is 5 cells: 8 x 5 / 2 = 20 cells are 40 frames, or 160 pixels. Half a window
    of 31 is 15: 2 x 15 = 30 cells are 240 pixels, which is 256 in whole latents. The other side
    would do with 64.
    """
    kernels = (*DIFFUSION_DECODER_2_5.kernels[:3], fourth, (11, 5, 11))
    kernels = tuple((t, c, r) if turned else (t, r, c) for t, r, c in kernels)
    cfg = dataclasses.replace(DIFFUSION_DECODER_2_5, kernels=kernels)
    assert min_overlap(cfg) == (40, side, side)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (TileSizes((24, 8), (0, 0), (96, 24)), r"width=\(96, 24\).*overlap by 32"),
        (TileSizes((16, 0), (0, 0), (0, 0)), r"frames=\(16, 0\).*overlap by 8"),
        (TileSizes((0, 0), (100, 32), (0, 0)), r"height=\(100, 32\).*multiples of 8"),
        (TileCounts((1, 0), (1, 0), (16, 0)), r"width=\(16, 0\).*3 are needed"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tiling, message):
    with pytest.raises(UserError, match=message):
        plan_tiles(TINY, (1, 5, 4, 5, 4), tiling)


def test_a_tile_of_the_release_fills_the_window_of_its_last_stage():
    """Two columns of it come of one that is cut: its 11 come of 6, not of 5."""
    shape = (1, 16, 22, 40, 128)  # 160 columns to be cut
    plan = plan_tiles(DIFFUSION_DECODER_2_5, shape, TileCounts(width=(26, 0)))
    assert min(tile.source.stop - tile.source.start for tile in plan.columns) == 6
    with pytest.raises(UserError, match=r"tiles of 5 latent cells are too small: 6 are needed"):
        plan_tiles(DIFFUSION_DECODER_2_5, shape, TileCounts(width=(27, 0)))


@pytest.mark.parametrize(("max_cells", "batch"), [(1_000_000, 1), (2_000_000, 1), (2_000_000, 2)])
def test_automatic_tiles_fit_and_overlap_by_the_reach(max_cells, batch):
    cfg, shape = DIFFUSION_DECODER_2_5, (batch, 16, 22, 40, 128)  # 121 frames of 1280 x 704
    plan = plan_tiles(cfg, shape, automatic_tiling(cfg, shape, max_cells))
    for group in plan.groups:
        for tile in group:
            cells = np.prod([s.stop - s.start for s in tile.source[1:]])
            assert 8 * batch * cells <= max_cells
    for axis, least in zip((plan.time, plan.rows, plan.columns), min_overlap(cfg), strict=True):
        for before, after in itertools.pairwise(axis):
            assert before.target.stop - after.target.start >= least
    assert automatic_tiling(cfg, shape, batch * 10_000_000) is None


# ---- weights -------------------------------------------------------------------------------------


def test_gates_multiply_what_their_projections_give():
    tensors = tensors_of(GOLDEN, "diffusion_decoder")
    cfg, stored = release_of(GOLDEN).load("diffusion_decoder")
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    params = fold_gates(stored, cfg)
    linear = params["blocks"][1]["attention_out"]
    got = x @ linear["kernel"].astype(np.float32) + linear["bias"]
    prefix = "diff_blocks.1."
    plain = x @ tensors[f"{prefix}attn.proj.weight"].astype(np.float32).T
    want = tensors[f"{prefix}gate_msa"] * (plain + tensors[f"{prefix}attn.proj.bias"])
    np.testing.assert_allclose(got, want, atol=0.03)  # the product is rounded to bfloat16
    assert linear["kernel"].dtype == jnp.bfloat16


def test_weights_without_gates_stay_as_they_are():
    cfg, params = release_of(GOLDEN).load("diffusion_decoder")
    del params["gates"]
    folded = fold_gates(params, cfg)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, folded, params))


# ---- config --------------------------------------------------------------------------------------

RELEASED = {
    "_class_name": "CausalDiffusionVAE",
    "latent_channels": 128,
    "model_output_type": "x0",
    "decoder": {
        "in_channels": 128,
        "out_channels": 3,
        "patch_size": 4,
        "head_dim": 64,
        "stage_channels": [2048, 1024, 512, 512, 256],
        "stage_depths": [4, 6, 4, 2, 8],
        "stage_kernels": [[3, 7, 7], [3, 7, 7], [3, 5, 5], [3, 5, 5], [11, 11, 11]],
        "stage5_kernel": [11, 11, 11],
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
        "resampler_kind": "linear",
        "spatial_padding_mode": "zeros",
    },
}


def test_released_metadata_gives_the_preset():
    assert diffusion_decoder_config(RELEASED) == DIFFUSION_DECODER_2_5


def test_absent_keys_have_the_official_defaults():
    assert diffusion_decoder_config({}) == DiffusionDecoderConfig()
    assert diffusion_decoder_config({"decoder": {}}, dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resampler_kind": "conv"}, "resampler_kind='conv', only 'linear'"),
        ({"upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 2], [[2, 2, 2], 2]]},
         r"upsamples\[2\] reduces 512 channels by 2, but stage_channels\[3\] is 512"),
        ({"stage_depths": [4, 6, 4, 2]}, "expected 5 stages"),
    ],
)  # fmt: skip
def test_an_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        diffusion_decoder_config(RELEASED | {"decoder": RELEASED["decoder"] | change})
