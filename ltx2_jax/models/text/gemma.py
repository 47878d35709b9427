"""The text encoder's language model: a Gemma 3 or Gemma 4 decoder, text part only.

The diffusion model is conditioned on every layer's hidden states, not on the last alone. `fold`
hands them out one at a time inside the scan over layers, so that a caller can accumulate features
without the [L + 1, B, S, D] stack ever existing.
Source: paper section 3.2; `ltx_core/text_encoders/gemma/encoders/base_encoder.py`.

Dims as in `gemma_layers.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models import streamed
from ltx2_jax.models.layers import Rngs, parameter
from ltx2_jax.models.quantized import quantize, stored
from ltx2_jax.models.text.gemma_layers import (
    Cache,
    GemmaConfig,
    Layer,
    LayerKind,
    Norm,
    attention_mask,
    lead,
    repeating,
    rope_tables,
)
from ltx2_jax.sharding import axis_size, pin, spec

GEMMA_3_12B = GemmaConfig()
GEMMA_4_12B = GemmaConfig(
    vocab_size=262_144,
    full=LayerKind(
        head_dim=512,
        kv_heads=1,
        rope_theta=1_000_000.0,
        rotary_fraction=0.25,
        keys_are_values=True,
    ),
    attention_scale=1.0,
    norm_offset=0.0,
    value_norm=True,
    layer_scalar=True,
    logit_cap=30.0,
)

# For tests and synthetic captions: everything that Gemma 3 has, in few numbers.
GEMMA_SMALL = GemmaConfig(
    vocab_size=512,
    width=64,
    mlp=128,
    num_heads=4,
    layers=3 * ("sliding",) + ("full",),
    sliding=LayerKind(head_dim=16, kv_heads=2, window=8),
    full=LayerKind(head_dim=16, kv_heads=2, rope_theta=1_000_000.0, rope_factor=8.0),
    attention_scale=1 / 4,
    dtype="float32",
)

# For every group of layers, for every layer of its pattern: keys and values [repeats, B, S, K, H].
Caches = tuple[tuple[Cache, ...], ...]
# (carry, hidden [B, S, D], index: int32 scalar) -> carry
Consume = Callable[[Any, Array, Array], Any]


class Group(nnx.Module):
    """A pattern of layers; `Gemma` stacks its repetitions."""

    def __init__(self, cfg: GemmaConfig, pattern: tuple[str, ...], *, rngs: Rngs):
        self.pattern = pattern
        self.layers = nnx.List([Layer(cfg, cfg.kind(name), rngs=rngs) for name in pattern])


class Gemma(nnx.Module):
    """The decoder. Build it under the mesh that it runs on: the mesh decides what is split.

    Rows must be padded on the left, and positions count from 0 at the first slot, padding included.
    Hidden states of padding are finite and mean nothing.

    Raises:
      UserError: the model axis of the mesh does not divide the heads or the MLP's features.
    """

    def __init__(self, cfg: GemmaConfig, *, rngs: Rngs):
        self.cfg = cfg
        self.width_axis = "fsdp" if cfg.width % axis_size("fsdp") == 0 else None
        table = (cfg.vocab_size, cfg.width)
        self.embedding = parameter(rngs, table, (None, self.width_axis), std=cfg.width**-0.5)
        # Stacked from birth: every leaf of a group has a leading axis of its repetitions.
        self.groups = nnx.List(
            [
                jax.vmap(lambda r, pattern=pattern: Group(cfg, pattern, rngs=r))(rngs.split(n))
                for pattern, n in repeating(cfg.layers)
            ]
        )
        self.norm = Norm(cfg.width, cfg, rngs=rngs)
        quantize(self, stored(cfg.quantized))  # which runs once for a prompt

    def fold(
        self,
        tokens: Array,  # int [B, S]
        mask: Array,  # [B, S], False or 0 at padding
        consume: Consume,
        init: Any,
    ) -> Any:
        """Pass every hidden state to `consume`, in order, and return the last carry.

        Index 0 is the scaled embeddings, index i the output of layer i, the last one after the
        final norm: `cfg.num_layers + 1` in all. `consume` runs inside a scan: `index` is traced,
        and the carry it returns must have the shapes, dtypes and shardings of `init`.
        """
        positions = jnp.arange(tokens.shape[1])
        context = self._context(mask, positions)

        def step(state, layer, kind, index, _):
            x, carry = state
            # The input of a layer is the hidden state before it. So the last hidden state, the only
            # one that passes the final norm, is left for the end.
            carry = consume(carry, x, index)
            x, _ = layer(x, *context[kind])
            return (x, carry), None

        (x, carry), _ = self._scan(step, (self.embed(tokens), init), None)
        return consume(carry, self.norm(x), jnp.int32(self.cfg.num_layers))

    def hidden_states(self, tokens: Array, mask: Array) -> Array:
        """All hidden states, [L + 1, B, S, D]: what `fold` hands out, stacked."""
        shape = (self.cfg.num_layers + 1, *tokens.shape, self.cfg.width)
        where = spec(None, *lead(tokens.shape[0]), None)
        stack = jnp.zeros(shape, self.cfg.dtype, out_sharding=where)

        def put(stack, hidden, index):
            return jax.lax.dynamic_update_index_in_dim(stack, hidden, index, axis=0)

        return self.fold(tokens, mask, put, stack)

    def init_cache(self, batch: int, length: int) -> Caches:
        """Empty keys and values for `length` tokens, in the activation dtype."""

        def empty(repeats: int, kind: str) -> Cache:
            head = self.cfg.kind(kind)
            split = "heads" if head.kv_heads % axis_size("heads") == 0 else None
            shape = (repeats, batch, length, head.kv_heads, head.head_dim)
            where = spec(None, *lead(batch), split, None)
            return tuple(jnp.zeros(shape, self.cfg.dtype, out_sharding=where) for _ in range(2))

        groups = repeating(self.cfg.layers)
        return tuple(tuple(empty(n, kind) for kind in pattern) for pattern, n in groups)

    def extend(
        self,
        tokens: Array,  # int [B, T]
        valid: Array,  # bool [B, S], False at padding; all slots of the cache
        caches: Caches,
        position: Array | int,  # slot of the first of the tokens
    ) -> tuple[Array, Caches]:
        """Hidden states after the final norm, [B, T, D], of tokens that follow those cached."""
        context = self._context(valid, position + jnp.arange(tokens.shape[1]))

        def step(x, layer, kind, index, cache):
            del index
            return layer(x, *context[kind], cache, position)

        x, caches = self._scan(step, self.embed(tokens), caches)
        return self.norm(x), caches

    def embed(self, tokens: Array) -> Array:
        """tokens [B, T] -> sqrt(D) embedding, [B, T, D]."""
        # Every shard looks up its part of the width for all rows: the table never moves.
        where = spec(None, None, self.width_axis)
        x = self.embedding[...].at[pin(tokens, None, None)].get(out_sharding=where)
        # It goes from parts of the width to parts of the batch in two steps: XLA has no better way.
        x = pin(pin(x.astype(self.cfg.dtype), None, None, None), *lead(tokens.shape[0]), None)
        # The factor is rounded to the activation dtype, as in the model's training: in bfloat16
        # sqrt(3840) = 61.97 is 62.
        return x * jnp.asarray(math.sqrt(self.cfg.width), x.dtype)

    def logits(self, x: Array) -> Array:
        """Hidden states after the final norm [B, D] -> float32 [B, V], by the tied embedding."""
        # Products of each shard's part of the width are summed: again the table stays.
        x, table = pin(pin(x, None, None), None, self.width_axis), self.embedding[...]
        logits = jnp.einsum(
            "bd,vd->bv",
            x,
            table.astype(x.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=spec(None, None),
        )
        cap = self.cfg.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _context(self, valid: Array, positions: Array) -> dict[str, tuple[Any, Array]]:
        """Rotary tables and mask of each kind of layer; computed once, before layer 0."""
        valid = pin(valid.astype(bool), *lead(valid.shape[0]))
        return {
            name: (
                rope_tables(self.cfg.kind(name), positions),
                attention_mask(valid, positions, self.cfg.kind(name).window),
            )
            for name in sorted(set(self.cfg.layers))
        }

    def _scan(self, step: Callable, carry: Any, caches: Caches | None) -> tuple[Any, Caches]:
        """carry, cache = step(carry, layer, kind, index, cache), for every layer in order."""
        first, kept = 0, []
        for group, cache in zip(self.groups, caches or [None] * len(self.groups), strict=True):
            graphdef, weights = nnx.split(group)
            repeats = jax.tree.leaves(weights)[0].shape[0]
            indices = first + len(group.pattern) * jnp.arange(repeats, dtype=jnp.int32)
            body = partial(_run_pattern, step, graphdef)
            with jax.named_scope("layers"):
                carry, out = streamed.scan(body, carry, (weights, indices, cache))
            kept.append(out)
            first += len(group.pattern) * repeats
        return carry, tuple(kept)


def _run_pattern(step, graphdef, carry, scanned):
    weights, index, caches = scanned
    group = nnx.merge(graphdef, weights)
    out = []
    for i, (layer, kind) in enumerate(zip(group.layers, group.pattern, strict=True)):
        cache = None if caches is None else caches[i]
        carry, cache = step(carry, layer, kind, index + i, cache)
        out.append(cache)
    return carry, tuple(out)
