"""Building blocks of the transformer: linear maps, norms, AdaLN, timestep embedding, feed-forward.

Weights are stored in float32 (or bfloat16 for sampling) and used in the dtype of the activations.
Each of them says beside its shape where it is stored (`weight_spec`). `Linear` gathers the FSDP
part where it uses it.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models.remat import PROJECTION
from ltx2_jax.models.rounded import product_of_rounded
from ltx2_jax.sharding import axis_size, pin, reduces_in_float32, spec, spec_of, weight_spec

Axes = tuple[str | None, ...]


@jax.tree_util.register_pytree_node_class
class Rngs:
    """Random keys for initialisers, the same as those of `nnx.Rngs` with one stream.

    `nnx.Rngs` keeps its count in an array. While a network is traced, Flax asks that array for its
    sharding at every key, and each time JAX writes a long error message that is thrown away. This
    took half of the time in which a network is built. Here the count is a Python number.
    """

    def __init__(self, key: int | Array):
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._drawn = 0

    def params(self) -> Array:
        """The next key."""
        key = jax.random.fold_in(self._key, self._drawn)
        self._drawn += 1
        return key

    def split(self, count: int) -> "Rngs":
        """One for each of `count` layers: a tree with a leading axis, for `jax.vmap`."""
        return Rngs(jax.random.split(self.params(), count))

    def tree_flatten(self) -> tuple[tuple[Array], int]:
        return (self._key,), self._drawn

    @classmethod
    def tree_unflatten(cls, drawn: int, key: tuple[Array]) -> "Rngs":
        made = object.__new__(cls)
        (made._key,), made._drawn = key, drawn
        return made


def parameter(
    rngs: Rngs, shape: tuple[int, ...], axes: Axes, *, std: float = 0.0, mean: float = 0.0
) -> nnx.Param:
    """A float32 parameter born on its shards: constant `mean`, or normal with deviation `std`."""
    where = weight_spec(shape, axes)
    if std == 0:
        return nnx.Param(jnp.full(shape, mean, jnp.float32, out_sharding=where))
    key = rngs.params()
    noise = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32, out_sharding=where)
    return nnx.Param(mean + noise * (std / 0.87962566))  # the deviation of a normal cut at +-2


class Linear(nnx.Module):
    """y = x @ weight.T + bias over the last axis.

    The weight is [out, in] as in released files, so that it goes from file to device and back byte
    by byte; matrix units take either orientation (the TPU compiler's cost estimates are equal).
    `axes` names the features, input first: ("fsdp", None) for an unsplit map, ("fsdp", "heads") to
    split the output features over the model axis, ("heads", "fsdp") to contract split features.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        axes: Axes = ("fsdp", None),
        bias: bool = True,
        std: float | None = None,
        rngs: Rngs,
    ):
        std = 1 / math.sqrt(n_in) if std is None else std
        self.axes = axes
        self.weight = parameter(rngs, (n_out, n_in), axes[::-1], std=std)
        # Where the output features are not split, the bias is spread as "fsdp": neither it nor its
        # moments need to be whole on every chip.
        split = axis_size(axes[1]) > 1
        self.bias = parameter(rngs, (n_out,), (axes[1] if split else "fsdp",)) if bias else None
        self.adapter = nnx.data(None)  # or an adapter of `models.lora`
        self.scale = nnx.data(None)  # or that of a weight of `models.quantized`
        self.rounds_input = False  # whether what it reads is rounded as the weight is

    def __call__(self, x: Array, lead: Axes) -> Array:
        """x [..., in] -> [..., out]; `lead` names the axes before the feature axis."""
        n_in, n_out = (None if axis == "fsdp" else axis for axis in self.axes)
        if self.scale is None:
            y = product(x, self.weight[...], (n_out, n_in), lead)
        else:
            values, scale = self.weight[...], self.scale[...]
            of = product_of_rounded if self.rounds_input else _product_of_quantized
            y = of(x, values, scale, (n_out, n_in), lead)
        if self.adapter is not None:
            y = y + self.adapter(x, lead)
        if self.bias is not None:
            y = y + pin(self.bias[...].astype(x.dtype), n_out)
        return y


def product(x: Array, weight: Array, axes: Axes, lead: Axes) -> Array:
    """x [..., in] and weight [out, in], gathered to `axes` -> [..., out], in the dtype of x."""
    reduced = _product_reduced_in_float32 if reduces_in_float32() else _product
    return reduced(x, weight, axes, lead)


def _product(x: Array, weight: Array, axes: Axes, lead: Axes) -> Array:
    """x [..., in] and weight [out, in], gathered to `axes` -> [..., out].

    The weight is cast first and then gathered, which halves the bytes on the wire in bfloat16. Its
    gradient is therefore also summed over the shards of the batch in that dtype, before it becomes
    float32; see `optim.reduce_dtype`.
    """
    weight = pin(weight.astype(x.dtype), *axes)
    return jnp.einsum("...i,oi->...o", x, weight, out_sharding=spec(*lead, axes[0]))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product_reduced_in_float32(x: Array, weight: Array, axes: Axes, lead: Axes) -> Array:
    """`_product` whose weight's gradient leaves the matrix unit, and is summed, in float32."""
    return _product(x, weight, axes, lead)


def _forward(x: Array, weight: Array, axes: Axes, lead: Axes) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight, axes, lead), (x, weight)


