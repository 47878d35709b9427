"""Sampling steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import flow, steppers
from ltx2_jax.diffusion.schedules import ltx2_sigmas


def test_euler_with_the_true_clean_latents_stays_on_the_noising_line():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 2, 5, 3))
    x = steppers.euler(flow.noised(x0, noise, 0.8), x0, 0.8, 0.3)
    np.testing.assert_allclose(x, flow.noised(x0, noise, 0.3), atol=1e-6)


def test_euler_to_zero_returns_the_clean_estimate():
    x, x0 = jax.random.normal(jax.random.key(1), (2, 2, 5, 3))
    np.testing.assert_allclose(steppers.euler(x, x0, 0.4, 0.0), x0, atol=1e-5)


def test_euler_takes_one_sigma_per_sample():
    x, x0 = jax.random.normal(jax.random.key(2), (2, 2, 5, 3))
    sigma, following = jnp.array([0.9, 0.5]), jnp.array([0.7, 0.1])
    got = jax.jit(steppers.euler)(x, x0, sigma, following)
    for i in range(2):
        alone = steppers.euler(x[i : i + 1], x0[i : i + 1], sigma[i], following[i])
        np.testing.assert_allclose(got[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_euler_over_a_schedule_samples_a_gaussian(spread):
    """With data N(3, spread^2) the best estimate is linear in x and its flow is known exactly."""
    sigmas = ltx2_sigmas(200)
    noise = jax.random.normal(jax.random.key(3), (1, 64, 2))

    def step(x, levels):
        s, following = levels
        variance = (1 - s) ** 2 * spread**2 + s**2
        x0 = 3.0 + (1 - s) * spread**2 / variance * (x - (1 - s) * 3.0)
        return steppers.euler(x, x0, s, following), None

    got, _ = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    np.testing.assert_allclose(got, 3.0 + spread * noise, atol=0.1)


def test_euler_in_bfloat16_rounds_the_velocity_then_the_result():
    x, x0 = jax.random.normal(jax.random.key(4), (2, 2, 5, 3)).astype(jnp.bfloat16)
    got = steppers.euler(x, x0, 0.5, 0.25)
    xf, x0f = np.asarray(x, np.float32), np.asarray(x0, np.float32)
    velocity = ((xf - x0f) / 0.5).astype(jnp.bfloat16).astype(np.float32)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, (xf - 0.25 * velocity).astype(jnp.bfloat16))
