"""One sampling step: from the current latents and a clean estimate to the next noise level.

A stepper takes `(x, x0, sigma, sigma_next)` and returns the next x. What only some of them need
(noise, eta, a second evaluation) they take as keyword arguments after these four.

Source: `ltx_core/components/diffusion_steps.py`.
"""

import jax.numpy as jnp
from jax import Array

from ltx2_jax.diffusion.flow import align, to_velocity


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
