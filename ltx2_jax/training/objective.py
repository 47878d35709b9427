"""What a step learns: noise, noise levels and conditions of a batch, and the loss of both streams.

    noise both streams -> predict velocities -> masked loss per stream

Randomness is a function of (seed, step) alone, and is drawn for the whole global batch at once, so
the same step gives the same numbers on any mesh and however it is cut into micro-batches.
Source: `ltx_trainer/training_strategies/flexible.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.config import Config
from ltx2_jax.diffusion import flow, geometry
from ltx2_jax.diffusion.conditioning import first_frame_mask
from ltx2_jax.models.ltx2 import LTX2, TEXT_FIELDS
from ltx2_jax.models.transformer.streams import Modality
from ltx2_jax.sharding import pin, spec
from ltx2_jax.training.batch import Batch


@dataclass(frozen=True)
class Stream:
    """One stream of a noised batch."""

    x0: Array  # [B, T, C]
    noise: Array  # [B, T, C]
    sigma: Array  # [B]
    clean: Array | None  # [B, T] bool: given tokens, neither noised nor learned; None: no token
    positions: Array  # [B or 1, axes, T, 2]


jax.tree_util.register_dataclass(Stream, ("x0", "noise", "sigma", "clean", "positions"), ())


def draw(
    key: Array,
    batch: Batch,
    config: Config,
    strides: tuple[int, int, int],
    clock: geometry.AudioClock = geometry.AUDIO_CLOCK,
) -> dict[str, Any]:
    """All that is random in one step: noise, noise levels, given frames, dropped captions.

    `strides` and `clock` are the codec's: when and where its latents are.

    Returns {"video": Stream, "audio": Stream, "drop_caption": bool [B]}.
    """
    keys = jax.random.split(key, 5)
    x0_video = pin(geometry.patchify_video(batch["video"]), "batch", "video_tokens", None)
    x0_audio = pin(geometry.patchify_audio(batch["audio"]), "batch", "audio_tokens", None)
    size = x0_video.shape[0]
    video_sigma, audio_sigma = flow.draw_sigmas(
        keys[0],
        size,
        x0_video.shape[1],
        x0_audio.shape[1],
        shared_prob=config.flow.shared_sigma_prob,
        std=config.flow.sigma_std,
        uniform_prob=config.flow.sigma_uniform_prob,
    )
    latent_shape = batch["video"].shape[1:4]
    clean = None
    # One latent frame is the whole clip: given, it would leave nothing to learn.
    if config.flow.first_frame_prob > 0 and latent_shape[0] > 1:
        given = _share(keys[1], config.flow.first_frame_prob, size)
        first = np.arange(x0_video.shape[1]) < latent_shape[1] * latent_shape[2]
        clean = pin(given[:, None] & first, "batch", "video_tokens")
    noise = [
        jax.random.normal(key, x.shape, x.dtype, out_sharding=spec("batch", tokens, None))
        for key, x, tokens in (
            (keys[2], x0_video, "video_tokens"),
            (keys[3], x0_audio, "audio_tokens"),
        )
    ]
    video_positions = geometry.video_positions(latent_shape, batch["fps"], strides)
    audio_positions = jnp.asarray(geometry.audio_positions(x0_audio.shape[1], clock))
    video_sigma, audio_sigma = pin(video_sigma, "batch"), pin(audio_sigma, "batch")
    drop = _share(keys[4], config.flow.caption_dropout, size)
    return {
        "video": Stream(x0_video, noise[0], video_sigma, clean, video_positions),
        "audio": Stream(x0_audio, noise[1], audio_sigma, None, audio_positions),
        "drop_caption": pin(drop, "batch"),
    }


def _share(key: Array, probability: float, size: int) -> Array:
    """bool [size], True with `probability`; the same draws with JAX_ENABLE_X64."""
    return jax.random.bernoulli(key, jnp.float32(probability), (size,))


def as_modality(
    stream: Stream, context: Array, context_mask: Array | None, keyframes: Any
) -> Modality:
    """The noised stream as the network takes it: given tokens are clean and have timestep 0."""
    levels = stream.sigma[:, None]  # [B, 1]
    if stream.clean is not None:
        levels = jnp.where(stream.clean, 0.0, levels)
    return Modality(
        latent=flow.noised(stream.x0, stream.noise, levels),
        sigma=stream.sigma,
        timesteps=stream.sigma[:, None],
        clean=stream.clean,
        positions=stream.positions,
        context=context,
        context_mask=context_mask,
        keyframes_mask=keyframes,
    )


def loss(
    model: LTX2, batch: Batch, drawn: dict[str, Any], null_text: dict[str, Array], config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean of the per-sample losses, and sums for the log (so that micro-batches add up)."""
    text = {
        name: without_captions(batch[name], null_text[name], drawn["drop_caption"])
        for name in TEXT_FIELDS
        if name in batch
    }
    video_context, audio_context, mask = model.context(text)
    keyframes = (
        first_frame_mask(batch["video"].shape[:4]) if config.model.keyframe_embedding else None
    )
    video = as_modality(drawn["video"], video_context, mask, keyframes)
    audio = as_modality(drawn["audio"], audio_context, mask, None)
    velocities = model.transformer(video, audio)
    sums: dict[str, Array] = {}
    losses = {}
    for name, velocity in zip(("video", "audio"), velocities, strict=True):
        stream = drawn[name]
        target = flow.velocity_target(stream.x0, stream.noise)
        losses[name] = flow.masked_loss(velocity, target, learned_mask(stream))
        sums[f"{name}_loss"] = jnp.sum(losses[name])
        sums[f"{name}_quarter"], sums[f"{name}_count"] = flow.sigma_quarters(
            losses[name], stream.sigma
        )
    weights = {"video": config.flow.video_weight, "audio": config.flow.audio_weight}
    return sum(weights[name] * jnp.mean(losses[name]) for name in losses), sums


def without_captions(rows: Array, empty: Array, drop: Array) -> Array:
    """rows [B, S, ...] with `empty` [S, ...], a field of the empty caption, where drop [B] says."""
    axes = ("batch", "text_tokens", *[None] * (rows.ndim - 2))
    empty = pin(jnp.broadcast_to(empty, rows.shape), *axes)
    drop = jnp.expand_dims(drop, range(1, rows.ndim))
    return jnp.where(drop, empty, pin(rows, *axes))


def learned_mask(stream: Stream) -> Array:
    """[B, T], 1 where the token counts in the loss."""
    if stream.clean is None:
        return jnp.ones(stream.x0.shape[:2], out_sharding=jax.typeof(stream.x0[..., 0]).sharding)
    return (~stream.clean).astype(jnp.float32)
