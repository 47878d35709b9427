"""Low-rank adapters beside the linear maps of a network: y = W x + B A x.

An adapter is a parameter tree {"a": [r, in], "b": [out, r]} under the path of each `Linear` that
has one, with a leading layer axis in stacked blocks. Several adapters of one map are one adapter,
whose rank is the sum of theirs.
Source: LoRA, arXiv 2106.09685; scales are folded into b, as released files have it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import Axes, Linear
from ltx2_jax.sharding import pin, spec


class LowRank(nnx.Module):
    """The product of two thin matrices, added to what a linear map gives."""

    def __init__(self, a: Any, b: Any, axes: Axes):
        """`a` [.., r, in], `b` [.., out, r]; `axes` as of the `Linear`: input, output."""
        # A type of its own: an optimizer can tell adapters from the weights that they adapt.
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.axes = axes

    def __call__(self, x: Array, lead: Axes) -> Array:
        """x [..., in] -> [..., out]."""
        n_in, n_out = (None if axis == "fsdp" else axis for axis in self.axes)
        a, b = (p[...].astype(x.dtype) for p in (self.a, self.b))
        a, b = pin(a, None, n_in), pin(b, n_out, None)
        low = jnp.einsum("...i,ri->...r", x, a, out_sharding=spec(*lead, None))
        return jnp.einsum("...r,or->...o", low, b, out_sharding=spec(*lead, n_out))


def attach(model: nnx.Module, adapters: Mapping[Any, Any]) -> None:
    """Puts adapters beside the linear maps of `model`, in place of those that are there.

    Raises:
      ValueError: an adapter where the model has no `Linear`, or one that does not fit it.
    """
    for path, linear in _linears(model):
        linear.adapter = nnx.data(None)
        adapter: Any = adapters
        for part in path:
            adapter = adapter.get(part, {}) if isinstance(adapter, Mapping) else {}
        if not adapter:
            continue
        *_, n_out, n_in = linear.weight.shape
        if adapter["a"].shape[-1] != n_in or adapter["b"].shape[-2] != n_out:
            raise ValueError(
                f"adapter of {'.'.join(map(str, path))}: {adapter['a'].shape} and "
                f"{adapter['b'].shape} do not fit [{n_out}, {n_in}]"
            )
        linear.adapter = nnx.data(LowRank(adapter["a"], adapter["b"], linear.axes))


def _linears(model: nnx.Module) -> list[tuple[tuple[Any, ...], Linear]]:
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, Linear)]
