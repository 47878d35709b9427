"""Noising, sigma draws and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import kstest, norm

from ltx2_jax.diffusion import flow

DRAWS = 20_000


def pair(dtype=jnp.float32, shape=(2, 5, 3)):
    x0, noise = jax.random.normal(jax.random.key(0), (2, *shape))
    return x0.astype(dtype), noise.astype(dtype)


# ------------------------------------------------------------------------------------ conversions


def test_noise_levels_zero_and_one_are_clean_and_noise():
    x0, noise = pair()
    np.testing.assert_array_equal(flow.noised(x0, noise, 0.0), x0)
    np.testing.assert_array_equal(flow.noised(x0, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_noising():
    x0, noise = pair()
    _, slope = jax.jvp(lambda s: flow.noised(x0, noise, s), (0.3,), (1.0,))
    np.testing.assert_allclose(flow.velocity_target(x0, noise), slope, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (2, 5), (2, 5, 1)])
def test_the_true_velocity_leads_back_to_the_clean_latents(shape):
    x0, noise = pair()
    sigma = jax.random.uniform(jax.random.key(1), shape, minval=0.1)
    x = flow.noised(x0, noise, sigma)
    velocity = flow.velocity_target(x0, noise)
    np.testing.assert_allclose(flow.to_x0(x, velocity, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(flow.to_velocity(x, x0, sigma), velocity, atol=1e-5)


def test_clean_tokens_stay_as_they_are():
    x0, noise = pair()
    timesteps = jnp.array([[0.0, 0.5, 0.5, 0.5, 0.0]] * 2)
    estimate = flow.to_x0(x0, noise, timesteps)
    np.testing.assert_array_equal(estimate[:, [0, 4]], x0[:, [0, 4]])
    velocity = flow.to_velocity(x0, estimate, timesteps)
    np.testing.assert_array_equal(velocity[:, [0, 4]], 0)
    np.testing.assert_allclose(velocity[:, 1:4], noise[:, 1:4], rtol=1e-5, atol=1e-5)


def test_conversions_keep_the_dtype_but_compute_in_float32():
    x, v = pair(jnp.bfloat16)
    got = flow.to_x0(x, v, 0.7)
    assert got.dtype == flow.noised(x, v, 0.7).dtype == jnp.bfloat16
    assert flow.velocity_target(x, v).dtype == jnp.bfloat16
    assert flow.velocity_target(x, v.astype(jnp.float32)).dtype == jnp.float32
    exact = np.asarray(x, np.float32) - np.asarray(v, np.float32) * np.float32(0.7)
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


# ------------------------------------------------------------------------------------ sigma draws


@pytest.mark.parametrize(
    ("tokens", "mu", "median"),
    [
        (1024, 0.95, 0.68032),
        (4096, 2.05, 0.82619),
        (6144, 2.7833, 0.87559),
        (15360, 6.0833, 0.92510),
    ],
)
def test_sigma_median_is_the_closed_form(tokens, mu, median):
    assert flow.shift_mu(tokens) == pytest.approx(mu, abs=1e-4)
    sigma = flow.sample_sigmas(jax.random.key(2), (DRAWS,), tokens, uniform_prob=0.0)
    below = np.mean(np.asarray(sigma) < median)
    assert below == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(DRAWS))


def cumulative(sigma, tokens, eps=1e-3, uniform_prob=0.1):
    """CDF of the sampler in float64, from the inverse of its steps rather than the steps."""
    mu = 0.95 + (2.05 - 0.95) * (tokens - 1024) / 3072
    low, high = expit(mu - 2.5758), expit(mu + 3.0902)

    def below(z):  # P(stretched logit-normal < z)
        u = np.clip(low + z * (high - low), 1e-300, 1 - 1e-16)
        return norm.cdf(np.log(u) - np.log1p(-u) - mu)

    reflected = below(eps) - below(2 * eps - sigma)  # the overshoot below eps, folded upwards
    main = np.where(sigma >= eps, below(sigma) - below(eps) + reflected, 0.0)
    main = np.where(sigma >= 1.0, 1.0, main)
    uniform = np.clip((sigma - eps) / (1 - eps), 0, 1)
    return (1 - uniform_prob) * main + uniform_prob * uniform


@pytest.mark.parametrize("tokens", [126, 1024, 6144])
def test_sigma_distribution_is_the_specified_one(tokens):
    sigma = np.asarray(flow.sample_sigmas(jax.random.key(3), (DRAWS,), tokens), np.float64)
    assert sigma.min() >= 1e-3 - 1e-7
    assert sigma.max() <= 1.0
    inside = sigma[sigma < 1.0]  # the top 0.1 % of the logit-normal is clamped onto 1
    assert np.mean(sigma == 1.0) == pytest.approx(0.9e-3, abs=1e-3)
    assert kstest(inside, lambda s: cumulative(s, tokens)).pvalue > 1e-3


@pytest.mark.parametrize("tokens", [1, 32640, 53680, 200_000])
def test_sigmas_stay_finite_and_spread_at_any_length(tokens):
    sigma = np.asarray(flow.sample_sigmas(jax.random.key(4), (2000,), tokens, uniform_prob=0.0))
    assert np.all(np.isfinite(sigma))
    assert len(np.unique(sigma)) > 1500
    assert np.std(sigma) > 0.05


def test_token_count_may_be_traced_and_differ_by_sample():
    key, tokens = jax.random.key(5), jnp.array([126, 6144, 53680])
    traced = jax.jit(lambda t: flow.sample_sigmas(key, (3,), t))(tokens)
    np.testing.assert_allclose(traced, flow.sample_sigmas(key, (3,), tokens), rtol=1e-5)


def test_uniform_sigmas_fill_their_range():
    sigma = flow.uniform_sigmas(jax.random.key(6), (DRAWS,), 0.2, 0.6)
    assert kstest(np.asarray(sigma), "uniform", args=(0.2, 0.4)).pvalue > 1e-3


def test_streams_draw_independently_each_with_its_own_shift():
    video, audio = flow.draw_sigmas(jax.random.key(7), DRAWS, 6144, 126, shared_prob=0.0)
    assert abs(np.corrcoef(video, audio)[0, 1]) < 0.03
    assert np.median(video) > np.median(audio) + 0.1
    assert not np.any(np.asarray(video) == np.asarray(audio))


def test_a_share_of_samples_has_one_sigma_for_both_streams():
    key = jax.random.key(8)
    video, audio = flow.draw_sigmas(key, DRAWS, 6144, 126, shared_prob=0.25)
    assert np.mean(np.asarray(video) == np.asarray(audio)) == pytest.approx(0.25, abs=0.02)
    alone, _ = flow.draw_sigmas(key, DRAWS, 6144, 126, shared_prob=0.0)
    np.testing.assert_array_equal(video, alone)  # the video's draw is the shared one
    video, audio = flow.draw_sigmas(key, 16, 6144, 126, shared_prob=1.0)
    np.testing.assert_array_equal(video, audio)


# --------------------------------------------------------------------------------------- the loss


def test_loss_is_the_mean_over_unmasked_tokens():
    prediction, target = pair(shape=(2, 6, 4))
    mask = jnp.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    loss = flow.masked_loss(prediction, target, mask)
    error = np.square(np.asarray(prediction) - np.asarray(target))
    np.testing.assert_allclose(loss, [error[0, [0, 1, 3]].mean(), error[1].mean()], rtol=1e-5)


def test_a_fully_masked_sample_has_no_loss_and_no_gradient():
    prediction, target = pair()
    loss, slope = jax.value_and_grad(
        lambda p: flow.masked_loss(p, target, jnp.zeros((2, 5))).sum()
    )(prediction)
    assert loss == 0
    np.testing.assert_array_equal(slope, 0)


def test_sigma_quarters_sum_and_count():
    loss = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    sigma = jnp.array([0.0, 0.25, 0.3, 0.75, 1.0])
    sums, counts = jax.jit(flow.sigma_quarters)(loss, sigma)
    np.testing.assert_array_equal(sums, [1, 6, 0, 24])
    np.testing.assert_array_equal(counts, [1, 2, 0, 2])


def test_a_sample_that_does_not_count_is_in_no_quarter():
    loss, sigma = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.1, 0.2, 0.9])
    sums, counts = flow.sigma_quarters(loss, sigma, jnp.array([True, False, True]))
    np.testing.assert_array_equal(sums, [1, 0, 0, 4])
    np.testing.assert_array_equal(counts, [1, 0, 0, 1])
