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

Names: `v` and `a` are the tokens that run through the blocks, the residual streams of video and of
audio. `video` and `audio` are what a caller gives of either stream, a `Modality`. `video_cond` and
`audio_cond` are what the blocks read of either stream beside its tokens, a `Conditioning`.

Dims: B batch, T video tokens (or the tokens of either stream), A audio tokens, S text tokens,
Tq and Tk tokens of queries and keys, D width of a stream (Dv and Da where both meet), E width of
its text, N heads, H head width, F mlp, L layers, R AdaLN rows, K noise levels, C latent channels.
Axes that broadcast over tokens have size 1.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models import streamed
from ltx2_jax.models.layers import FeedForward, Rngs, modulate, parameter, rms_norm
from ltx2_jax.models.remat import BLOCK_INPUT, REMAT_POLICIES
from ltx2_jax.models.transformer.attention import Attention, KeysValues
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.streams import (
    Conditioning,
    Keep,
    Modality,
    PreparedPair,
    Stem,
)
from ltx2_jax.sharding import pin

VIDEO, AUDIO, TEXT = "video_tokens", "audio_tokens", "text_tokens"  # logical names of token axes


class Block(nnx.Module):
    """One dual-stream block; see the module docstring for its four steps."""

    def __init__(self, cfg: TransformerConfig, *, rngs: Rngs):
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
        self.video_self = attention(dv, dv, head, tokens=(VIDEO, VIDEO))
        self.audio_self = attention(da, da, audio_head, tokens=(AUDIO, AUDIO))
        self.video_text = attention(dv, cfg.context_dim, head, tokens=(VIDEO, TEXT))
        self.audio_text = attention(da, cfg.audio_context_dim, audio_head, tokens=(AUDIO, TEXT))
        self.video_mlp = FeedForward(dv, cfg.ff_mult, bias=cfg.ff_bias, rngs=rngs)
        self.audio_mlp = FeedForward(da, cfg.ff_mult, bias=cfg.audio_ff_bias, rngs=rngs)
        table = partial(parameter, rngs, axes=(None, "fsdp"), std=0.02)
        self.video_table = table((rows, dv))
        self.audio_table = table((rows, da))
        prompt = cfg.modulated_text_attention
        self.video_prompt_table = table((2, cfg.context_dim)) if prompt else None
        self.audio_prompt_table = table((2, cfg.audio_context_dim)) if prompt else None
        cross, to_video, to_audio = cfg.audio_video_attention, (VIDEO, AUDIO), (AUDIO, VIDEO)
        self.audio_to_video = attention(dv, da, audio_head, tokens=to_video) if cross else None
        self.video_to_audio = attention(da, dv, audio_head, tokens=to_audio) if cross else None
        self.video_cross_table = table((5, dv)) if cross else None
        self.audio_cross_table = table((5, da)) if cross else None

    def __call__(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        steps = (self.self_attention, self.text_attention, self.cross_modal, self.feed_forward)
        for step in steps:
            v, a = step(v, a, video_cond, audio_cond, keep)
        return v, a

    # The four steps, all of the signature of `__call__`.

    def self_attention(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        """1. Either stream looks at itself."""
        if _runs(video_cond):
            module, table = self.video_self, self.video_table
            v = self._self_attention(v, module, table, video_cond, keep.video_self)
        if _runs(audio_cond):
            module, table = self.audio_self, self.audio_table
            a = self._self_attention(a, module, table, audio_cond, keep.audio_self)
        return v, a

    def text_attention(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        """2. Either stream looks at the text."""
        if _runs(video_cond):
            tables = self.video_table, self.video_prompt_table
            v = self._text_attention(v, self.video_text, *tables, video_cond)
        if _runs(audio_cond):
            tables = self.audio_table, self.audio_prompt_table
            a = self._text_attention(a, self.audio_text, *tables, audio_cond)
        return v, a

    def cross_modal(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        """3. The streams look at each other."""
        both = video_cond is not None and audio_cond is not None
        if both and self.audio_to_video is not None:
            return self._audio_video(v, a, video_cond, audio_cond, keep)
        return v, a

    def feed_forward(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        """4. Every token by itself."""
        if _runs(video_cond):
            v = self._feed_forward(v, self.video_mlp, self.video_table, video_cond, VIDEO)
        if _runs(audio_cond):
            a = self._feed_forward(a, self.audio_mlp, self.audio_table, audio_cond, AUDIO)
        return v, a

    def _self_attention(
        self,
        x: Array,  # [B, T, D]
        attention: Attention,
        table: nnx.Param,  # [R, D]
        cond: Conditioning,
        keep: Array | None,  # [B]
    ) -> Array:  # [B, T, D]
        shift, scale, gate = _rows(table[0:3], cond.modulation[:, :, 0:3], cond)
        h = modulate(rms_norm(x, self.eps), scale, shift)
        prepared = cond.prepared
        return x + gate * attention(h, rope=prepared.rope, bias=prepared.self_bias, keep=keep)

    def _text_attention(
        self,
        x: Array,  # [B, T, D]
        attention: Attention,
        table: nnx.Param,  # [R, D]
        prompt_table: nnx.Param | None,  # [2, E]
        cond: Conditioning,
    ) -> Array:  # [B, T, D]
        h, prepared, gate = rms_norm(x, self.eps), cond.prepared, None
        if prompt_table is not None:
            shift, scale, gate = _rows(table[6:9], cond.modulation[:, :, 6:9], cond)
            h = modulate(h, scale, shift)
        keys_values = prepared.keys_values
        if keys_values is None:
            context = _modulated_text(prepared.context, prompt_table, cond.prompt_modulation)
            keys_values = attention.keys_values(context)
        out = attention(h, keys_values=keys_values, bias=prepared.context_bias)
        return x + (out if gate is None else gate * out)

    def text_keys_values(
        self,
        video_context: Array | None,  # [B, S, E]
        audio_context: Array | None,  # [B, S, E]
    ) -> tuple[KeysValues | None, KeysValues | None]:
        """Keys and values of the text for both streams, if no noise level changes them."""
        of_video = of_audio = None
        if video_context is not None:
            video_context = _modulated_text(video_context, self.video_prompt_table, None)
            of_video = self.video_text.keys_values(video_context)
        if audio_context is not None:
            audio_context = _modulated_text(audio_context, self.audio_prompt_table, None)
            of_audio = self.audio_text.keys_values(audio_context)
        return of_video, of_audio

    def _audio_video(
        self,
        v: Array,  # [B, T, Dv]
        a: Array,  # [B, A, Da]
        video_cond: Conditioning,
        audio_cond: Conditioning,
        keep: Keep,  # of one layer, [B]
    ) -> tuple[Array, Array]:  # [B, T, Dv], [B, A, Da]
        nv, na = rms_norm(v, self.eps), rms_norm(a, self.eps)
        # Scale comes before shift here, the opposite of every other table. Rows 0-1 serve audio to
        # video, rows 2-3 video to audio, row 4 is the gate.
        v_rows = _rows(self.video_cross_table[0:4], video_cond.cross_modulation, video_cond)
        a_rows = _rows(self.audio_cross_table[0:4], audio_cond.cross_modulation, audio_cond)
        (v_gate,) = _rows(self.video_cross_table[4:5], video_cond.cross_gate)
        (a_gate,) = _rows(self.audio_cross_table[4:5], audio_cond.cross_gate)
        v_rope, a_rope = video_cond.prepared.cross_rope, audio_cond.prepared.cross_rope
        if video_cond.enabled:
            queries, keys = modulate(nv, *v_rows[0:2]), modulate(na, *a_rows[0:2])
            out = self.audio_to_video(queries, keys, rope=v_rope, context_rope=a_rope)
            v = v + _kept(v_gate * out, keep.audio_to_video)
        if audio_cond.enabled:
            queries, keys = modulate(na, *a_rows[2:4]), modulate(nv, *v_rows[2:4])
            out = self.video_to_audio(queries, keys, rope=a_rope, context_rope=v_rope)
            a = a + _kept(a_gate * out, keep.video_to_audio)
        return v, a

    def _feed_forward(
        self,
        x: Array,  # [B, T, D]
        mlp: FeedForward,
        table: nnx.Param,  # [R, D]
        cond: Conditioning,
        tokens: str,  # logical name of the T axis
    ) -> Array:  # [B, T, D]
        shift, scale, gate = _rows(table[3:6], cond.modulation[:, :, 3:6], cond)
        return x + gate * mlp(modulate(rms_norm(x, self.eps), scale, shift), ("batch", tokens))


def _runs(cond: Conditioning | None) -> bool:
    """Whether the blocks change this stream."""
    return cond is not None and cond.enabled


def _rows(
    table: Array,  # [R, D]
    modulation: Array | None,  # [B, K, R, D]
    cond: Conditioning | None = None,
) -> list[Array]:
    """Their sum by rows: R arrays [B, 1 or T, D], or [D] without modulation.

    `cond` is given where its clean tokens have a modulation of their own.
    """
    table = pin(table, None, None)
    if modulation is None:
        return list(table)
    rows = [row + modulation[:, :, i] for i, row in enumerate(table.astype(modulation.dtype))]
    return rows if cond is None else [cond.of_tokens(row) for row in rows]


def _modulated_text(
    context: Array,  # [B, S, E]
    table: nnx.Param | None,  # [2, E]
    modulation: Array | None,  # [B, 1, 2, E], from the sigma of the prompt (2.3)
) -> Array:  # [B, S, E]
    if table is None:
        return context
    shift, scale = _rows(table[...].astype(context.dtype), modulation)
    return modulate(context, scale, shift)


def _kept(
    residual: Array,  # [B, T, D]
    keep: Array | None,  # [B]
) -> Array:  # [B, T, D]
    return residual if keep is None else jnp.where(keep[:, None, None] > 0, residual, 0)


class LTX2Transformer(nnx.Module):
    """The joint audio-video velocity network."""

    def __init__(self, cfg: TransformerConfig, *, rngs: Rngs):
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
        prepared: PreparedPair | None = None,
    ) -> tuple[Array | None, Array | None]:
        """Velocities of both streams, [B, T, C] and [B, A, C], in the activation dtype.

        A stream given as None drops out together with both cross-attentions. `prepared` is what
        `prepare` returned for the same text, positions and masks.
        """
        v, a, video_cond, audio_cond = self.embed(video, audio, prepared)
        v, a = self.run_blocks(v, a, video_cond, audio_cond, keep or Keep())
        return (
            None if video is None else self.video.head(v, video_cond),
            None if audio is None else self.audio.head(a, audio_cond),
        )

    def prepare(self, video: Modality | None, audio: Modality | None) -> PreparedPair:
        """What does not change from step to step of a sampler, to be computed before its loop.

        It depends on text, positions and masks alone; the other fields are not read. It holds the
        keys and values of the text for all blocks, unless the model modulates its text by sigma.
        """
        prepared = self._prepare(video, audio)
        if self.cfg.modulated_text_attention and self.cfg.prompt_adaln:
            return prepared
        contexts = [None if stream is None else stream.context for stream in prepared]
        graphdef, state = nnx.split(self.blocks)

        def body(_, weights):
            return None, nnx.merge(graphdef, weights).text_keys_values(*contexts)

        with jax.named_scope("layers"):
            _, keys_values = streamed.scan(body, None, state)
        return tuple(
            None if stream is None else dataclasses.replace(stream, keys_values=kv)
            for stream, kv in zip(prepared, keys_values, strict=True)
        )

    def _prepare(self, video: Modality | None, audio: Modality | None) -> PreparedPair:
        """As `prepare`, without the keys and values: all that one call of the model needs."""
        return (
            None if video is None else self.video.prepare(video, audio),
            None if audio is None else self.audio.prepare(audio, video),
        )

    def embed(
        self, video: Modality | None, audio: Modality | None, prepared: PreparedPair | None = None
    ) -> tuple[Array | None, Array | None, Conditioning | None, Conditioning | None]:
        """Everything before block 0: tokens [B, T, Dv] and [B, A, Da], and their conditioning."""
        of_video, of_audio = prepared or self._prepare(video, audio)
        v, video_cond = (None, None) if video is None else self.video(video, audio, of_video)
        a, audio_cond = (None, None) if audio is None else self.audio(audio, video, of_audio)
        return v, a, video_cond, audio_cond

    def run_blocks(
        self,
        v: Array | None,  # [B, T, Dv]
        a: Array | None,  # [B, A, Da]
        video_cond: Conditioning | None,
        audio_cond: Conditioning | None,
        keep: Keep,  # [B, L]
        *,
        step: Callable[..., tuple[Array | None, Array | None]] = Block.__call__,
    ) -> tuple[Array | None, Array | None]:  # [B, T, Dv], [B, A, Da]
        """All blocks in one scan, or one `step` of theirs, to time it."""
        graphdef, state = nnx.split(self.blocks)
        conds = video_cond, audio_cond
        keys_values = [None if cond is None else cond.prepared.keys_values for cond in conds]
        # The scan takes a layer at a time: its masks [B] from [L, B].
        keep = jax.tree.map(lambda mask: pin(mask.T, None, "batch"), keep)

        def body(carry, layer):  # (v, a), what one block has for itself
            weights, layer_keep, *layer_text = layer
            carry = checkpoint_name(carry, BLOCK_INPUT)
            layer_conds = [_in_block(*pair) for pair in zip(conds, layer_text, strict=True)]
            return step(nnx.merge(graphdef, weights), *carry, *layer_conds, layer_keep), None

        if self.cfg.remat != "none":
            # prevent_cse keeps XLA from undoing the recomputation; scan already does that.
            policy = REMAT_POLICIES[self.cfg.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        with jax.named_scope("layers"):  # a name by which plan tells this loop from others
            (v, a), _ = streamed.scan(body, (v, a), (state, keep, *keys_values))
        return v, a


def _in_block(cond: Conditioning | None, keys_values: KeysValues | None) -> Conditioning | None:
    """The conditioning with the keys and values of one block."""
    if cond is None:
        return None
    prepared = dataclasses.replace(cond.prepared, keys_values=keys_values)
    return dataclasses.replace(cond, prepared=prepared)
