"""Captions to context: a trainable embedding, where text features enter the model.

The transformer takes context for video [B, S, Dv] and for audio [B, S, Da] and a mask [B, S].
This module makes them from token ids; a pretrained text encoder makes the same three from its
features.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import Linear, parameter
from ltx2_jax.models.transformer import TransformerConfig
from ltx2_jax.sharding import pin, spec


@dataclass(frozen=True)
class TextConfig:
    length: int = 32  # tokens per caption, left padded
    vocab_size: int = 512  # at most; small caption sets give fewer
    width: int = 64  # of the embedding


class CaptionEmbedding(nnx.Module):
    """Token and position embeddings, projected to the context width of each stream."""

    def __init__(self, cfg: TextConfig, model: TransformerConfig, *, rngs: nnx.Rngs):
        caption = model.caption_channels
        self.dtype = model.dtype
        self.tokens = parameter(rngs, (cfg.vocab_size, cfg.width), (None, "fsdp"), std=1.0)
        self.positions = parameter(rngs, (cfg.length, cfg.width), (None, "fsdp"), std=1.0)
        self.to_video = Linear(cfg.width, caption or model.context_dim, rngs=rngs)
        self.to_audio = Linear(cfg.width, caption or model.audio_context_dim, rngs=rngs)

    def __call__(self, tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
        """ids, mask [B, S] -> context of video [B, S, Dv], of audio [B, S, Da], and the mask."""
        lead = ("batch", "text_tokens")
        table, positions = pin(self.tokens[...], None, None), pin(self.positions[...], None, None)
        x = table.at[tokens].get(out_sharding=spec(*lead, None)) + positions
        x = x.astype(jnp.dtype(self.dtype))
        return self.to_video(x, lead), self.to_audio(x, lead), mask
