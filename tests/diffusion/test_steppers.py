"""Sampling steps."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import conditioning, flow, sampler, steppers
from ltx2_jax.diffusion.schedules import linear_quadratic_sigmas, ltx2_sigmas


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


# ------------------------------------------------------------------------------- steppers in a loop

MEAN, STD = 2.0, 0.5
STEPPERS = {
    "euler": steppers.Euler(),
    "ancestral": steppers.AncestralEuler(),
    "gradient estimation": steppers.GradientEstimation(),
    "cfg++": steppers.EulerCFGPlusPlus(0.5),
    "res_2s": steppers.Res2s(),
    "res_2s by token": steppers.Res2s(by_token=True),
}


class Best:
    """The best estimate of tokens from N(MEAN, STD^2), with and without a prompt."""

    def rows(self, steps, inner):
        return {}

    def begin(self, x):
        return ()

    def find(self, x, row, memory):
        s = row["sigma"]
        gain = (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2)
        x0 = sampler.Latents(
            *(None if a is None else MEAN + gain * (a - (1 - s) * MEAN) for a in x)
        )
        return sampler.Estimate(x0, x0), memory


def noises(calls, shape):
    drawn = jax.random.normal(jax.random.key(9), (calls, 2, *shape))
    return lambda call: sampler.Latents(*drawn[call])


@cache
def sampled(stepper, steps=150):
    """A video of which two of 40 tokens are given, and a sound of which nothing is."""
    shape = (64, 40, 2)
    given = conditioning.Conditions(
        clean=jnp.full(shape, 7.0),
        strength=jnp.tile(jnp.arange(40) < 2, (64, 1)),
        positions=None, marks=None, attention=None, clip_tokens=40,
    )  # fmt: skip
    start = jax.random.normal(jax.random.key(8), (2, *shape))
    x = sampler.Latents(conditioning.keep_given(given, start[0]), start[1])
    sigmas = jnp.asarray(linear_quadratic_sigmas(steps))
    noise, known = noises(2 * steps + 1, shape), sampler.Given(given, None)
    run = lambda x: sampler.denoise_by(Best(), x, sigmas, stepper, noise=noise, given=known)  # noqa: E731
    return jax.jit(run)(x)


@pytest.mark.parametrize("name", STEPPERS)
def test_every_stepper_draws_from_the_law_of_its_estimates(name):
    video, audio = sampled(STEPPERS[name])
    for tokens in (video[:, 2:], audio):
        np.testing.assert_allclose(np.mean(tokens), MEAN, atol=0.04)
        # By token, the noise is left out of a clip of which some is given in full.
        rtol = 0.2 if name == "res_2s by token" else 0.1
        np.testing.assert_allclose(np.std(tokens), STD, rtol=rtol)


@pytest.mark.parametrize("name", STEPPERS)
def test_given_tokens_come_back_bit_by_bit(name):
    np.testing.assert_array_equal(sampled(STEPPERS[name]).video[:, :2], 7.0)


@pytest.mark.parametrize(
    "stepper", [steppers.AncestralEuler(0.0), steppers.GradientEstimation(1.0)], ids=repr
)
def test_without_their_number_they_are_euler(stepper):
    for a, b in zip(sampled(stepper), sampled(steppers.Euler()), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_noise_moves_a_clip_and_not_its_law():
    plain, noisy = (sampled(STEPPERS[name])[1] for name in ("euler", "ancestral"))
    assert np.abs(np.corrcoef(np.ravel(plain), np.ravel(noisy))[0, 1]) < 0.9


def test_a_short_step_of_res2s_begins_where_its_noised_midpoint_comes_from():
    """The closed form is what a hundred rounds of the published rule lead to."""
    stepper = steppers.Res2s()
    sigmas = jnp.asarray([0.6, 0.5, 0.0])  # h = 0.18
    rows = jax.tree.map(lambda a: a[0], stepper.rows(sigmas))
    x, x0, noise = np.random.default_rng(0).normal(size=(3, 1, 4, 3)).astype(np.float32)
    found = steppers.Found(jnp.asarray(x0), None)
    moved, (anchor, e1) = stepper.step(rows, jnp.asarray(x), found, (x, x), noise, None)
    h = np.log(0.6 / 0.5)
    share, again = 1 - np.exp(-h / 2), x.astype(np.float64)
    for _ in range(100):
        again = np.asarray(moved, np.float64) - share * (x0 - again)
    np.testing.assert_allclose(anchor, again, atol=1e-5)
    np.testing.assert_allclose(e1, x0 - again, atol=1e-5)
    assert np.abs(anchor - x).max() > 1e-2


@pytest.mark.parametrize(("sigma", "following"), [(0.02, 0.015), (0.8, 0.4)])
def test_a_long_step_of_res2s_or_one_at_little_noise_begins_where_it_is(sigma, following):
    stepper = steppers.Res2s()
    rows = jax.tree.map(lambda a: a[0], stepper.rows(jnp.asarray([sigma, following, 0.0])))
    x, x0, noise = np.random.default_rng(0).normal(size=(3, 1, 4, 3)).astype(np.float32)
    found = steppers.Found(jnp.asarray(x0), None)
    _, (anchor, e1) = stepper.step(rows, jnp.asarray(x), found, (x, x), noise, None)
    np.testing.assert_array_equal(anchor, x)
    np.testing.assert_array_equal(e1, x0 - x)


def test_res2s_asks_for_the_estimate_between_its_noise_levels_and_ends_above_zero():
    rows = steppers.Res2s().rows(jnp.asarray([1.0, 0.25, 0.0]))
    want = [1, 0.5, 0.25, (0.25 * 0.0011) ** 0.5, 0.0011]
    np.testing.assert_allclose(rows["sigma"], want, rtol=1e-6)
    open_end = steppers.Res2s().rows(jnp.asarray([1.0, 0.25, 0.04]))
    np.testing.assert_allclose(open_end["sigma"], [1, 0.5, 0.25, 0.1, 0.04], rtol=1e-6)
    assert not open_end["take"].any()


def test_the_noise_of_res2s_is_a_half_after_the_midpoint_and_eta_after_the_end():
    stepper = steppers.Res2s(eta=0.25)
    rows = stepper.rows(jnp.asarray([0.8, 0.5, 0.0]))
    x, x0, noise = np.random.default_rng(1).normal(size=(3, 1, 4, 3)).astype(np.float32)
    found = steppers.Found(jnp.asarray(x0), None)
    for call, eta in ((0, 0.5), (1, 0.25)):
        row = {name: values[call] for name, values in rows.items()}
        noisy, still = (
            stepper.step(row, jnp.asarray(x), found, (x, x0), n, None)[0]
            for n in (noise, 0 * noise)
        )
        np.testing.assert_allclose(noisy - still, eta * row["next"] * noise, atol=1e-5)


def test_noise_is_exactly_normal_in_the_steps_that_ask_for_it():
    asked = {name for name, stepper in STEPPERS.items() if stepper.draws and stepper.normalized}
    assert asked == {"res_2s", "res_2s by token"}
    assert {name for name, s in STEPPERS.items() if s.draws} == asked | {"ancestral", "cfg++"}


def test_the_noise_of_a_step_has_the_share_that_is_asked_for():
    x, x0, noise = np.random.default_rng(2).normal(size=(3, 1, 4, 3)).astype(np.float32)
    found = steppers.Found(jnp.asarray(x0), jnp.asarray(x0))
    row = {"sigma": jnp.float32(0.8), "next": jnp.float32(0.5)}
    # Ancestral: down to 0.5^2 / 0.8. CFG++: levels 4 and 1, noise over signal.
    down = 0.3125
    full = {
        steppers.AncestralEuler: (0.25 - (down * 0.5 / (1 - down)) ** 2) ** 0.5,
        steppers.EulerCFGPlusPlus: 0.5 * (1 - 1 / 16) ** 0.5,
    }
    for kind, up in full.items():
        for share in (1.0, 0.25):
            noisy, still = (
                kind(s_noise=share).step(row, jnp.asarray(x), found, (), n, None)[0]
                for n in (noise, 0 * noise)
            )
            np.testing.assert_allclose(noisy - still, share * up * noise, atol=1e-5)


@pytest.mark.parametrize("name", ["gradient estimation", "cfg++"])
def test_the_last_step_takes_the_estimate_itself(name):
    x, x0, before = np.random.default_rng(3).normal(size=(3, 1, 4, 3)).astype(np.float32)
    row = {"sigma": jnp.float32(0.4), "next": jnp.float32(0), "first": jnp.bool(False)}
    found = steppers.Found(jnp.asarray(x0), jnp.asarray(x))
    last, _ = STEPPERS[name].step(row, jnp.asarray(x), found, jnp.asarray(before), 0 * x, None)
    np.testing.assert_array_equal(last, x0)
