"""One stage of a recipe: what is given becomes conditions, and the compiled sampler runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ltx2_jax import hosts
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.diffusion import conditioning, geometry
from ltx2_jax.diffusion.conditioning import Conditions
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.sampler import Given, rows_axis
from ltx2_jax.sampling.given import Encoded, Placed
from ltx2_jax.sampling.programs import Pass, Request
from ltx2_jax.sampling.recipes import Stage
from ltx2_jax.sampling.tasks import Task
from ltx2_jax.sharding import batch_shards, sharding_of

VOICE_GAP = 0.04  # seconds between a voice that is heard before a clip, and the clip


@dataclass(frozen=True)
class Shapes:
    """Of the latents of a stage."""

    video: tuple[int, int, int]  # F', H', W'
    audio: int  # A
    channels: int
    audio_channels: int
    bins: int
    strides: tuple[int, int, int]
    clock: geometry.AudioClock

    @classmethod
    def of(cls, task: Task, codec: Codec, height: int, width: int) -> "Shapes":
        strides, clock = codec.video.strides, codec.audio.clock
        return cls(
            geometry.video_latent_shape(task.num_frames, height, width, strides),
            geometry.audio_latent_length(task.num_frames, task.fps, clock.latents_per_second),
            codec.video.channels,
            codec.audio.channels,
            codec.audio.bins,
            strides,
            clock,
        )

    def request(self, fps: float) -> Request:
        return Request(self.video, self.audio, self.bins, self.strides, fps, self.clock)


# --------------------------------------------------------------------------------- what is given


def conditions(
    task: Task,
    given: Encoded,
    shapes: Shapes,
    *,
    marked: bool,
    rows: int,
    before: "Sequence[Found] | None" = None,
) -> Given | None:
    """What is known of both streams of `rows` clips; None: both are generated from nothing.

    Args:
      task: what is asked for.
      given: its latents.
      shapes: of the stage.
      marked: whether the model has the keyframe embedding.
      rows: clips.
      before: latents that the clips start from, of a stage after the first.
    """
    video = audio = None
    if task.picture:
        video = _video(task, given, shapes, marked, rows)
        if task.slots:
            at = geometry.evenly_spaced_keyframes(task.slots, task.num_frames)
            slots = None if before is None else np.stack([clip.slots for clip in before])
            video = conditioning.keyframe_slots(video, at, task.fps, shapes.strides, slots)
    if task.sound or task.audio is not None:
        audio = _audio(given, shapes, rows)
    both = video is not None and audio is not None
    if both and before is None and not _known(video) and not _known(audio):
        return None
    return Given(video, audio)


def beside(task: Task, shapes: Sequence[Shapes]) -> list[int]:
    """Numbers of video tokens of which some are put beside those of the clip, in any stage.

    A mesh that divides these, too, divides all that a stage is given.
    """
    found = []
    if task.keyframes or task.slots or any(image.frame for image in task.images):
        found += [math.prod(shape.video[1:]) for shape in shapes]
    for read in task.references:
        rows, columns = shapes[0].video[1:]
        found.append(rows // read.downscale * (columns // read.downscale))
    return found


def _known(c: Conditions) -> bool:
    return c.frozen or c.strength is not None or c.clip_tokens < c.clean.shape[1]


def _video(task: Task, given: Encoded, shapes: Shapes, marked: bool, rows: int) -> Conditions:
    clean = given.video
    if clean is None:
        clean = np.zeros((*shapes.video, shapes.channels), np.float32)
    c = conditioning.of_video(_rows(clean, rows), task.fps, shapes.strides, marked=marked)
    if given.video_given is not None:
        if given.video_given.all():
            return conditioning.freeze(c)
        per_frame = math.prod(shapes.video[1:])
        c = conditioning.give(c, np.repeat(given.video_given, per_frame))
    beside = {"fps": task.fps, "strides": shapes.strides}
    for image in given.images:
        if image.frame == 0:
            c = conditioning.frames(c, _rows(image.latents, rows), 0, _strength(image))
        else:  # a latent stands for several frames, an image for one: it is given beside them
            c = conditioning.keyframe(c, _rows(image.latents, rows), image.frame,
                                      strength=_strength(image), **beside)  # fmt: skip
    for image in given.keyframes:
        c = conditioning.keyframe(c, _rows(image.latents, rows), image.frame,
                                  strength=_strength(image), **beside)  # fmt: skip
    for clip in given.references:
        read = clip.reference
        c = conditioning.reference_video(
            c,
            _rows(clip.latents, rows),
            spatial_scale=read.downscale,
            temporal_scale=read.time_scale,
            strength=_strength(clip),
            attention=None if read.attention == 1 else read.attention,
            **beside,
        )
    return c


def _audio(given: Encoded, shapes: Shapes, rows: int) -> Conditions:
    clean = given.audio
    if clean is None:
        clean = np.zeros((shapes.audio, shapes.bins, shapes.audio_channels), np.float32)
    c = conditioning.of_audio(_rows(clean, rows), shapes.clock)
    if given.audio_given is not None:
        if given.audio_given.all():
            return conditioning.freeze(c)
        c = conditioning.give(c, given.audio_given)
    if given.voice is not None:
        times = geometry.audio_positions(len(given.voice), shapes.clock)
        before = times - times[..., -1:, 1:] - np.float32(VOICE_GAP)
        c = conditioning.reference_audio(c, _rows(given.voice, rows), before)
    return c


def _strength(placed: Placed) -> float | None:
    return None if placed.strength == 1 else placed.strength


def _rows(latents: np.ndarray, rows: int) -> np.ndarray:
    return np.repeat(latents[None].astype(np.float32), rows, axis=0)


# -------------------------------------------------------------------------------------- guidance


def passes(stage: Stage, given: Given | None) -> tuple[tuple[Pass, ...], list[Any], Any, Guidance]:
    """The passes beside that under the prompt, their strengths, rescale factors, and the rest.

    A stream that is missing or frozen is not guided; without the other stream there is nothing to
    be led away from.
    """
    streams = [stage.video, stage.audio]
    runs, both = [True, True], True
    if given is not None:
        runs = [c is not None and not c.frozen for c in given]
        both = all(c is not None for c in given)

    def numbers(of: Callable[[Any], float]) -> tuple[np.float32, np.float32]:
        return tuple(np.float32(of(s) if on else 0) for s, on in zip(streams, runs, strict=True))

    blocks = [s.stg_blocks if s.stg and on else () for s, on in zip(streams, runs, strict=True)]
    # A sound that is given is heard under the prompt in all passes.
    heard = True if given is not None and given.audio is not None and not runs[1] else None
    choices = [
        (Pass(prompt=False, audio_prompt=heard), numbers(lambda s: s.cfg - 1)),
        (Pass(skipped=blocks[0], audio_skipped=blocks[1]), numbers(lambda s: s.stg)),
    ]
    if both:
        choices.append((Pass(exchange=False), numbers(lambda s: s.modality - 1)))
    needed = [(p, pair) for p, pair in choices if any(pair)]
    factors = numbers(lambda s: s.rescale)
    rescales = factors if needed and any(factors) else None
    how = replace(stage.how, skip_steps=(stage.video.skip_step, stage.audio.skip_step))
    return tuple(p for p, _ in needed), [pair for _, pair in needed], rescales, how


# ------------------------------------------------------------------------------------- the stage


class Found(NamedTuple):
    """Latents of a clip; None of a stream that is not there."""

    video: np.ndarray | None = None  # [F', H', W', C]
    audio: np.ndarray | None = None  # [A, M, C]
    slots: np.ndarray | None = None  # [K, H', W', C], keyframes that the model made for itself


@dataclass(frozen=True)
class Program:
    """The compiled sampler of a model on a mesh, and whether it has the keyframe embedding."""

    sample: Callable[..., tuple[jax.Array, ...]]  # `programs.make_sampler()`
    graph: Any
    mesh: jax.sharding.Mesh
    marked: bool


def run(
    stage: Stage,
    program: Program,
    params: Any,
    shapes: Shapes,
    task: Task,
    encoded: Encoded,
    text: dict[str, np.ndarray],
    seeds: Sequence[int],
    before: Sequence[Found] | None,
    *,
    number: int,
    batch: int,
    noises: tuple[Any, Any] = (None, None),
) -> list[Found]:
    """Latents of every clip.

    Args:
      stage: what to do.
      program: the sampler.
      params: its weights.
      shapes: of the latents.
      task: what is asked for.
      encoded: what is given.
      text: fields of all prompts, and of the negative one at the end.
      seeds: one a clip.
      before: latents that the clips start from, at this size; None in the first stage.
      number: of the stage, from 0; its noise differs from that of others.
      batch: clips at a time, at most.
      noises: in the place of those drawn; see `programs.sample`.
    """
    given = partial(conditions, task, encoded, shapes, marked=program.marked)
    others, strengths, rescales, how = passes(stage, given(rows=1))
    shards = batch_shards(program.mesh)
    shards //= math.gcd(shards, len(others) + 1)
    size = -(-min(batch, len(seeds)) // shards) * shards
    sigmas = stage.sigma_values(math.prod(shapes.video))
    made: list[Found] = []
    silent = True if hosts.index() else None  # or where nobody looks
    for first in tqdm(range(0, len(seeds), size), desc=f"stage {number + 1}", disable=silent):
        rows = np.minimum(np.arange(first, first + size), len(seeds) - 1)
        start = None if before is None else [before[row] for row in rows]
        with jax.set_mesh(program.mesh), jax.enable_x64(False):
            latents = program.sample(
                params,
                (
                    {name: value[rows] for name, value in text.items()},
                    {name: value[-1:] for name, value in text.items()},
                ),
                np.asarray(seeds, np.uint32)[rows],
                jax.random.key(number),
                sigmas,
                tuple(strengths),
                rescales,
                given(rows=size, before=start),
                None if start is None else _placed(start, program.mesh),
                noises,
                graphdef=program.graph,
                request=shapes.request(task.fps),
                passes=others,
                stepper=stage.step,
                guidance=how,
            )
        streams = [None if x is None else hosts.whole(x) for x in latents]
        clips = range(min(size, len(seeds) - first))
        made += [Found(*(None if x is None else x[i] for x in streams)) for i in clips]
    return made


def _placed(
    start: Sequence[Found], mesh: jax.sharding.Mesh
) -> tuple[jax.Array | None, jax.Array | None]:
    """Latents of some clips, where the sampler leaves those that it makes in their place."""

    def place(clips: Sequence[np.ndarray | None]) -> jax.Array | None:
        if clips[0] is None:
            return None
        names = (rows_axis(len(clips)), *[None] * clips[0].ndim)
        return jax.device_put(np.stack(clips), sharding_of(mesh, *names))

    return place([clip.video for clip in start]), place([clip.audio for clip in start])
