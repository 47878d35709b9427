"""Noise levels to visit when sampling: sigma falls from 1 (noise) to 0 (clean).

A schedule of n steps is n + 1 values, float32 numpy, known before anything is traced. They are
computed in float64 and rounded once. LTX-2's own schedule instead rounds at the places where the
official code does, because strong shifts magnify the difference.

Sources: `ltx_core/components/schedulers.py`, `ltx_pipelines/utils/constants.py`.
"""

import math

import numpy as np

from ltx2_jax.diffusion.flow import shift_mu
from ltx2_jax.errors import UserError
from ltx2_jax.rounding import linspace

# What the distilled checkpoints were distilled for; no shift is applied to them.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE_2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
STAGE_2_TILED_SIGMAS = (0.625, 0.4, 0.0)

SCHEDULES = ("ltx2", "linear_quadratic", "beta", "distilled")


def make_sigmas(name: str, steps: int, tokens: int = 4096) -> np.ndarray:
    """The schedule called `name` in `steps` steps: float32, normally [steps + 1].

    `tokens` shifts the "ltx2" schedule. It is the video token count, or 4096, which most official
    pipelines use for every clip. Raises UserError for a name not in `SCHEDULES`, and for
    "distilled" with anything but its 8 steps.
    """
    if name == "ltx2":
        return ltx2_sigmas(steps, tokens)
    if name == "linear_quadratic":
        return linear_quadratic_sigmas(steps)
    if name == "beta":
        return beta_sigmas(steps)
    if name == "distilled":
        count = len(DISTILLED_SIGMAS) - 1
        if steps != count:
            raise UserError(f"the distilled schedule has {count} steps, not {steps}: set {count}")
        return np.asarray(DISTILLED_SIGMAS, np.float32)
    raise UserError(f"no schedule is called {name!r}: choose from {', '.join(SCHEDULES)}")


def ltx2_sigmas(
    steps: int,
    tokens: int = 4096,
    base_shift: float = 0.95,
    max_shift: float = 2.05,
    stretch: bool = True,
    terminal: float = 0.1,
) -> np.ndarray:
    """Evenly spaced sigmas, shifted towards noise by the token count: float32 [steps + 1].

    `stretch` rescales the non-zero sigmas so that the last one is `terminal`, which leaves a short
    last step however strong the shift. Source: `LTX2Scheduler`.
    """
    _check_steps(steps)
    one, shift = np.float32(1), np.float32(math.exp(shift_mu(tokens, base_shift, max_shift)))
    sigma = linspace(1.0, 0.0, steps + 1)[:-1]
    sigma = shift * (one / (one / sigma - one + shift))
    if stretch and steps > 1:  # one step has a single non-zero sigma, 1, and nothing to stretch
        gone = one - sigma
        sigma = one - gone / (gone[-1] / np.float32(1 - terminal))
    return _closed_by_zero(sigma)


def linear_quadratic_sigmas(
    steps: int, threshold: float = 0.025, linear_steps: int | None = None
) -> np.ndarray:
    """Equal steps until `threshold` of the noise is gone, then growing ones: float32 [steps + 1].

    The quadratic part continues the line with the same slope and ends at 0. `linear_steps` is half
    of the steps unless given. Source: `LinearQuadraticScheduler`.
    """
    _check_steps(steps)
    if steps == 1:
        return np.asarray([1.0, 0.0], np.float32)
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 0 < linear <= steps:
        raise UserError(f"linear_steps={linear} must lie between 1 and steps={steps}")
    slope = threshold / linear
    curve = (1.0 - slope * steps) / max(1, steps - linear) ** 2
    i = np.arange(steps, dtype=np.float64)
    return _closed_by_zero(1.0 - slope * i - curve * np.maximum(i - linear, 0.0) ** 2)


def beta_sigmas(steps: int, alpha: float = 0.6, beta: float = 0.6) -> np.ndarray:
    """Quantiles of a Beta distribution on a grid of 10000 shifted timesteps: float32.

    [steps + 1] values at most: steps that fall on the same grid point are taken once. Source:
    `BetaScheduler`.
    """
    from scipy.special import betaincinv  # slow to import, and few ask for this schedule

    _check_steps(steps)
    grid, mu = 10000, 2.37
    quantiles = betaincinv(alpha, beta, 1.0 - np.arange(steps) / steps)
    # Rounded first: the median of a symmetric Beta lies on a half, where one ulp would decide.
    index = np.rint(np.round(quantiles * (grid - 1), 6))
    t = (np.unique(index)[::-1] + 1.0) / grid
    shift = math.exp(mu)
    return _closed_by_zero(shift / (shift + 1.0 / t - 1.0))


def _closed_by_zero(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0).astype(np.float32)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps={steps}: a schedule needs at least one step")
