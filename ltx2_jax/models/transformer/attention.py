"""Attention: `attend()` on split heads, and the module around it that LTX-2 uses everywhere.

Dims as in `transformer.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models.layers import Linear, Rngs, parameter, rms_norm
from ltx2_jax.models.remat import ATTENTION, PROJECTION
from ltx2_jax.models.rope import Rope, apply_rope
from ltx2_jax.models.transformer import attention_kernels, sequence_parallel
from ltx2_jax.sharding import axis_size, pin, target

KeysValues = tuple[Array, Array]  # [B, Tk, N, H] twice


def attend(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    bias: Array | None = None,  # additive, broadcastable to [B, N, Tq, Tk]
    *,
    queries: str,  # logical name of the Tq axis
    keys: str,  # logical name of the Tk axis
    heads: str | None = "heads",  # of the N axis
    backend: str = "auto",  # or one of `attention_kernels.BACKENDS`, to debug it
) -> Array:  # [B, Tq, N, H]
    """softmax(q k^T / sqrt(H) + bias) v, softmax in float32.

    Which kernel computes it follows from the device that the program is compiled for and from what
    one device has of it (`attention_kernels.choose`); how it is parallel, from the two token axes
    (`sequence_parallel`). The result is saved by name for rematerialisation.
    """
    device = target()
    how = sequence_parallel.plan(q.shape[2], queries, keys, heads, device)
    q, k, v = pin(q, *how.q), pin(k, *how.k), pin(v, *how.k)
    # What one device has of them, after tokens were traded for heads.
    rows = q.shape[1] // axis_size(queries) * how.group
    columns = k.shape[1] // axis_size(keys) * how.group
    backend = attention_kernels.choose(
        backend, device, rows, columns, q.shape[3], q.dtype, biased=bias is not None
    )
    if backend == "splash":
        return sequence_parallel.splash(q, k, v, how)
    out = sequence_parallel.attend(q, k, v, bias, backend, how)
    # cuDNN's output is saved together with its statistics: see REMAT_POLICIES.
    return out if backend == "cudnn" else checkpoint_name(out, ATTENTION)


class Attention(nnx.Module):
    """Self- or cross-attention with q/k RMSNorm over the whole inner width and optional head gates.

    Queries come from x [B, Tq, query_dim]; keys and values from context [B, Tk, context_dim] or x
    itself. Source: `ltx_core/model/transformer/attention.py`.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: tuple[int, int],  # number, width
        *,
        tokens: tuple[str, str],  # logical names of the query and key token axes
        eps: float,
        gated: bool,
        interleaved_rope: bool = False,
        axis: str | None = "heads",  # logical name of the heads; None: every shard has them all
        backend: str = "auto",
        rngs: Rngs,
    ):
        inner = heads[0] * heads[1]
        self.heads, self.tokens, self.eps = heads[0], tokens, eps
        self.interleaved_rope = interleaved_rope
        self.axis, self.backend = axis, backend
        self.to_q = Linear(query_dim, inner, axes=("fsdp", axis), rngs=rngs)
        self.to_k = Linear(context_dim, inner, axes=("fsdp", axis), rngs=rngs)
        self.to_v = Linear(context_dim, inner, axes=("fsdp", axis), rngs=rngs)
        self.to_out = Linear(inner, query_dim, axes=(axis, "fsdp"), rngs=rngs)
        self.q_norm = parameter(rngs, (inner,), (axis,), mean=1.0)
        self.k_norm = parameter(rngs, (inner,), (axis,), mean=1.0)
        # Zero weights make every gate 2 sigmoid(0) = 1 at the start.
        gate = partial(Linear, axes=("fsdp", axis), std=0.0, rngs=rngs)
        self.to_gate = gate(query_dim, heads[0]) if gated else None

    def __call__(
        self,
        x: Array,  # [B, Tq, query_dim]
        context: Array | None = None,  # [B, Tk, context_dim]
        *,
        keys_values: KeysValues | None = None,  # those of the context, if they are known already
        rope: Rope | None = None,  # of the queries
        context_rope: Rope | None = None,  # of the keys; defaults to `rope`
        bias: Array | None = None,  # additive, broadcastable to [B, N, Tq, Tk]
        keep: Array | None = None,  # [B]; 0 replaces attention by its own value projection
    ) -> Array:  # [B, Tq, query_dim]
        lead = ("batch", self.tokens[0])
        q = checkpoint_name(self.to_q(x, lead), PROJECTION)
        q = self._split(rms_norm(q, self.eps, self.q_norm[...]))
        if rope is not None:
            q = apply_rope(q, rope, interleaved=self.interleaved_rope)
        if keys_values is None:
            keys_values = self.keys_values(x if context is None else context, context_rope or rope)
        (k, v), (queries, keys) = keys_values, self.tokens
        out = attend(
            q, k, v, bias, queries=queries, keys=keys, heads=self.axis, backend=self.backend
        )
        if keep is not None:
            out = jnp.where(keep[:, None, None, None] > 0, out, v)
        if self.to_gate is not None:
            out = out * (2 * jax.nn.sigmoid(self.to_gate(x, lead)))[..., None]
        return self.to_out(out.reshape(*out.shape[:2], -1), lead)

    def keys_values(
        self,
        context: Array,  # [B, Tk, context_dim]
        rope: Rope | None = None,
    ) -> KeysValues:
        """What queries are compared with, and what they gather."""
        lead = ("batch", self.tokens[1])
        k = checkpoint_name(self.to_k(context, lead), PROJECTION)
        v = checkpoint_name(self.to_v(context, lead), PROJECTION)
        k = self._split(rms_norm(k, self.eps, self.k_norm[...]))
        if rope is not None:
            k = apply_rope(k, rope, interleaved=self.interleaved_rope)
        return k, self._split(v)

    def _split(self, x: Array) -> Array:  # [B, T, N * H] -> [B, T, N, H]
        return x.reshape(*x.shape[:2], self.heads, -1)