def _backward(axes: Axes, lead: Axes, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = saved
    gathered = pin(weight.astype(x.dtype), *axes)
    dx = jnp.einsum("...o,oi->...i", dy, gathered, out_sharding=spec(*lead, axes[1]))
    dw = jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32,
                    out_sharding=spec(*axes))  # fmt: skip
    return dx, jax.sharding.reshard(dw, spec_of(jax.typeof(weight))).astype(weight.dtype)


_product_reduced_in_float32.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product_of_quantized(x: Array, values: Array, scale: Array, axes: Axes, lead: Axes) -> Array:
    """`_product` of values [out, in] and their scale, [out] or [out, groups].

    Only values cross the wire and come from memory, and they are exact in bfloat16. Scales of rows
    are left to the product; those of groups of a row cannot be. Nobody trains either: the backward
    pass has the gradient of x alone, and keeps the values as they are for it.
    """
    y = _product(x, _as_used(values, scale, axes, x.dtype), axes, lead)
    return _by_rows(y, scale, axes)


def _of_quantized(x: Array, values: Array, scale: Array, axes: Axes, lead: Axes) -> Any:
    return _product_of_quantized(x, values, scale, axes, lead), (values, scale)


def _back_to_x(axes: Axes, lead: Axes, saved: tuple[Array, Array], dy: Array) -> Any:
    values, scale = saved
    weight = _as_used(values, scale, axes, dy.dtype)
    dy = _by_rows(dy, scale, axes)
    dx = jnp.einsum("...o,oi->...i", dy, weight, out_sharding=spec(*lead, axes[1]))
    return dx, None, None


_product_of_quantized.defvjp(_of_quantized, _back_to_x)


def _as_used(values: Array, scale: Array, axes: Axes, dtype: jnp.dtype) -> Array:
    """Values [out, in] gathered and then cast, multiplied by their scale if it is of groups."""
    values = pin(values, *axes).astype(dtype)
    if scale.ndim == 1:
        return values
    step = pin(scale, axes[0], None).astype(dtype)
    return values * pin(jnp.repeat(step, values.shape[1] // step.shape[1], axis=1), *axes)


def _by_rows(y: Array, scale: Array, axes: Axes) -> Array:
    """y [..., out] times a scale of rows [out]; as it is where scales are of groups."""
    if scale.ndim > 1:
        return y
    return (y.astype(jnp.float32) * pin(scale, axes[0])).astype(y.dtype)


def rms_norm(x: Array, eps: float, scale: Array | None = None) -> Array:
    """x / rms(x) over the last axis, computed in float32, with an optional weight."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    return y.astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm without weights, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    """x (1 + scale) + shift; both broadcast over tokens when one sigma serves them all."""
    return x * (1 + scale) + shift


def timestep_embedding(timesteps: Array, dim: int, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding, float32 [..., dim], cosine half first; an odd dim ends with a zero.

    `timesteps` are in units of 1/1000 sigma. They stay float32: bfloat16 would turn 999 into 1000.
    Source: `ltx_core/model/transformer/timestep_embedding.py`.
    """
    half = dim // 2
    rates = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angle = timesteps.astype(jnp.float32)[..., None] * rates
    embedding = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.pad(embedding, [(0, 0)] * timesteps.ndim + [(0, dim - 2 * half)])


class AdaLayerNormSingle(nnx.Module):
    """Timestep -> `rows` modulation vectors, one MLP shared by all blocks (PixArt's adaLN-single).

    Source: `ltx_core/model/transformer/adaln.py`.
    """

    EMBEDDING = 256

    def __init__(self, dim: int, rows: int, *, rngs: Rngs):
        self.rows = rows
        self.linear_1 = Linear(self.EMBEDDING, dim, rngs=rngs)
        self.linear_2 = Linear(dim, dim, rngs=rngs)
        # It is by far the largest of the three, and its result is a few vectors: so it is split,
        # and the result is gathered.
        self.linear = Linear(dim, rows * dim, axes=("fsdp", "mlp"), std=0.02, rngs=rngs)

    def __call__(self, timesteps: Array, dtype: jnp.dtype, lead: Axes) -> tuple[Array, Array]:
        """timesteps [B, T] (already x 1000) -> modulation [B, T, rows, D], embedded [B, T, D]."""
        x = timestep_embedding(timesteps, self.EMBEDDING).astype(dtype)
        embedded = self.linear_2(jax.nn.silu(self.linear_1(x, lead)), lead)
        rows = pin(self.linear(jax.nn.silu(embedded), lead), *lead, None)
        return rows.reshape(*timesteps.shape, self.rows, -1), embedded


class FeedForward(nnx.Module):
    """Linear -> tanh-GELU -> Linear, hidden width `mult` times the model's."""

    def __init__(self, dim: int, mult: int, *, bias: bool = True, rngs: Rngs):
        self.linear_in = Linear(dim, mult * dim, axes=("fsdp", "mlp"), bias=bias, rngs=rngs)
        self.linear_out = Linear(mult * dim, dim, axes=("mlp", "fsdp"), bias=bias, rngs=rngs)

    def __call__(self, x: Array, lead: Axes) -> Array:
        hidden = checkpoint_name(self.linear_in(x, lead), PROJECTION)
        out = self.linear_out(jax.nn.gelu(hidden, approximate=True), lead)
        return checkpoint_name(out, PROJECTION)
