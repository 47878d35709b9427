"""The layers of a Gemma text decoder: its config, rotary tables, norms, attention and MLP.

Gemma 3 and Gemma 4 are values of `GemmaConfig`. Source of the rules: the published Gemma 3 report
(arXiv 2503.19786) and Hugging Face's `gemma3` and `gemma4_unified` models, which the official
LTX-2 code runs.

Dims: B batch, T new tokens, S tokens that keys cover, D width, N query heads, K key-value heads,
G query heads per key-value head, H head width, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Axes, Linear, Rngs, parameter, rms_norm
from ltx2_jax.models.rope import Rope, apply_rope
from ltx2_jax.sharding import axis_size, pin, spec

Cache = tuple[Array, Array]  # keys, values: [B, S, K, H]


@dataclass(frozen=True)
class LayerKind:
    """What sets sliding-window layers and full-attention layers apart."""

    head_dim: int = 256
    kv_heads: int = 8
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # angles are divided by it
    rotary_fraction: float = 1.0  # of the pairs of a head; the rest do not turn
    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    keys_are_values: bool = False  # values are the raw key projection


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes and wiring of one decoder; the defaults are Gemma 3 12B."""

    vocab_size: int = 262_208
    width: int = 3840
    mlp: int = 15_360
    num_heads: int = 16
    layers: tuple[str, ...] = 8 * (5 * ("sliding",) + ("full",))  # the kind of each
    sliding: LayerKind = field(default_factory=lambda: LayerKind(window=1024))
    full: LayerKind = field(
        default_factory=lambda: LayerKind(rope_theta=1_000_000.0, rope_factor=8.0)
    )
    attention_scale: float = 1 / 16  # of the scores
    norm_eps: float = 1e-6
    norm_offset: float = 1.0  # norms multiply by offset + weight
    value_norm: bool = False  # weightless RMSNorm of the values
    layer_scalar: bool = False  # each layer's output is multiplied by a stored number
    logit_cap: float | None = None  # logits become cap tanh(logits / cap)
    dtype: str = "bfloat16"  # of the activations
    quantized: str | None = None  # a form of `models.quantized`, for weights from files

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kind(self, name: str) -> LayerKind:
        return {"sliding": self.sliding, "full": self.full}[name]


