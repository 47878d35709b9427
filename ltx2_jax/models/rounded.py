"""Products of eight bits by eight: what a linear map reads is rounded as its weight is.

Matrix units that have them make twice as many products of int8, or of float8, as of bfloat16. Their
sums are int32, or float32: nothing but the rounding of both sides is lost.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ltx2_jax.sharding import mesh_axes, on_shards, pin

Axes = tuple[str | None, ...]
# Dtype of the values -> the largest of them, the dtype of sums of their products.
EIGHT_BITS = {
    jnp.dtype(jnp.int8): (127, jnp.int32),
    jnp.dtype(jnp.float8_e4m3fn): (448, jnp.float32),
}


def rounded(x: Array, step: Array, dtype: jnp.dtype, largest: int) -> Array:
    """x, float32, in steps that are broadcast over it: the nearest values of `dtype`."""
    values = jnp.where(step > 0, x / step, 0 * step)  # a NaN stays one, in the step
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return jnp.clip(values, -largest, largest).astype(dtype)


def product_of_rounded(x: Array, values: Array, scale: Array, axes: Axes, lead: Axes) -> Array:
    """x [..., in] times values [out, in] and their scale [out] -> [..., out], in the dtype of x.

    The weight is gathered to `axes`; `lead` names the axes of x before the last. Every row of x, a
    token, has a step of its own, by its largest number. Where rows are split over shards, it is
    that of the whole row, for which they exchange one number: so a mesh changes no value, only the
    order in which the results of shards are added, in the dtype of x. It has no gradient.
    """
    over, (largest, sums) = mesh_axes(axes[1]), EIGHT_BITS[values.dtype]

    def of_shard(x: Array, values: Array, scale: Array) -> Array:
        step = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        step = (jax.lax.pmax(step, over) if over else step).astype(jnp.float32) / largest
        # Else XLA casts x before what moves it into another layout, and moves float32.
        x, step = jax.lax.optimization_barrier((x, step))
        few = rounded(x.astype(jnp.float32), step, values.dtype, largest)
        y = jnp.einsum("...i,oi->...o", few, values, preferred_element_type=sums)
        y = (y.astype(jnp.float32) * step * scale).astype(x.dtype)
        return jax.lax.psum(y, over) if over else y

    names = ((*lead, axes[1]), axes, axes[:1])
    held = (pin(array, *where) for array, where in zip((x, values, scale), names, strict=True))
    return on_shards(of_shard, names, (*lead, axes[0]))(*held)
