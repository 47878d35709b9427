"""The denoising loop against data whose best velocity is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import schedules
from ltx2_jax.diffusion.conditioning import Conditions
from ltx2_jax.diffusion.guide import Guided
from ltx2_jax.diffusion.sampler import Given, Latents, all_passes, denoise, unguided
from ltx2_jax.sharding import spec

MEAN, STD = jnp.array([2.0, -1.0]), jnp.array([0.5, 1.5])


def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x] for x0 ~ N(mean, std^2) and x = (1 - sigma) x0 + sigma noise."""
    s = sigma[:, None, None]
    gain = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
    x0 = mean + gain * (x - (1 - s) * mean)
    return (x - x0) / s


def network(text):
    """Video and audio of the same law; `text` [B] moves the mean."""
    mean = MEAN + text[:, None, None]
    return lambda x, sigma: Latents(*(gaussian_velocity(a, sigma, mean, STD) for a in x))


def guided(conditions):
    """The estimate under the first condition, twice as far from the second."""
    guide = Guided(all_passes(network, conditions), [(1.0, 1.0)])
    return lambda x, sigma: guide.find(x, {"sigma": sigma}, {})[0].x0


def noise(batch, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return Latents(
        jax.random.normal(keys[0], (batch, 40, 2)), jax.random.normal(keys[1], (batch, 30, 2))
    )


def test_denoising_draws_from_the_distribution_that_the_velocity_belongs_to():
    sigmas = jnp.asarray(schedules.linear_quadratic_sigmas(200))
    clean = jax.jit(lambda x: denoise(unguided(network, jnp.zeros(100)), x, sigmas))(noise(100))
    for tokens in clean:
        tokens = np.asarray(tokens).reshape(-1, 2)
        np.testing.assert_allclose(tokens.mean(0), MEAN, atol=0.06)
        np.testing.assert_allclose(tokens.std(0), STD, rtol=0.04)


@pytest.mark.parametrize("schedule", ["ltx2", "linear_quadratic", "distilled"])
def test_a_known_clean_latent_is_reached_exactly_in_any_schedule(schedule):
    target = noise(3, seed=1)

    def to_target(x, sigma):
        return Latents(*((a - t) / sigma[:, None, None] for a, t in zip(x, target, strict=True)))

    sigmas = jnp.asarray(schedules.make_sigmas(schedule, 8))
    clean = denoise(unguided(lambda _: to_target, None), noise(3), sigmas)
    for got, want in zip(clean, target, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("clips", [1, 2])
def test_every_pass_has_what_is_given_of_its_own_clip(clips):
    def by_clip(*shape):
        return jnp.arange(1.0, clips + 1).reshape(clips, *[1] * len(shape)) * jnp.ones(shape)

    x, seen = noise(clips), []
    video = Conditions(x.video, 0.25 * by_clip(40), by_clip(3, 40, 2), by_clip(40),
                       by_clip(40, 40), 40)  # fmt: skip
    audio = Conditions(x.audio, None, jnp.ones((1, 1, 30, 2)), None, jnp.ones((1, 30, 30)), 30)

    def network(conditions, given):
        seen.append((conditions, given))
        return lambda x, sigma: Latents(*map(jnp.ones_like, x))

    passes = [jnp.zeros(clips), jnp.ones(clips)]
    found = all_passes(network, passes, Given(video, audio))(x, jnp.float32(0.5))
    ((conditions, given),) = seen
    np.testing.assert_array_equal(conditions, [0, 1] * clips)
    rows = [1, 1, 2, 2][: 2 * clips]  # both passes of a clip, then those of the next
    for name in ("strength", "positions", "marks", "attention"):
        got = np.asarray(getattr(given.video, name))
        want = np.asarray(rows) * (0.25 if name == "strength" else 1)
        want = want[:1] if clips == 1 and got.ndim > 2 else want  # of one clip: one for all
        np.testing.assert_array_equal(got.reshape(len(got), -1)[:, -1], want)
    assert (len(given.audio.positions), len(given.audio.attention)) == (1, 1)  # one for all
    for estimates in found:
        for i in range(clips):
            level = 0.5 * (1 - 0.25 * (i + 1))  # a token that is given in part has less noise
            np.testing.assert_allclose(estimates.video[i], x.video[i] - level, atol=1e-6)
        np.testing.assert_allclose(estimates.audio, x.audio - 0.5, atol=1e-6)


def test_both_passes_stay_on_the_shards_of_their_samples(mesh_context):
    x, text, null = noise(4), jnp.arange(4.0), jnp.full(4, -1.0)
    want = guided([text, null])(x, jnp.float32(0.5))
    with mesh_context(4, 1, 2):
        place = lambda a, *names: jax.device_put(a, spec("batch", *names))  # noqa: E731
        sharded = Latents(
            place(x.video, "video_tokens", None), place(x.audio, "audio_tokens", None)
        )
        predict = guided([place(text), place(null)])
        program = jax.jit(predict).lower(sharded, jnp.float32(0.5)).compile()
        got = program(sharded, jnp.float32(0.5))
    assert "all-" not in program.as_text()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
