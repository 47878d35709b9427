"""FLOPs from a trace against sums done by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ltx2_jax.models.codecs.video_vae import Block, VideoVAEConfig
from ltx2_jax.models.flops import count, video_vae_flops


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, **options):
    """x [B, T, C] with kernel [taps, C / groups, C']."""
    strides = options.pop("strides", (1,))
    padding = options.pop("padding", "VALID")
    numbers = ("NHC", "HIO", "NHC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def test_a_convolution_costs_its_taps_at_every_output():
    x, kernel = zeros(2, 11, 6), zeros(3, 6, 8)
    assert count(conv, x, kernel) == 2 * (2 * 9 * 8) * (3 * 6)
    strided = count(lambda x, k: conv(x, k, strides=(2,), padding="SAME"), x, kernel)
    assert strided == 2 * (2 * 6 * 8) * (3 * 6)
    grouped = count(lambda x, k: conv(x, k, feature_group_count=3), x, zeros(3, 2, 9))
    assert grouped == 2 * (2 * 9 * 9) * (3 * 2)


def test_a_transposed_convolution_costs_its_taps_at_every_input():
    def up(x, kernel):
        return conv(x, kernel, padding=((3, 3),), lhs_dilation=(2,))

    assert count(up, zeros(2, 5, 6), zeros(4, 6, 8)) == 2 * (2 * 5 * 6) * (4 * 8)


def test_a_matrix_product_costs_its_three_sizes_per_batch_entry():
    flops = count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), zeros(2, 3, 4), zeros(2, 4, 5))
    assert flops == 2 * 2 * 3 * 4 * 5


def test_bodies_count_as_often_as_they_run():
    product = 2 * 4**3

    def step(x, _):
        return jax.jit(jnp.matmul)(x, x), None

    def loop(x):
        return jax.lax.scan(lambda x, _: jax.lax.scan(step, x, None, length=3), x, None, length=5)

    assert count(loop, zeros(4, 4)) == 15 * product

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x @ x, x)

    assert count(branch, zeros(4, 4)) == 2 * product
    # Forward, again in the backward pass, and the gradients of both sides of either product.
    loss = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)))
    assert count(jax.grad(loss, (0, 1)), zeros(4, 4), zeros(4, 4)) == (2 + 2 + 4) * product


def test_a_loop_of_unknown_length_is_refused():
    def search(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="inside a while"):
        count(search, zeros(4, 4))


def test_flops_of_a_video_vae_are_those_of_its_convolutions():
    cfg = VideoVAEConfig(
        latent_channels=8,
        patch_size=4,
        encoder_blocks=(Block("res_x", layers=2), Block("compress_all_res", multiplier=2)),
        decoder_blocks=(Block("compress_all", multiplier=2), Block("res_x", inject_noise=True)),
        decoder_base_channels=8,
        timestep_conditioning=False,
    )
    fine, coarse = 5 * 4 * 6, 3 * 2 * 3  # positions before and after the fold by 2
    encode = fine * (48 * 8 + 4 * 8 * 8) + (6 * 4 * 6) * (8 * 2) + coarse * (16 * 9)
    decode = coarse * (8 * 16 + 2 * 16 * 16 + 16 * 64) + fine * (8 * 48)
    want = {"encode": 2 * 27 * encode, "decode": 2 * 27 * decode}
    assert video_vae_flops(cfg, 5, 16, 24) == want
    assert video_vae_flops(cfg, 5, 16, 24, batch=3)["decode"] == 3 * want["decode"]
    alone = replace(cfg, encoder_blocks=None)
    assert video_vae_flops(alone, 5, 16, 24) == {"decode": want["decode"]}
