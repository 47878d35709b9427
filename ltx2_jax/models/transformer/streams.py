"""One stream of the transformer: what it is given, its way in and its way out.

A caller gives a `Modality`. A `Stem` makes of it the tokens for the blocks, and the `Conditioning`
that the blocks read beside them. Dims as in `transformer.py`.
Source: `ltx_core/model/transformer/{model,transformer_args}.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import (
    AdaLayerNormSingle,
    Linear,
    Rngs,
    layer_norm,
    modulate,
    parameter,
)
from ltx2_jax.models.rope import Rope, rope_tables
from ltx2_jax.models.transformer.attention import KeysValues
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.sharding import pin


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "latent",
        "sigma",
        "timesteps",
        "positions",
        "context",
        "context_mask",
        "attention_mask",
        "keyframes_mask",
        "clean",
    ),
    meta_fields=("enabled",),
)
@dataclass(frozen=True)
class Modality:
    """One stream's inputs. `sigma` and `timesteps` are noise levels in [0, 1].

    They differ when some tokens are clean: `timesteps` then holds 0 there, while `sigma` (which
    modulates the prompt and gates the *other* stream's cross-attention) stays the stream's own.
    If tokens are either clean or at one common level, timesteps [B, 1] and `clean` say the same,
    and cost less: the modulation is computed for two levels in place of one per token.
    """

    latent: Array  # [B, T, C]
    sigma: Array  # [B]
    timesteps: Array  # [B, T], or [B, 1] when every token has the same
    positions: Array  # [B or 1, axes, T, 2] bounds: seconds, and pixels for video
    context: Array  # [B, S, E]
    context_mask: Array | None = None  # integer or bool [B, S]: 1 = attend; or additive float bias
    attention_mask: Array | None = None  # [B, T, T] strengths in [0, 1]
    keyframes_mask: Array | None = None  # [B, T]: marked where > 0
    clean: Array | None = None  # [B, T] bool: these have timestep 0, the others timesteps [B, 1]
    enabled: bool = True  # False: the stream stays as it is, only read by the other one


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("video_self", "audio_self", "audio_to_video", "video_to_audio"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Keep:
    """Perturbations of guidance passes: masks of samples and layers, 1 = keep, 0 = skip.

    A mask is [B, L], batch first as all inputs of the model are; a block is given its layer's [B].
    None keeps everything. A skipped self-attention passes its values through; a skipped
    cross-attention adds nothing.
    """

    video_self: Array | None = None  # [B, L]
    audio_self: Array | None = None  # [B, L]
    audio_to_video: Array | None = None  # [B, L]
    video_to_audio: Array | None = None  # [B, L]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("context", "keys_values", "rope", "cross_rope", "self_bias", "context_bias"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Prepared:
    """What the blocks read of one stream that no noise level changes.

    A sampler computes it once, before its loop: `LTX2Transformer.prepare`.
    """

    context: Array  # [B, S, E]
    keys_values: KeysValues | None  # of the text: [L, B, S, N, H], or [B, S, N, H] in a block
    rope: Rope
    cross_rope: Rope | None
    self_bias: Array | None  # [B, 1, T, T]
    context_bias: Array | None  # [B, 1, 1, S]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "prepared",
        "modulation",
        "embedded_timestep",
        "cross_modulation",
        "cross_gate",
        "prompt_modulation",
        "clean",
    ),
    meta_fields=("enabled",),
)
@dataclass(frozen=True)
class Conditioning:
    """What the blocks read of one stream besides its tokens; computed once, before block 0.

    K is the number of noise levels: 1 if all tokens share one, T if each has its own, and 2 if some
    tokens are clean (level 1) and the others share one (level 0).
    """

    prepared: Prepared
    modulation: Array  # [B, K, R, D]
    embedded_timestep: Array  # [B, K, D], for the output head
    cross_modulation: Array | None  # [B, K, 4, D]: scale, shift of a2v, scale, shift of v2a
    cross_gate: Array | None  # [B, 1, 1, D], from the other stream's sigma
    prompt_modulation: Array | None  # [B, 1, 2, E]: shift, scale
    clean: Array | None  # [B, T, 1] bool, if K is 2
    enabled: bool

    def of_tokens(self, x: Array) -> Array:
        """[B, K, D] -> [B, 1 or T, D], which broadcasts over tokens."""
        return x if self.clean is None else jnp.where(self.clean, x[:, 1:2], x[:, 0:1])


PreparedPair = tuple[Prepared | None, Prepared | None]  # of video, of audio


class Stem(nnx.Module):
    """One stream's way in and out: token projection, noise-level embeddings, output head."""

    def __init__(self, cfg: TransformerConfig, stream: str, *, rngs: Rngs):
        is_video = stream == "video"
        width = cfg.width if is_video else cfg.audio_width
        channels = (
            (cfg.in_channels, cfg.out_channels)
            if is_video
            else (cfg.audio_in_channels, cfg.audio_out_channels)
        )
        context_dim = cfg.context_dim if is_video else cfg.audio_context_dim
        self.cfg, self.lead = cfg, ("batch", f"{stream}_tokens")
        self.width, self.heads = width, cfg.num_heads if is_video else cfg.audio_num_heads
        self.max_pos = cfg.max_pos if is_video else cfg.audio_max_pos
        adaln = partial(AdaLayerNormSingle, rngs=rngs)
        self.project_in = Linear(channels[0], width, rngs=rngs)
        self.adaln = adaln(width, cfg.adaln_rows)
        prompt = cfg.modulated_text_attention and cfg.prompt_adaln
        self.prompt_adaln = adaln(context_dim, 2) if prompt else None
        caption = cfg.caption_channels
        self.caption_in = Linear(caption, context_dim, rngs=rngs) if caption else None
        self.caption_out = Linear(context_dim, context_dim, rngs=rngs) if caption else None
        keyframe = cfg.keyframe_embedding and is_video
        self.keyframe = parameter(rngs, (1, width), (None, "fsdp")) if keyframe else None
        self.cross_adaln = adaln(width, 4) if cfg.audio_video_attention else None
        self.cross_gate_adaln = adaln(width, 1) if cfg.audio_video_attention else None
        self.head_table = parameter(rngs, (2, width), (None, "fsdp"), std=0.02)
        self.project_out = Linear(width, channels[1], std=0.0, rngs=rngs)

    def prepare(self, stream: Modality, other: Modality | None) -> Prepared:
        """What follows from the stream's text, positions and masks, without keys and values."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        cross_rope = None
        if other is not None and self.cross_adaln is not None:
            cross_rope = self._rope(
                stream.positions[:, :1],
                cfg.audio_width,
                (max(cfg.max_pos[0], cfg.audio_max_pos[0]),),
            )
        return Prepared(
            context=self._context(stream.context.astype(dtype)),
            keys_values=None,
            rope=self._rope(stream.positions, self.width, self.max_pos),
            cross_rope=cross_rope,
            self_bias=attention_strength_bias(stream.attention_mask),
            context_bias=context_bias(stream.context_mask, dtype),
        )

    def __call__(
        self, stream: Modality, other: Modality | None, prepared: Prepared
    ) -> tuple[Array, Conditioning]:
        """Inputs of one stream -> tokens [B, T, D] and what the blocks read beside them."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        h = self.project_in(stream.latent.astype(dtype), self.lead)
        if self.keyframe is not None and stream.keyframes_mask is not None:
            mark = pin(self.keyframe[...].astype(dtype), None, None)
            h = h + jnp.where(stream.keyframes_mask[..., None] > 0, mark, 0)
        # One sigma for all tokens makes one AdaLN vector, which is broadcast, not one per token.
        once, timesteps = ("batch", None), stream.timesteps
        lead = self.lead if timesteps.shape[1] > 1 else once
        if stream.clean is not None:
            timesteps = jnp.concatenate([timesteps, jnp.zeros_like(timesteps)], axis=1)
        modulation, embedded = self.adaln(timesteps * cfg.timestep_scale, dtype, lead)
        prompt = cross = gate = None
        if self.prompt_adaln is not None:
            prompt, _ = self.prompt_adaln(stream.sigma[:, None] * cfg.timestep_scale, dtype, once)
        if other is not None and self.cross_adaln is not None:
            cross, _ = self.cross_adaln(timesteps * cfg.timestep_scale, dtype, lead)
            other_sigma = other.sigma[:, None] * cfg.cross_gate_timestep_scale
            gate, _ = self.cross_gate_adaln(other_sigma, dtype, once)
        return h, Conditioning(
            prepared=prepared,
            modulation=modulation,
            embedded_timestep=embedded,
            cross_modulation=cross,
            cross_gate=gate,
            prompt_modulation=prompt,
            clean=None if stream.clean is None else stream.clean[..., None],
            enabled=stream.enabled,
        )

    def head(self, x: Array, cond: Conditioning) -> Array:
        """Tokens [B, T, D] -> velocity [B, T, C]."""
        table = pin(self.head_table[...].astype(x.dtype), None, None)
        shift, scale = (cond.of_tokens(row + cond.embedded_timestep) for row in table)
        return self.project_out(modulate(layer_norm(x, self.cfg.norm_eps), scale, shift), self.lead)

    def _context(self, context: Array) -> Array:
        """[B, S, caption channels] -> [B, S, E] where the model projects its text (2.0)."""
        if self.caption_in is None:
            return context
        lead = ("batch", "text_tokens")
        return self.caption_out(jax.nn.gelu(self.caption_in(context, lead), approximate=True), lead)

    def _rope(self, positions: Array, width: int, max_pos: tuple[float, ...]) -> Rope:
        """Tables of positions [B or 1, axes, T, 2], for heads that share `width`."""
        cos, sin = rope_tables(
            positions,
            heads=self.heads,
            width=width,
            max_pos=max_pos,
            theta=self.cfg.rope_theta,
            precision=self.cfg.rope_precision,
            tokens=self.lead[1],
        )
        # Every block reads them, in the dtype that it rotates in: see `apply_rope`.
        return cos.astype(self.cfg.dtype), sin.astype(self.cfg.dtype)


def context_bias(mask: Array | None, dtype: Any) -> Array | None:
    """Additive bias [B, 1, 1, S] of an integer or bool mask [B, S]; a float mask is a bias."""
    if mask is None or jnp.issubdtype(mask.dtype, jnp.floating):
        return mask
    return ((mask.astype(jnp.float32) - 1) * float(jnp.finfo(dtype).max))[:, None, None, :]


def attention_strength_bias(mask: Array | None) -> Array | None:
    """Additive float32 bias [B, 1, T, T] of strengths [B, T, T] in [0, 1]: log, and -max for 0."""
    if mask is None:
        return None
    info, mask = jnp.finfo(jnp.float32), mask.astype(jnp.float32)
    bias = jnp.where(mask > 0, jnp.log(jnp.maximum(mask, info.tiny)), info.min)
    return bias[:, None]
