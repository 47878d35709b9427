"""Low-rank adapters beside the linear maps of a network: y = W x + B A x.

An adapter is a parameter tree {"a": [r, in], "b": [out, r]} under the path of each `Linear` that
has one, with a leading layer axis in stacked blocks. Several adapters of one map are one adapter,
whose rank is the sum of theirs.
Source: LoRA, arXiv 2106.09685. Released files have the scale in b; in training it stands beside it,
because an optimizer that rescales gradients would move b otherwise by another amount.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import Axes, Linear, product
from ltx2_jax.sharding import spec


class Constant(nnx.Variable):
    """What an adapter reads and nobody trains."""


class LowRank(nnx.Module):
    """The product of two thin matrices, added to what a linear map gives."""

    def __init__(
        self,
        a: Any,  # [.., r, in]
        b: Any,  # [.., out, r]
        axes: Axes,
        scale: Any = None,
        dropout: tuple[float, Any] | None = None,
    ):
        """The adapter of a `Linear` with `axes`.

        `scale` [..] is alpha / r where it is not in b. `dropout` is a rate and keys [..]: that
        share of what a reads is left out.
        """
        # A type of its own: an optimizer can tell adapters from the weights that they adapt.
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.scale = nnx.data(None if scale is None else Constant(scale))
        self.rate, keys = dropout or (0.0, None)
        self.keys = nnx.data(None if keys is None else Constant(keys))
        self.axes = axes

    def __call__(self, x: Array, lead: Axes) -> Array:
        """x [..., in] -> [..., out]."""
        n_in, n_out = (None if axis == "fsdp" else axis for axis in self.axes)
        if self.keys is not None:
            where = spec(*lead, n_in)
            draws = jax.random.uniform(self.keys[...], x.shape, jnp.float32, out_sharding=where)
            x = jnp.where(draws >= self.rate, x / (1 - self.rate), 0)
        low = product(x, self.a[...], (None, n_in), lead)
        if self.scale is not None:
            low = low * self.scale[...].astype(x.dtype)
        return product(low, self.b[...], (n_out, None), lead)


def homes(axes: Axes) -> tuple[Axes, Axes]:
    """Logical names of a [r, in] and b [out, r] of a `Linear` with `axes`, as they are stored.

    Both are spread as "fsdp": with their moments, the adapters of a released model are gigabytes.
    """
    n_in, n_out = axes
    a = ("fsdp" if n_in != "fsdp" else None, n_in)
    b = (n_out, "fsdp") if n_out != "fsdp" else ("fsdp", None)
    return a, b


def attach(model: nnx.Module, adapters: Mapping[Any, Any]) -> None:
    """Puts adapters beside the linear maps of `model`, in place of those that are there.

    Beside "a" and "b" an adapter may have a "scale", and "keys" with the "rate" of a dropout; see
    `LowRank`.

    Raises:
      ValueError: an adapter where the model has no `Linear`, or one that does not fit it.
    """
    for path, linear in linears(model):
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
        dropout = (adapter["rate"], adapter["keys"]) if "keys" in adapter else None
        low_rank = LowRank(adapter["a"], adapter["b"], linear.axes, adapter.get("scale"), dropout)
        linear.adapter = nnx.data(low_rank)


def linears(model: nnx.Module) -> list[tuple[tuple[Any, ...], Linear]]:
    """The linear maps of a model, with their paths."""
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, Linear)]
