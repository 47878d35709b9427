"""The process in its less travelled arguments: other clocks, other shifts, more passes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from ltx2_jax.diffusion import geometry, schedules
from ltx2_jax.diffusion.conditioning import first_frame_mask
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.diffusion.sampler import Latents, all_passes, denoise, unguided

# --------------------------------------------------------------------------------------- geometry


def test_rows_and_columns_have_strides_of_their_own():
    bounds = geometry.pixel_bounds((2, 2, 3), strides=(4, 8, 16))[0]
    np.testing.assert_array_equal(bounds[1, ::3], [[0, 8], [8, 16], [0, 8], [8, 16]])
    np.testing.assert_array_equal(bounds[2, :3], [[0, 16], [16, 32], [32, 48]])
    seconds, rows, columns = geometry.video_positions((2, 2, 3), 5.0, (4, 8, 16))[0]
    np.testing.assert_allclose(seconds[[0, 11]], [[0, 0.2], [0.2, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(rows, bounds[1])  # pixels, whatever the frame rate
    np.testing.assert_array_equal(columns, bounds[2])


def test_a_grid_starts_at_its_indices():
    bounds = geometry.grid_bounds((2, 2, 2))
    assert bounds.shape == (1, 3, 8, 2)
    starts = [*itertools.product((0, 1), (0, 1), (0, 1))]
    np.testing.assert_array_equal(bounds[0, :, :, 0].T, starts)
    np.testing.assert_array_equal(bounds[..., 1] - bounds[..., 0], 1)


def test_audio_tokens_follow_the_clock_of_their_codec():
    clock = AudioClock(sample_rate=8000, hop=200, downsample=2)
    assert clock.latents_per_second == 20
    bounds = geometry.audio_positions(3, clock)[0, 0]
    np.testing.assert_allclose(bounds, [[0, 0.025], [0.025, 0.075], [0.075, 0.125]], rtol=1e-6)
    loose = geometry.audio_positions(2, clock, shift=1, causal=False)[0, 0]
    np.testing.assert_allclose(loose, [[0.05, 0.1], [0.1, 0.15]], rtol=1e-6)
    assert geometry.AUDIO_CLOCK.latents_per_second == 25


def test_every_pixel_of_a_patch_has_its_place_among_the_features():
    F, H, W, C, p = 2, 4, 6, 3, 2
    latents = np.arange(F * H * W * C).reshape(1, F, H, W, C)
    tokens = geometry.patchify_video(latents, p)
    for f, h, w, c in itertools.product(*map(range, (F, H, W, C))):
        token = (f * (H // p) + h // p) * (W // p) + w // p
        assert tokens[0, token, (c * p + h % p) * p + w % p] == latents[0, f, h, w, c]


def test_the_first_frame_alone_is_marked_in_every_clip():
    mask = first_frame_mask((2, 3, 2, 4))
    np.testing.assert_array_equal(mask, np.tile(np.arange(24) < 8, (2, 1)))


# -------------------------------------------------------------------------------------- schedules


def test_the_shift_is_a_line_through_its_two_ends():
    even = np.linspace(1, 0, 5)
    options = {"base_shift": 0.0, "max_shift": 1.0, "stretch": False}
    for tokens, mu in ((1024, 0.0), (4096, 1.0), (2560, 0.5)):
        got = schedules.ltx2_sigmas(4, tokens, **options)
        np.testing.assert_allclose(got, np.exp(mu) * even / (1 + np.expm1(mu) * even), rtol=1e-6)


def test_every_name_is_of_its_own_schedule():
    np.testing.assert_array_equal(
        schedules.make_sigmas("linear_quadratic", 6), schedules.linear_quadratic_sigmas(6)
    )
    index = np.rint(beta.ppf(1 - np.arange(6) / 6, 0.6, 0.6) * 9999)
    t = (index + 1) / 10000
    want = np.append(np.exp(2.37) / (np.exp(2.37) + 1 / t - 1), 0)
    np.testing.assert_allclose(schedules.make_sigmas("beta", 6), want, atol=1e-6)
    by_name = {name: tuple(schedules.make_sigmas(name, 8)[1:3]) for name in schedules.SCHEDULES}
    assert by_name["ltx2"] != by_name["beta"] != by_name["linear_quadratic"]


def test_half_of_an_odd_number_of_linear_quadratic_steps_is_rounded_down():
    steps = np.diff(schedules.linear_quadratic_sigmas(5).astype(float))
    np.testing.assert_allclose(steps[:2], [-0.0125, -0.0125], atol=1e-6)
    assert steps[2] < -0.05


# ---------------------------------------------------------------------------------------- sampler


def latents(clips, value=0.0):
    return Latents(jnp.full((clips, 2, 1), value), jnp.full((clips, 3, 1), value))


def network(condition):
    """Velocities of minus the condition in the picture and of minus ten times it in the sound."""
    rows = condition["value"][:, None, None]
    return lambda x, sigma: Latents(0 * x.video - rows, 0 * x.audio - 10 * rows)


def test_passes_come_in_their_order_clip_by_clip():
    conditions = [{"value": jnp.asarray(values)} for values in ([1.0, 2], [3.0, 4], [5.0, 6])]
    seen = all_passes(network, conditions)(latents(2), jnp.float32(1.0))
    for got, want in zip(seen, ([1, 2], [3, 4], [5, 6]), strict=True):
        np.testing.assert_allclose(got.video, np.tile(np.reshape(want, (2, 1, 1)), (1, 2, 1)))
        np.testing.assert_allclose(got.audio, 10 * np.tile(np.reshape(want, (2, 1, 1)), (1, 3, 1)))


def test_a_pass_sees_the_noise_level_of_its_step_in_every_clip():
    seen = []

    def recording(condition):
        def velocity(x, sigma):
            jax.debug.callback(lambda s: seen.append(np.asarray(s)), sigma, ordered=True)
            return x

        return velocity

    sigmas = jnp.asarray([1.0, 0.7, 0.2, 0.0])
    denoise(unguided(recording, None), latents(2, 1.0), sigmas)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [[1, 1], [0.7, 0.7], [0.2, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_a_clean_estimate_is_what_the_velocity_leads_to(sigma):
    got = unguided(network, {"value": jnp.asarray([1.0, 2.0])})(latents(2, 5.0), jnp.float32(sigma))
    np.testing.assert_allclose(got.video[:, 0, 0], [5 + sigma, 5 + 2 * sigma])
    np.testing.assert_allclose(got.audio[:, 0, 0], [5 + 10 * sigma, 5 + 20 * sigma])
