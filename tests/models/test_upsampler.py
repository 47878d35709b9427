"""Latent upsamplers: steps up against slow index arithmetic, released tensors both ways."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.upsampler import RationalResampler, UpsamplerConfig, upsample_latents
from ltx2_jax.models.layers import Rngs
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.upsampler import TABLE, create, upsampler_config

TINY = UpsamplerConfig(in_channels=4, mid_channels=32, num_blocks_per_stage=1, dtype="float32")
BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256


def network(**changes):
    """A small upsampler whose weights all count."""
    make = partial(create, dataclasses.replace(TINY, **changes))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "blur_kernel":
            return jnp.asarray(BINOMIAL[:, :, None, None])
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(np.float32(rng.normal(size=leaf.shape) / np.sqrt(fan_in)))

    abstract = nnx.to_pure_dict(nnx.split(nnx.eval_shape(make), nnx.Param)[1])
    return mapping.build(make, jax.tree_util.tree_map_with_path(draw, abstract))


call = nnx.jit(lambda module, x: module(x))


def random(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def shuffle_by_loops(x, ft, fh, fw):
    """[B, F, H, W, D ft fh fw] -> [B, F ft, H fh, W fw, D], entry by entry."""
    B, F, H, W, C = x.shape
    D = C // (ft * fh * fw)
    y = np.empty((B, F * ft, H * fh, W * fw, D), x.dtype)
    for d, t, i, j in itertools.product(range(D), range(ft), range(fh), range(fw)):
        y[:, t::ft, i::fh, j::fw, d] = x[..., ((d * ft + t) * fh + i) * fw + j]
    return y


# ------------------------------------------------------------------------------------ steps up


@pytest.mark.parametrize(("scale", "up", "down"), [(0.75, 3, 4), (1.5, 3, 2), (2.0, 2, 1)])
def test_a_ratio_is_a_shuffle_then_a_binomial_blur_with_a_stride(scale, up, down):
    config = dataclasses.replace(TINY, rational_resampler=True, spatial_scale=scale)
    matrix = random(32, 32 * up**2)
    kernel = np.zeros((3, 3, *matrix.shape), np.float32)
    kernel[1, 1] = matrix
    resampler = mapping.build(
        lambda: RationalResampler(config, rngs=Rngs(0)),
        {
            "conv": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(32 * up**2)},
            "blur_kernel": jnp.asarray(BINOMIAL[:, :, None, None]),
        },
    )
    x = random(2, 2, 5, 6, 32)
    expected = shuffle_by_loops(x @ matrix, 1, up, up)
    if down > 1:
        blur = BINOMIAL[None, None, :, :, None]
        expected = ndimage.correlate(expected, blur, mode="constant")[:, :, ::down, ::down]
    np.testing.assert_allclose(call(resampler, x), expected, atol=1e-4)


def test_time_and_space_together_are_one_shuffle_without_the_first_frame():
    both = network(temporal_upsample=True, num_blocks_per_stage=0)
    x = random(1, 2, 3, 4, 4)
    inner = jax.nn.silu(both.norm_in(both.conv_in(x)))
    larger = shuffle_by_loops(np.asarray(both.expand(inner)), 2, 2, 2)[:, 1:]
    np.testing.assert_allclose(call(both, x), both.conv_out(larger), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (1, 3, 10, 6, 4)),
        ({"rational_resampler": True, "spatial_scale": 1.5}, (1, 3, 8, 5, 4)),
        ({"spatial_scale": 1.5}, (1, 3, 10, 6, 4)),  # read by the rational resampler alone
        ({"spatial_upsample": False, "temporal_upsample": True}, (1, 5, 5, 3, 4)),
        ({"rational_resampler": True, "temporal_upsample": True}, (1, 5, 10, 6, 4)),
    ],
)
def test_sizes_of_the_result(changes, shape):
    module = network(**changes)
    assert jax.eval_shape(lambda x: module(x), random(1, 3, 5, 3, 4)).shape == shape


def test_clips_of_a_batch_do_not_meet():
    module, x = network(rational_resampler=True, spatial_scale=1.5), random(2, 2, 4, 3, 4)
    np.testing.assert_allclose(call(module, x)[1:], call(module, x[1:]), atol=1e-5)


def test_group_norms_hold_far_from_zero():
    """Where a mean of squares minus a squared mean would be lost to rounding."""
    norm = network().norm_in
    x = 100 + 0.01 * random(1, 2, 3, 4, 32)
    exact = x.astype(np.float64)  # one channel a group
    mean, variance = (f(exact, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    want = (exact - mean) / np.sqrt(variance + 1e-5)
    want = want * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x), want, atol=5e-3)


def test_two_dimensions_treat_every_frame_by_itself():
    flat, x = network(dims=2), random(1, 3, 3, 4, 4)
    frames = [call(flat, x[:, i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(call(flat, x), np.concatenate(frames, axis=1), atol=1e-5)


# ---------------------------------------------------------------------------------- statistics


def test_the_network_sees_latents_that_are_not_normalised():
    x, mean, std = random(1, 2, 3, 3, 4), np.arange(4) - 1.5, np.arange(1, 5) / 2
    seen = []

    def repeat_rows(latents):
        seen.append(np.asarray(latents))
        return jnp.repeat(latents, 2, axis=2).astype(jnp.bfloat16)

    larger = upsample_latents(repeat_rows, x, mean, std)
    np.testing.assert_allclose(seen[0], x * std + mean, rtol=1e-5, atol=1e-6)
    assert larger.dtype == jnp.float32
    np.testing.assert_allclose(larger, np.repeat(x, 2, axis=2), atol=0.05)


def test_bfloat16_stays_close_to_float32():
    x = random(1, 2, 4, 4, 4)
    exact, rounded = call(network(), x), call(network(dtype="bfloat16"), x)
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - exact
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(exact)


# -------------------------------------------------------------------------------------- weights


def test_a_stored_blur_kernel_is_the_one_that_is_used():
    config = dataclasses.replace(TINY, rational_resampler=True, spatial_scale=1.5)
    params = nnx.to_pure_dict(nnx.split(network(rational_resampler=True, spatial_scale=1.5))[1])
    parameters = mapping.parameters(partial(create, config), TABLE)
    tensors = mapping.to_official(params, parameters)
    assert tensors["upsampler.blur_down.kernel"].shape == (1, 1, 5, 5)
    x = random(1, 1, 4, 4, 4)

    def result() -> np.ndarray:
        params = mapping.from_official(tensors, parameters, "upsampler")
        return call(mapping.build(partial(create, config), params), x)

    before = result()
    tensors["upsampler.blur_down.kernel"] = 2 * tensors["upsampler.blur_down.kernel"]
    after = result()
    assert np.abs(after - before).max() > 0.01


def test_config_keys_and_their_official_defaults():
    assert upsampler_config({}) == UpsamplerConfig()
    metadata = {
        "_class_name": "LatentUpsampler",
        "mid_channels": 1024,
        "rational_resampler": True,
        "spatial_scale": 1.5,
        "dtype": "an unknown key",
    }
    config = upsampler_config(metadata, dtype="float32")
    assert (config.mid_channels, config.scale, config.dtype) == (1024, (1.0, 1.5, 1.5), "float32")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"_class_name": "AudioVAE"}, "_class_name='AudioVAE'"),
        ({"dims": 1}, "dims=1: only 2 and 3"),
        ({"spatial_upsample": False}, "one of spatial_upsample and temporal_upsample"),
        ({"dims": 2, "temporal_upsample": True}, "temporal_upsample needs dims=3"),
        ({"rational_resampler": True, "spatial_scale": 3.0}, "spatial_scale=3.0: use one of 0.75"),
        ({"mid_channels": 100}, "mid_channels=100: not a multiple of 32"),
    ],
)
def test_a_config_of_something_else_is_refused_by_name(metadata, message):
    with pytest.raises(UserError, match=message):
        upsampler_config(metadata)
