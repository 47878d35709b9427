"""The LTX-2 diffusion transformer: a video stream and an audio stream that look at each other.

Every block runs, in this order, the video line above the audio line:

    1. self-attention, 3-D RoPE for video, 1-D for audio
    2. cross-attention to the text
    3. audio -> video and video -> audio cross-attention on the shared clock (temporal RoPE),
       both reading the state from before this step
    4. feed-forward

All of it is modulated by AdaLN vectors of the noise level (adaLN-single: one MLP outside, one small
table in each block). The released 2.0, 2.3 and 2.5 models are values of `TransformerConfig`.
Source: paper section 3; `ltx_core/model/transformer/{model,transformer,transformer_args}.py`.

Dims: B batch, T video tokens, A audio tokens, S text tokens, D width, N heads, H head width,
F mlp, L layers, R AdaLN rows, C latent channels. Axes broadcast over tokens have size 1.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models.attention import Attention
from ltx2_jax.models.attention_kernels import BACKENDS
from ltx2_jax.models.layers import (
    AdaLayerNormSingle,
    FeedForward,
    Linear,
    layer_norm,
    modulate,
    parameter,
    rms_norm,
)
from ltx2_jax.models.remat import BLOCK_INPUT, REMAT_POLICIES
from ltx2_jax.models.rope import Rope, rope_tables
from ltx2_jax.sharding import pin


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and wiring of one model; the defaults are LTX-2 2.0 (19B)."""

    num_layers: int = 48
    num_heads: int = 32
    head_dim: int = 128
    audio_num_heads: int = 32
    audio_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    context_dim: int = 4096  # text width that video attends to
    audio_context_dim: int = 2048  # text width that audio attends to
    caption_channels: int | None = 3840  # text is projected from this width inside (2.0), or None
    gated_attention: bool = False  # a sigmoid gate per head (2.3)
    modulated_text_attention: bool = False  # AdaLN around the text attention (2.3)
    prompt_adaln: bool = False  # text keys and values modulated by sigma as well (2.3)
    ff_bias: bool = True
    audio_ff_bias: bool = True
    keyframe_embedding: bool = False  # a learned mark on given or generated keyframes (2.5)
    audio_video_attention: bool = True  # off only to ablate it
    ff_mult: int = 4
    norm_eps: float = 1e-6
    timestep_scale: float = 1000.0
    cross_gate_timestep_scale: float = 1000.0
    rope_theta: float = 10000.0
    max_pos: tuple[float, float, float] = (20.0, 2048.0, 2048.0)  # seconds, pixels, pixels
    audio_max_pos: tuple[float] = (20.0,)  # seconds
    rope_type: str = "split"  # or "interleaved"
    rope_precision: str = "float64"
    dtype: str = "bfloat16"  # of activations; weights are cast to it where they are used
    remat: str = "attention"  # a key of REMAT_POLICIES
    attention: str = "auto"  # the backend, to debug one: see attention_kernels.py

    def __post_init__(self):
        choices = {
            "remat": tuple(REMAT_POLICIES),
            "attention": BACKENDS,
            "rope_type": ("split", "interleaved"),
            "rope_precision": ("float64", "float32"),
            "dtype": ("bfloat16", "float32"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        if self.audio_num_heads != self.num_heads:
            raise ValueError(
                f"audio_num_heads={self.audio_num_heads} must equal num_heads={self.num_heads}: "
                "the streams exchange keys head by head"
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def audio_width(self) -> int:
        return self.audio_num_heads * self.audio_head_dim

    @property
    def adaln_rows(self) -> int:
        return 9 if self.modulated_text_attention else 6


LTX2_19B = TransformerConfig()
LTX2_3_22B = dataclasses.replace(
    LTX2_19B,
    caption_channels=None,
    gated_attention=True,
    modulated_text_attention=True,
    prompt_adaln=True,
)
LTX2_5_22B = dataclasses.replace(LTX2_3_22B, ff_bias=False, keyframe_embedding=True)
PRESETS = {"2.0": LTX2_19B, "2.3": LTX2_3_22B, "2.5": LTX2_5_22B}


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
    ),
    meta_fields=("enabled",),
)
@dataclass(frozen=True)
class Modality:
    """One stream's inputs. `sigma` and `timesteps` are noise levels in [0, 1].

    They differ when some tokens are clean: `timesteps` then holds 0 there, while `sigma` (which
    modulates the prompt and gates the *other* stream's cross-attention) stays the stream's own.
    """

    latent: Array  # [B, T, C]
    sigma: Array  # [B]
    timesteps: Array  # [B, T], or [B, 1] when every token has the same
    positions: Array  # [B or 1, axes, T, 2] bounds: seconds, and pixels for video
    context: Array  # [B, S, text width]
    context_mask: Array | None = None  # integer or bool [B, S]: 1 = attend; or additive float bias
    attention_mask: Array | None = None  # [B, T, T] strengths in [0, 1]
    keyframes_mask: Array | None = None  # [B, T]: marked where > 0
    enabled: bool = True  # False: the stream stays as it is, only read by the other one


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("video_self", "audio_self", "audio_to_video", "video_to_audio"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Keep:
    """Perturbations of guidance passes: [L, B] masks, 1 = keep, 0 = skip, None = keep everywhere.

    A skipped self-attention passes its values through; a skipped cross-attention adds nothing.
    """

    video_self: Array | None = None
    audio_self: Array | None = None
    audio_to_video: Array | None = None
    video_to_audio: Array | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "context",
        "modulation",
        "embedded_timestep",
        "cross_modulation",
        "cross_gate",
        "prompt_modulation",
        "rope",
        "cross_rope",
        "self_bias",
        "context_bias",
    ),
    meta_fields=("enabled",),
)
@dataclass(frozen=True)
class Conditioning:
    """What the blocks read of one stream besides its tokens; computed once, before block 0."""

    context: Array  # [B, S, text width]
    modulation: Array  # [B, T or 1, R, D]
    embedded_timestep: Array  # [B, T or 1, D], for the output head
    cross_modulation: Array | None  # [B, T or 1, 4, D]: scale, shift of a2v, scale, shift of v2a
    cross_gate: Array | None  # [B, 1, 1, D], from the other stream's sigma
    prompt_modulation: Array | None  # [B, 1, 2, text width]: shift, scale
    rope: Rope
    cross_rope: Rope | None
    self_bias: Array | None  # [B, 1, T, T]
    context_bias: Array | None  # [B, 1, 1, S]
    enabled: bool


