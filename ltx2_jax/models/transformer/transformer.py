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
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models.layers import FeedForward, modulate, parameter, rms_norm
from ltx2_jax.models.remat import BLOCK_INPUT, REMAT_POLICIES
from ltx2_jax.models.transformer.attention import Attention, KeysValues
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.streams import Conditioning, FixedPair, Keep, Modality, Stem
from ltx2_jax.sharding import pin


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
        for step in (self.self_attention, self.text_attention, self.cross_modal, self.feed_forward):
            v, a = step(v, a, video, audio, keep)
        return v, a

    # The four steps, all of the signature of `__call__`.

    def self_attention(self, v, a, video, audio, keep):
        """1. Either stream looks at itself."""
        if _runs(video):
            v = self._self_attention(v, self.video_self, self.video_table, video, keep.video_self)
        if _runs(audio):
            a = self._self_attention(a, self.audio_self, self.audio_table, audio, keep.audio_self)
        return v, a

    def text_attention(self, v, a, video, audio, keep):
        """2. Either stream looks at the text."""
        if _runs(video):
            v = self._text(v, self.video_text, self.video_table, self.video_prompt_table, video)
        if _runs(audio):
            a = self._text(a, self.audio_text, self.audio_table, self.audio_prompt_table, audio)
        return v, a

    def cross_modal(self, v, a, video, audio, keep):
        """3. The streams look at each other."""
        if video is not None and audio is not None and self.audio_to_video is not None:
            return self._audio_video(v, a, video, audio, keep)
        return v, a

    def feed_forward(self, v, a, video, audio, keep):
        """4. Every token by itself."""
        if _runs(video):
            v = self._feed_forward(v, self.video_mlp, self.video_table, video, "video_tokens")
        if _runs(audio):
            a = self._feed_forward(a, self.audio_mlp, self.audio_table, audio, "audio_tokens")
        return v, a

    def _self_attention(self, x, attention, table, stream, keep):
        shift, scale, gate = _rows(table[0:3], stream.modulation[:, :, 0:3], stream)
        h = modulate(rms_norm(x, self.eps), scale, shift)
        fixed = stream.fixed
        return x + gate * attention(h, rope=fixed.rope, bias=fixed.self_bias, keep=keep)

    def _text(self, x, attention, table, prompt_table, stream):
        h, fixed, gate = rms_norm(x, self.eps), stream.fixed, None
        if prompt_table is not None:
            shift, scale, gate = _rows(table[6:9], stream.modulation[:, :, 6:9], stream)
            h = modulate(h, scale, shift)
        keys_values = fixed.keys_values
        if keys_values is None:
            context = _modulated_text(fixed.context, prompt_table, stream.prompt_modulation)
            keys_values = attention.keys_values(context)
        out = attention(h, keys_values=keys_values, bias=fixed.context_bias)
        return x + (out if gate is None else gate * out)

    def text_keys_values(self, video: Array | None, audio: Array | None) -> tuple[Any, Any]:
        """Those of the text of both streams [B, S, text width], where no noise level changes it."""
        v = a = None
        if video is not None:
            video = _modulated_text(video, self.video_prompt_table, None)
            v = self.video_text.keys_values(video)
        if audio is not None:
            audio = _modulated_text(audio, self.audio_prompt_table, None)
            a = self.audio_text.keys_values(audio)
        return v, a

    def _audio_video(self, v, a, video, audio, keep):
        nv, na = rms_norm(v, self.eps), rms_norm(a, self.eps)
        # Scale before shift here, the opposite of every other table. Rows 0-1 serve audio -> video,
        # rows 2-3 video -> audio, row 4 is the gate.
        v_rows = _rows(self.video_cross_table[0:4], video.cross_modulation, video)
        a_rows = _rows(self.audio_cross_table[0:4], audio.cross_modulation, audio)
        (v_gate,) = _rows(self.video_cross_table[4:5], video.cross_gate)
        (a_gate,) = _rows(self.audio_cross_table[4:5], audio.cross_gate)
        if video.enabled:
            queries, keys = modulate(nv, *v_rows[0:2]), modulate(na, *a_rows[0:2])
            ropes = {"rope": video.fixed.cross_rope, "context_rope": audio.fixed.cross_rope}
            v = v + _kept(v_gate * self.audio_to_video(queries, keys, **ropes), keep.audio_to_video)
        if audio.enabled:
            queries, keys = modulate(na, *a_rows[2:4]), modulate(nv, *v_rows[2:4])
            ropes = {"rope": audio.fixed.cross_rope, "context_rope": video.fixed.cross_rope}
            a = a + _kept(a_gate * self.video_to_audio(queries, keys, **ropes), keep.video_to_audio)
        return v, a

    def _feed_forward(self, x, mlp, table, stream, tokens):
        shift, scale, gate = _rows(table[3:6], stream.modulation[:, :, 3:6], stream)
        return x + gate * mlp(modulate(rms_norm(x, self.eps), scale, shift), ("batch", tokens))


def _runs(stream: Conditioning | None) -> bool:
    return stream is not None and stream.enabled


