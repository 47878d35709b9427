"""Sampling schedules against published values and scipy."""

import numpy as np
import pytest
from scipy.stats import beta

from ltx2_jax.diffusion import schedules
from ltx2_jax.errors import UserError

EIGHT = [1, 0.96571, 0.92187, 0.86386, 0.78345, 0.66458, 0.47100, 0.1, 0]
FIFTEEN_AT_8160 = {
    0: 1,
    1: 0.99349,
    2: 0.98602,
    3: 0.97734,
    12: 0.67390,
    13: 0.50338,
    14: 0.1,
    15: 0,
}


def test_ltx2_schedule_has_the_published_values():
    np.testing.assert_allclose(schedules.ltx2_sigmas(8), EIGHT, atol=6e-6)
    sigmas = schedules.ltx2_sigmas(15, tokens=8160)
    np.testing.assert_allclose(
        sigmas[list(FIFTEEN_AT_8160)], list(FIFTEEN_AT_8160.values()), atol=6e-6
    )


def test_ltx2_schedule_ends_at_the_terminal_only_when_stretched():
    assert schedules.ltx2_sigmas(9, terminal=0.03)[-2] == pytest.approx(0.03, abs=6e-8)
    plain = schedules.ltx2_sigmas(10, stretch=False)
    shift = np.exp(2.05)  # max_shift, at 4096 tokens
    t = np.linspace(1, 0, 11)
    np.testing.assert_allclose(plain, shift * t / (1 + (shift - 1) * t), rtol=1e-6)


def test_the_shifts_of_a_schedule_may_be_given():
    """The logarithm of the shift is a line in tokens, through one at 1024 and one at 4096."""
    t = np.linspace(1, 0, 11)
    for tokens, shift in ((1024, np.exp(0.5)), (4096, np.exp(1.5)), (2560, np.exp(1.0))):
        plain = schedules.ltx2_sigmas(10, tokens, base_shift=0.5, max_shift=1.5, stretch=False)
        np.testing.assert_allclose(plain, shift * t / (1 + (shift - 1) * t), rtol=1e-6)


def test_linear_quadratic_may_be_linear_up_to_its_last_step():
    sigmas = schedules.linear_quadratic_sigmas(8, threshold=0.16, linear_steps=8)
    np.testing.assert_allclose(sigmas, [*(1 - 0.02 * np.arange(8)), 0], atol=1e-7)


def test_more_tokens_stay_longer_at_high_noise():
    few, many = schedules.ltx2_sigmas(20, tokens=512), schedules.ltx2_sigmas(20, tokens=16384)
    assert np.all(many[1:-2] > few[1:-2])


def test_linear_quadratic_in_eight_steps_is_the_distilled_list():
    np.testing.assert_allclose(
        schedules.linear_quadratic_sigmas(8), schedules.DISTILLED_SIGMAS, atol=1e-7
    )


def test_linear_quadratic_is_smooth_where_its_parts_meet():
    sigmas = schedules.linear_quadratic_sigmas(20, threshold=0.05, linear_steps=5).astype(float)
    assert sigmas[5] == pytest.approx(0.95, abs=1e-6)
    np.testing.assert_allclose(np.diff(sigmas[:6]), -0.01, atol=1e-6)
    second = np.diff(sigmas[5:], n=2)  # a parabola has constant second differences
    np.testing.assert_allclose(second, second[0], atol=1e-6)


@pytest.mark.parametrize(("steps", "a", "b"), [(1, 0.6, 0.6), (8, 0.6, 0.6), (40, 0.6, 0.9)])
def test_beta_schedule_matches_scipy(steps, a, b):
    index = np.rint(np.round(beta.ppf(1 - np.arange(steps) / steps, a, b) * 9999, 6))
    t = (np.unique(index)[::-1] + 1) / 10000
    want = np.append(np.exp(2.37) / (np.exp(2.37) + 1 / t - 1), 0)
    np.testing.assert_allclose(schedules.beta_sigmas(steps, a, b), want, atol=1e-6)


def test_beta_schedule_takes_coinciding_steps_once():
    sigmas = schedules.beta_sigmas(2000, 0.1, 0.1)  # nearly all mass at both ends
    assert len(sigmas) < 2001
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize("name", ["ltx2", "linear_quadratic", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_every_schedule_falls_from_one_to_zero(name, steps):
    sigmas = schedules.make_sigmas(name, steps)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == pytest.approx(1.0)
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_schedules_are_chosen_by_name():
    np.testing.assert_array_equal(
        schedules.make_sigmas("ltx2", 12, tokens=99), schedules.ltx2_sigmas(12, 99)
    )
    np.testing.assert_array_equal(
        schedules.make_sigmas("distilled", 8), np.float32(schedules.DISTILLED_SIGMAS)
    )
    assert schedules.STAGE_2_SIGMAS == schedules.DISTILLED_SIGMAS[-4:]
    assert schedules.STAGE_2_TILED_SIGMAS == (0.625, 0.4, 0.0)


def test_mistakes_name_what_is_possible():
    with pytest.raises(UserError, match="'karras': choose from ltx2, linear_quadratic, beta, dist"):
        schedules.make_sigmas("karras", 8)
    with pytest.raises(UserError, match="has 8 steps, not 30"):
        schedules.make_sigmas("distilled", 30)
    for name in ("ltx2", "linear_quadratic", "beta"):
        with pytest.raises(UserError, match=r"^steps=0"):
            schedules.make_sigmas(name, 0)
    for linear in (0, 9):
        with pytest.raises(UserError, match=f"linear_steps={linear}"):
            schedules.linear_quadratic_sigmas(8, linear_steps=linear)
