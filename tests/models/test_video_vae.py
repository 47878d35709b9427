"""The convolutional video VAE beyond the golden cases: other blocks, bounds, noise, sharding."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx
from golden_case import release_of, tensors_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import video_vae_blocks as blocks
from ltx2_jax.models.codecs.video_vae import (
    DECODE_NOISE,
    VIDEO_VAE_2_0,
    VIDEO_VAE_2_3,
    Block,
    LatentStatistics,
    VideoVAEConfig,
)
from ltx2_jax.models.layers import Rngs
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.video_vae import (
    TABLE,
    create,
    video_vae_config,
)

# Strides (4, 8, 8); every way of folding that the newer releases use.
SMALL = VideoVAEConfig(
    latent_channels=4,
    patch_size=2,
    encoder_blocks=(
        Block("res_x"),
        Block("compress_space_res", multiplier=2),
        Block("compress_time_res"),
        Block("compress_all_res", multiplier=2),
    ),
    decoder_blocks=(
        Block("compress_space", multiplier=2),
        Block("compress_time"),
        Block("compress_all", multiplier=2, residual=True),
        Block("res_x"),
    ),
    decoder_base_channels=4,
    timestep_conditioning=False,
    dtype="float32",
)
# The kinds of blocks that no released file has, and both kinds of noise.
UNUSUAL = VideoVAEConfig(
    latent_channels=4,
    patch_size=1,
    encoder_blocks=(
        Block("compress_time"),
        Block("compress_space"),
        Block("attn"),
        Block("compress_all"),
        Block("res_x_y", multiplier=2),
        Block("compress_all_x_y", multiplier=2),
    ),
    decoder_blocks=(
        Block("compress_all"),
        Block("compress_all"),
        Block("attn"),
        Block("res_x_y", multiplier=2),
        Block("compress_all"),
        Block("res_x", layers=2, inject_noise=True),
    ),
    decoder_base_channels=4,
    decoder_padding="replicate",
    latent_log_var="per_channel",
    dtype="float32",
)


def drawn(make, seed=0):
    """The module that `make` builds, all its weights drawn; deviations are around 1."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape, scale=0.2) + ("std" in jax.tree_util.keystr(path))
        return jnp.asarray(np.float32(value))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@partial(jax.jit, static_argnums=(0, 1))
def call(graphdef, method, state, *args):
    return getattr(nnx.merge(graphdef, state), method)(*args)


def run(module, method, *args):
    """A call of a method, compiled once for every structure of module and arguments."""
    graphdef, state = nnx.split(module)
    return call(graphdef, method, state, *args)


def trace(cfg, method, *args):
    """Shape and dtype of what a method of the VAE returns."""
    graphdef, state = nnx.split(nnx.eval_shape(partial(create, cfg)))
    return jax.eval_shape(partial(call, graphdef, method), state, *args)


