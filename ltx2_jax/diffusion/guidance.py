"""Guidance: combining clean estimates of several passes into one.

It works on clean estimates x0, never on velocities, and in float32: a scale of 7 multiplies the
rounding of the difference by 7.

Source: `ltx_core/components/guiders.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from ltx2_jax.diffusion.flow import align


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
    away = sum(
        align(strength, c) * (c - other.astype(jnp.float32))
        for other, strength in zip(others, strengths, strict=True)
    )
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
