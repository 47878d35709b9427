"""Guidance: combining clean estimates of several passes into one.

It works on clean estimates x0, never on velocities, and in float32: a scale of 7 multiplies the
rounding of the difference by 7.

Two conventions of the number in front are in use. A *scale* s means `uncond + s (cond - uncond)`,
so that 1 is no guidance: classifier-free and modality guidance are given so. A *strength* w means
`cond + w (cond - other)`, so that 0 is none: spatio-temporal guidance (STG) and stateful APG are
given so. They are one formula, with w = s - 1. Everything here but `cfg` takes strengths.

Source: `ltx_core/components/guiders.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion.flow import align
from ltx2_jax.errors import UserError

# ------------------------------------------------------------------------------------- directions
# Where a strength moves an estimate to: the difference of two, or a part of it.

DIRECTIONS = ("difference", "star", "apg")


@dataclass(frozen=True)
class Guidance:
    """How estimates are combined, besides the numbers in front."""

    direction: str = "difference"  # of the first pass beside that under the prompt: `DIRECTIONS`
    apg_eta: float = 1.0  # the share of the part along the estimate
    apg_norm: float = 0.0  # the largest norm of the difference; 0: any
    apg_momentum: float = 0.0  # what is left of the last step's difference
    per_sample: bool = True  # rescaling looks at each clip by itself; False: as the released code
    # Of steps i, the network runs where i is a multiple of k + 1, for video and for audio. Between
    # them a stream's last estimate serves again.
    skip_steps: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise UserError(
                f"no guidance is called {self.direction!r}: choose from {', '.join(DIRECTIONS)}"
            )
        if min(self.skip_steps) < 0:
            raise UserError(f"skip_steps={self.skip_steps} must not be negative")


def star(cond: Array, uncond: Array) -> Array:
    """CFG*: `cond - a uncond`, with the a that brings uncond closest to cond; float32 [B, ...]."""
    c, u = cond.astype(jnp.float32), uncond.astype(jnp.float32)
    return c - projection(c, u) * u


def apg(
    cond: Array,  # [B, ...]
    difference: Array,  # [B, ...], of cond and another estimate
    *,
    eta: float = 1.0,
    norm: float = 0.0,
    axes: Sequence[int] = (-3, -2, -1),
) -> Array:
    """Adaptive projected guidance: the part of `difference` across cond, and eta of that along it.

    A difference whose norm over `axes` is above `norm`, if that is not 0, is first cut to it. The
    released code takes the last three axes, of whatever it is given. float32, in cond's shape.
    """
    c, d = cond.astype(jnp.float32), difference.astype(jnp.float32)
    if norm > 0:
        size = jnp.sqrt(jnp.sum(jnp.square(d), axis=tuple(axes), keepdims=True))
        d = d * jnp.minimum(1.0, norm / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    along = projection(d, c) * c
    return d - along + eta * along


def projection(x: Array, onto: Array) -> Array:
    """The a that brings `a * onto` closest to x, sample by sample: float32 [B, 1, ...]."""
    axes = tuple(range(1, x.ndim))
    product = jnp.sum(x * onto, axis=axes, keepdims=True)
    return product / (jnp.sum(jnp.square(onto), axis=axes, keepdims=True) + 1e-8)


# ------------------------------------------------------------------------------------ combinations


def cfg(cond: Array, uncond: Array, scale: Array | float) -> Array:
    """Classifier-free guidance, `cond + (scale - 1) * (cond - uncond)`, in cond's dtype.

    `cond` is the x0 estimate for the prompt, `uncond` the one for the negative prompt, both
    [B, T, C]; `scale` is [] or one per sample [B]. Scale 1 returns cond.
    """
    return moved_away(cond, [uncond], [align(scale, cond) - 1.0])


def moved_away(cond: Array, others: Sequence[Array], strengths: Sequence[Array | float]) -> Array:
    """`cond + sum of strength * (cond - other)`, in cond's dtype, of estimates [B, T, C].

    A strength, [] or one per sample [B], is 0 for nothing, and one less than the usual scale of
    classifier-free guidance.
    """
    c = cond.astype(jnp.float32)
    return moved(cond, [c - other.astype(jnp.float32) for other in others], strengths)


def moved(cond: Array, directions: Sequence[Array], strengths: Sequence[Array | float]) -> Array:
    """`cond + sum of strength * direction`, in cond's dtype, of [B, T, C]."""
    if not directions:
        return cond
    c = cond.astype(jnp.float32)
    away = sum(align(w, c) * d for d, w in zip(directions, strengths, strict=True))
    return (c + away).astype(cond.dtype)


def rescale(pred: Array, cond: Array, factor: Array | float, *, per_sample: bool = True) -> Array:
    """Pull the guided estimate's contrast back to that of `cond`; [B, T, C] in pred's dtype.

    `factor` 0 changes nothing and 1 restores the standard deviation of cond fully. The deviation
    (unbiased) is each sample's own, so that a clip does not depend on what it is batched with;
    the released code takes it over the whole batch, which is `per_sample=False`.
    """
    p = pred.astype(jnp.float32)
    axes = tuple(range(1 if per_sample else 0, p.ndim))
    want = jnp.std(cond.astype(jnp.float32), axis=axes, keepdims=True, ddof=1)
    have = jnp.std(p, axis=axes, keepdims=True, ddof=1)
    r = align(factor, p)
    ratio = want / jnp.maximum(have, jnp.finfo(jnp.float32).tiny)
    return (p * (r * ratio + (1.0 - r))).astype(pred.dtype)


# ----------------------------------------------------------------------------------- step by step


def binned(values: Mapping[float, float], sigmas: np.ndarray) -> np.ndarray:
    """A number for each of `sigmas`: float32 of their shape, known before anything is traced.

    `values` are by the upper bounds of their bins: the smallest that is not below sigma decides;
    above all of them, the largest. A strength may be one number per step.
    """
    if not values:
        raise UserError("numbers by noise level need at least one level")
    bounds = np.sort(np.fromiter(values, np.float64))
    place = np.minimum(np.searchsorted(bounds, np.asarray(sigmas, np.float64)), len(bounds) - 1)
    return np.asarray([values[bound] for bound in bounds], np.float32)[place]


def skipped(steps: np.ndarray | int, skip_step: int) -> np.ndarray:
    """Whether the network does not run at steps [...]: those that are no multiple of k + 1."""
    return np.asarray(steps) % (skip_step + 1) != 0