def noise_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("padding", "mode"), [("zeros", "constant"), ("reflect", "reflect"), ("replicate", "edge")]
)
def test_convolution_repeats_frames_and_pads_space_as_told(padding, mode, causal):
    style = blocks.ConvStyle(padding, causal=causal, dtype="float32")
    conv = drawn(lambda: blocks.CausalConv(2, 3, style, rngs=Rngs(0)))
    x = noise_of(1, 4, 5, 6, 2)
    padded = np.pad(x[0], ((2, 0) if causal else (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
    padded = np.pad(padded, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode)
    kernel = np.asarray(conv.conv.kernel[...])
    want = np.stack(
        [
            sum(scipy.signal.correlate(padded[..., i], kernel[..., i, o], "valid") for i in (0, 1))
            + np.asarray(conv.conv.bias[o])
            for o in range(3)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(run(conv, "__call__", x)[0], want, atol=1e-5)


def test_strided_convolution_is_a_sampling_of_the_dense_one():
    style = blocks.ConvStyle("reflect", causal=True, dtype="float32")
    dense = drawn(lambda: blocks.CausalConv(2, 3, style, rngs=Rngs(0)))
    strided = drawn(lambda: blocks.CausalConv(2, 3, style, stride=(2, 2, 2), rngs=Rngs(0)))
    x = noise_of(2, 5, 4, 6, 2)
    want = run(dense, "__call__", x)[:, ::2, ::2, ::2]
    np.testing.assert_allclose(run(strided, "__call__", x), want, atol=1e-5)


def test_patches_put_the_width_offset_before_the_height_offset():
    pixels = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 4, 3)
    x = np.asarray(blocks.patchify(pixels, 2))
    for colour, right, down in np.ndindex(3, 2, 2):
        want = pixels[:, :, down::2, right::2, colour]
        np.testing.assert_array_equal(x[..., 4 * colour + 2 * right + down], want)
    np.testing.assert_array_equal(blocks.unpatchify(x, 2), pixels)


def test_pixel_norm_has_the_epsilon_of_the_video_vae():
    x = np.full((1, 1, 1, 1, 4), 1e-4, np.float32)  # mean square 1e-8
    np.testing.assert_allclose(blocks.pixel_norm(x), 0.5**0.5, rtol=1e-4)


def test_a_shortcut_is_normalised_over_a_whole_clip_with_its_own_epsilon():
    """Far from zero, where a mean of squares minus a squared mean would be lost to rounding."""
    style = blocks.ConvStyle("zeros", causal=True, dtype="float32")
    layer = drawn(lambda: blocks.ResidualBlock(2, 3, style, rngs=Rngs(0)))
    x = 8 + 1e-3 * noise_of(2, 2, 3, 4, 2)
    exact = x.astype(np.float64)
    mean, variance = (f(exact, axis=(1, 2, 3, 4), keepdims=True) for f in (np.mean, np.var))
    want = (exact - mean) / np.sqrt(variance + 1e-6)
    norm = layer.shortcut_norm
    want = want * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x), want, atol=2e-3)


def test_attention_stays_within_a_frame_and_has_one_head():
    style = blocks.ConvStyle("zeros", causal=True, dtype="float32")
    layer = drawn(lambda: blocks.FrameAttention(6, style, rngs=Rngs(0)))
    x = noise_of(1, 2, 3, 4, 6).astype(np.float64)
    got = run(layer, "__call__", np.float32(x))
    qkv, out = np.asarray(layer.qkv.kernel)[0, 0], np.asarray(layer.out.kernel)[0, 0]
    for frame in range(2):
        tokens = x[0, frame].reshape(12, 6)
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True) * 6**0.5
        y = unit * np.asarray(layer.norm_scale)[:, 0, 0] @ qkv + np.asarray(layer.qkv.bias)
        q, k, v = np.split(y, 3, axis=1)
        weights = np.exp(q @ k.T / 6**0.5)
        y = weights / weights.sum(1, keepdims=True) @ v @ out + np.asarray(layer.out.bias)
        np.testing.assert_allclose(got[0, frame].reshape(12, 6), tokens + y, atol=1e-5)


def test_statistics_are_float32_whatever_comes_in():
    statistics = LatentStatistics(2)
    statistics.mean = nnx.Param(jnp.array([100.0, -1.0], jnp.bfloat16))
    statistics.std = nnx.Param(jnp.array([0.5, 3.0], jnp.bfloat16))
    x = jnp.array([[101.0, 2.0]], jnp.bfloat16)
    normal = statistics.normalize(x)
    assert normal.dtype == jnp.float32
    np.testing.assert_array_equal(normal, [[2.0, 1.0]])
    np.testing.assert_array_equal(statistics.unnormalize(normal), x)


# ---- the whole network ---------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [SMALL, UNUSUAL])
def test_shapes_follow_the_strides(cfg):
    st, sh, sw = cfg.strides
    pixels = jax.ShapeDtypeStruct((2, 2 * st + 1, 2 * sh, 3 * sw, 3), jnp.bfloat16)
    latents = trace(cfg, "encode", pixels)
    assert (latents.shape, latents.dtype) == ((2, 3, 2, 3, 4), jnp.float32)
    video = trace(cfg, "decode", latents, None, jax.random.key(0))
    assert (video.shape, video.dtype) == (pixels.shape, jnp.float32)


def test_encoder_sees_no_future():
    vae, pixels = drawn(partial(create, SMALL)), noise_of(1, 9, 8, 16, 3)
    long, short = run(vae, "encode", pixels), run(vae, "encode", pixels[:, :5])
    np.testing.assert_allclose(long[:, :2], short, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_decoder_sees_the_future_unless_causal(causal):
    vae = drawn(partial(create, replace(SMALL, causal_decoder=causal)))
    latents = noise_of(1, 4, 2, 2, 4)
    long, short = run(vae, "decode", latents), run(vae, "decode", latents[:, :2])
    assert short.shape[1] == 5
    assert np.allclose(long[:, :5], short, atol=1e-4) == causal


def test_videos_of_a_batch_do_not_meet():
    vae = drawn(partial(create, UNUSUAL))
    pixels, latents = noise_of(2, 9, 8, 8, 3), noise_of(2, 2, 1, 2, 4)
    noise = [noise_of(2, 2, 1, 2, 4), *(noise_of(1, 2, seed=i) for i in range(4))]
    times = np.float32([0.05, 0.3])
    both = run(vae, "encode", pixels), run(vae, "decode", latents, times, noise)
    flipped = (
        run(vae, "encode", pixels[::-1]),
        run(vae, "decode", latents[::-1], times[::-1], [noise[0][::-1], *noise[1:]]),
    )
    for a, b in zip(both, flipped, strict=True):
        np.testing.assert_allclose(a, b[::-1], atol=1e-5)
        assert not np.allclose(a[0], a[1])


def test_encode_leaves_out_frames_beyond_the_last_latent():
    vae, pixels = drawn(partial(create, SMALL)), noise_of(1, 8, 8, 8, 3)
    want = run(vae, "encode", pixels[:, :5])
    np.testing.assert_array_equal(run(vae, "encode", pixels), want)


def test_bfloat16_is_close_to_float32():
    exact = drawn(partial(create, SMALL))
    graphdef = nnx.split(nnx.eval_shape(partial(create, replace(SMALL, dtype="bfloat16"))))[0]
    rounded = nnx.merge(graphdef, nnx.state(exact))
    pixels, latents = noise_of(1, 5, 8, 8, 3), noise_of(1, 2, 1, 1, 4)
    for method, x in (("encode", pixels), ("decode", latents)):
        a, b = run(exact, method, x), run(rounded, method, x)
        assert b.dtype == jnp.float32
        error = np.abs(np.asarray(a - b)).max() / np.asarray(a).std()
        assert 1e-6 < error < 0.1


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((1, 8, 8, 8, 3), "8 frames"),
        ((1, 5, 12, 8, 3), "12 x 8"),
        ((1, 5, 8, 4, 3), "8 x 4"),
        ((1, 5, 8, 8, 1), "1 channels"),
    ],
)
def test_illegal_videos_are_refused(shape, part):
    with pytest.raises(UserError, match=part):
        trace(SMALL, "encoder", jax.ShapeDtypeStruct(shape, jnp.float32))


