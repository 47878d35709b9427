"""FLOPs of a function from its trace alone: nothing is computed, no weights are needed.

Conventions, those of `ltx2_jax.flops`: a multiply-accumulate is 2 FLOPs; convolutions and matrix
products only; products with the zeros of a convolution's padding count, those with the zeros that a
transposed convolution puts between its inputs do not.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from ltx2_jax.models.video_vae import VideoVAE, VideoVAEConfig

# Their bodies run a number of times, or on a part of the data, that the equation does not tell.
_OPAQUE = ("while", "shard_map", "pallas_call")


def conv_flops(function: Callable, *args: Any) -> int:
    """FLOPs of `function(*args)`; arguments are arrays, or `jax.ShapeDtypeStruct` for them.

    Of a `cond` the dearest branch counts.

    Raises:
      ValueError: the function has a `while` loop without a static trip count, a `shard_map` or a
        Pallas kernel.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def video_vae_flops(
    cfg: VideoVAEConfig, frames: int, height: int, width: int, batch: int = 1
) -> dict[str, int]:
    """FLOPs of encoding and of decoding videos of a legal size, for the halves that `cfg` has."""
    vae = nnx.eval_shape(lambda: VideoVAE(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(vae)

    def encode(state: nnx.State, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).encoder(pixels)

    def decode(state: nnx.State, latents: jax.Array) -> jax.Array:
        draw = partial(jnp.zeros, dtype=jnp.float32)
        return nnx.merge(graphdef, state).decoder(latents, draw=draw)

    st, sh, sw = cfg.strides
    pixels = (batch, frames, height, width, cfg.in_channels)
    latents = (batch, (frames - 1) // st + 1, height // sh, width // sw, cfg.latent_channels)
    flops = {}
    if cfg.encoder_blocks is not None:
        flops["encode"] = conv_flops(encode, state, jax.ShapeDtypeStruct(pixels, jnp.float32))
    if cfg.decoder_blocks is not None:
        flops["decode"] = conv_flops(decode, state, jax.ShapeDtypeStruct(latents, jnp.float32))
    return flops


def _count(jaxpr: Jaxpr) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    bodies = [_count(body) for body in _bodies(eqn)]
    if name in _OPAQUE and any(bodies):
        raise ValueError(f"cannot count the FLOPs inside a {name}")
    if name == "cond":
        return max(bodies)
    return sum(bodies) * eqn.params.get("length", 1) if name == "scan" else sum(bodies)


def _bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _convolution(eqn: JaxprEqn) -> int:
    inputs, kernel = (var.aval for var in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    taps = math.prod(kernel.shape[axis] for axis in window)
    if math.prod(eqn.params["lhs_dilation"]) > 1:
        # Every input meets every tap, of the outputs of its group.
        groups = eqn.params["feature_group_count"]
        return 2 * inputs.size * taps * kernel.shape[out_axis] // groups
    return 2 * eqn.outvars[0].aval.size * taps * kernel.shape[in_axis]
