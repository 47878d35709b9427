"""Text features to the context that the transformer attends to: one connector for each stream.

A connector is a small bidirectional transformer over the whole padded length. Valid tokens come
first; the slots behind them hold learnable registers ("thinking tokens"), so that every slot counts
and the transformer needs no text mask. It runs in every training step, on stored features, frozen.
Source: paper section 3; `ltx_core/text_encoders/gemma/embeddings_{connector,processor}.py`.

Dims: B batch, S text tokens, D width of a connector, R registers.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import FeedForward, Rngs, parameter, rms_norm
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.rope import Rope, rope_tables
from ltx2_jax.models.transformer.attention import Attention
from ltx2_jax.sharding import axis_size, on_shards, pin

TOKENS = "text_tokens"
LEAD = ("batch", TOKENS)
EPS = 1e-6
THETA = 10000.0  # whatever the transformer's config says
FF_MULT = 4


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes and wiring of one connector; the defaults are LTX-2 2.0."""

    num_layers: int = 2
    num_heads: int = 30
    head_dim: int = 128
    gated_attention: bool = False  # a sigmoid gate per head (2.3)
    ff_bias: bool = True
    max_pos: float = 4096.0  # the slot that maps to fraction 1
    rope_type: str = "split"  # or "interleaved"
    rope_precision: str = "float64"
    registers: int = 128  # slot j, if padding, holds register j mod R; 0: padding is masked out
    dtype: str = "bfloat16"  # of activations; weights are cast to it where they are used

    def __post_init__(self):
        choices = {
            "rope_type": ("split", "interleaved"),
            "rope_precision": ("float64", "float32"),
            "dtype": ("bfloat16", "float32"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


CONNECTOR_2_0 = ConnectorConfig()
VIDEO_CONNECTOR_2_3 = ConnectorConfig(num_layers=8, num_heads=32, gated_attention=True)
AUDIO_CONNECTOR_2_3 = dataclasses.replace(VIDEO_CONNECTOR_2_3, head_dim=64)


class ConnectorBlock(nnx.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x)), norms without weights."""

    def __init__(self, cfg: ConnectorConfig, *, rngs: Rngs):
        self.attention = Attention(
            cfg.width,
            cfg.width,
            (cfg.num_heads, cfg.head_dim),
            tokens=(TOKENS, TOKENS),
            eps=EPS,
            gated=cfg.gated_attention,
            interleaved_rope=cfg.rope_type == "interleaved",
            axis=_head_axis(cfg),
            rngs=rngs,
        )
        self.mlp = FeedForward(cfg.width, FF_MULT, bias=cfg.ff_bias, rngs=rngs)

    def __call__(self, x: Array, rope: Rope, bias: Array | None) -> Array:  # [B, S, D] -> same
        x = x + self.attention(rms_norm(x, EPS), rope=rope, bias=bias)
        return x + self.mlp(rms_norm(x, EPS), LEAD)


class Connector(nnx.Module):
    """Features of one stream, valid tokens first, to its context."""

    def __init__(self, cfg: ConnectorConfig, *, rngs: Rngs):
        self.cfg = cfg
        shape, axes = (cfg.registers, cfg.width), (None, "fsdp")
        self.registers = parameter(rngs, shape, axes, std=0.5) if cfg.registers else None
        # Stacked from birth: every leaf of `blocks` has a leading layer axis.
        self.blocks = jax.vmap(lambda r: ConnectorBlock(cfg, rngs=r))(rngs.split(cfg.num_layers))

    def __call__(self, features: Array, mask: Array) -> Array:
        """features [B, S, D], mask bool [B, S] with all valid tokens first -> context [B, S, D].

        Without registers, padded slots are no keys of the attention and end as zeros.
        """
        cfg, length = self.cfg, features.shape[1]
        x, bias = pin(features.astype(jnp.dtype(cfg.dtype)), *LEAD, None), None
        if self.registers is not None:
            slots = pin(self.registers[...].astype(x.dtype), None, None)
            x = jnp.where(mask[..., None], x, jnp.resize(slots, (length, cfg.width)))
        else:
            bias = jnp.where(mask, 0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        rope = rope_tables(
            jnp.arange(length)[None, None],
            heads=cfg.num_heads,
            width=cfg.width,
            max_pos=(cfg.max_pos,),
            theta=THETA,
            precision=cfg.rope_precision,
            tokens=TOKENS,
            axis=_head_axis(cfg),
        )
        graphdef, state = nnx.split(self.blocks)

        def body(x, weights):
            return nnx.merge(graphdef, weights)(x, rope, bias), None

        # Without it, compiled, the eight layers of 2.3 keep 10 GiB of a chip for the backward pass.
        body = jax.checkpoint(body, policy=REMAT_POLICIES["attention"], prevent_cse=False)
        x = rms_norm(jax.lax.scan(body, x, state)[0], EPS)
        return x if bias is None else jnp.where(mask[..., None], x, 0)


class Connectors(nnx.Module):
    """Both connectors, side by side."""

    def __init__(self, video: ConnectorConfig, audio: ConnectorConfig, *, rngs: Rngs):
        if bool(video.registers) != bool(audio.registers):
            raise ValueError("either both connectors have registers or none: they share one mask")
        self.video = Connector(video, rngs=rngs)
        self.audio = Connector(audio, rngs=rngs)

    def __call__(
        self,
        video: Array,  # [B, S, Dv] features
        audio: Array,  # [B, S, Da]
        mask: Array,  # [B, S]; 0 for padding, wherever it stands
    ) -> tuple[Array, Array, Array | None]:
        """Context of video [B, S, Dv] and of audio [B, S, Da], and the mask of its valid slots.

        Valid tokens move to the front in their order. With registers every slot counts and the mask
        is None. Without, it is the bool [B, S] mask of the moved tokens: give it to the transformer
        as `context_mask`, or its text attention would read the zeros behind them.
        """
        order, mask = valid_first(mask)
        video = self.video(_reorder(video, order), mask)
        audio = self.audio(_reorder(audio, order), mask)
        return video, audio, None if self.video.registers is not None else mask


def _head_axis(cfg: ConnectorConfig) -> str | None:
    """The logical axis of the heads. A model axis of 4 does not divide the 30 of the 2.0 model."""
    return "heads" if cfg.num_heads % axis_size("heads") == 0 else None


def valid_first(mask: Array) -> tuple[Array, Array]:
    """mask [B, S] -> where each slot's token comes from, int32 [B, S], and the bool mask after."""
    mask = mask > 0
    order = jnp.argsort(~mask, axis=1, stable=True)
    count = jnp.sum(mask, axis=1, keepdims=True)
    return order, jnp.arange(mask.shape[1]) < count


def _reorder(x: Array, order: Array) -> Array:  # [B, S, D], [B, S] -> [B, S, D]
    return on_shards(_reorder_rows, [(*LEAD, None), LEAD], (*LEAD, None))(
        pin(x, *LEAD, None), pin(order, *LEAD)
    )


def _reorder_rows(x: Array, order: Array) -> Array:  # as `_reorder`, of the rows of one device
    return x[jnp.arange(x.shape[0])[:, None], order]