def test_latents_of_another_vae_are_refused():
    with pytest.raises(UserError, match="5 channels: expected 4"):
        trace(SMALL, "decoder", jax.ShapeDtypeStruct((1, 2, 1, 1, 5), jnp.float32))


# ---- noise ---------------------------------------------------------------------------------------


def test_a_key_draws_the_noise_once_and_the_same_every_time():
    """Every draw by its number: no two maps of the same size are alike."""
    vae, latents = drawn(partial(create, UNUSUAL)), noise_of(1, 2, 1, 2, 4)
    first, again, other = (
        run(vae, "decode", latents, None, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(5)]
    shapes = [latents.shape, *[(1, 2)] * 4]
    noise = [np.asarray(jax.random.normal(*pair)) for pair in zip(keys, shapes, strict=True)]
    np.testing.assert_allclose(run(vae, "decode", latents, None, noise), first, atol=1e-4)


def test_timestep_conditioning_makes_the_latents_noisy_by_its_own_measure():
    """Noise of 1 in normal units against moving the latents by hand, injected noise being zero."""
    vae, latents = drawn(partial(create, UNUSUAL)), noise_of(1, 2, 1, 2, 4)
    quiet = [np.zeros((1, 2), np.float32)] * 4
    noisy = run(vae, "decode", latents, 0.05, [np.ones_like(latents), *quiet])
    moved = latents + DECODE_NOISE / (1 - DECODE_NOISE)
    still = run(vae, "decode", moved, None, [np.zeros_like(latents), *quiet])
    np.testing.assert_allclose(noisy, still, atol=1e-4)


def test_blocks_that_inject_noise_need_it_whatever_else_does():
    """Two maps for each of them, at their resolution: also one that stands alone."""
    block = Block("res_x_y", inject_noise=True)
    cfg = replace(UNUSUAL, decoder_blocks=(block, Block("compress_space")))
    cfg = replace(cfg, timestep_conditioning=False)
    assert cfg.uses_noise
    assert not replace(cfg, decoder_blocks=cfg.decoder_blocks[1:]).uses_noise
    asked = []

    def draw(shape):
        asked.append(shape)
        return jnp.zeros(shape)

    graphdef, state = nnx.split(nnx.eval_shape(partial(create, cfg)))

    def decode(state, latents):
        return nnx.merge(graphdef, state).decoder(latents, draw=draw)

    jax.eval_shape(decode, state, jnp.zeros((1, 2, 3, 5, 4)))
    assert asked == [(6, 10), (6, 10)]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (None, r"pass a jax\.random\.key"),
        ([(1, 2, 1, 2, 4), (1, 2)], r"a draw of \(1, 2\), got no more"),
        ([(1, 4, 2, 1, 2)], r"a draw of \(1, 2, 1, 2, 4\), got one of \(1, 4, 2, 1, 2\)"),
    ],
)
def test_noise_that_does_not_fit_is_refused(noise, message):
    noise = None if noise is None else [np.zeros(shape, np.float32) for shape in noise]
    with pytest.raises(UserError, match=message):
        trace(UNUSUAL, "decode", jnp.zeros((1, 2, 1, 2, 4)), None, noise)


