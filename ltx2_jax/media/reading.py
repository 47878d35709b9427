"""Films and sounds on disk, read into clips: through PyAV, and wav through soundfile.

Time zero of a clip is its first picture, for the sound too: audio is placed by its timestamps
relative to that picture, so a codec's delay never shifts the two apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from etils import epath

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.media.clip_files import here
from ltx2_jax.media.copies import placed
from ltx2_jax.media.picture import orientation, shown_width, to_rgb, with_colours
from ltx2_jax.media.sound import SoundTrack, to_stereo
from ltx2_jax.media.timing import FrameClock, paced, resampled
from ltx2_jax.media.tracks import best_stream
from ltx2_jax.media.writing import ABOUT, Clip, file_url, quiet
from ltx2_jax.models.codecs.resample import resample

# Titles and the like are not looked at, and may be in any encoding. PyAV >= 19 never minds.
_ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
DEINTERLACED = "interlaced, with its fields made whole pictures (bwdif)"


def read_clip(
    path: str | os.PathLike,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    sample_rate: int | None = None,
    start: float = 0.0,
) -> Clip:
    """Reads the beginning of a video file, or a part of it from `start` seconds on.

    num_frames: take the first so many frames; None takes all. fps: resample by taking, at every
    output time, the source frame nearest in time; None keeps the file's frames and rate. height,
    width: scale to cover this size, then crop the centre (both or neither). sample_rate: resample
    the sound; None keeps the file's rate.

    The sound comes back as stereo (see `to_stereo`), float32 [round(F / fps * sample_rate), 2],
    trimmed or padded with zeros; it is None where the file has no audio stream.

    Pictures are as they are meant to be seen: upright, of square pixels, with whole pictures made
    of fields, in SDR and BT.709 (`ltx2_jax.media.colour`). Of several tracks, the film's
    (`ltx2_jax.media.tracks`). The clip's notes say what was done.

    Raises UserError, naming the file, when it is missing, unreadable, has no video stream, no
    frames, fewer frames than asked for, timestamps that run backwards or leave a hole, colours that
    no rule turns into SDR, or, with fps None, frames that do not keep to its rate.
    """
    path = placed(path)
    if (height is None) != (width is None):
        raise UserError(f"{path}: give both height and width, or neither")
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if value is not None and value < 1:
            raise UserError(f"{path}: {name} must be at least 1, not {value}")
    for name, value in (("fps", fps), ("sample_rate", sample_rate)):
        if value is not None and not value > 0:
            raise UserError(f"{path}: {name} must be positive, not {value}")
    size = None if height is None else (height, width)
    notes: set[str] = set()
    if not 0 <= start < float("inf"):
        raise UserError(f"{path}: start must be seconds from 0 on, not {start}")
    with _opened(path) as container:
        begin = _sought(container, "video", start)
        video, origin, rate = _decode_video(container, num_frames, size, fps, notes, begin)
        if len(video) == 0:
            raise UserError("the video stream has no frames")
        if num_frames is not None and len(video) < num_frames:
            at = f" at {fps:g} fps" if fps is not None else ""
            raise TooShort(
                f"{num_frames} frames wanted, but it has only {len(video)}{at}", len(video)
            )
        if not rate > 0:
            raise UserError("the file does not say its frame rate; convert it to mp4 first")
    duration = len(video) / rate
    audio, source_rate = None, sample_rate or 16000
    with _opened(path) as container:
        if container.streams.audio:
            _sought(container, "audio", start)
            audio, source_rate = _decode_audio(container, origin, duration, notes)
    if audio is not None:
        if sample_rate is not None:
            audio = resample(audio, source_rate, sample_rate)
            source_rate = sample_rate
        audio = _fit_length(audio, round(duration * source_rate))
    return Clip(video, rate, audio, source_rate, tuple(sorted(notes)))


class TooShort(UserError):
    """A file has fewer frames than asked for: `frames` from there on."""

    def __init__(self, text: str, frames: int):
        super().__init__(text)
        self.frames = frames


@dataclasses.dataclass(frozen=True)
class FileSize:
    """What a file holds, by what it says: frames and size as shown, seconds, and whether sound.

    `num_frames` and `fps` are 0 where there is no picture.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    seconds: float
    has_sound: bool


