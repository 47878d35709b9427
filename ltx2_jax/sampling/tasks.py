"""What is asked for: the size of a clip, and all that is given of it beside the prompt.

`make_task` reads and checks what a user gives; `given.encode` turns it into latents for one stage.
A stream is generated, given whole (frozen: sound for a picture, a picture for sound), or given but
for a span of time (a retake, an extension). Images, keyframes and references are given beside.
Sources: `ltx_pipelines/{ti2vid_two_stages,a2vid_two_stage,retake,ic_lora,dubit,
keyframe_interpolation}.py`, `ltx_pipelines/utils/helpers.py`.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ltx2_jax.diffusion import geometry
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import (
    Clip,
    read_clip,
    read_image,
    read_whole_sound,
)
from ltx2_jax.models.codecs.inputs import as_stereo

FPS, FRAMES = 24.0, 121
LONGEST = 20.0  # seconds of positions that the released models know
Path = str | os.PathLike
Span = tuple[float, float]  # seconds, from and to


@dataclass(frozen=True)
class Picture:
    """An image, or frames of a clip, that is given at a frame of the clip to be made."""

    pixels: np.ndarray  # uint8 [f, H, W, 3]
    frame: int = 0
    strength: float = 1.0
    crf: int | None = None  # of the H.264 it goes through first; None: the recipe's
    name: str = "image"


@dataclass(frozen=True)
class KnownVideo:
    """Frames of the clip that are there already, from frame `first` on, but for a span."""

    pixels: np.ndarray  # uint8 [F, H, W, 3]
    first: int = 0
    redo: Span | None = None  # of the clip to be made

    def is_whole(self, frames: int) -> bool:
        """Whether nothing of the picture is left to be generated."""
        return self.redo is None and len(self.pixels) == frames


@dataclass(frozen=True)
class KnownAudio:
    """Sound of the clip that is there already, from `start` seconds on, but for a span."""

    samples: np.ndarray  # float32 [samples, channels]
    rate: int
    start: float = 0.0
    redo: Span | None = None

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / self.rate

    def is_whole(self, seconds: float) -> bool:
        """Whether nothing of the sound is left to be generated."""
        return self.redo is None and self.start == 0 and self.end >= seconds - 1e-3


@dataclass(frozen=True)
class Reference:
    """A clip that an IC-LoRA reads beside the one that it makes."""

    pixels: np.ndarray  # uint8 [F, H, W, 3]
    strength: float = 1.0
    attention: float = 1.0  # how much the clip and the reference see of each other
    downscale: int = 1  # how much smaller it is
    time_scale: int = 1  # how many times fewer frames it has


@dataclass(frozen=True)
class Task:
    """One clip, or as many as there are prompts, of one size."""

    num_frames: int
    height: int
    width: int
    fps: float
    picture: bool = True  # False: sound alone
    sound: bool = True  # False: picture alone
    images: tuple[Picture, ...] = ()  # in the place of latent frames
    keyframes: tuple[Picture, ...] = ()  # beside them
    slots: int = 0  # keyframes that the model makes for itself (2.5)
    video: KnownVideo | None = None
    audio: KnownAudio | None = None
    references: tuple[Reference, ...] = ()
    voice: KnownAudio | None = None  # whose voice, or sound, is to be heard
    notes: tuple[str, ...] = ()  # what the user is told

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def fresh(self) -> bool:
        """Whether nothing is given but text and images."""
        return not (self.video or self.audio or self.references or self.voice)

    @property
    def partial(self) -> bool:
        """Whether streams are given in part, or whole and the other made to fit."""
        return self.video is not None or self.audio is not None


# --------------------------------------------------------------------------------- what is asked


@dataclass
class Asked:
    """The arguments of a call that say what the clip is; see `Pipeline.__call__`."""

    num_frames: int | None = None
    duration: float | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    image: Any = None
    keyframes: Any = None
    num_generated_keyframes: int = 0
    audio: Any = None
    audio_start: float = 0.0
    audio_max_duration: float | None = None
    video: Any = None
    start: float | None = None
    end: float | None = None
    retake: str = "both"
    extend: float | None = None
    extend_before: float | None = None
    references: Any = None
    voice: Any = None
    dub: Any = None
    picture: bool = True
    sound: bool = True
    notes: list[str] = field(default_factory=list)


def make_task(
    asked: Asked,
    *,
    strides: tuple[int, int, int],
    multiple: int,
    size: tuple[int, int],
    scales: tuple[int, int] = (1, 1),
    longest: float = LONGEST,
) -> Task:
    """Reads and checks all that is given.

    Args:
      asked: by the user; `num_frames` or `duration` is known, or follows from what is given.
      strides: of the codec.
      multiple: of which height and width must be.
      size: (height, width) where none is asked for.
      scales: how many times smaller, and of fewer frames, references are.
      longest: seconds that the model knows.

    Raises:
      UserError: naming what cannot be.
    """
    _check_together(asked)
    notes = asked.notes
    known = _clip(asked.video, asked.fps, "video") if asked.video is not None else None
    dub, *share = asked.dub if isinstance(asked.dub, tuple) else (asked.dub,)
    dub = _clip(dub, asked.fps, "dub") if dub is not None else None
    guide = known or dub
    fps = asked.fps or (guide.fps if guide else FPS)
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps={fps:g} must be above 0, such as 24 or 25")
    height, width = _size(asked, guide, multiple, size, notes)
    sound = None
    if asked.audio is not None:
        sound = _sound(asked.audio, asked.audio_start, asked.audio_max_duration)
    references = [*several(asked.references), *([(dub, *share)] if dub else [])]
    before, after = (_eights(s, fps, strides[0]) for s in (asked.extend_before, asked.extend))
    frames = _frames(asked, guide, sound, fps, strides[0], before + after, notes)
    fresh = not (known or sound or references) and asked.picture
    if frames / fps > longest + 1e-6 and not fresh:  # else it is made in parts
        notes.append(
            f"{frames / fps:.1f} s are more than the {longest:g} s that the model was trained on: "
            "expect less of what comes later"
        )
    video = audio = None
    if known is not None:
        video, audio = _known(asked, known, frames - before - after, before, fps)
    if sound is not None:
        audio = _fitted(sound, frames / fps, notes)
    # A silent clip whose picture is retaken stays silent.
    silent = known is not None and known.audio is None and asked.start is not None
    task = Task(
        frames,
        height,
        width,
        fps,
        picture=asked.picture,
        sound=asked.sound and not (silent and asked.retake == "video"),
        images=_pictures(asked.image, "image", frames, (height, width), notes),
        keyframes=_pictures(asked.keyframes, "keyframe", frames, (height, width), notes),
        slots=asked.num_generated_keyframes,
        video=video,
        audio=audio,
        references=tuple(_reference(r, frames, fps, scales, notes) for r in references),
        voice=_voice(asked.voice, dub),
        notes=tuple(notes),
    )
    if task.slots:
        geometry.evenly_spaced_keyframes(task.slots, frames)
    return task


def _voice(given: Any, dub: Clip | None) -> KnownAudio | None:
    """Whose voice is heard: the one given, or that of a clip to be dubbed."""
    if given is not None:
        return _sound(given)
    if dub is None or dub.audio is None:
        return None
    return KnownAudio(dub.audio, dub.sample_rate)


def several(given: Any) -> list[Any]:
    """A list as it is; what else is given is one; None and an empty tuple are none."""
    if given is None or (isinstance(given, tuple) and not given):
        return []
    return given if isinstance(given, list) else [given]


def _check_together(asked: Asked) -> None:
    if not (asked.picture or asked.sound):
        raise UserError("neither picture nor sound is asked for")
    if asked.retake not in ("both", "video", "audio"):
        raise UserError(f"retake={asked.retake!r}: choose from both, video, audio")
    if asked.num_frames is not None and asked.duration is not None:
        raise UserError("num_frames and duration: give one of them")
    span = asked.start is not None or asked.end is not None
    grows = asked.extend is not None or asked.extend_before is not None
    if (span or grows) and asked.video is None:
        flag = "start and end" if span else "extend"
        raise UserError(f"{flag}: of which clip? give video= (--video-path)")
    if span and grows:
        raise UserError("start and end with extend: first the one, then the other")
    if span and (asked.start is None or asked.end is None):
        raise UserError("start and end: give both, in seconds")
    for name in ("extend", "extend_before", "duration", "audio_max_duration"):
        value = getattr(asked, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}={value:g} must be above 0 seconds")
    pictures = [*several(asked.image), *several(asked.keyframes)]
    if asked.video is not None and pictures:
        raise UserError("video with image or keyframes: a clip that is given needs no others")
    if asked.video is not None and asked.audio is not None and (span or grows):
        raise UserError("audio with video and a span: the video's own sound is used")
    if not asked.picture and (pictures or several(asked.references)):
        raise UserError("image, keyframes and references need a picture, but sound alone is asked")
    if not asked.sound and (asked.audio is not None or asked.voice is not None):
        raise UserError("audio and voice need sound, but picture alone is asked")
    if asked.dub is not None and asked.video is not None:
        raise UserError("dub and video: give one of them")
    if asked.video is not None and not (span or grows):
        if asked.audio is not None or not asked.sound:
            raise UserError(
                "video alone is given whole, and sound is made for it: nothing is left to make "
                "without sound, or with audio"
            )
    if not asked.picture and asked.video is not None:
        raise UserError("video with sound alone: give the video, and its picture is kept")


def _clip(given: Any, fps: float | None, what: str) -> Clip:
    clip = given if isinstance(given, Clip) else read_clip(given, fps=fps)
    if not len(clip.video):
        raise UserError(f"{what}: has no frames")
    return clip


def _sound(given: Any, start: float = 0.0, longest: float | None = None) -> KnownAudio:
    """A path, a `Clip`, or (samples, rate), from `start` seconds on."""
    if isinstance(given, Clip):
        if given.audio is None:
            raise UserError("audio: the clip has no sound")
        samples, rate = given.audio, given.sample_rate
    elif isinstance(given, tuple):
        samples, rate = given
    else:
        samples, rate = read_whole_sound(given)
    samples = as_stereo(np.asarray(samples, np.float32)[None])[0]
    samples = samples[round(start * rate) :]
    samples = samples if longest is None else samples[: round(longest * rate)]
    if not len(samples):
        raise UserError(f"audio: nothing is left from {start:g} s on")
    return KnownAudio(np.asarray(samples), int(rate))


def _size(
    asked: Asked, guide: Clip | None, multiple: int, default: tuple[int, int], notes: list[str]
) -> tuple[int, int]:
    """Height and width, legal ones."""
    if (asked.height is None) != (asked.width is None):
        raise UserError("height and width: give both, or neither")
    if asked.height is None and guide is not None:
        real = guide.video.shape[1:3]
        size = tuple(max(multiple, round(s / multiple) * multiple) for s in real)
        if size != real:
            notes.append(
                f"the given clip is {real[1]}x{real[0]}: it is made {size[1]}x{size[0]}, the "
                f"nearest size of multiples of {multiple}"
            )
        return size
    height, width = (asked.height, asked.width) if asked.height is not None else default
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            either = f"{below} or {below + multiple}" if below > 0 else f"{multiple}"
            raise UserError(f"{name}={value} is not a multiple of {multiple}: use {either}")
    return height, width


def _eights(seconds: float | None, fps: float, stride: int) -> int:
    """Frames of an extension: whole latents, at least one."""
    return 0 if seconds is None else max(stride, round(seconds * fps / stride) * stride)


def _frames(
    asked: Asked,
    guide: Clip | None,
    sound: KnownAudio | None,
    fps: float,
    stride: int,
    more: int,
    notes: list[str],
) -> int:
    """Frames of the clip to be made."""
    if asked.num_frames is not None and not more:
        wanted = asked.num_frames
        if wanted < 1 or (wanted - 1) % stride:
            below = max((wanted - 1) // stride * stride + 1, 1)
            either = f"{below} or {below + stride}" if wanted > 1 else "1"
            raise UserError(f"num_frames={wanted} is not {stride}*k+1: use {either}")
        if guide is not None and wanted > len(guide.video):
            raise UserError(
                f"num_frames={wanted}, but the given clip has {len(guide.video)} frames; to make "
                "it longer: extend="
            )
        return wanted
    if guide is not None:
        kept = geometry.snap_frames(len(guide.video), stride)
        if kept != len(guide.video):
            notes.append(
                f"{len(guide.video)} frames are not {stride} k + 1: the first {kept} are used"
            )
        return kept + more
    if asked.duration is not None:
        exact = round(asked.duration * fps)
    elif sound is not None:
        exact = round(len(sound.samples) / sound.rate * fps)
    else:
        return FRAMES
    # The nearest legal count, so that a second is a second.
    return max(0, round((exact - 1) / stride)) * stride + 1


def _known(
    asked: Asked, clip: Clip, frames: int, before: int, fps: float
) -> tuple[KnownVideo, KnownAudio | None]:
    """What is there of both streams: in a retake all but the span, else all."""
    pixels, seconds = clip.video[:frames], frames / fps
    span = None
    if asked.start is not None:
        span = (float(asked.start), float(asked.end))
        if not 0 <= span[0] < span[1] <= seconds + 0.5 / fps:
            raise UserError(
                f"start={span[0]:g}, end={span[1]:g}: not a span of the clip, which lasts "
                f"{seconds:.3f} s"
            )
    video = KnownVideo(pixels, before, span if asked.retake in ("both", "video") else None)
    grows = asked.extend is not None or asked.extend_before is not None
    if clip.audio is None or (span is None and not grows):
        return video, None  # sound for a picture
    samples = as_stereo(clip.audio[None])[0][: round(seconds * clip.sample_rate)]
    redo = span if asked.retake in ("both", "audio") else None
    return video, KnownAudio(np.asarray(samples), clip.sample_rate, before / fps, redo)


def _fitted(sound: KnownAudio, seconds: float, notes: list[str]) -> KnownAudio:
    """As long as the clip: cut, or followed by silence."""
    wanted, have = round(seconds * sound.rate), len(sound.samples)
    if abs(have - wanted) > 0.02 * sound.rate:
        what = "its end is left out" if have > wanted else "silence follows it"
        notes.append(f"the sound lasts {have / sound.rate:.2f} s, the clip {seconds:.2f}: {what}")
    samples = np.pad(sound.samples[:wanted], ((0, max(0, wanted - have)), (0, 0)))
    return KnownAudio(samples, sound.rate)


def _pictures(
    given: Any, what: str, frames: int, size: tuple[int, int], notes: list[str]
) -> tuple[Picture, ...]:
    """One or a list of images, or (image, frame, strength, crf); an image is pixels or a path."""
    found = []
    for one in several(given):
        image, *rest = one if isinstance(one, tuple) else (one,)
        named = isinstance(image, str | os.PathLike)
        name = str(image) if named else what
        pixels = np.asarray(image.video if isinstance(image, Clip) else
                            read_image(image) if named else image)  # fmt: skip
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise UserError(f"{name}: not uint8 [H, W, 3], but {pixels.dtype} {pixels.shape}")
        picture = Picture(pixels, *rest, name=name)
        if not -frames <= picture.frame < frames:
            raise UserError(
                f"{name}: frame {picture.frame} is not one of the clip's {frames}, 0 to "
                f"{frames - 1}"
            )
        if not 0 <= picture.strength <= 1:
            raise UserError(f"{name}: strength {picture.strength:g} is not from 0 to 1")
        if picture.crf is not None and not 0 <= picture.crf <= 51:
            raise UserError(f"{name}: CRF {picture.crf} is not from 0 to 51")
        frame = picture.frame % frames
        _tell_crop(pixels.shape[1:3], size, name, notes)
        found.append(Picture(pixels, frame, picture.strength, picture.crf, name))
    return tuple(found)


def _tell_crop(have: tuple[int, int], wanted: tuple[int, int], name: str, notes: list[str]) -> None:
    scale = max(wanted[0] / have[0], wanted[1] / have[1])
    lost = [1 - w / (h * scale) for h, w in zip(have, wanted, strict=True)]
    if max(lost) > 0.01:
        side = "top and bottom" if lost[0] > lost[1] else "left and right"
        notes.append(
            f"{name} is {have[1]}x{have[0]}, the clip {wanted[1]}x{wanted[0]}: {max(lost):.0%} of "
            f"it is cropped, at {side}"
        )


def _reference(
    given: Any, frames: int, fps: float, scales: tuple[int, int], notes: list[str]
) -> Reference:
    """A clip, or (clip, strength), (clip, strength, attention)."""
    source, *rest = given if isinstance(given, tuple) else (given,)
    clip = _clip(source, fps, "reference")
    pixels = clip.video
    if len(pixels) < frames:
        notes.append(
            f"the reference has {len(pixels)} frames, the clip {frames}: its last one is repeated"
        )
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], frames - len(pixels), axis=0)])
    return Reference(pixels[:frames], *rest, downscale=scales[0], time_scale=scales[1])
