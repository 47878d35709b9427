"""Weights in the memory of the host: the same numbers, and two layers of them on the device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ltx2_jax.models import streamed
from ltx2_jax.models.layers import Linear, Rngs
from ltx2_jax.models.quantized import FORMS, quantize
from ltx2_jax.planning.topology import has_compiler, tpu_devices
from ltx2_jax.sharding import make_mesh


class Stack(nnx.Module):
    """Linear maps on top of each other, run twice, as by two steps of a sampler."""

    def __init__(self, layers, width, form=None):
        build = jax.vmap(lambda r: Linear(width, width, axes=("fsdp", "mlp"), rngs=r))
        self.blocks = build(Rngs(0).split(layers))
        quantize(self, form)

    def __call__(self, x):
        graph, params = nnx.split(self.blocks)

        def body(x, layer):
            y = jnp.tanh(nnx.merge(graph, layer)(x, (None,)))
            y = jax.sharding.reshard(y, P(None, None))
            return y, y.sum()

        def step(x, _):
            return streamed.scan(body, x, params)

        return jax.lax.scan(step, x, None, length=2)


def run(graph, params, x):
    return nnx.merge(graph, params)(x)


def on_host(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, a: streamed.place([entry.key for entry in path], a, offload=True), params
    )


def filled(array):
    """Other numbers of the same type in the same place."""
    draws = np.random.default_rng(array.size).integers(1, 8, array.shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        draws = draws / 128
    return jax.device_put(jnp.asarray(draws, array.dtype), array.sharding)


@pytest.mark.parametrize(("layers", "form"), [(1, None), (3, "int4"), (4, "int8")])
def test_layers_from_the_host_compute_the_same_bit_for_bit(layers, form, mesh_context):
    """One layer, an odd number, an even one; split over two devices, two have copies."""
    with mesh_context(2, 2, 2):
        params = nnx.split(Stack(layers, 64, form))
        graph, params = params[0], nnx.to_pure_dict(params[1])
        params = jax.tree.map(filled, params)  # no layer is like another
        held = on_host(params)
        kinds = {name: a.sharding.memory_kind for name, a in held["blocks"].items()}
        assert kinds["weight"] == "pinned_host"
        assert kinds["bias"] != "pinned_host"
        x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
        program = jax.jit(run, static_argnums=0)
        jax.tree.map(np.testing.assert_array_equal, program(graph, held, x),
                     program(graph, params, x))  # fmt: skip


def test_matrices_scales_and_adapters_of_layers_wait_on_the_host_and_nothing_else():
    where = NamedSharding(make_mesh(devices=jax.devices()[:1]), P())
    stack = jax.device_put(np.zeros((3, 2, 4), np.float32), where)
    for name, array, on_host in (
        ("weight", stack, True),
        ("scale", stack, True),
        ("a", stack, True),
        ("b", stack, True),
        ("bias", stack[0], False),
        ("scale", stack[0], False),  # of rows, a number each
        ("registers", stack, False),
    ):
        placed = streamed.place(("blocks", name), array, offload=True)
        assert (placed.sharding.memory_kind == streamed.HOST) == on_host, name
        here = streamed.place(("blocks", name), placed, offload=False)
        assert on_host or here.sharding.memory_kind != streamed.HOST


LAYERS, WIDTH, ROWS = 12, 1024, 256


@pytest.mark.skipif(not has_compiler(), reason="no TPU compiler for this machine")
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_two_layers_are_on_the_device(form):
    """By the TPU compiler; all others stay on the host, and none is turned or copied there."""
    mesh = make_mesh(devices=tpu_devices("v5e:2x2")[:1])
    with jax.set_mesh(mesh):
        graph, params = nnx.split(nnx.eval_shape(lambda: Stack(LAYERS, WIDTH, form)))
        params = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape,
                a.dtype if form else jnp.bfloat16,
                sharding=NamedSharding(mesh, P(*[None] * a.ndim)),
            ),
            nnx.to_pure_dict(params),
        )
        params = streamed.abstract_placed(params, offload=True)
        x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        program = jax.jit(run, static_argnums=0).lower(graph, params, x).compile()
    memory = program.memory_analysis()
    layer = WIDTH * WIDTH * (FORMS[form][2] if form else 16) / 8
    held = LAYERS * layer
    assert held <= memory.host_argument_size_in_bytes < 1.05 * held
    assert memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes < layer + 2 * ROWS * WIDTH  # vectors, and x
    # Beside the layers what is left of their way through the product: one layer in bfloat16.
    assert memory.temp_size_in_bytes < 2 * layer + 1.5 * 2 * WIDTH * WIDTH
    assert "dynamic-slice-start" in program.as_text()
    assert not re.search(rf"\w+\[{LAYERS},{WIDTH},{WIDTH}\]\S* copy", program.as_text())