def file_size(path: str | os.PathLike) -> FileSize:
    """What a film or a sound file holds; only its first picture is decoded.

    Raises UserError as `read_clip` does where there is neither picture nor sound.
    """
    path = placed(path)
    with _opened(path) as container:
        stream, sound = best_stream(container, "video"), best_stream(container, "audio")
        total = (container.duration or 0) / av.time_base
        if stream is None:
            if sound is None:
                raise UserError("the file has no video stream and no sound")
            own = sound.duration * sound.time_base if sound.duration else 0
            return FileSize(0, 0, 0, 0.0, float(own) or total, True)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        own = float(stream.duration * stream.time_base) if stream.duration else total
        frames = stream.frames or round(own * rate) or 1
        for _, frame in _pictures(container, stream, set()):
            shown = frame.height, shown_width(frame.width, stream.sample_aspect_ratio)
            height, width = shown[::-1] if orientation(frame)[0] else shown
            seconds = frames / rate if rate else own
            return FileSize(frames, height, width, rate, seconds, sound is not None)
        raise UserError("the video stream has no frames")


def read_sound(
    path: str | os.PathLike, *, seconds: float, sample_rate: int, start: float = 0.0
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads the sound of any file: float32 [round(seconds * sample_rate), 2], and its notes.

    Trimmed or padded with zeros, from `start` seconds on. Raises UserError as `read_clip` does, and
    where there is no sound.
    """
    path, notes = placed(path), set()
    with _opened(path) as container:
        if not container.streams.audio:
            raise UserError("the file has no sound")
        _sought(container, "audio", start)
        stream = best_stream(container, "audio")
        first = float((stream.start_time or 0) * stream.time_base)
        audio, rate = _decode_audio(container, first + start, seconds, notes)
    audio = _fit_length(resample(audio, rate, sample_rate), round(seconds * sample_rate))
    return audio, tuple(sorted(notes))


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a still image, uint8 [H, W, 3]: upright, RGB; of a film the first picture.

    Raises UserError when the file is missing or unreadable.
    """
    path, notes = placed(path), set()
    with _opened(path) as container:
        video, _, _ = _decode_video(container, 1, None, 1.0, notes, None)
        if not len(video):
            raise UserError("holds no picture")
    return video[0]


def small_frames(
    path: str | os.PathLike, height: int, width: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Every picture of a film, averaged to a size: seconds after the first, uint8 [H, W, 3].

    As it is stored: neither upright nor cropped. One is held at a time.

    Raises UserError as `read_clip` does, where it comes to what cannot be read.
    """
    path, converter = placed(path), VideoReformatter()
    with _opened(path) as container:
        stream = _film_stream(container)
        clock = FrameClock(float(stream.average_rate or stream.guessed_rate or 0))
        for stamp, frame in _pictures(container, stream, set()):
            time = clock.tick(stamp)
            small = converter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation="AREA"
            )
            yield time, small.to_ndarray()


def read_whole_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Reads the sound of any file that has some: (float32 [samples, 1 or 2], sample rate).

    Time zero is the first picture, if it has pictures, and their time is that of the sound.

    Raises UserError when the file is missing or unreadable, or has no sound.
    """
    path = placed(path)
    with contextlib.suppress(UserError):  # exact to the sample, of what soundfile knows
        audio, rate = read_wav(path)
        return (audio if audio.shape[1] < 3 else to_stereo(audio)), rate
    with _opened(path) as container:
        pictures = best_stream(container, "video") is not None
        if not container.streams.audio:
            raise UserError("has no sound")
        if not pictures:
            seconds = (container.duration or 0) / av.time_base
            audio, rate = _decode_audio(container, 0.0, seconds or 3600.0, set())
            return audio[: round(seconds * rate) or None], rate
    clip = read_clip(path)
    return clip.audio, clip.sample_rate


def read_about(path: str | os.PathLike) -> str:
    """What a file says of how it was made, "" if nothing: `Clip.about`.

    Raises UserError when the file is missing or unreadable.
    """
    with _opened(placed(path)) as container:
        return container.metadata.get(ABOUT, "")


def read_wav(path: str | os.PathLike, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Reads a sound file: (float32 [samples, channels], sample rate), resampled if a rate is given.

    Raises UserError when the file is missing or unreadable.
    """
    path = placed(path)
    try:
        with here(path) as file:
            if not file.is_file():
                raise UserError("no such file")
            # In full, because "-" would be the standard input.
            audio, rate = soundfile.read(file.absolute(), dtype="float32", always_2d=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path}: not a readable sound file ({reason(error)})") from None
    if sample_rate is not None:
        audio, rate = resample(audio, rate, sample_rate), sample_rate
    return audio, rate


# ---------------------------------------------------------------- decoding


@contextlib.contextmanager
def _opened(path: Path | epath.Path) -> Iterator[av.container.InputContainer]:
    """An open container; whatever is found wrong inside the block becomes a UserError.

    The block's own UserErrors get the path in front.
    """
    quiet()
    try:
        with here(path) as file:
            if file.is_dir():
                raise UserError("is a folder, not a video file")
            with av.open(file_url(file), **_ANY_TITLE) as container:
                yield container
    except TooShort as error:
        raise TooShort(f"{path}: {error}", error.frames) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # Not only libav's errors: PyAV refuses sound that changes its format on the way, for one. A bad
    # clip among thousands must not end the work on all.
    except Exception as error:
        raise UserError(f"{path}: not a readable video file ({reason(error)})") from None


def _sought(container: av.container.InputContainer, kind: str, seconds: float) -> float | None:
    """Moves to the last key frame before `seconds` after the first picture; None at the beginning.

    Returns the time in the file's own clock. What lies between is left to the caller to skip; a
    file that cannot be moved in is decoded from its beginning.
    """
    if not seconds:
        return None
    video = best_stream(container, "video")
    stream = best_stream(container, kind, related=video) if kind == "audio" else video
    first = video or stream
    if first is None:
        return None
    begin = float((first.start_time or 0) * first.time_base) + seconds
    margin = 0.5 if kind == "audio" else 0.0  # decoders of sound need the packets before
    with contextlib.suppress(av.FFmpegError):
        container.seek(max(0, round((begin - margin) / stream.time_base)), stream=stream)
    return begin


def _from(
    frames: Iterable[tuple[float | None, av.VideoFrame]], begin: float | None, rate: float
) -> Iterator[tuple[float | None, av.VideoFrame]]:
    """Those from `begin` on, by the time in the file's clock."""
    for stamp, frame in frames:
        if begin is None or stamp is None or stamp >= begin - 0.5 / (rate or 25):
            yield stamp, frame


def _decode_video(
    container: av.container.InputContainer,
    num_frames: int | None,
    size: tuple[int, int] | None,
    fps: float | None,
    notes: set[str],
    begin: float | None,
) -> tuple[np.ndarray, float, float]:
    """-> uint8 [F, H, W, 3], the first frame's time in seconds, the output's frames per second."""
    stream = _film_stream(container)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    limit = float("inf") if num_frames is None else num_frames
    clock, frames = FrameClock(rate), _from(_pictures(container, stream, notes), begin, rate)
    if fps is None:
        chosen = paced(frames, clock, rate, limit)
    else:
        chosen = resampled(frames, clock, rate, fps, limit)
    images: list[np.ndarray] = []
    converter = VideoReformatter()  # a frame's own is set up anew, with threads, every time
    for frame, count in chosen:
        image, note = to_rgb(frame, size, stream.sample_aspect_ratio, converter)
        notes.update({note} - {None})
        images += [image] * count
    if len({image.shape for image in images}) > 1:
        raise UserError("its pictures change their size on the way; give one (height and width)")
    video = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
    return video, clock.start or 0.0, rate if fps is None else fps


def _film_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The film's pictures, ready to be decoded."""
    stream = best_stream(container, "video")
    if stream is None:
        cover = " but its cover" if container.streams.video else ""
        raise UserError(f"the file has no video stream{cover}")
    if stream.codec_context.width * stream.codec_context.height >= 256 * 256:
        stream.thread_type = "AUTO"  # for small pictures, starting threads takes longer
    return stream


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream, notes: set[str]
) -> Iterator[tuple[float | None, av.VideoFrame]]:
    """(timestamp, frame) in the order of time. An empty packet shows the frame before again."""
    again: deque[float] = deque()
    last: tuple[float | None, av.VideoFrame] | None = None
    decoded = with_colours(_decoded(container, stream, again), stream.codec_context)
    for frame in _deinterlaced(decoded, notes):
        while again and frame.time is not None and again[0] < frame.time:
            time = again.popleft()
            if last is not None and (last[0] is None or time > last[0]):
                last = time, last[1]
                yield last
        last = frame.time, frame
        yield last
    while last is not None and again:
        time = again.popleft()
        if last[0] is None or time > last[0]:
            last = time, last[1]
            yield last


def _decoded(
    container: av.container.InputContainer, stream: Any, empty: deque[float] | None = None
) -> Iterator[Any]:
    """Frames of one stream, decoded; the times of packets that hold nothing go to `empty`.

    libav takes such a packet for the end. Theora and AVI have them within a film, for a picture
    that does not change.
    """
    last = None
    for packet in container.demux(stream):
        if packet.size:
            yield from packet.decode()
            continue
        last = packet
        stamp = packet.dts if packet.pts is None else packet.pts
        if empty is not None and stamp is not None:
            empty.append(float(stamp * packet.time_base))
    if last is not None:
        yield from last.decode()  # PyAV ends with an empty packet, which is meant as the end


def _deinterlaced(frames: Iterable[av.VideoFrame], notes: set[str]) -> Iterator[av.VideoFrame]:
    """The frames; from the first interlaced one on through libav's bwdif, one for every frame."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            notes.add(DEINTERLACED)
            graph = av.filter.Graph()
            bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base,
            )
            graph.link_nodes(source, bwdif, graph.add("buffersink"))
            graph.configure()
        if graph is None:
            yield frame
            continue
        graph.vpush(frame)
        yield from _drained(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _drained(graph)


def _drained(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.vpull()


def _decode_audio(
    container: av.container.InputContainer, start: float, duration: float, notes: set[str]
) -> tuple[np.ndarray, int]:
    """-> float32 [samples, 2] from `start` on, a little longer than `duration`; its sample rate."""
    stream = best_stream(container, "audio", related=best_stream(container, "video"))
    rate = int(stream.codec_context.sample_rate)
    # Interleaved, because PyAV 18 reads past the planes of a planar frame of eight channels.
    to_float = av.AudioResampler(format="flt")
    track = SoundTrack(rate, duration)
    for decoded in _decoded(container, stream):
        for frame in to_float.resample(decoded):
            interleaved = frame.to_ndarray().reshape(frame.samples, -1)
            time = None if decoded.time is None else decoded.time - start
            track.place(to_stereo(interleaved, frame.layout.name), time)
        if track.full:
            break
    notes.update({track.note} - {None})
    return track.samples, rate


def _fit_length(audio: np.ndarray, length: int) -> np.ndarray:
    """Trims or zero-pads [samples, channels] at the end."""
    audio = np.asarray(audio[:length], np.float32)
    return np.pad(audio, ((0, length - len(audio)), (0, 0)))
