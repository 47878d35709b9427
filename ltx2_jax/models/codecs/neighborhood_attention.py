"""Neighbourhood attention: every cell of a video volume attends to the box of cells around it.

A box of 11 x 11 x 11 has 1331 keys. Visiting them one offset after another (shift, multiply, online
softmax) would leave the matrix unit idle: for the released decoder at 121 frames of 1280 x 704 (6.8
million cells, 256 channels, 8 blocks) it would take 7e13 vector FLOPs and 1331 passes over keys and
values. Instead a block of 4 x 8 x 8 = 256 queries meets the
14 x 18 x 18 = 4536 keys that any of them can see in two dense products with a mask: 3.4 times the
FLOPs (2.5e14), but on the matrix unit, and a key is read 18 times from memory, not 1331 times.
Smaller blocks waste fewer FLOPs but leave rows of the unit empty and read keys more often; with
larger ones the logits (19 MB for four heads) no longer stay in a TPU's VMEM between the products.

Blocks are visited by a loop that slices and updates in place, so memory beyond q, k, v and the
output is one block's logits: 4 * heads * 256 * 4536 bytes here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = (4, 8, 8)  # queries along time, height, width, but not many more than the box is long
SHORTEST = 4
MASKED = -1e30


def neighborhood_attention(
    q: Array,  # [B, T, H, W, N, D], already scaled
    k: Array,  # [B, T, H, W, N, D]
    v: Array,  # [B, T, H, W, N, D]
    kernel: Sequence[int],  # size of the box along T, H, W
) -> Array:  # [B, T, H, W, N, D]
    """softmax(q k^T) v over the box of `kernel` cells around each query, softmax in float32.

    The box is centred (an even one reaches further back) and, near a border, shifted inwards until
    it lies inside: it always has kernel[0] * kernel[1] * kernel[2] keys. These are the semantics of
    NATTEN's `na3d`. Source: `ltx_core/model/video_vae/transformer/attention.py`.

    Raises:
      ValueError: the volume is smaller than the kernel.
    """
    batch, *size, heads, width = q.shape
    size, box = np.array(size), np.array(kernel)
    if (size < box).any():
        raise ValueError(f"a volume of {size} cells is smaller than the kernel {box}")
    block = np.minimum(np.minimum(BLOCK, np.maximum(box, SHORTEST)), size)
    span = np.minimum(block + box - 1, size)  # the keys that a block can see
    counts = -(-size // block)

    # Heads are an axis of a block only: a TPU would pad their 64 features to 128 in memory.
    q, k, v = (x.reshape(batch, *size, heads * width) for x in (q, k, v))

    def cut(x: Array, corner: Array, shape: np.ndarray) -> Array:
        x = jax.lax.dynamic_slice(x, (0, *corner, 0), (batch, *shape, heads * width))
        return x.reshape(batch, -1, heads, width)

    def visit(index: Array, out: Array) -> Array:
        place = jnp.stack(jnp.unravel_index(index, tuple(counts)))
        # The last block of an axis is moved back inside and computes some cells a second time.
        first = jnp.minimum(place * block, size - block)
        seen = jnp.clip(first - box // 2, 0, size - span)
        time, rows, columns = (
            _bias(first[a] + jnp.arange(block[a]), seen[a] + jnp.arange(span[a]), size[a], box[a])
            for a in range(3)
        )
        bias = (
            time[:, None, None, :, None, None]
            + rows[:, None, None, :, None]
            + columns[:, None, None, :]
        )  # of queries [t, h, w] and keys [t, h, w]
        bias = bias.reshape(block.prod(), span.prod())
        y = _attend(cut(q, first, block), cut(k, seen, span), cut(v, seen, span), bias)
        y = y.reshape(batch, *block, heads * width)
        return jax.lax.dynamic_update_slice(out, y, (0, *first, 0))

    out = jax.lax.fori_loop(0, int(counts.prod()), visit, jnp.zeros_like(v))
    return out.reshape(batch, *size, heads, width)


def _bias(queries: Array, keys: Array, size: int, box: int) -> Array:
    """0 where a key is in the box of a query along one axis, else `MASKED`: [queries, keys]."""
    start = jnp.clip(queries - box // 2, 0, size - box)[:, None]
    return jnp.where((keys >= start) & (keys < start + box), 0.0, MASKED)


def _attend(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Dense attention [B, Q, N, D] x [B, K, N, D] -> [B, Q, N, D] with a bias [Q, K]."""
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(v.dtype)
    # A column of ones gives the denominators with the matrix product: one pass less over the
    # weights, which are the largest arrays here.
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=jnp.float32)
    return (out[..., :-1] / out[..., -1:]).astype(v.dtype)
