"""The sampler of one stage: a compiled program, weights resident.

Its passes run side by side. The first is under the prompt. Every other one differs from it in a
`Pass`, and the clean estimate is moved away from what that pass sees:

    x0 = prompt + sum of strength * (prompt - other)

so that a strength is 0 for nothing, and one less than the usual scale of classifier-free guidance.
What is given of a stream, and what it starts from, are inputs of the program: `Conditions`. The
kinds of passes, of guidance and of steps are what it is compiled for.
Source: `ltx_core/components/guiders.py`, `ltx_core/guidance/perturbations.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.chips import compiler_options
from ltx2_jax.diffusion import conditioning, geometry
from ltx2_jax.diffusion.conditioning import Conditions, first_frame_mask
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.guide import Guided
from ltx2_jax.diffusion.sampler import (
    NOTHING,
    TOKENS,
    Given,
    Latents,
    Velocity,
    all_passes,
    denoise_by,
    nothing,
    of_streams,
    rows_axis,
)
from ltx2_jax.diffusion.steppers import Euler, EulerCFGPlusPlus, Stepper
from ltx2_jax.errors import UserError
from ltx2_jax.models.ltx2 import LTX2
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.sharding import Names, axis_size, pin

# What a strength multiplies, one pair (video, audio) of float32 scalars for each pass; a number may
# be one for every step, [steps].
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
    audio_skipped: tuple[int, ...] | None = None  # those of the sound; None: the same
    audio_prompt: bool | None = None  # of the sound; None: the same


EMPTY_CAPTION = Pass(prompt=False)


def released_passes(layers: int) -> tuple[Pass, ...]:
    """Those that the released pipelines add by default, for a model of so many blocks.

    Without a prompt, with the self-attention of block 28 skipped, with the streams apart.
    """
    return EMPTY_CAPTION, Pass(skipped=(min(28, layers - 1),)), Pass(exchange=False)


def make_sampler() -> Callable[..., tuple[Array, ...]]:
    """The jitted `sample`, for the mesh in context. The latents it starts from are donated."""
    static = ("graphdef", "request", "passes", "stepper", "guidance")
    options = compiler_options(training=False)
    return jax.jit(
        sample, static_argnames=static, donate_argnames="start", compiler_options=options
    )


def sample(
    params: Any,
    texts: tuple[TextFields, TextFields],  # of the prompts [B, S, ...], of no prompt [1, S, ...]
    rows: Array,  # [B], number of each clip: its noise is a function of (key, number)
    key: Array,
    sigmas: Array,  # [steps + 1]
    strengths: Strengths,
    rescales: tuple[Array, Array] | None = None,  # of video and audio: `guidance.rescale`
    given: Given | None = None,  # a stream of which it says None is missing; None: both, from noise
    start: tuple[Array | None, Array | None]
    | None = None,  # as the result: what noise is mixed with
    noises: tuple[Latents | None, Latents | None] = (None, None),  # in the place of those drawn
    *,
    graphdef: Any,
    request: Request,
    passes: tuple[Pass, ...],
    stepper: Stepper = Euler(),  # noqa: B008
    guidance: Guidance = Guidance(),  # noqa: B008
) -> tuple[Array, ...]:
    """Text to clean latents of both streams: [B, F', H', W', C] and [B, A, M, C].

    `passes` are those beside the pass under the prompt. All run side by side in one batch. A third
    result are the keyframes [B, K, H', W', C] that were generated, if `given` has slots for them.
    `noises` are those that the clips start from, [B, T, C], and those of the stepper's calls,
    [calls, B, T, C].

    Raises:
      UserError: appended tokens that the mesh does not divide; a stepper without the pass it needs.
    """
    model = nnx.merge(graphdef, params)
    given = NOTHING if given is None else _placed(given, start)
    guide = _guide(model, texts, rows, strengths, rescales, request, passes, guidance, given)
    if isinstance(stepper, EulerCFGPlusPlus) and (guide.uncond is None or guide.skips):
        raise UserError("Euler CFG++ needs the pass without a prompt in every step: set a scale")
    first, more = noises
    x = noise(model, request, rows, key, given) if first is None else first
    if not nothing(given):
        x = of_streams(lambda c, a: conditioning.noised(c, a, sigmas[0]), given, x)

    def fresh(call: Array) -> Latents:
        if more is not None:
            return of_streams(lambda a: a[call], more)
        return step_noise(x, rows, key, call, normalized=stepper.normalized)

    clean = denoise_by(guide, x, sigmas, stepper, noise=fresh, given=given)
    return results(clean, request, given)


def _guide(
    model: LTX2,
    texts: tuple[TextFields, TextFields],
    rows: Array,  # [B]
    strengths: Strengths,
    rescales: tuple[Array, Array] | None,
    request: Request,
    passes: tuple[Pass, ...],
    guidance: Guidance,
    given: Given,
) -> Guided:
    """The passes and how they are combined."""
    clips, layers = rows.shape[0], model.transformer.cfg.num_layers
    text, null_text = (
        {name: jnp.broadcast_to(x, (clips, *x.shape[1:])) for name, x in fields.items()}
        for fields in texts
    )
    masked = any(p.skipped or p.audio_skipped or not p.exchange for p in passes)
    apart = any(p.audio_prompt not in (None, p.prompt) for p in passes)
    conditions = []
    for p in (Pass(), *passes):
        keep = _keep(p, clips, layers) if masked else None
        heard = p.prompt if p.audio_prompt is None else p.audio_prompt
        of_audio = (text if heard else null_text) if apart else None
        conditions.append((text if p.prompt else null_text, keep, of_audio))

    def of_text(
        condition: tuple[TextFields, Keep | None, TextFields | None], given: Given = NOTHING
    ) -> Velocity:
        text, keep, of_audio = condition
        return network(model, request, text, keep, given, of_audio)

    without = [i for i, p in enumerate(passes) if not p.prompt]
    return Guided(
        passes=all_passes(of_text, conditions, given),
        strengths=strengths,
        rescales=rescales,
        how=guidance,
        uncond=without[0] if without else None,
        given=given,
    )


def _keep(p: Pass, clips: int, layers: int) -> Keep:
    """The masks of a pass."""

    def without(blocks: tuple[int, ...]) -> Array:
        return jnp.asarray(np.tile(~np.isin(np.arange(layers), blocks), (clips, 1)))

    own = without(p.skipped)
    sound = own if p.audio_skipped is None else without(p.audio_skipped)
    cross = jnp.full((clips, layers), p.exchange)
    return Keep(video_self=own, audio_self=sound, audio_to_video=cross, video_to_audio=cross)


def _placed(given: Given, start: tuple[Array | None, Array | None] | None) -> Given:
    """The conditions on the mesh, with the latents that the clips start from."""
    patchify = geometry.patchify_video, geometry.patchify_audio
    placed = []
    for c, latents, tokens, (name, _) in zip(
        given, start or (None, None), patchify, TOKENS, strict=True
    ):
        if c is not None and latents is not None:
            c = conditioning.started(c, tokens(latents))
        placed.append(None if c is None else _on_mesh(c, name))
    return Given(*placed)


def _on_mesh(c: Conditions, tokens: str) -> Conditions:
    """Conditions of a stream whose tokens have this logical name."""
    total, shards = c.clean.shape[1], axis_size(tokens)
    if total % shards:
        raise UserError(
            f"mesh: sequence={shards} does not divide {total} video tokens, {c.clip_tokens} of the "
            f"clip and {total - c.clip_tokens} of keyframes and references; sizes that do: "
            + ", ".join(str(n) for n in range(1, shards + 1) if total % n == 0)
        )
    lead = rows_axis(c.clean.shape[0])

    def place(x: Array | None, *names: str | None) -> Array | None:
        return None if x is None else pin(jnp.asarray(x), *names)

    def latents(x: Array | None) -> Array | None:
        """In float32, in which the loop adds small steps to them."""
        return None if x is None else place(x, lead, tokens, None).astype(jnp.float32)

    return dataclasses.replace(
        c,
        clean=latents(c.clean),
        strength=place(c.strength, lead, tokens),
        positions=place(c.positions, None, None, None, None),
        marks=place(c.marks, lead, tokens),
        attention=place(c.attention, None, None, None),
        start=latents(c.start),
    )


def noise(
    model: LTX2, request: Request, rows: Array, key: Array, given: Given = NOTHING
) -> Latents:
    """What each clip starts from, a function of (key, its number in `rows` [B]).

    A clip's own tokens start from the same noise whatever is appended to them.
    """
    cfg = model.transformer.cfg
    shapes = (
        (math.prod(request.video_shape), cfg.in_channels),
        (request.audio_length, cfg.audio_in_channels),
    )
    if nothing(given):
        return Latents(*(_normal(key, i, rows, shapes[i], TOKENS[i]) for i in range(2)))
    drawn: list[Array | None] = [None, None]
    for i, c in enumerate(given):
        if c is None:
            continue
        count, channels = c.clean.shape[1:]
        own = _normal(key, i, rows, (c.clip_tokens, channels), (None, None))
        more = _normal(key, i + 2, rows, (count - c.clip_tokens, channels), (None, None))
        whole = own if count == c.clip_tokens else jnp.concatenate([own, more], 1)
        drawn[i] = pin(whole, rows_axis(rows.shape[0]), *TOKENS[i])
    return Latents(*drawn)


def step_noise(
    x: Latents, rows: Array, key: Array, call: Array, *, normalized: bool = False
) -> Latents:
    """Of a stepper's call, in the shapes of `x`, a function of (key, clip, number of the call)."""
    drawn: list[Array | None] = [None, None]
    for i, a in enumerate(x):
        if a is not None:
            call_key = jax.random.fold_in(jax.random.fold_in(key, i + 4), call)
            drawn[i] = _normal(call_key, 0, rows, a.shape[1:], TOKENS[i])
            if normalized:
                mean = jnp.mean(drawn[i], axis=(1, 2), keepdims=True)
                drawn[i] = (drawn[i] - mean) / jnp.std(drawn[i], axis=(1, 2), keepdims=True, ddof=1)
    return Latents(*drawn)


def _normal(key: Array, index: int, rows: Array, shape: tuple[int, int], names: Names) -> Array:
    """float32 [B, *shape], of the stream of numbers called `index`."""
    stream_key = jax.random.fold_in(key, index)
    keys = jax.vmap(lambda row: jax.random.fold_in(stream_key, row))(rows)
    drawn = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
    return pin(drawn, rows_axis(rows.shape[0]), *names)


def results(clean: Latents, request: Request, given: Given) -> tuple[Array, ...]:
    """What `sample` returns, of tokens [B, T, C]; a stream that is missing is None."""
    if nothing(given):
        return unpatchify(clean, request)
    own = of_streams(lambda x, c: conditioning.of_clip(c, _whole(x)), clean, given)
    latents = unpatchify(own, request)
    if given.video is None or given.video.slots is None:
        return latents
    return *latents, conditioning.slots_of(given.video, _whole(clean.video))


def _whole(x: Array) -> Array:
    """Tokens [B, T, C], all of a clip on a chip: the grid axes are not the sharded token axis."""
    return pin(x, rows_axis(x.shape[0]), None, None)


def unpatchify(clean: Latents, request: Request) -> tuple[Array | None, Array | None]:
    """Tokens to latents [B, F', H', W', C] and [B, A, M, C]."""
    video = audio = None
    if clean.video is not None:
        video = geometry.unpatchify_video(_whole(clean.video), request.video_shape)
    if clean.audio is not None:
        audio = geometry.unpatchify_audio(clean.audio, request.audio_bins)
    return video, audio


def network(
    model: LTX2,
    request: Request,
    text: dict[str, Array],
    keep: Keep | None = None,
    given: Given = NOTHING,
    audio_text: dict[str, Array] | None = None,
) -> Velocity:
    """The velocity of both streams under text fields [B, S, ...]; see `sampler.Network`.

    `audio_text` is that of the sound, if it is another.
    """
    streams = modalities(model, request, text, given, audio_text)
    prepared = model.transformer.prepare(*streams)

    def velocity(x: Latents, sigma: Array, enabled: tuple[bool, bool] = (True, True)) -> Latents:
        def at_level(stream: Modality, latent: Array, c: Conditions | None, runs: bool) -> Modality:
            level = {"sigma": sigma, "timesteps": sigma[:, None]}
            level = level if c is None else conditioning.levels(c, sigma)
            return dataclasses.replace(stream, latent=latent, enabled=runs, **level)

        now = of_streams(at_level, streams, x, given, enabled)
        return Latents(*model.transformer(*now, keep, prepared))

    return velocity


def modalities(
    model: LTX2,
    request: Request,
    text: dict[str, Array],
    given: Given = NOTHING,
    audio_text: dict[str, Array] | None = None,
) -> tuple[Modality | None, Modality | None]:
    """Both streams without latents and noise levels: text, positions, marks."""

    def contexts(text: dict[str, Array]) -> tuple[Array, Array, Array | None]:
        text = {name: pin(x, "batch", *[None] * (x.ndim - 1)) for name, x in text.items()}
        return model.context(text)

    video_context, audio_context, mask = contexts(text)
    audio_mask = mask
    if audio_text is not None:
        _, audio_context, audio_mask = contexts(audio_text)
    marked = model.transformer.cfg.keyframe_embedding
    if not nothing(given):
        return (
            _given_modality(given.video, video_context, mask, marked),
            _given_modality(given.audio, audio_context, audio_mask, False),
        )
    rows = text["text_mask"].shape[0]
    positions = geometry.video_positions(request.video_shape, request.fps, request.strides)
    keyframes = first_frame_mask((rows, *request.video_shape)) if marked else None
    none = {"latent": None, "sigma": None, "timesteps": None}
    video = Modality(**none, positions=jnp.asarray(positions), context=video_context,
                     context_mask=mask, keyframes_mask=keyframes)  # fmt: skip
    positions = geometry.audio_positions(request.audio_length, request.audio_clock)
    return video, Modality(**none, positions=jnp.asarray(positions), context=audio_context,
                           context_mask=audio_mask)  # fmt: skip


def _given_modality(
    c: Conditions | None, context: Array, mask: Array | None, marked: bool
) -> Modality | None:
    if c is None:
        return None
    return Modality(
        latent=None,
        sigma=None,
        timesteps=None,
        positions=jnp.asarray(c.positions),
        context=context,
        context_mask=mask,
        attention_mask=c.attention,
        keyframes_mask=c.marks if marked else None,
    )
