"""The large matrices of a network in eight or four bits, for few or small chips.

    int8   127 steps to either side of zero, one scale a row
    fp8    float8 e4m3, 3 bits of mantissa, one scale a row
    int4   7 steps to either side of zero, one scale for every 32 numbers of a row

A weight [.., out, in] becomes values of its shape and a scale, [.., out] or [.., out, groups]. They
stand beside each other in a `Linear` and are multiplied where they are used. The largest number of
a row or group is the largest value, zero is zero, the rest is rounded to the nearest. So an error
is half a step at most: 1/254 of the largest number with int8, 1/14 with int4, and 1/16 of the
number itself with fp8 (near zero 2^-10 / 448 of the largest). The scales of int4, half a bit a
number, are bfloat16, and are rounded before values are divided by them.

Sampling has them, and a training of what stands beside them: they are not trained themselves.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ltx2_jax import chips
from ltx2_jax.errors import UserError
from ltx2_jax.models.lora import linears
from ltx2_jax.models.rounded import rounded
from ltx2_jax.sharding import spec_of

# Form -> dtype of the values, the largest of them, bits of a number with its share of a scale.
FORMS = {
    "int8": (jnp.int8, 127, 8.0),
    "fp8": (jnp.float8_e4m3fn, 448, 8.0),
    "int4": (jnp.int4, 7, 4.5),
}
# Forms of which products are made in eight bits, too (`models.rounded`) -> that of the weights.
PRODUCTS = {"int8-products": "int8", "fp8-products": "fp8"}
CHOICES = (*FORMS, *PRODUCTS)
GROUP = 32  # numbers of a row that share a scale of int4


def check_form(form: str | None, known: Iterable[str] = CHOICES) -> None:
    """UserError for a form that is not known; None is for weights as they are."""
    if form is not None and form not in known:
        raise UserError(f"quantize={form!r} is not one of {', '.join(known)}")


def stored(form: str | None) -> str | None:
    """The form in which weights are kept, whatever is done with them."""
    return PRODUCTS.get(form, form)


def described(form: str | None, device_kind: str) -> str:
    """What is kept and multiplied so, for a person, and whether it is of use on such a device."""
    few = stored(form)
    if few == form:
        return f"{form or 'bfloat16'} weights"
    chip = chips.of_kind(device_kind)
    slow = chip is None or chip.products(few) == 1
    why = f", for which {device_kind} has no faster unit: --quantize={few} is closer"
    return f"{few} weights and products{why * slow}"


def shapes(weight: Any, form: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of the values and the scale of a weight [.., out, in], where they belong if it has a home.

    Scales are split as the rows are.
    """
    *rows, n_in = weight.shape
    grouped = form == "int4"
    shape = (*rows, n_in // math.gcd(n_in, GROUP)) if grouped else tuple(rows)
    home = of_scale = getattr(weight, "sharding", None)
    if isinstance(home, NamedSharding):
        of_scale = NamedSharding(home.mesh, _of_rows(home.spec, len(rows)))
    dtype = jnp.bfloat16 if grouped else jnp.float32
    return (
        jax.ShapeDtypeStruct(weight.shape, FORMS[form][0], sharding=home),
        jax.ShapeDtypeStruct(shape, dtype, sharding=of_scale),
    )


def _of_rows(spec: PartitionSpec, count: int) -> PartitionSpec:
    return PartitionSpec(*[*spec, *[None] * count][:count])


def quantized(weight: Array, form: str) -> tuple[Array, Array]:
    """Values [.., out, in] and scale, [.., out] or [.., out, groups], of a weight [.., out, in]."""
    dtype, largest, _ = FORMS[form]
    of_scale = shapes(jax.ShapeDtypeStruct(weight.shape, dtype), form)[1]
    weight = weight.astype(jnp.float32)
    # A row is one group, but for int4.
    groups = weight.reshape(*weight.shape[:-1], -1, weight.shape[-1] // _groups(of_scale, weight))
    scale = (jnp.max(jnp.abs(groups), axis=-1) / largest).astype(of_scale.dtype)
    values = rounded(groups, scale.astype(jnp.float32)[..., None], dtype, largest)
    return values.reshape(weight.shape), scale.reshape(of_scale.shape)


def _groups(scale: Any, weight: Any) -> int:
    """Groups of a row."""
    return scale.shape[-1] if len(scale.shape) == len(weight.shape) else 1


def dequantized(values: Array, scale: Array) -> Array:
    """The weight, float32 [.., out, in], of what `quantized` gives."""
    groups = _groups(scale, values)
    split = values.reshape(*values.shape[:-1], groups, -1).astype(jnp.float32)
    step = scale.reshape(*values.shape[:-1], groups, 1).astype(jnp.float32)
    return (split * step).reshape(values.shape)


def quantize(
    model: nnx.Module, form: str | None, kept: Callable[[tuple[Any, ...]], bool] = lambda _: False
) -> nnx.Module:
    """The model, built anew, with room for quantised weights in its stacked blocks.

    What it gets are zeros: the values come from files (`weights.loading`). The gates of heads,
    which are small, and everything outside of the blocks stay as they are, and linear maps of whose
    path `kept` is true.
    """
    check_form(form)
    if form is None:
        return model
    for path, linear in linears(model):
        weight = linear.weight[...]
        if weight.ndim != 3 or path[-1] == "to_gate" or kept(path):
            continue
        abstract = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        values, scale = shapes(abstract, stored(form))
        where = of_scale = None
        if not jax.sharding.get_abstract_mesh().empty:
            where = spec_of(jax.typeof(weight))
            of_scale = _of_rows(where, 2)
        linear.weight = nnx.Param(jnp.zeros(values.shape, values.dtype, out_sharding=where))
        scale = jnp.zeros(scale.shape, scale.dtype, out_sharding=of_scale)
        linear.scale = nnx.data(nnx.Param(scale))
        linear.rounds_input = form in PRODUCTS
    return model