class Block(nnx.Module):
    """One dual-stream block; see the module docstring for its four steps."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        video, audio, text = "video_tokens", "audio_tokens", "text_tokens"
        dv, da, rows = cfg.width, cfg.audio_width, cfg.adaln_rows
        head, audio_head = (cfg.num_heads, cfg.head_dim), (cfg.audio_num_heads, cfg.audio_head_dim)
        attention = partial(
            Attention,
            eps=cfg.norm_eps,
            gated=cfg.gated_attention,
            interleaved_rope=cfg.rope_type == "interleaved",
            backend=cfg.attention,
            rngs=rngs,
        )
        self.eps = cfg.norm_eps
        self.video_self = attention(dv, dv, head, tokens=(video, video))
        self.audio_self = attention(da, da, audio_head, tokens=(audio, audio))
        self.video_text = attention(dv, cfg.context_dim, head, tokens=(video, text))
        self.audio_text = attention(da, cfg.audio_context_dim, audio_head, tokens=(audio, text))
        self.video_mlp = FeedForward(dv, cfg.ff_mult, bias=cfg.ff_bias, rngs=rngs)
        self.audio_mlp = FeedForward(da, cfg.ff_mult, bias=cfg.audio_ff_bias, rngs=rngs)
        table = partial(parameter, rngs, axes=(None, "fsdp"), std=0.02)
        self.video_table = table((rows, dv))
        self.audio_table = table((rows, da))
        prompt = cfg.modulated_text_attention
        self.video_prompt_table = table((2, cfg.context_dim)) if prompt else None
        self.audio_prompt_table = table((2, cfg.audio_context_dim)) if prompt else None
        cross, to_video, to_audio = cfg.audio_video_attention, (video, audio), (audio, video)
        self.audio_to_video = attention(dv, da, audio_head, tokens=to_video) if cross else None
        self.video_to_audio = attention(da, dv, audio_head, tokens=to_audio) if cross else None
        self.video_cross_table = table((5, dv)) if cross else None
        self.audio_cross_table = table((5, da)) if cross else None

    def __call__(
        self,
        v: Array | None,  # [B, T, D]
        a: Array | None,  # [B, A, Da]
        video: Conditioning | None,
        audio: Conditioning | None,
        keep: Keep,  # one layer's masks, [B]
    ) -> tuple[Array | None, Array | None]:
        run_v, run_a = (stream is not None and stream.enabled for stream in (video, audio))
        if run_v:
            v = self._self_attention(v, self.video_self, self.video_table, video, keep.video_self)
        if run_a:
            a = self._self_attention(a, self.audio_self, self.audio_table, audio, keep.audio_self)
        if run_v:
            v = self._text(v, self.video_text, self.video_table, self.video_prompt_table, video)
        if run_a:
            a = self._text(a, self.audio_text, self.audio_table, self.audio_prompt_table, audio)
        if video is not None and audio is not None and self.audio_to_video is not None:
            v, a = self._audio_video(v, a, video, audio, keep)
        if run_v:
            v = self._feed_forward(v, self.video_mlp, self.video_table, video, "video_tokens")
        if run_a:
            a = self._feed_forward(a, self.audio_mlp, self.audio_table, audio, "audio_tokens")
        return v, a

    def _self_attention(self, x, attention, table, stream, keep):
        shift, scale, gate = _rows(table[0:3], stream.modulation[:, :, 0:3])
        h = modulate(rms_norm(x, self.eps), scale, shift)
        return x + gate * attention(h, rope=stream.rope, bias=stream.self_bias, keep=keep)

    def _text(self, x, attention, table, prompt_table, stream):
        h, context = rms_norm(x, self.eps), stream.context
        if prompt_table is None:
            return x + attention(h, context, bias=stream.context_bias)
        shift, scale, gate = _rows(table[6:9], stream.modulation[:, :, 6:9])
        prompt_table = prompt_table[...].astype(context.dtype)
        context_shift, context_scale = _rows(prompt_table, stream.prompt_modulation)
        h, context = modulate(h, scale, shift), modulate(context, context_scale, context_shift)
        return x + gate * attention(h, context, bias=stream.context_bias)

    def _audio_video(self, v, a, video, audio, keep):
        nv, na = rms_norm(v, self.eps), rms_norm(a, self.eps)
        # Scale before shift here, the opposite of every other table. Rows 0-1 serve audio -> video,
        # rows 2-3 video -> audio, row 4 is the gate.
        v_rows = _rows(self.video_cross_table[0:4], video.cross_modulation)
        a_rows = _rows(self.audio_cross_table[0:4], audio.cross_modulation)
        (v_gate,) = _rows(self.video_cross_table[4:5], video.cross_gate)
        (a_gate,) = _rows(self.audio_cross_table[4:5], audio.cross_gate)
        if video.enabled:
            queries, keys = modulate(nv, *v_rows[0:2]), modulate(na, *a_rows[0:2])
            ropes = {"rope": video.cross_rope, "context_rope": audio.cross_rope}
            v = v + _kept(v_gate * self.audio_to_video(queries, keys, **ropes), keep.audio_to_video)
        if audio.enabled:
            queries, keys = modulate(na, *a_rows[2:4]), modulate(nv, *v_rows[2:4])
            ropes = {"rope": audio.cross_rope, "context_rope": video.cross_rope}
            a = a + _kept(a_gate * self.video_to_audio(queries, keys, **ropes), keep.video_to_audio)
        return v, a

    def _feed_forward(self, x, mlp, table, stream, tokens):
        shift, scale, gate = _rows(table[3:6], stream.modulation[:, :, 3:6])
        return x + gate * mlp(modulate(rms_norm(x, self.eps), scale, shift), ("batch", tokens))


def _rows(table: Array, modulation: Array | None) -> list[Array]:
    """Table rows [R, D] (+ modulation [B, T or 1, R, D]) -> R arrays that broadcast over tokens."""
    table = pin(table, None, None)
    if modulation is None:
        return list(table)
    return [row + modulation[:, :, i] for i, row in enumerate(table.astype(modulation.dtype))]


def _kept(residual: Array, keep: Array | None) -> Array:
    return residual if keep is None else jnp.where(keep[:, None, None] > 0, residual, 0)


class Stem(nnx.Module):
    """One stream's way in and out: token projection, noise-level embeddings, output head."""

    def __init__(self, cfg: TransformerConfig, stream: str, *, rngs: nnx.Rngs):
        video = stream == "video"
        width = cfg.width if video else cfg.audio_width
        channels = (
            (cfg.in_channels, cfg.out_channels)
            if video
            else (cfg.audio_in_channels, cfg.audio_out_channels)
        )
        context_dim = cfg.context_dim if video else cfg.audio_context_dim
        self.cfg, self.lead = cfg, ("batch", f"{stream}_tokens")
        self.width, self.heads = width, cfg.num_heads if video else cfg.audio_num_heads
        self.max_pos = cfg.max_pos if video else cfg.audio_max_pos
        adaln = partial(AdaLayerNormSingle, rngs=rngs)
        self.project_in = Linear(channels[0], width, rngs=rngs)
        self.adaln = adaln(width, cfg.adaln_rows)
        prompt = cfg.modulated_text_attention and cfg.prompt_adaln
        self.prompt_adaln = adaln(context_dim, 2) if prompt else None
        caption = cfg.caption_channels
        self.caption_in = Linear(caption, context_dim, rngs=rngs) if caption else None
        self.caption_out = Linear(context_dim, context_dim, rngs=rngs) if caption else None
        keyframe = cfg.keyframe_embedding and video
        self.keyframe = parameter(rngs, (1, width), (None, "fsdp")) if keyframe else None
        self.cross_adaln = adaln(width, 4) if cfg.audio_video_attention else None
        self.cross_gate_adaln = adaln(width, 1) if cfg.audio_video_attention else None
        self.head_table = parameter(rngs, (2, width), (None, "fsdp"), std=0.02)
        self.project_out = Linear(width, channels[1], std=0.0, rngs=rngs)

    def __call__(self, x: Modality, other: Modality | None) -> tuple[Array, Conditioning]:
        """Inputs of one stream -> tokens [B, T, D] and what the blocks read beside them."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        h = self.project_in(x.latent.astype(dtype), self.lead)
        if self.keyframe is not None and x.keyframes_mask is not None:
            mark = pin(self.keyframe[...].astype(dtype), None, None)
            h = h + jnp.where(x.keyframes_mask[..., None] > 0, mark, 0)
        # One sigma for all tokens is one AdaLN vector, broadcast; not a row per token.
        lead = self.lead if x.timesteps.shape[1] > 1 else ("batch", None)
        once = ("batch", None)
        modulation, embedded = self.adaln(x.timesteps * cfg.timestep_scale, dtype, lead)
        prompt = cross = gate = cross_rope = None
        if self.prompt_adaln is not None:
            prompt, _ = self.prompt_adaln(x.sigma[:, None] * cfg.timestep_scale, dtype, once)
        if other is not None and self.cross_adaln is not None:
            cross, _ = self.cross_adaln(x.timesteps * cfg.timestep_scale, dtype, lead)
            other_sigma = other.sigma[:, None] * cfg.cross_gate_timestep_scale
            gate, _ = self.cross_gate_adaln(other_sigma, dtype, once)
            cross_rope = self._rope(
                x.positions[:, :1], cfg.audio_width, (max(cfg.max_pos[0], cfg.audio_max_pos[0]),)
            )
        return h, Conditioning(
            context=self._context(x.context.astype(dtype)),
            modulation=modulation,
            embedded_timestep=embedded,
            cross_modulation=cross,
            cross_gate=gate,
            prompt_modulation=prompt,
            rope=self._rope(x.positions, self.width, self.max_pos),
            cross_rope=cross_rope,
            self_bias=attention_strength_bias(x.attention_mask),
            context_bias=context_bias(x.context_mask, dtype),
            enabled=x.enabled,
        )

    def head(self, x: Array, stream: Conditioning) -> Array:
        """Tokens [B, T, D] -> velocity [B, T, C]."""
        table = pin(self.head_table[...].astype(x.dtype), None, None)
        shift, scale = table[0] + stream.embedded_timestep, table[1] + stream.embedded_timestep
        return self.project_out(modulate(layer_norm(x, self.cfg.norm_eps), scale, shift), self.lead)

    def _context(self, context: Array) -> Array:
        if self.caption_in is None:
            return context
        lead = ("batch", "text_tokens")
        return self.caption_out(jax.nn.gelu(self.caption_in(context, lead), approximate=True), lead)

    def _rope(self, positions: Array, width: int, max_pos: tuple[float, ...]) -> Rope:
        return rope_tables(
            positions,
            heads=self.heads,
            width=width,
            max_pos=max_pos,
            theta=self.cfg.rope_theta,
            precision=self.cfg.rope_precision,
            tokens=self.lead[1],
        )


def context_bias(mask: Array | None, dtype: Any) -> Array | None:
    """Additive bias [B, 1, 1, S] of an integer or bool mask [B, S]; a float mask is one already."""
    if mask is None or jnp.issubdtype(mask.dtype, jnp.floating):
        return mask
    return ((mask.astype(jnp.float32) - 1) * float(jnp.finfo(dtype).max))[:, None, None, :]


def attention_strength_bias(mask: Array | None) -> Array | None:
    """Strengths [B, T, T] in [0, 1] -> additive float32 bias [B, 1, T, T]: log, 0 becomes -max."""
    if mask is None:
        return None
    info, mask = jnp.finfo(jnp.float32), mask.astype(jnp.float32)
    bias = jnp.where(mask > 0, jnp.log(jnp.maximum(mask, info.tiny)), info.min)
    return bias[:, None]


class LTX2Transformer(nnx.Module):
    """The joint audio-video velocity network."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.video = Stem(cfg, "video", rngs=rngs)
        self.audio = Stem(cfg, "audio", rngs=rngs)
        # Stacked from birth: every leaf of `blocks` has a leading layer axis.
        self.blocks = jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.split(cfg.num_layers))

    def __call__(
        self, video: Modality | None, audio: Modality | None, keep: Keep | None = None
    ) -> tuple[Array | None, Array | None]:
        """Velocities of both streams, [B, T, C] and [B, A, C], in the activation dtype.

        A stream given as None drops out together with both cross-attentions.
        """
        v, a, video_in, audio_in = self.prepare(video, audio)
        v, a = self.run_blocks(v, a, video_in, audio_in, keep or Keep())
        return (
            None if video is None else self.video.head(v, video_in),
            None if audio is None else self.audio.head(a, audio_in),
        )

    def prepare(
        self, video: Modality | None, audio: Modality | None
    ) -> tuple[Array | None, Array | None, Conditioning | None, Conditioning | None]:
        """Everything before block 0: tokens and conditioning of both streams."""
        v, video_in = (None, None) if video is None else self.video(video, audio)
        a, audio_in = (None, None) if audio is None else self.audio(audio, video)
        return v, a, video_in, audio_in

    def run_blocks(self, v, a, video: Conditioning | None, audio: Conditioning | None, keep: Keep):
        """All blocks in one `lax.scan`; [B, T, D] and [B, A, Da] -> the same."""
        graphdef, state = nnx.split(self.blocks)

        def body(carry, layer):
            weights, layer_keep = layer
            carry = checkpoint_name(carry, BLOCK_INPUT)
            return nnx.merge(graphdef, weights)(*carry, video, audio, layer_keep), None

        if self.cfg.remat != "none":
            # prevent_cse guards against XLA undoing the recomputation; scan already does.
            policy = REMAT_POLICIES[self.cfg.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        (v, a), _ = jax.lax.scan(body, (v, a), (state, keep))
        return v, a
