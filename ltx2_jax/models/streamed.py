"""Stacked weights where a sampler reads them: on the device, or in the memory of the host.

From the host each layer comes to the device ahead of its use:

    weights of a layer   host -> device   while layers before it compute
    on the device        two layers       the one in use, and the one on its way

What lies where is a property of the arrays: `home` says where they belong, and `scan` runs over
layers wherever they are. A program that reads them from the host gives the same numbers, but for
what a compiler fuses otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

HOST = "pinned_host"
MATRICES = ("weight", "scale", "a", "b")  # of a linear map and its adapter
# Of a TPU: the order of the axes, from the slowest, and the tiles of short types.
_INT4 = {"sub_byte_element_size_in_bits": 4}
_ON_DEVICE = {
    # Scales of groups are repeated along the inputs, which the compiler wants in rows of tiles for
    # that. It would turn all layers before the loop over steps, which is a second copy of them.
    "int4": Layout((0, 2, 1), ((64, 128), (8, 1)), **_INT4),
}
_ON_HOST = {
    # Tiles of 8 rows of words are those by which it can cut out a layer on the host. From its own,
    # which are larger, it would copy all layers to the device and back in every step.
    "int8": Layout((0, 1, 2), ((8, 128), (4, 1))),
    "float8_e4m3fn": Layout((0, 1, 2), ((8, 128), (4, 1))),
    "int4": Layout((0, 1, 2), ((8, 128), (8, 1)), **_INT4),
}


def home(path: Sequence[Any], array: Any, *, offload: bool) -> NamedSharding | Format | None:
    """Where a matrix of stacked layers lies, and in which layout; None: it is none.

    With `offload` matrices [L, .., ..], their scales and adapters lie in the memory of the host.
    The vectors of all layers are small together: they stay on the device. `array` may be abstract.
    """
    if path[-1] not in MATRICES or array.ndim != 3 or not isinstance(array.sharding, NamedSharding):
        return None
    where = array.sharding.with_memory_kind(HOST) if offload else array.sharding
    layout = (_ON_HOST if offload else _ON_DEVICE).get(array.dtype.name)
    mesh = where.mesh
    tpu = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == "tpu"
    return Format(layout, where) if layout and tpu else where


def place(path: Sequence[Any], array: Array, *, offload: bool) -> Array:
    """The parameter at a path in its `home`."""
    where = home(path, array, offload=offload)
    return array if where is None else jax.device_put(array, where)


def abstract_placed(tree: Any, *, offload: bool) -> Any:
    """Abstract parameters in a nested dict, where `place` puts them."""

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = home([entry.key for entry in path], leaf, offload=offload)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where or leaf.sharding)

    return jax.tree_util.tree_map_with_path(placed, tree)


def is_on_host(array: Any) -> bool:
    """Whether an array, or what is traced in its place, lies in the memory of the host."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over layers, those of them that lie in the host's memory a layer ahead."""
    leaves, tree = jax.tree.flatten(layers)
    held = [number for number, leaf in enumerate(leaves) if is_on_host(leaf)]
    if not held:
        return jax.lax.scan(body, carry, layers)
    count = leaves[held[0]].shape[0]

    def fetched(layer: Array | int) -> list[Array]:
        return [
            jax.device_put(
                jax.lax.dynamic_index_in_dim(leaves[number], layer, keepdims=False),
                jax.memory.Space.Device,
            )
            for number in held
        ]

    def step(state: tuple[Any, list[Array]], of_layer: tuple[Array, list[Any]]) -> Any:
        (carry, here), (layer, others) = state, of_layer
        coming = fetched(jnp.minimum(layer + 1, count - 1))
        whole = list(others)
        for number, array in zip(held, here, strict=True):
            whole[number] = array
        carry, out = body(carry, jax.tree.unflatten(tree, whole))
        return (carry, coming), out

    others = [None if number in held else leaf for number, leaf in enumerate(leaves)]
    given = jnp.arange(count, dtype=jnp.int32), others
    # By twos: the layer that is coming goes where the one before the last was. Else it would have
    # to wait for the place of the one in use.
    (carry, _), out = jax.lax.scan(step, (carry, fetched(0)), given, unroll=2)
    return carry, out
