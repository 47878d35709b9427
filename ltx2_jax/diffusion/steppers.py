"""Sampling steps: from the current latents and a clean estimate to the next noise level.

A stepper is a value that `sampler.denoise` takes as its argument. It lists the calls of the network
that a schedule needs, one or more a step, and tells of each what follows from its clean estimate.
All calls run through one loop body, so a stepper of many calls a step compiles the network once.

    Euler                the straight step
    AncestralEuler       a longer one, and noise on top (distilled models from 2.5 on)
    GradientEstimation   Euler along a velocity that is extrapolated from the last two
    EulerCFGPlusPlus     away from the estimate without a prompt, along its noise
    Res2s                second order, two calls a step, noise after either (HQ)

Streams are stepped one by one, in float32. What is given of a stream comes back as it was given.
Source: `ltx_core/components/diffusion_steps.py`, `ltx_pipelines/utils/{samplers,res2s}.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion.conditioning import Conditions, keep_given, token_levels
from ltx2_jax.diffusion.flow import align, to_velocity

Memory = Any  # a tree of arrays: what a stepper remembers of a stream from call to call
Row = dict[str, Array]  # what a call knows of its place in the schedule; "sigma" [] in any case


class Found(NamedTuple):
    """What a call found in one stream."""

    x0: Array  # [B, T, C] the clean estimate, guided, the given tokens put back
    uncond: Array | None  # [B, T, C] that of the pass without a prompt, as it is


class Stepper(Protocol):
    """How clean estimates become steps."""

    calls_per_step: int
    draws: bool  # whether a call needs noise
    normalized: bool  # whether that noise has the mean 0 and the deviation 1 exactly

    def rows(self, sigmas: Array) -> Row:
        """Of the calls of a schedule [steps + 1], stacked: "sigma" [calls], and others."""

    def begin(self, x: Array) -> Memory:
        """Before the first call at tokens [B, T, C]."""

    def step(
        self,
        row: Row,
        x: Array,  # [B, T, C], at which the network was called
        found: Found,
        memory: Memory,
        noise: Array | None,  # [B, T, C]
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        """Where the network is called next, [B, T, C]; after the last call, the clean latents."""


def euler(
    x: Array,  # [B, T, C] at noise level sigma
    x0: Array,  # [B, T, C] clean estimate
    sigma: Array | float,
    sigma_next: Array | float,
) -> Array:
    """A straight step along the velocity; x's shape and dtype. The sigmas are [] or [B].

    The sum runs in float32; the velocity passes through x's dtype first, as in the released code,
    so that a bfloat16 run agrees with it too.
    """
    velocity = to_velocity(x, x0, sigma).astype(jnp.float32)
    step = align(sigma_next, x) - align(sigma, x)
    return (x.astype(jnp.float32) + velocity * step).astype(x.dtype)


def ancestral_euler(
    x: Array,  # [B, T, C] at noise level sigma
    x0: Array,  # [B, T, C] clean estimate
    sigma: Array | float,
    sigma_next: Array | float,
    *,
    noise: Array,  # [B, T, C]
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Array:
    """A step below sigma_next, and noise up to it; `x0` where sigma_next is 0. The sigmas are [].

    The flow's own coefficients, for signal 1 - sigma: those of other processes differ.
    """
    sigma, sigma_next = align(sigma, x), align(sigma_next, x)
    down = sigma_next * (1.0 + (sigma_next / sigma - 1.0) * eta)
    x32, x0 = x.astype(jnp.float32), x0.astype(jnp.float32)
    moved = (down / sigma) * x32 + (1.0 - down / sigma) * x0
    signal = (1.0 - sigma_next) / (1.0 - down)
    up = jnp.sqrt(jnp.maximum(sigma_next**2 - (down * signal) ** 2, 0.0))
    if eta > 0:
        moved = signal * moved + s_noise * up * noise.astype(jnp.float32)
    return moved.astype(x.dtype)


def euler_cfg_plus_plus(
    x: Array,  # [B, T, C] at noise level sigma
    x0: Array,  # [B, T, C] clean estimate, guided
    sigma: Array | float,
    sigma_next: Array | float,
    *,
    uncond: Array,  # [B, T, C] clean estimate without a prompt
    noise: Array,  # [B, T, C]
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Array:
    """Towards the guided estimate, with the noise that the other one sees in x. The sigmas are [].

    Levels are compared as sigma / (1 - sigma), the noise over the signal.
    """
    eps = float(jnp.finfo(jnp.float32).eps)
    sigma, sigma_next = align(sigma, x), align(sigma_next, x)
    signal, signal_next = jnp.maximum(1.0 - sigma, eps), jnp.maximum(1.0 - sigma_next, eps)
    seen = (x.astype(jnp.float32) - signal * uncond.astype(jnp.float32)) * (1.0 / sigma)
    level, level_next = sigma / signal, sigma_next / signal_next
    spread = level_next**2 * jnp.maximum(level**2 - level_next**2, 0.0) / level**2
    up = jnp.minimum(eta * jnp.sqrt(spread), level_next)
    down = jnp.sqrt(jnp.maximum(level_next**2 - up**2, 0.0))
    moved = signal_next * (x0.astype(jnp.float32) + down * seen)
    return (moved + signal_next * s_noise * up * noise.astype(jnp.float32)).astype(x.dtype)


# ------------------------------------------------------------------------------ one call a step


class _OneCall:
    """What steppers of one call a step share; here, one that draws and remembers nothing."""

    calls_per_step = 1
    draws = normalized = False

    def rows(self, sigmas: Array) -> Row:
        return {"sigma": sigmas[:-1], "next": sigmas[1:]}

    def begin(self, x: Array) -> Memory:
        return ()


@dataclass(frozen=True)
class Euler(_OneCall):
    """`euler`."""

    def step(
        self,
        row: Row,
        x: Array,
        found: Found,
        memory: Memory,
        noise: Array | None,
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        return euler(x, found.x0, row["sigma"], row["next"]), memory


@dataclass(frozen=True)
class AncestralEuler(_OneCall):
    """`ancestral_euler`; eta 0 is Euler."""

    eta: float = 1.0
    s_noise: float = 1.0

    @property
    def draws(self) -> bool:
        return self.eta > 0

    def step(
        self,
        row: Row,
        x: Array,
        found: Found,
        memory: Memory,
        noise: Array | None,
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        numbers = {"noise": noise, "eta": self.eta, "s_noise": self.s_noise}
        moved = ancestral_euler(x, found.x0, row["sigma"], row["next"], **numbers)
        return _without_noise(moved, row, given) if self.draws else moved, memory


@dataclass(frozen=True)
class EulerCFGPlusPlus(_OneCall):
    """`euler_cfg_plus_plus`; it needs the pass without a prompt."""

    eta: float = 1.0
    s_noise: float = 1.0

    @property
    def draws(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def step(
        self,
        row: Row,
        x: Array,
        found: Found,
        memory: Memory,
        noise: Array | None,
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        numbers = {"uncond": found.uncond, "eta": self.eta, "s_noise": self.s_noise}
        numbers["noise"] = noise if self.draws else jnp.zeros_like(x)
        moved = euler_cfg_plus_plus(x, found.x0, row["sigma"], row["next"], **numbers)
        # At sigma_next 0 the step is the guided estimate but for the last bits.
        moved = jnp.where(row["next"] > 0, moved, found.x0)
        return _without_noise(moved, row, given) if self.draws else moved, memory


def _without_noise(moved: Array, row: Row, given: Conditions | None) -> Array:
    """Tokens [B, T, C] with the given ones put back after noise was added, if it was."""
    return moved if given is None else jnp.where(row["next"] > 0, keep_given(given, moved), moved)


@dataclass(frozen=True)
class GradientEstimation(_OneCall):
    """Euler along `v + (gamma - 1) (v - last v)`; gamma 1 is Euler."""

    gamma: float = 2.0

    def rows(self, sigmas: Array) -> Row:
        return super().rows(sigmas) | {"first": jnp.arange(sigmas.shape[0] - 1) == 0}

    def begin(self, x: Array) -> Memory:
        return jnp.zeros_like(x)

    def step(
        self,
        row: Row,
        x: Array,
        found: Found,
        memory: Memory,
        noise: Array | None,
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        velocity = to_velocity(x, found.x0, row["sigma"])
        further = self.gamma * (velocity - memory) + memory
        along = jnp.where(row["first"], velocity, further).astype(jnp.float32)
        moved = x.astype(jnp.float32) + along * (row["next"] - row["sigma"])
        # The last step takes the estimate itself, not one that was extrapolated.
        return jnp.where(row["next"] > 0, moved.astype(x.dtype), found.x0), velocity


# ------------------------------------------------------------------------------------------ res_2s

FIRST, SECOND, LAST = 0, 1, 2
SMALLEST = 0.0011  # the noise level in the place of a final 0, whose logarithm a step would need


def res2s_coefficients(h: Array | float) -> tuple[Array, Array, Array]:
    """a21, b1, b2 of a step of length h = log(sigma / sigma_next), its midpoint at h / 2.

    `x_mid = x + h a21 e1`, `x_next = x + h (b1 e1 + b2 e2)` with e = x0 - x of either call.
    """
    h = jnp.asarray(h, jnp.float32)
    a21, b2 = 0.5 * _phi1(h / 2), 2.0 * _phi2(h)
    return a21, _phi1(h) - b2, b2


def _phi1(h: Array) -> Array:
    """(1 - e^-h) / h."""
    return jnp.where(h > 1e-6, -jnp.expm1(-h) / jnp.where(h > 1e-6, h, 1.0), 1.0)


def _phi2(h: Array) -> Array:
    """(e^-h - 1 + h) / h^2; by its series where float32 would lose the difference."""
    series = sum((-h) ** k / float(np.prod(np.arange(1.0, k + 3))) for k in range(8))
    large = jnp.where(h > 0.5, h, 1.0)
    return jnp.where(h > 0.5, (jnp.expm1(-large) + large) / large**2, series)


def renoised(
    x: Array,  # [B, T, C] at noise level sigma
    update: Array,  # [B, T, C], what a step without noise adds to x
    sigma: Array | float,  # [], [B] or [B, T]
    sigma_next: Array | float,
    *,
    noise: Array,  # [B, T, C]
    eta: float = 0.5,
) -> Array:
    """The step with a share of its noise replaced: float32 [B, T, C].

    Without noise it is `x + update`. That is returned for all tokens of a clip as soon as
    sigma_next or eta is 0, for any of them: so does the released code.
    """
    s, n = align(sigma, x), align(sigma_next, x)
    up = jnp.minimum(eta * n, 0.9999 * n)
    left = jnp.sqrt(jnp.maximum(n**2 - up**2, 0.0))
    share = 1.0 - n + left
    down = left / share
    # (x - (x + update)) / (s - n) is the noise seen, and x minus s times it the clean estimate.
    seen = -update.astype(jnp.float32) * (1.0 / jnp.where(s > n, s - n, 1.0))
    clean = x.astype(jnp.float32) - s * seen
    moved = share * (clean + down * seen) + up * noise.astype(jnp.float32)
    plain = jnp.any(up == 0, axis=tuple(range(1, up.ndim)), keepdims=True)
    return jnp.where(plain, x.astype(jnp.float32) + update, moved)


@dataclass(frozen=True)
class Res2s:
    """The exponential integrator res_2s, with noise after its midpoint and after its end.

    `anchor_rounds` move the start of a short step to where the noised midpoint would have been
    reached from (0: none). The released code computes in float64; here every coefficient keeps its
    relative precision in float32, and no difference of nearby numbers is taken.
    """

    eta: float = 0.5  # of the end; the midpoint has 0.5
    anchor_rounds: int = 100
    by_token: bool = (
        False  # noise by each token's own level, and given tokens not put back after it
    )

    calls_per_step = 2
    draws = normalized = True

    def rows(self, sigmas: Array) -> Row:
        """2 n calls of n steps, and one at the end that takes the last estimate."""
        ends_clean = sigmas[-1] == 0
        sigmas = jnp.concatenate([sigmas[:-1], jnp.where(ends_clean, SMALLEST, sigmas[-1])[None]])
        sigma, following = sigmas[:-1], sigmas[1:]
        middle = jnp.sqrt(sigma * following)
        in_turn = lambda a, b, last: jnp.append(jnp.stack([a, b], 1).reshape(-1), last)  # noqa: E731
        steps = sigma.shape[0]
        phase = np.append(np.tile([FIRST, SECOND], steps), LAST)
        return {
            "sigma": in_turn(sigma, middle, sigmas[-1]),
            "from": in_turn(sigma, sigma, sigmas[-1]),
            "next": in_turn(middle, following, sigmas[-1]),
            "h": in_turn(*[jnp.log1p((sigma - following) / following)] * 2, 0.0),
            "phase": jnp.asarray(phase, jnp.int32),
            "take": jnp.append(jnp.zeros(2 * steps, bool), ends_clean),
        }

    def begin(self, x: Array) -> Memory:
        """The start of the step and the first estimate's distance from it."""
        return jnp.zeros_like(x), jnp.zeros_like(x)

    def step(
        self,
        row: Row,
        x: Array,
        found: Found,
        memory: Memory,
        noise: Array | None,
        given: Conditions | None,
    ) -> tuple[Array, Memory]:
        h, x0 = row["h"], found.x0
        a21, b1, b2 = res2s_coefficients(h)

        def first(_: Memory) -> tuple[Array, Memory]:
            moved = self._renoised(x, h * a21 * (x0 - x), row, noise, given, 0.5)
            # The rounds A <- moved - h a21 (x0 - A) shrink the distance to their fixed point.
            share = h * a21
            fixed = (moved - share * x0) * (1.0 / (1.0 - share))
            anchor = fixed + share**self.anchor_rounds * (x - fixed)
            short = (h < 0.5) & (row["from"] > 0.03) if self.anchor_rounds else False
            anchor = jnp.where(short, anchor, x)
            return moved, (anchor, x0 - anchor)

        def second(memory: Memory) -> tuple[Array, Memory]:
            anchor, e1 = memory
            update = h * (b1 * e1 + b2 * (x0 - anchor))
            return self._renoised(anchor, update, row, noise, given, self.eta), memory

        def last(memory: Memory) -> tuple[Array, Memory]:
            return jnp.where(row["take"], x0, x), memory

        return jax.lax.switch(row["phase"], [first, second, last], memory)

    def _renoised(
        self,
        x: Array,
        update: Array,
        row: Row,
        noise: Array,
        given: Conditions | None,
        eta: float,
    ) -> Array:
        sigma, following = row["from"], row["next"]
        if not self.by_token or given is None:
            moved = renoised(x, update, sigma, following, noise=noise, eta=eta)
            return moved if given is None else keep_given(given, moved)
        levels = (token_levels(given, s * jnp.ones(x.shape[0])) for s in (sigma, following))
        return renoised(x, update, *levels, noise=noise, eta=eta)