def _rows(
    table: Array, modulation: Array | None, stream: Conditioning | None = None
) -> list[Array]:
    """Table rows [R, D] (+ modulation [B, N, R, D]) -> R arrays that broadcast over tokens.

    `stream` is given where its clean tokens have a modulation of their own.
    """
    table = pin(table, None, None)
    if modulation is None:
        return list(table)
    rows = [row + modulation[:, :, i] for i, row in enumerate(table.astype(modulation.dtype))]
    return rows if stream is None else [stream.of_tokens(row) for row in rows]


def _modulated_text(context: Array, table: Any, modulation: Array | None) -> Array:
    """[B, S, text width], by a table [2, text width] and the sigma of the prompt (2.3)."""
    if table is None:
        return context
    shift, scale = _rows(table[...].astype(context.dtype), modulation)
    return modulate(context, scale, shift)


def _kept(residual: Array, keep: Array | None) -> Array:
    return residual if keep is None else jnp.where(keep[:, None, None] > 0, residual, 0)


class LTX2Transformer(nnx.Module):
    """The joint audio-video velocity network."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.video = Stem(cfg, "video", rngs=rngs)
        self.audio = Stem(cfg, "audio", rngs=rngs)
        # Stacked from birth: every leaf of `blocks` has a leading layer axis.
        self.blocks = jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.split(cfg.num_layers))

    def __call__(
        self,
        video: Modality | None,
        audio: Modality | None,
        keep: Keep | None = None,
        fixed: FixedPair | None = None,
    ) -> tuple[Array | None, Array | None]:
        """Velocities of both streams, [B, T, C] and [B, A, C], in the activation dtype.

        A stream given as None drops out together with both cross-attentions. `fixed` is what
        `fixed` returned for the same text, positions and masks.
        """
        v, a, video_in, audio_in = self.prepare(video, audio, fixed)
        v, a = self.run_blocks(v, a, video_in, audio_in, keep or Keep())
        return (
            None if video is None else self.video.head(v, video_in),
            None if audio is None else self.audio.head(a, audio_in),
        )

    def fixed(self, video: Modality | None, audio: Modality | None) -> FixedPair:
        """What does not change from step to step of a sampler, to be computed before its loop.

        It depends on text, positions and masks alone; the other fields are not read. Beside what
        `prepare` would compute it holds the keys and values of the text for all blocks, unless the
        model modulates its text by sigma.
        """
        fixed = self._fixed(video, audio)
        if self.cfg.modulated_text_attention and self.cfg.prompt_adaln:
            return fixed
        contexts = [None if stream is None else stream.context for stream in fixed]
        graphdef, state = nnx.split(self.blocks)

        def body(_, weights):
            return None, nnx.merge(graphdef, weights).text_keys_values(*contexts)

        with jax.named_scope("layers"):
            _, keys_values = jax.lax.scan(body, None, state)
        return tuple(
            None if stream is None else dataclasses.replace(stream, keys_values=kv)
            for stream, kv in zip(fixed, keys_values, strict=True)
        )

    def prepare(
        self, video: Modality | None, audio: Modality | None, fixed: FixedPair | None = None
    ) -> tuple[Array | None, Array | None, Conditioning | None, Conditioning | None]:
        """Everything before block 0: tokens and conditioning of both streams."""
        of_video, of_audio = fixed or self._fixed(video, audio)
        v, video_in = (None, None) if video is None else self.video(video, audio, of_video)
        a, audio_in = (None, None) if audio is None else self.audio(audio, video, of_audio)
        return v, a, video_in, audio_in

    def _fixed(self, video: Modality | None, audio: Modality | None) -> FixedPair:
        return (
            None if video is None else self.video.fixed(video, audio),
            None if audio is None else self.audio.fixed(audio, video),
        )

    def run_blocks(
        self,
        v: Array | None,  # [B, T, D]
        a: Array | None,  # [B, A, Da]
        video: Conditioning | None,
        audio: Conditioning | None,
        keep: Keep,
        *,
        step: Callable[..., tuple[Array | None, Array | None]] = Block.__call__,
    ) -> tuple[Array | None, Array | None]:
        """All blocks in one `lax.scan`, or one `step` of theirs, to time it."""
        graphdef, state = nnx.split(self.blocks)
        keys_values = [None if x is None else x.fixed.keys_values for x in (video, audio)]

        def body(carry, layer):
            weights, layer_keep, *layer_text = layer
            carry = checkpoint_name(carry, BLOCK_INPUT)
            conditions = [
                _in_block(x, kv) for x, kv in zip((video, audio), layer_text, strict=True)
            ]
            return step(nnx.merge(graphdef, weights), *carry, *conditions, layer_keep), None

        if self.cfg.remat != "none":
            # prevent_cse guards against XLA undoing the recomputation; scan already does.
            policy = REMAT_POLICIES[self.cfg.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        with jax.named_scope("layers"):  # a name by which plan tells this loop from others
            (v, a), _ = jax.lax.scan(body, (v, a), (state, keep, *keys_values))
        return v, a


def _in_block(stream: Conditioning | None, keys_values: KeysValues | None) -> Conditioning | None:
    """The conditioning with the keys and values of one block."""
    if stream is None:
        return None
    fixed = dataclasses.replace(stream.fixed, keys_values=keys_values)
    return dataclasses.replace(stream, fixed=fixed)
