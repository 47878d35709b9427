"""What is given of a clip: its latents for a stage, and its own place in the clip that was made.

`encode` turns a task into latents; what a clip keeps of a picture or a sound that was given comes
back as it was, by `kept_frames` and `with_known_sound`.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ltx2_jax.codecs.interface import Codec
from ltx2_jax.diffusion import geometry
from ltx2_jax.media.media import Clip, resample, through_h264
from ltx2_jax.media.picture import covering
from ltx2_jax.models.codecs.inputs import as_stereo
from ltx2_jax.sampling.tasks import KnownAudio, KnownVideo, Picture, Reference, Span, Task

# ------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Placed:
    """Latents that are given beside those of the clip."""

    latents: np.ndarray  # [f, h, w, C]
    frame: int
    strength: float
    reference: Reference | None = None


@dataclass(frozen=True)
class Encoded:
    """What is given, as latents for one stage."""

    video: np.ndarray | None = None  # [F', H', W', C]
    video_given: np.ndarray | None = None  # bool [F'], latent frames; None: nothing
    images: tuple[Placed, ...] = ()
    keyframes: tuple[Placed, ...] = ()
    references: tuple[Placed, ...] = ()
    audio: np.ndarray | None = None  # [A, M, C]
    audio_given: np.ndarray | None = None  # bool [A]
    voice: np.ndarray | None = None  # [A, M, C]


def encode(
    task: Task, codec: Codec, height: int, width: int, crf: int, *, references: bool = True
) -> Encoded:
    """Latents of all that is given, for a stage of this size."""
    strides, fields = codec.video.strides, {}
    frames = (task.num_frames - 1) // strides[0] + 1

    def still(picture: Picture) -> Placed:
        quality = crf if picture.crf is None else picture.crf
        pixels = picture.pixels[: geometry.snap_frames(len(picture.pixels), strides[0])]
        if quality and len(pixels) == 1 and min(pixels.shape[1:3]) > 1:
            pixels = through_h264(pixels[0], quality)[None]
        latents = _encoded(codec, covering(pixels, height, width))
        return Placed(latents, picture.frame, picture.strength)

    def reference(given: Reference) -> Placed:
        rows, columns = height // given.downscale, width // given.downscale
        times = [0, *range(1, len(given.pixels), given.time_scale)]
        pixels = given.pixels[times][: geometry.snap_frames(len(times), strides[0])]
        latents = _encoded(codec, covering(pixels, rows, columns))
        return Placed(latents, 0, given.strength, given)

    if task.video is not None:
        known = _encoded(codec, covering(task.video.pixels, height, width))
        fields["video"], fields["video_given"] = _on_grid(known, task.video, frames, strides[0],
                                                          task.fps)  # fmt: skip
    if task.audio is not None:
        fields["audio"], fields["audio_given"] = _sound_latents(task, codec)
    if task.voice is not None:
        fields["voice"] = _heard(codec, task.voice)
    if references:
        fields["references"] = tuple(map(reference, task.references))
    return Encoded(
        images=tuple(map(still, task.images)),
        keyframes=tuple(map(still, task.keyframes)),
        **fields,
    )


def _encoded(codec: Codec, pixels: np.ndarray) -> np.ndarray:
    """Pixels [f, H, W, 3] from 0 to 255 -> latents [f', h, w, C]."""
    return np.asarray(codec.video.encode(pixels[None].astype(np.float32) / 127.5 - 1))[0]


def _on_grid(
    latents: np.ndarray, known: KnownVideo, frames: int, stride: int, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of known frames on the grid of the clip, and which latent frames they give.

    The first latent stands for one frame, every other one for `stride`. Where frames are put before
    the known ones, the first of those falls into a latent of `stride` frames and is generated anew.
    """
    first = known.first // stride
    clean = np.zeros((frames, *latents.shape[1:]), np.float32)
    given = np.zeros(frames, bool)
    begin = 1 if first else 0
    clean[first + begin : first + len(latents)] = latents[begin:]
    given[first + begin : first + len(latents)] = True
    if known.redo is not None:
        times = geometry.pixel_bounds((frames, 1, 1), (stride, 1, 1))[0, 0] / fps
        given &= ~_overlap(times, known.redo)
    return clean, given


def _overlap(bounds: np.ndarray, span: Span) -> np.ndarray:
    """bool [n] of bounds [n, 2]."""
    return (bounds[:, 1] > span[0]) & (bounds[:, 0] < span[1])


def _sound_latents(task: Task, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """Latents [A, M, C] of the known sound in its place, and which of them are given."""
    clock, known = codec.audio.clock, task.audio
    count = geometry.audio_latent_length(task.num_frames, task.fps, clock.latents_per_second)
    rate = codec.audio.sample_rate
    whole = np.zeros((max(1, round(count / clock.latents_per_second * rate)), 2), np.float32)
    samples = resample(known.samples, known.rate, rate)
    begin = round(known.start * rate)
    samples = samples[: len(whole) - begin]
    whole[begin : begin + len(samples)] = samples
    latents = np.asarray(codec.audio.encode(whole[None]))[0]
    times = geometry.audio_positions(count, clock)[0, 0]
    # The last latent may end a little after the picture.
    inside = (times[:, 0] >= known.start - 1e-6) & (times[:, 1] <= known.end + 0.5 / 25)
    if known.redo is not None:
        inside &= ~_overlap(times, known.redo)
    return latents, inside


def _heard(codec: Codec, sound: KnownAudio) -> np.ndarray:
    """Latents [A, M, C] of a sound by itself."""
    samples = as_stereo(resample(sound.samples, sound.rate, codec.audio.sample_rate)[None])
    return np.asarray(codec.audio.encode(samples))[0]


# ------------------------------------------------------------------------------------ what is kept


def kept_frames(task: Task, stride: int) -> np.ndarray:
    """bool [F]: frames of the clip that are known, and stay as they were given."""
    kept = np.zeros(task.num_frames, bool)
    if (known := task.video) is None:
        return kept
    kept[known.first : known.first + len(known.pixels)] = True
    if known.redo is not None:
        latents = (task.num_frames - 1) // stride + 1
        bounds = geometry.pixel_bounds((latents, 1, 1), (stride, 1, 1))[0, 0].astype(int)
        for begin, end in bounds[_overlap(bounds / task.fps, known.redo)]:
            kept[begin:end] = False
    return kept


def with_known_sound(task: Task, made: np.ndarray, rate: int) -> np.ndarray:
    """Sound that was made, float32 [samples, 2], with what is known of it in its place.

    What was made is changed within 10 ms of the known parts so that nothing clicks.
    """
    known = task.audio
    if known is None:
        return made
    samples = resample(known.samples, known.rate, rate)
    begin = round(known.start * rate)
    samples = samples[: len(made) - begin]
    kept = np.zeros(len(made), bool)
    kept[begin : begin + len(samples)] = True
    if known.redo is not None:
        kept[max(0, round(known.redo[0] * rate)) : round(known.redo[1] * rate)] = False
    whole = made.copy()
    whole[kept] = samples[kept[begin : begin + len(samples)]]
    return _joined(whole, made, kept, round(0.01 * rate))


def _joined(whole: np.ndarray, made: np.ndarray, kept: np.ndarray, fade: int) -> np.ndarray:
    """`whole` [samples, 2] without jumps where known sound, of `kept`, meets what was made.

    The step is taken out of the new sound, and comes back within `fade` samples.
    """
    out = whole.copy()
    for edge in np.flatnonzero(np.diff(kept.astype(np.int8))):
        forwards = kept[edge]  # the new sound begins, or ends, here
        at = edge if forwards else edge + 1
        new = np.arange(edge + 1, min(len(out), edge + 1 + fade)) if forwards else (
            np.arange(edge, max(-1, edge - fade), -1)
        )  # fmt: skip
        new = new[~kept[new]]
        share = 1 - (np.arange(len(new), dtype=np.float32) + 1) / (fade + 1)
        out[new] += share[:, None] * (whole[at] - made[at])
    return out


# ------------------------------------------------------------------------------- in several parts


def last_frames(clip: Clip, frames: int) -> Clip:
    """The end of a clip."""
    audio = clip.audio
    if audio is not None:
        audio = audio[round((len(clip.video) - frames) / clip.fps * clip.sample_rate) :]
    return dataclasses.replace(clip, video=clip.video[-frames:], audio=audio)


def continued(clip: Clip, longer: Clip, shared: int) -> Clip:
    """A clip, and what comes after its last `shared` frames in another one."""
    audio = clip.audio
    if audio is not None:
        rest = longer.audio[round(shared / clip.fps * clip.sample_rate) :]
        audio = np.concatenate([audio, rest])
    return dataclasses.replace(
        clip, video=np.concatenate([clip.video, longer.video[shared:]]), audio=audio
    )
