"""Text generation with a Gemma decoder: one jitted loop with a key-value cache.

Prompt enhancement uses it. Source: `ltx_core/text_encoders/gemma/encoders/base_encoder.py`, and
Hugging Face's `generate`, whose order of steps this keeps: ban, temperature, top k, draw.

Dims: B batch, P prompt, C prompt and new tokens, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.sharding import pin


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens, and when to stop.

    Raises:
      UserError: a value out of range.
    """

    max_new_tokens: int
    eos: tuple[int, ...] = (1,)  # tokens that end a row; they are part of the result
    temperature: float = 0.0  # 0 takes the likeliest token, else draw from softmax(logits / it)
    top_k: int = 0  # draw from so many likeliest tokens only; 0 is all
    no_repeat_ngram: int = 0  # n > 0: never the same n tokens in a row twice, prompt included
    pad: int = 0  # fills a row after its end token

    def __post_init__(self):
        for name, least in (
            ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("no_repeat_ngram", 0)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")


# The official prompt enhancement. Its top k is the default of Hugging Face's sampling.
GEMMA_3_ENHANCEMENT = Decoding(max_new_tokens=512, temperature=0.7, top_k=50)
GEMMA_4_ENHANCEMENT = Decoding(max_new_tokens=600, no_repeat_ngram=5)


def generate(
    model: Gemma,
    tokens: np.ndarray | Array,  # int [B, P]
    mask: np.ndarray | Array,  # [B, P], False or 0 at padding, which is on the left
    how: Decoding,
    key: Array | None = None,  # for drawing
) -> Array:
    """Continue every prompt until it ends or has `max_new_tokens`; int32 [B, max_new_tokens].

    Runs under the mesh in context, which must be the one that the model was built for.

    Raises:
      UserError: a temperature without a key, a prompt that is empty or not padded on the left.
    """
    if how.temperature > 0 and key is None:
        raise UserError(f"temperature={how.temperature} draws tokens: give a key")
    real = np.asarray(mask).astype(bool)
    if not real[:, -1:].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise UserError("mask: prompts must have at least one token and be padded on the left")
    graphdef, params = nnx.split(model)
    tokens = jnp.asarray(tokens, jnp.int32)
    return _generate(graphdef, params, tokens, jnp.asarray(real), key, how=how)


@partial(jax.jit, static_argnames=("graphdef", "how"))
def _generate(
    graphdef: Any, params: Any, tokens: Array, mask: Array, key: Array | None, *, how: Decoding
) -> Array:
    model = nnx.merge(graphdef, params)
    # Token ids are few: whole on every shard, so that no step of the loop moves them.
    tokens, mask = pin(tokens, None, None), pin(mask, None, None)
    batch, prompt = tokens.shape
    new = ((0, 0), (0, how.max_new_tokens))
    written = jnp.pad(tokens, new, constant_values=how.pad)
    valid = jnp.pad(mask, new, constant_values=True)

    def choose(hidden, written, done, count):
        """Write token `count` of every row, given the last hidden state before it."""
        logits, position = model.logits(hidden[:, -1]), prompt + count
        if how.no_repeat_ngram:
            banned = repeated(written, valid, position, how.no_repeat_ngram, logits.shape[1])
            logits = jnp.where(banned, -jnp.inf, logits)
        if how.temperature > 0:
            token = draw(jax.random.fold_in(key, count), logits, how.temperature, how.top_k)
        else:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token = jnp.where(done, how.pad, token)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], position, axis=1)
        return written, done | jnp.isin(token, jnp.asarray(how.eos, jnp.int32))

    def body(state):
        count, written, done, caches = state
        last = jax.lax.dynamic_slice_in_dim(written, prompt + count - 1, 1, axis=1)
        hidden, caches = model.extend(last, valid, caches, prompt + count - 1)
        return count + 1, *choose(hidden, written, done, count), caches

    def unfinished(state):
        count, _, done, _ = state
        return (count < how.max_new_tokens) & ~done.all()

    caches = model.init_cache(batch, prompt + how.max_new_tokens)
    hidden, caches = model.extend(tokens, valid, caches, 0)
    written, done = choose(hidden, written, jnp.zeros(batch, bool), 0)
    state = jax.lax.while_loop(unfinished, body, (jnp.int32(1), written, done, caches))
    return state[1][:, prompt:]


def draw(key: Array, logits: Array, temperature: float, top_k: int = 0) -> Array:
    """One token a row, int32 [B], from softmax(logits [B, V] / temperature) of the top k."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        weakest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < weakest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def repeated(
    written: Array,  # int [B, C]
    valid: Array,  # bool [B, C], False at the padding on the left
    position: Array | int,  # the slot to be written next
    n: int,
    vocab: int,
) -> Array:
    """Tokens that would complete an n-gram which the row already has before `position`, [B, V]."""
    batch, length = written.shape
    if length < n:
        return jnp.zeros((batch, vocab), bool)
    first = jnp.argmax(valid, axis=1)[:, None]  # slot of the first real token
    last = jax.lax.dynamic_slice_in_dim(written, position - (n - 1), n - 1, axis=1)
    starts = jnp.arange(length - n + 1)[None]
    same = (starts >= first) & (starts + n - 1 < position) & (position - (n - 1) >= first)
    for i in range(n - 1):
        same &= written[:, i : length - n + 1 + i] == last[:, i : i + 1]
    rows = jnp.arange(batch)[:, None]
    return jnp.zeros((batch, vocab), bool).at[rows, written[:, n - 1 :]].max(same)
