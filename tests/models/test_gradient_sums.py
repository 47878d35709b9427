"""In which dtype gradients are summed over the shards of a batch, and what bfloat16 costs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ltx2_jax.models.layers import Linear, Rngs
from ltx2_jax.sharding import gradients_reduced_in, pin


def weight_gradient(mesh_context, dtype, x, dy):
    """d (y * dy) / d weight of a `Linear` whose batch lies on 8 shards."""
    with mesh_context(8, 1, 1):
        layer = Linear(x.shape[-1], dy.shape[-1], bias=False, rngs=Rngs(0))
        graph, params = nnx.split(layer)
        rows = [pin(jnp.asarray(a, jnp.bfloat16), "batch", None) for a in (x, dy)]

        def loss(params, x, dy):
            with gradients_reduced_in(dtype):
                y = nnx.merge(graph, params)(x, ("batch",))
            return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32))

        grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, *rows)
        return np.asarray(grads[0].weight.get_value()), np.asarray(grads[1], np.float32)


def test_sums_in_float32_are_exact_where_those_in_bfloat16_round(mesh_context):
    rng = np.random.default_rng(0)
    # Whole numbers: every product and sum is exact in float32, and 257 is none of bfloat16's.
    x, dy = (rng.integers(-8, 9, (64, size)).astype(np.float32) for size in (16, 24))
    exact = dy.T @ x
    full, dx = weight_gradient(mesh_context, "float32", x, dy)
    np.testing.assert_array_equal(full, exact)
    coarse, dx_coarse = weight_gradient(mesh_context, "bfloat16", x, dy)
    assert 0 < np.abs(coarse - exact).max() <= np.abs(exact).max() / 64
    np.testing.assert_array_equal(dx, dx_coarse)  # what goes back to the activations is the same


def summed(parts, axes):
    """[N, size] summed in bfloat16 as rings do, one after the other over axes of these sizes."""
    parts = parts.astype(ml_dtypes.bfloat16).reshape(*axes, -1)
    while parts.ndim > 1:
        total = parts[0]
        for part in parts[1:]:
            total = (total.astype(np.float32) + part.astype(np.float32)).astype(ml_dtypes.bfloat16)
        parts = total
    return parts.astype(np.float32)


@pytest.mark.parametrize(
    ("axes", "of_noise", "of_signal"),
    [
        ((4, 4, 4), 0.0050, 0.0029),  # 64 chips, along the axes of their torus
        ((8, 8, 8), 0.0066, 0.0036),
        ((64,), 0.0100, 0.0134),  # one ring through all chips
        ((512,), 0.0269, 0.2671),  # what comes late is below half a unit of the sum, and is lost
    ],
)
def test_what_sums_in_bfloat16_lose(axes, of_noise, of_signal):
    """Relative to the norm: shards that disagree, and shards that agree but for 10 %."""
    rng, count = np.random.default_rng(0), int(np.prod(axes))
    noise = rng.normal(size=(count, 4096)).astype(np.float32)
    signal = rng.normal(size=4096).astype(np.float32) + 0.1 * noise
    for parts, error in ((noise, of_noise), (signal, of_signal)):
        exact = parts.astype(np.float64).sum(axis=0)
        wrong = np.linalg.norm(summed(parts, axes) - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(wrong, error, rtol=0.05)
