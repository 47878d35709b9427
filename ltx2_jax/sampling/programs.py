"""The sampler in as many guidance passes as asked for: one compiled program, weights resident.

The first pass is under the prompt. Every other one differs from it in a `Pass`, and the clean
estimate is moved away from what that pass sees:

    x0 = prompt + sum of strength * (prompt - other)

so that a strength is 0 for nothing, and one less than the usual scale of classifier-free guidance.
Source: `ltx_core/components/guiders.py`, `ltx_core/guidance/perturbations.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.chips import compiler_options
from ltx2_jax.diffusion import geometry
from ltx2_jax.diffusion.conditioning import first_frame_mask
from ltx2_jax.diffusion.sampler import Latents, Velocity, denoise, guided, rows_axis, unguided
from ltx2_jax.models.ltx2 import LTX2
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.sharding import pin

# What a strength multiplies, one pair (video, audio) of float32 scalars for each pass.
Strengths = tuple[tuple[Array, Array], ...]
TextFields = dict[str, Array]  # `ltx2.TEXT_FIELDS`


@dataclass(frozen=True)
class Request:
    """What one compiled sampler is specialised to."""

    video_shape: tuple[int, int, int]  # F', H', W'
    audio_length: int
    audio_bins: int
    strides: tuple[int, int, int]
    fps: float
    audio_clock: geometry.AudioClock = geometry.AUDIO_CLOCK


@dataclass(frozen=True)
class Pass:
    """How a pass differs from the one under the prompt."""

    prompt: bool = True  # False: under the empty caption
    skipped: tuple[int, ...] = ()  # blocks whose self-attention, of both streams, it skips
    exchange: bool = True  # False: each stream on its own


EMPTY_CAPTION = Pass(prompt=False)


def released_passes(layers: int) -> tuple[Pass, ...]:
    """Those that the released pipelines add by default, for a model of so many blocks.

    Without a prompt, with the self-attention of block 28 skipped, with the streams apart.
    """
    return EMPTY_CAPTION, Pass(skipped=(min(28, layers - 1),)), Pass(exchange=False)


def make_sampler() -> Callable[..., tuple[Array, Array]]:
    """The jitted `sample`, for the mesh in context."""
    static, options = ("graphdef", "request", "passes"), compiler_options(training=False)
    return jax.jit(sample, static_argnames=static, compiler_options=options)


def sample(
    params: Any,
    texts: tuple[TextFields, TextFields],  # of the prompts [B, S, ...], of no prompt [1, S, ...]
    rows: Array,  # [B], number of each clip: its noise is a function of (key, number)
    key: Array,
    sigmas: Array,  # [steps + 1]
    strengths: Strengths,
    *,
    graphdef: Any,
    request: Request,
    passes: tuple[Pass, ...],
) -> tuple[Array, Array]:
    """Text to clean latents of both streams: [B, F', H', W', C] and [B, A, M, C].

    `passes` are those beside the pass under the prompt. All run side by side in one batch.
    """
    model = nnx.merge(graphdef, params)
    clips, layers = rows.shape[0], model.transformer.cfg.num_layers
    text, null_text = (
        {name: jnp.broadcast_to(x, (clips, *x.shape[1:])) for name, x in fields.items()}
        for fields in texts
    )
    of_text = partial(network, model, request)
    if passes:
        masked = any(p.skipped or not p.exchange for p in passes)
        conditions = [
            (text if p.prompt else null_text, _keep(p, clips, layers) if masked else None)
            for p in (Pass(), *passes)
        ]
        predict = guided(lambda condition: of_text(*condition), conditions, strengths)
    else:
        predict = unguided(of_text, text)
    return unpatchify(denoise(predict, noise(model, request, rows, key), sigmas), request)


def _keep(p: Pass, clips: int, layers: int) -> Keep:
    """The masks of a pass."""
    masks = np.ones((2, clips, layers), bool)
    masks[0, :, list(p.skipped)] = False
    masks[1] = p.exchange
    own, cross = jnp.asarray(masks[0]), jnp.asarray(masks[1])
    return Keep(video_self=own, audio_self=own, audio_to_video=cross, video_to_audio=cross)


def noise(model: LTX2, request: Request, rows: Array, key: Array) -> Latents:
    """What each clip starts from, a function of (key, its number in `rows` [B])."""
    cfg, lead = model.transformer.cfg, rows_axis(rows.shape[0])

    def stream(index: int, shape: tuple[int, int], tokens: str) -> Array:
        stream_key = jax.random.fold_in(key, index)
        keys = jax.vmap(lambda row: jax.random.fold_in(stream_key, row))(rows)
        drawn = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
        return pin(drawn, lead, tokens, None)

    return Latents(
        stream(0, (math.prod(request.video_shape), cfg.in_channels), "video_tokens"),
        stream(1, (request.audio_length, cfg.audio_in_channels), "audio_tokens"),
    )


def unpatchify(clean: Latents, request: Request) -> tuple[Array, Array]:
    """Tokens to latents [B, F', H', W', C] and [B, A, M, C]."""
    # Whole clips per chip again: the grid axes below are not the sharded token axis.
    tokens = pin(clean.video, rows_axis(clean.video.shape[0]), None, None)
    return (
        geometry.unpatchify_video(tokens, request.video_shape),
        geometry.unpatchify_audio(clean.audio, request.audio_bins),
    )


def network(
    model: LTX2, request: Request, text: dict[str, Array], keep: Keep | None = None
) -> Velocity:
    """The velocity of both streams under text fields [B, S, ...]; see `sampler.Network`."""
    video, audio = modalities(model, request, text)
    prepared = model.transformer.prepare(video, audio)

    def velocity(x: Latents, sigma: Array) -> Latents:
        level = {"sigma": sigma, "timesteps": sigma[:, None]}
        streams = (
            dataclasses.replace(stream, latent=latent, **level)
            for stream, latent in zip((video, audio), x, strict=True)
        )
        return Latents(*model.transformer(*streams, keep, prepared))

    return velocity


def modalities(model: LTX2, request: Request, text: dict[str, Array]) -> tuple[Modality, Modality]:
    """Both streams without latents and noise levels: text, positions, marks."""
    rows = text["text_mask"].shape[0]
    text = {name: pin(x, "batch", *[None] * (x.ndim - 1)) for name, x in text.items()}
    video_context, audio_context, mask = model.context(text)
    positions = geometry.video_positions(request.video_shape, request.fps, request.strides)
    keyframes = None
    if model.transformer.cfg.keyframe_embedding:
        keyframes = first_frame_mask((rows, *request.video_shape))
    given = {"latent": None, "sigma": None, "timesteps": None, "context_mask": mask}
    video = Modality(**given, positions=jnp.asarray(positions), context=video_context,
                     keyframes_mask=keyframes)  # fmt: skip
    positions = geometry.audio_positions(request.audio_length, request.audio_clock)
    return video, Modality(**given, positions=jnp.asarray(positions), context=audio_context)