# ---- sharding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_split_width_needs_neighbours_only(method, padding):
    mesh = jax.make_mesh((8,), ("width",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec(None, None, None, "width"))
    cfg = replace(SMALL, encoder_padding=padding, decoder_padding=padding)
    vae = drawn(partial(create, cfg))
    graphdef, state = nnx.split(vae)
    x = noise_of(*{"encode": (1, 5, 16, 64, 3), "decode": (1, 2, 2, 8, 4)}[method])

    def split(state, x):
        x = jax.lax.with_sharding_constraint(x, where)
        y = getattr(nnx.merge(graphdef, state), method)(x)
        return jax.lax.with_sharding_constraint(y, where)

    compiled = jax.jit(split).lower(state, x).compile()
    collectives = set(re.findall(r"(all-\w+|reduce-scatter|collective-\w+)", compiled.as_text()))
    assert collectives == {"collective-permute"}
    np.testing.assert_allclose(compiled(state, x), run(vae, method, x), atol=1e-5)


# ---- weights and config --------------------------------------------------------------------------

CHECKPOINT = Path(__file__).parents[1] / "golden" / "v2.3" / "checkpoint.safetensors"


def test_blocks_without_golden_data_have_their_official_names():
    params = mapping.parameters(partial(create, UNUSUAL), TABLE)
    names = {parameter.names[0] for parameter in params}
    assert len(names) == len(params)
    assert names >= {
        "encoder.down_blocks.0.conv.weight",
        "encoder.down_blocks.2.norm.gamma",
        "encoder.down_blocks.2.to_qkv.weight",
        "encoder.down_blocks.2.proj.bias",
        "encoder.down_blocks.5.conv.bias",
        "decoder.up_blocks.0.res_blocks.1.per_channel_scale2",
    }


def test_one_half_can_be_had_alone():
    release = release_of(CHECKPOINT)
    tensors = tensors_of(CHECKPOINT, "video_vae")
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        cfg = release.config("video_vae", **{f"{other}_blocks": None})
        parameters = mapping.parameters(partial(create, cfg), TABLE)
        kept = {name: x for name, x in tensors.items() if not name.startswith(other)}
        params = mapping.from_official(kept, parameters, "video VAE")
        assert set(params) == {half, "statistics"}
        assert getattr(mapping.build(partial(create, cfg), params), other) is None
        assert cfg.strides == (8, 32, 32)


# The `vae` config in the metadata of the released files, keys that decide nothing left out.
RELEASED = {
    "2.0": """{"_class_name": "CausalVideoAutoencoder", "dims": 3, "latent_channels": 128,
        "encoder_blocks": [["res_x", {"num_layers": 4}], ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}], ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}], ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}]], "decoder_blocks": [
        ["res_x", {"num_layers": 5, "inject_noise": false}],
        ["compress_all", {"residual": true, "multiplier": 2}],
        ["res_x", {"num_layers": 5, "inject_noise": false}],
        ["compress_all", {"residual": true, "multiplier": 2}],
        ["res_x", {"num_layers": 5, "inject_noise": false}],
        ["compress_all", {"residual": true, "multiplier": 2}],
        ["res_x", {"num_layers": 5, "inject_noise": false}]], "use_quant_conv": false,
        "encoder_spatial_padding_mode": "zeros", "timestep_conditioning": false}""",
    "2.3": """{"_class_name": "CausalVideoAutoencoder", "dims": 3, "latent_channels": 128,
        "encoder_blocks": [["res_x", {"num_layers": 4}], ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}], ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}], ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}]], "decoder_blocks": [["res_x", {"num_layers": 4}],
        ["compress_space", {"multiplier": 2}], ["res_x", {"num_layers": 6}],
        ["compress_time", {"multiplier": 2}], ["res_x", {"num_layers": 4}],
        ["compress_all", {"multiplier": 1}], ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 2}], ["res_x", {"num_layers": 2}]],
        "decoder_base_channels": 128, "spatial_padding_mode": "zeros",
        "timestep_conditioning": false}""",
}


@pytest.mark.parametrize(("version", "cfg"), [("2.0", VIDEO_VAE_2_0), ("2.3", VIDEO_VAE_2_3)])
def test_released_metadata_gives_the_presets(version, cfg):
    assert video_vae_config(json.loads(RELEASED[version])) == cfg
    assert cfg.strides == (8, 32, 32)
    assert not cfg.uses_noise
    vae = nnx.eval_shape(partial(create, cfg))
    widths = [b.layers[0].conv1.conv.in_features for b in vae.decoder.blocks[::2]]
    assert widths == {"2.0": [1024, 512, 256, 128], "2.3": [1024, 512, 512, 256, 128]}[version]
    widths = [b.layers[0].conv1.conv.in_features for b in vae.encoder.blocks[::2]]
    assert widths == [128, 256, 512, 1024, {"2.0": 2048, "2.3": 1024}[version]]


def test_absent_keys_have_the_official_defaults():
    assert video_vae_config({}) == VideoVAEConfig()
    cfg = video_vae_config(
        {
            "encoder_blocks": [["res_x", 3], ["res_x_y", 1], ["compress_all", 1]],
            "decoder_blocks": [["res_x_y", {}], ["compress_space", {"residual": True}]],
            "spatial_padding_mode": "replicate",
            "encoder_spatial_padding_mode": "zeros",
        }
    )
    assert cfg.encoder_blocks == (
        Block("res_x", layers=3),
        Block("res_x_y", multiplier=2),
        Block("compress_all"),
    )
    assert cfg.decoder_blocks == (Block("res_x_y", multiplier=2), Block("compress_space"))
    assert cfg.encoder_padding == cfg.decoder_padding == "replicate"


def test_a_nested_config_gives_the_encoder_of_a_diffusion_vae():
    cfg = video_vae_config(
        {
            "_class_name": "CausalDiffusionVAE",
            "latent_channels": 7,
            "encoder": {
                "out_channels": 6,
                "blocks": [["compress_all_res", {}]],
                "patch_size": 2,
                "spatial_padding_mode": "reflect",
                "latent_log_var": "constant",
            },
            "decoder": {"out_channels": 3, "patch_size": 4},
        }
    )
    assert cfg.decoder_blocks is None
    assert cfg.encoder_blocks == (Block("compress_all_res", multiplier=2),)
    assert (cfg.latent_channels, cfg.encoder_padding, cfg.strides) == (6, "reflect", (2, 4, 4))
    assert cfg.latent_log_var == "constant"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"norm_layer": "group_norm"}, "norm_layer='group_norm', only 'pixel_norm'"),
        ({"dims": [2, 1]}, "dims=.* only 3"),
        ({"encoder": {"norm_layer": "group_norm"}}, "norm_layer='group_norm'"),
        ({"encoder_blocks": [["attn_res_x", {}]]}, "encoder_blocks: 'attn_res_x' is not supported"),
        ({"decoder_blocks": [["compress_all_res", {}]]}, "decoder_blocks: 'compress_all_res'"),
        ({"decoder_blocks": [["res_x", {"num_layers": 0}]]}, "layers and multiplier >= 1"),
        ({"spatial_padding_mode": "circular"}, "padding 'circular': expected zeros, reflect"),
        ({"latent_log_var": "none"}, "latent_log_var 'none': expected uniform, constant"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(metadata, message):
    with pytest.raises(UserError, match=message):
        video_vae_config(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_blocks": (Block("compress_all_res"),)}, "cannot fold 4 channels by 8 to 4"),
        ({"decoder_blocks": (Block("compress_all", residual=True),)}, "cannot unfold 4 channels"),
        ({"decoder_blocks": (Block("res_x_y", 1, 2, inject_noise=True),)}, "keeps the width"),
    ],
)
def test_widths_that_no_block_can_have_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(partial(create, replace(SMALL, **changes)))
