"""Parameters and FLOPs of the networks, from their configs or their traces; nothing is computed.

A multiply-accumulate is 2 FLOPs. Only matrix products and convolutions count: norms, rotary
embeddings, softmax, activations, modulation and gating cost bandwidth, not matrix units. Attention
is dense, and nothing of it is halved. Products with the zeros of a convolution's padding count;
those with the zeros that a transposed convolution puts between its inputs do not. These are the
model's FLOPs: recomputation under rematerialisation does not count, so that an MFU from them is
comparable across remat policies.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from ltx2_jax.models.codecs.video_vae import VideoVAE, VideoVAEConfig
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.transformer import LTX2Transformer

TIMESTEP_CHANNELS = 256  # sinusoid features entering the timestep MLPs
TRAIN_PASSES = 3  # a backward pass costs two forward passes: gradients of inputs and of weights


# ------------------------------------------------------------------------------- of a transformer


@functools.cache
def total_parameters(config: TransformerConfig) -> int:
    """Number of parameters of the transformer: 18.88 B for LTX-2 2.0, 18.99 B for 2.3."""
    model = nnx.eval_shape(lambda: LTX2Transformer(config, rngs=Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def forward_flops(
    config: TransformerConfig, video_tokens: int, audio_tokens: int, text_tokens: int = 1024
) -> dict[str, float]:
    """FLOPs of one forward pass of one sample, term by term.

    Guidance passes and batch entries each cost this much. Terms named "core" are the two products
    inside attention, the rest are projections. The timestep MLPs run once per sample, not per
    token.
    """
    c, L = config, config.num_layers
    v, a, s = video_tokens, audio_tokens, text_tokens
    V, A = c.width, c.audio_width
    terms = {"timestep MLPs": _timestep_flops(c)}
    terms["input and output"] = _matmul(v, V, c.in_channels + c.out_channels) + _matmul(
        a, A, c.audio_in_channels + c.audio_out_channels
    )
    streams = ("video", v, V, c.context_dim), ("audio", a, A, c.audio_context_dim)
    for name, n, D, context in streams:
        terms |= {
            f"{name} self-attention core": L * _core(n, n, D),
            f"{name} self-attention projections": L * 4 * _matmul(n, D, D),
            f"{name} text attention core": L * _core(n, s, D),
            f"{name} text attention projections": L * 2 * _matmul(n, D, D),
            f"{name} text keys and values": L * 2 * _matmul(s, context, D),
            f"{name} feed-forward": L * 2 * _matmul(n, D, c.ff_mult * D),
        }
    if c.audio_video_attention:
        # Query and output on the attending side, key and value on the other: the sum is symmetric.
        projections = 2 * _matmul(v, V, A) + 2 * _matmul(a, A, A)
        terms["audio-to-video and video-to-audio core"] = L * 2 * _core(v, a, A)
        terms["audio-to-video and video-to-audio projections"] = L * 2 * projections
    if c.gated_attention:
        cross = c.audio_num_heads if c.audio_video_attention else 0
        gates = _matmul(v, V, 2 * c.num_heads + cross)
        terms["attention gates"] = L * (gates + _matmul(a, A, 2 * c.audio_num_heads + cross))
    if c.caption_channels is not None:
        terms["caption projection"] = sum(
            _matmul(s, c.caption_channels, d) + _matmul(s, d, d)
            for d in (c.context_dim, c.audio_context_dim)
        )
    return terms


def train_flops(
    config: TransformerConfig, video_tokens: int, audio_tokens: int, text_tokens: int = 1024
) -> float:
    """FLOPs of one training step of one sample: forward and backward, nothing recomputed."""
    return TRAIN_PASSES * sum(
        forward_flops(config, video_tokens, audio_tokens, text_tokens).values()
    )


def _timestep_flops(c: TransformerConfig) -> float:
    rows = [c.adaln_rows]
    rows += [2] * (c.modulated_text_attention and c.prompt_adaln)
    rows += [4, 1] * c.audio_video_attention
    return 2.0 * sum(
        (TIMESTEP_CHANNELS + 1) * d + (d + 1) * d + (d + 1) * n * d
        for d in (c.width, c.audio_width)
        for n in rows
    )


def _matmul(rows: int, fan_in: int, fan_out: int) -> float:
    return 2.0 * rows * fan_in * fan_out


def _core(queries: int, keys: int, inner: int) -> float:
    return 4.0 * queries * keys * inner  # scores, and their weighting of the values


# ------------------------------------------------------------------------------------- of a trace

# The equation does not tell how often their bodies run, or on which part of the data.
_OPAQUE = ("while", "shard_map", "pallas_call")


def count(function: Callable, *args: Any) -> int:
    """FLOPs of `function(*args)`; arguments are arrays, or `jax.ShapeDtypeStruct` for them.

    Of a `cond`, the branch with the most FLOPs counts.

    Raises:
      ValueError: the function has a `while` loop without a static trip count, a `shard_map` or a
        Pallas kernel.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def video_vae_flops(
    cfg: VideoVAEConfig, frames: int, height: int, width: int, batch: int = 1
) -> dict[str, int]:
    """FLOPs of encoding and of decoding videos of a legal size, for the halves that `cfg` has."""
    vae = nnx.eval_shape(lambda: VideoVAE(cfg, rngs=Rngs(0)))
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
        flops["encode"] = count(encode, state, jax.ShapeDtypeStruct(pixels, jnp.float32))
    if cfg.decoder_blocks is not None:
        flops["decode"] = count(decode, state, jax.ShapeDtypeStruct(latents, jnp.float32))
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
    bodies = [_count(body) for body in jaxprs_in_params(eqn.params)]
    if name in _OPAQUE and any(bodies):
        raise ValueError(f"cannot count the FLOPs inside a {name}")
    if name == "cond":
        return max(bodies)
    return sum(bodies) * eqn.params.get("length", 1) if name == "scan" else sum(bodies)


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