def rope_frequencies(kind: LayerKind) -> np.ndarray:
    """float32 [H / 2]: radians a position of each pair of head features; 0 where none turns."""
    turning = int(kind.rotary_fraction * kind.head_dim // 2)
    # In float32, as upstream: at position 1000 the last bit of a frequency is 6e-5 radians.
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(kind.head_dim)
    frequencies = np.zeros(kind.head_dim // 2, np.float32)
    frequencies[:turning] = 1 / np.float32(kind.rope_theta) ** exponents / kind.rope_factor
    return frequencies


def rope_tables(kind: LayerKind, positions: Array) -> Rope:
    """positions [T] -> cos and sin, float32 [1, T, 1, H / 2]: the same for every row and head."""
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(kind))
    angle = angle[None, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def attention_mask(valid: Array, positions: Array, window: int | None) -> Array:
    """Which keys a token sees, bool [B, T, S]: valid, not after it, and inside its window.

    valid: bool [B, S], False at padding. positions: [T], indices into the S keys.
    """
    age = positions[:, None] - jnp.arange(valid.shape[1])[None, :]
    seen = age >= 0
    if window is not None:
        seen &= age < window
    return seen[None] & valid[:, None, :]


def lead(batch: int) -> Axes:
    """Logical axes of [B, T]: rows over the data axis if it divides them, else copies."""
    return ("batch" if batch % axis_size("batch") == 0 else None, None)


class Norm(nnx.Module):
    """RMSNorm with a weight, in float32: y = x / rms(x) (offset + weight)."""

    def __init__(self, width: int, cfg: GemmaConfig, *, rngs: Rngs):
        self.eps, self.offset = cfg.norm_eps, cfg.norm_offset
        self.weight = parameter(rngs, (width,), (None,), mean=1 - cfg.norm_offset)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.eps, self.offset + self.weight[...].astype(jnp.float32))


class Attention(nnx.Module):
    """Causal grouped-query attention with RMSNorm of each head's queries and keys.

    Heads are split over the model axis. Key-value heads are too if it divides them; else every
    shard computes them all.
    """

    def __init__(self, cfg: GemmaConfig, kind: LayerKind, *, rngs: Rngs):
        shards = axis_size("heads")
        if cfg.num_heads % shards:
            raise UserError(
                f"mesh: model={shards} does not divide the {cfg.num_heads} heads of the text "
                "encoder"
            )
        self.cfg, self.kind = cfg, kind
        self.kv_axis = "heads" if kind.kv_heads % shards == 0 else None
        inner, kv = cfg.num_heads * kind.head_dim, kind.kv_heads * kind.head_dim

        def linear(n_in: int, n_out: int, *axes: str | None) -> Linear:
            return Linear(n_in, n_out, axes=axes, bias=False, rngs=rngs)

        self.query = linear(cfg.width, inner, "fsdp", "heads")
        self.key = linear(cfg.width, kv, "fsdp", self.kv_axis)
        self.value = None if kind.keys_are_values else linear(cfg.width, kv, "fsdp", self.kv_axis)
        self.out = linear(inner, cfg.width, "heads", "fsdp")
        self.query_norm = Norm(kind.head_dim, cfg, rngs=rngs)
        self.key_norm = Norm(kind.head_dim, cfg, rngs=rngs)

    def __call__(
        self,
        x: Array,  # [B, T, D]
        rope: Rope,
        mask: Array,  # bool [B, T, S]
        cache: Cache | None,
        position: Array | int,
    ) -> tuple[Array, Cache | None]:
        """[B, T, D] and the cache with the keys and values of x written at `position`."""
        cfg, head, axes = self.cfg, self.kind.head_dim, lead(x.shape[0])
        split = (*x.shape[:2], -1, head)
        q = self.query(x, axes).reshape(split)
        k = self.key(x, axes).reshape(split)
        v = k if self.value is None else self.value(x, axes).reshape(split)
        if cfg.value_norm:
            v = rms_norm(v, cfg.norm_eps)
        q, k = apply_rope(self.query_norm(q), rope), apply_rope(self.key_norm(k), rope)
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            k, v = cache = tuple(
                write(old, new.astype(old.dtype), position, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        out = self._attend(q, k, v, mask, axes)
        return self.out(out, axes), cache

    def _attend(self, q: Array, k: Array, v: Array, mask: Array, axes: Axes) -> Array:
        """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N * H]."""
        batch, tokens, heads, width = q.shape
        kv_axis = self.kv_axis
        if kv_axis is None:
            # Whole on every shard: the copy for each query head is what the shard's heads need.
            k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
            k, v = (pin(x, *axes, "heads", None) for x in (k, v))
            kv_axis = "heads"
        groups = heads // k.shape[2]
        grouped = (batch, tokens, k.shape[2], groups, width)
        q = jnp.reshape(q, grouped, out_sharding=spec(*axes, kv_axis, None, None))
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(
            mask[:, None, None], scores * self.cfg.attention_scale, jnp.finfo(jnp.float32).min
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
        flat = (batch, tokens, heads * width)
        return jnp.reshape(out, flat, out_sharding=spec(*axes, "heads"))


class GatedMLP(nnx.Module):
    """GeGLU: down(gelu(gate(x)) up(x)) with the tanh form of GELU."""

    def __init__(self, cfg: GemmaConfig, *, rngs: Rngs):
        wide = {"axes": ("fsdp", "mlp"), "bias": False, "rngs": rngs}
        self.gate = Linear(cfg.width, cfg.mlp, **wide)
        self.up = Linear(cfg.width, cfg.mlp, **wide)
        self.down = Linear(cfg.mlp, cfg.width, axes=("mlp", "fsdp"), bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        axes = lead(x.shape[0])
        return self.down(jax.nn.gelu(self.gate(x, axes), approximate=True) * self.up(x, axes), axes)


class Layer(nnx.Module):
    """Attention and MLP, each with a norm before it and one after it, inside the residual."""

    def __init__(self, cfg: GemmaConfig, kind: LayerKind, *, rngs: Rngs):
        self.attention = Attention(cfg, kind, rngs=rngs)
        self.mlp = GatedMLP(cfg, rngs=rngs)
        self.attention_norm = Norm(cfg.width, cfg, rngs=rngs)
        self.attention_out_norm = Norm(cfg.width, cfg, rngs=rngs)
        self.mlp_norm = Norm(cfg.width, cfg, rngs=rngs)
        self.mlp_out_norm = Norm(cfg.width, cfg, rngs=rngs)
        self.scalar = parameter(rngs, (1,), (None,), mean=1.0) if cfg.layer_scalar else None

    def __call__(
        self,
        x: Array,  # [B, T, D]
        rope: Rope,
        mask: Array,  # bool [B, T, S]
        cache: Cache | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """One layer; with a cache, keys and values are kept there and attention reads it."""
        h, cache = self.attention(self.attention_norm(x), rope, mask, cache, position)
        x = x + self.attention_out_norm(h)
        x = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        if self.scalar is not None:
            x = x * self.scalar[...].astype(x.dtype)
        return x, cache


def repeating(kinds: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Layer kinds as (pattern, repeats) groups, chosen so that few layers have to be compiled.

    5 sliding + 1 full, eight times, is one group. What a pattern leaves over makes further groups.
    """
    if not kinds:
        return ()
    best = (math.inf, 0, 0)
    for period in range(1, len(kinds) + 1):
        repeats = 1
        while kinds[period * repeats :][:period] == kinds[:period]:
            repeats += 1
        best = min(best, (len(kinds) - period * (repeats - 1), period, repeats))
    _, period, repeats = best
    return ((kinds[:period], repeats), *repeating(kinds[period * repeats :]))
