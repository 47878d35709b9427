"""Classifier-free guidance and its rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import guidance
from ltx2_jax.errors import UserError


def passes(dtype=jnp.float32):
    cond, uncond = jax.random.normal(jax.random.key(0), (2, 2, 7, 4))
    return (2 * cond + 1).astype(dtype), uncond.astype(dtype)


def test_scale_one_is_the_conditional_pass_and_zero_the_unconditional():
    cond, uncond = passes()
    np.testing.assert_array_equal(guidance.cfg(cond, uncond, 1.0), cond)
    np.testing.assert_allclose(guidance.cfg(cond, uncond, 0.0), uncond, atol=1e-6)


def test_guidance_extrapolates_from_unconditional_through_conditional():
    cond, uncond = passes()
    scale = jnp.array([3.0, 7.0])
    want = uncond + scale[:, None, None] * (cond - uncond)
    np.testing.assert_allclose(guidance.cfg(cond, uncond, scale), want, atol=1e-5)


def test_guidance_computes_in_float32():
    cond, uncond = passes(jnp.bfloat16)
    got = guidance.cfg(cond, uncond, 7.0)
    c, u = np.asarray(cond, np.float32), np.asarray(uncond, np.float32)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, (c + 6 * (c - u)).astype(jnp.bfloat16))


@pytest.mark.parametrize("per_sample", [True, False])
def test_full_rescale_restores_the_unbiased_deviation(per_sample):
    cond, uncond = passes()
    guided = guidance.rescale(guidance.cfg(cond, uncond, 7.0), cond, 1.0, per_sample=per_sample)
    axes = (1, 2) if per_sample else None
    np.testing.assert_allclose(
        np.std(np.asarray(guided), axis=axes, ddof=1),
        np.std(np.asarray(cond), axis=axes, ddof=1),
        rtol=1e-5,
    )


def test_partial_rescale_is_the_specified_blend():
    cond, uncond = passes()
    pred = guidance.cfg(cond, uncond, 3.0)
    ratio = np.std(np.asarray(cond), ddof=1) / np.std(np.asarray(pred), ddof=1)
    got = guidance.rescale(pred, cond, 0.7, per_sample=False)
    np.testing.assert_allclose(got, pred * (0.7 * ratio + 0.3), rtol=1e-5)
    np.testing.assert_array_equal(guidance.rescale(pred, cond, 0.0), pred)


def test_a_sample_does_not_depend_on_its_batch():
    cond, uncond = passes()
    pred = guidance.cfg(cond, uncond, 5.0)
    together = jax.jit(guidance.rescale)(pred, cond, 0.7)
    alone = guidance.rescale(pred[1:], cond[1:], 0.7)
    np.testing.assert_allclose(together[1:], alone, rtol=1e-6)
    whole = guidance.rescale(pred, cond, 0.7, per_sample=False)
    assert not np.allclose(whole[1:], alone, rtol=1e-4)


def test_a_constant_estimate_stays_finite():
    flat = jnp.zeros((1, 3, 2))
    np.testing.assert_array_equal(guidance.rescale(flat, flat, 0.7), 0)


def test_a_number_by_noise_level_is_that_of_the_least_bound_that_is_not_below():
    values = {0.5: 2.0, 0.2: 1.0, 0.9: 3.0}
    levels = np.asarray([1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0])
    np.testing.assert_array_equal(guidance.binned(values, levels), [3, 3, 3, 2, 2, 1, 1, 1])
    with pytest.raises(UserError, match="need at least one level"):
        guidance.binned({}, levels)


def test_steps_to_skip_are_not_fewer_than_none():
    for steps in ((-1, 2), (2, -1)):
        with pytest.raises(UserError, match=r"skip_steps=.* must not be negative"):
            guidance.Guidance(skip_steps=steps)
