"""Duration head: how many seconds the shot that a prompt describes would take.

Learned queries (one or more) attend to all tokens of the text contexts; a small network turns what
they gather into the logarithm of a duration. The contexts need no mask: their connectors put
learned registers in the place of padding.

`ltx2_jax.diffusion.geometry.seconds_to_frames` turns the seconds into a legal number of frames.

Dims: B batch, S and S' tokens of the video and the audio context, D width, Q queries.
Source: `ltx_core/duration_head/duration_head.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs


@dataclass(frozen=True)
class DurationHeadConfig:
    """Hyper-parameters, with the official defaults."""

    video_context_dim: int = 4096
    audio_context_dim: int = 2048
    width: int = 256
    num_queries: int = 1
    num_heads: int = 4
    mlp_width: int = 256

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"duration_head pooler_hidden_dim={self.width}: not a multiple of"
                f" num_pooler_heads={self.num_heads}"
            )


class ContextIn(nnx.Module):
    """One context projected to the common width and marked by its modality."""

    def __init__(self, n_in: int, width: int, *, rngs: Rngs):
        self.project = nnx.Linear(n_in, width, rngs=rngs)
        self.modality = nnx.Param(jnp.zeros(width))

    def __call__(self, tokens: Array) -> Array:
        return self.project(tokens) + self.modality[...]


class DurationHead(nnx.Module):
    """Text contexts -> seconds. It is small: all of it is float32."""

    def __init__(self, config: DurationHeadConfig, *, rngs: Rngs):
        self.config = config
        width = config.width
        self.video = ContextIn(config.video_context_dim, width, rngs=rngs)
        self.audio = ContextIn(config.audio_context_dim, width, rngs=rngs)
        self.queries = nnx.Param(jnp.zeros((config.num_queries, width)))
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_in = nnx.Linear(config.num_queries * width, config.mlp_width, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_width, 1, rngs=rngs)

    def __call__(self, video: Array | None = None, audio: Array | None = None) -> Array:
        """Seconds [B] from the video context [B, S, ...], the audio context [B, S', ...], or both.

        Raises:
            UserError: neither is given.
        """
        given = [
            embed(tokens.astype(jnp.float32))
            for embed, tokens in ((self.video, video), (self.audio, audio))
            if tokens is not None
        ]
        if not given:
            raise UserError("the duration head needs a video or an audio context")
        pooled = self._pool(jnp.concatenate(given, axis=1))  # [B, Q * D]
        hidden = jax.nn.gelu(self.mlp_in(pooled), approximate=True)
        return jnp.exp(self.mlp_out(hidden)[:, 0])

    def _pool(self, tokens: Array) -> Array:
        """tokens [B, S, D] -> what every query gathers, [B, Q * D]."""
        B, S, D = tokens.shape
        heads = self.config.num_heads
        Q = self.config.num_queries
        # One stored matrix serves queries, keys and values; each needs a third of it.
        w_q, w_k, w_v = jnp.split(self.qkv.kernel[...], 3, axis=1)
        b_q, b_k, b_v = jnp.split(self.qkv.bias[...], 3)
        q = (self.queries[...] @ w_q + b_q).reshape(1, Q, heads, D // heads)
        k = (tokens @ w_k + b_k).reshape(B, S, heads, D // heads)
        v = (tokens @ w_v + b_v).reshape(B, S, heads, D // heads)
        pooled = jax.nn.dot_product_attention(jnp.broadcast_to(q, (B, *q.shape[1:])), k, v)
        return self.attention_out(pooled.reshape(B, Q, D)).reshape(B, Q * D)
