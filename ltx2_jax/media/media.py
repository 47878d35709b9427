"""Clips on disk and in memory: mp4 through PyAV, wav through soundfile.

The only file that imports `av`. Time zero of a clip is its first picture, for the sound too: audio
is placed by its timestamps relative to that picture, so a codec's delay never shifts the two apart.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing
from ltx2_jax.media.clip_files import found
from ltx2_jax.media.picture import orientation, shown_width, to_rgb, with_colours
from ltx2_jax.media.sound import SoundTrack, to_stereo
from ltx2_jax.media.timing import FrameClock, paced, resampled
from ltx2_jax.media.tracks import best_stream
from ltx2_jax.models.codecs.resample import resample

AAC_SAMPLE_RATES = (
    *(7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000),
    *(44100, 48000, 64000, 88200, 96000),
)
# Titles and the like are not looked at, and may be in any encoding. PyAV >= 19 never minds.
_ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
BT709 = 1  # the code of H.273 for matrix, primaries and transfer
LIMITED_RANGE = 1
SHOWN_BYTES = 2**25  # of a clip that is put into the page of a notebook
_ABOUT = "comment"  # the tag of containers for what made a clip
DEINTERLACED = "interlaced, with its fields made whole pictures (bwdif)"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A picture track with its sound.

    video: uint8 [F, H, W, 3], RGB. fps: frames per second. audio: float32 [samples, channels] in
    [-1, 1], or None for a silent medium (which is not the same as a track of zeros). notes: what
    reading it had to do that the user should know, such as a conversion of colours. about: what
    made the clip, a text for the metadata of the files it is saved as.
    """

    video: np.ndarray
    fps: float
    audio: np.ndarray | None = None
    sample_rate: int = 16000
    notes: tuple[str, ...] = ()
    about: str = ""

    @property
    def duration(self) -> float:
        """Seconds of picture, a frame of which lasts 1 / fps; of sound, if there is no picture."""
        if not len(self.video) and self.audio is not None:
            return len(self.audio) / self.sample_rate
        return len(self.video) / self.fps

    def save(self, path: str | os.PathLike) -> None:
        """Writes .mp4 (H.264 + AAC), .wav (the sound alone) or .png (see `write_pngs`), by suffix.

        Raises UserError for another suffix, for a .wav of a clip without sound, and as `write_mp4`.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".mp4":
            write_mp4(path, self)
        elif suffix == ".png":
            write_pngs(path, [self.video])
        elif suffix == ".wav":
            if self.audio is None:
                raise UserError(f"{path}: the clip has no sound to write; save it as .mp4")
            write_wav(path, self.audio, self.sample_rate)
        else:
            name = suffix or "no suffix"
            raise UserError(f"{path}: cannot save as {name!r}; use .mp4 or .wav, or .png")

    def _repr_html_(self) -> str:
        """A player for notebooks, with the whole clip in it."""
        buffer, no_picture = io.BytesIO(), not len(self.video)
        if no_picture and self.audio is None:
            return "<p>an empty clip</p>"
        if no_picture:
            soundfile.write(buffer, np.clip(self.audio, -1, 1), self.sample_rate, format="WAV")
        else:
            _mux(buffer, self, [], crf=18, name="clip")
        if len(buffer.getvalue()) > SHOWN_BYTES:
            size = len(buffer.getvalue()) / 2**20
            return (
                f"<p>a clip of {self.duration:.1f} s: its {size:.0f} MiB are too many to show in a "
                "notebook; <code>clip.save</code> writes it to a file</p>"
            )
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        if no_picture:
            return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
        width = max(256, self.video.shape[2])
        about = html.escape(f"{len(self.video)} frames at {self.fps:g} fps")
        return (
            f'<video controls loop width="{width}" title="{about}" '
            f'style="image-rendering: pixelated" src="data:video/mp4;base64,{data}"></video>'
        )


# ---------------------------------------------------------------- reading


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
    path = Path(path)
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
    path = Path(path)
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
    path, notes = Path(path), set()
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
    path, notes = Path(path), set()
    with _opened(path) as container:
        video, _, _ = _decode_video(container, 1, None, 1.0, notes, None)
        if not len(video):
            raise UserError("holds no picture")
    return video[0]


def read_whole_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Reads the sound of any file that has some: (float32 [samples, 1 or 2], sample rate).

    Time zero is the first picture, if it has pictures, and their time is that of the sound.

    Raises UserError when the file is missing or unreadable, or has no sound.
    """
    path = Path(path)
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
    with _opened(Path(path)) as container:
        return container.metadata.get(_ABOUT, "")


def read_wav(path: str | os.PathLike, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Reads a sound file: (float32 [samples, channels], sample rate), resampled if a rate is given.

    Raises UserError when the file is missing or unreadable.
    """
    path = Path(path)
    try:
        file = found(path)
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


# ---------------------------------------------------------------- writing


def write_mp4(path: str | os.PathLike, clip: Clip, *, crf: int = 18) -> None:
    """Writes H.264 (yuv420p, BT.709) and AAC, atomically; folders on the way are created.

    crf: x264's constant quality, 0 (lossless) to 51. A clip whose audio is None gets no audio
    stream. Raises UserError for odd sizes, an empty clip, a sample rate AAC lacks, sound that is
    not mono or stereo or not finite, and a file that cannot be written.
    """
    with replacing(path, av.error.FFmpegError) as temporary:
        _mux(_url(temporary), clip, [], crf=crf, name=str(path))


def through_h264(image: np.ndarray, crf: int) -> np.ndarray:
    """An image [H, W, 3] as it looks in a film of quality `crf`; uint8, sizes made even by a crop.

    Released models were trained on frames of films, and move an image that looks like one better.
    One picture of H.264 (preset veryfast, yuv420p), as in `ltx_pipelines/utils/media_io`.
    """
    height, width = (size // 2 * 2 for size in image.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
    buffer = io.BytesIO()
    _quiet()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, format="mp4") as container:
        return next(container.decode(container.streams.video[0])).to_ndarray(format="rgb24")


def write_pngs(path: str | os.PathLike, chunks: Iterable[np.ndarray]) -> list[Path]:
    """Writes frames uint8 [f, H, W, 3], in time order, as NAME-00000.png and on beside `path`.

    `path` is NAME.png. Returns the files. Raises UserError when one cannot be written.
    """
    path, written = Path(path), []
    for image in itertools.chain.from_iterable(chunks):
        written.append(path.with_name(f"{path.stem}-{len(written):05d}.png"))
        encoder = av.CodecContext.create("png", "w")
        encoder.height, encoder.width = image.shape[:2]
        encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        with replacing(written[-1], av.error.FFmpegError) as temporary:
            temporary.write_bytes(b"".join(map(bytes, packets)))
    return written


def stream_mp4(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],  # uint8 [f, H, W, 3]
    *,
    fps: float,
    audio: np.ndarray | None = None,  # [samples, 1 or 2] in [-1, 1]
    sample_rate: int = 16000,
    crf: int = 18,
    about: str = "",
) -> None:
    """`write_mp4` of a clip that arrives in pieces, in time order; one piece is held at a time.

    Nothing is left under `path` when the chunks end with an exception. Raises UserError as
    `write_mp4` does; chunks without a frame are passed over, but there must be one with some.
    """
    chunks = (chunk for chunk in chunks if len(chunk))
    first = next(chunks, np.zeros((0, 2, 2, 3), np.uint8))
    # A copy of one frame, so that nothing keeps the first piece alive once it is encoded.
    clip = Clip(first[:1].copy(), fps, audio, sample_rate, about=about)
    rest = itertools.chain(iter([first[1:]]), chunks)
    del first
    with replacing(path, av.error.FFmpegError) as temporary:
        _mux(_url(temporary), clip, rest, crf=crf, name=str(path))


def write_wav(
    path: str | os.PathLike,
    audio: np.ndarray,  # [samples, channels] or [samples], in [-1, 1]
    sample_rate: int,
) -> None:
    """Writes 16-bit PCM, atomically; values outside [-1, 1] are clipped.

    Raises UserError when the file cannot be written.
    """
    _check_finite(audio, str(path))
    with replacing(path, soundfile.SoundFileError) as temporary:
        soundfile.write(
            temporary, np.clip(audio, -1, 1), sample_rate, format="WAV", subtype="PCM_16"
        )


# ---------------------------------------------------------------- decoding


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """An open container; whatever is found wrong inside the block becomes a UserError.

    The block's own UserErrors get the path in front.
    """
    _quiet()
    try:
        file = found(path)
        if file.is_dir():
            raise UserError("is a folder, not a video file")
        with av.open(_url(file), **_ANY_TITLE) as container:
            yield container
    except TooShort as error:
        raise TooShort(f"{path}: {error}", error.frames) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # Not only libav's errors: PyAV refuses sound that changes its format on the way, for one. A bad
    # clip among thousands must not end the work on all.
    except Exception as error:
        raise UserError(f"{path}: not a readable video file ({reason(error)})") from None


def _url(path: str | os.PathLike) -> str:
    """A path as libav takes it; without the scheme, a colon in a name would end one."""
    return f"file:{os.fspath(path)}"


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
    stream = best_stream(container, "video")
    if stream is None:
        cover = " but its cover" if container.streams.video else ""
        raise UserError(f"the file has no video stream{cover}")
    if stream.codec_context.width * stream.codec_context.height >= 256 * 256:
        stream.thread_type = "AUTO"  # for small pictures, starting threads takes longer
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


# ---------------------------------------------------------------- encoding


def _mux(
    target: str | io.BytesIO, clip: Clip, more: Iterable[np.ndarray], *, crf: int, name: str
) -> None:
    """Encodes a clip, with `more` frames after its own, into a file name or a file object.

    `name` is what errors call it.
    """
    _check_clip(clip, name)
    _quiet()
    _, height, width, _ = clip.video.shape
    # The index goes to the front, so that players can stream; libav does it by opening the file
    # a second time, which a file object does not allow.
    options = {"movflags": "+faststart"} if isinstance(target, str) else {}
    with av.open(target, "w", format="mp4", container_options=options) as container:
        if clip.about:
            container.metadata[_ABOUT] = clip.about
        # 1001 keeps the broadcast rates exact: 29.97 is 30000 / 1001.
        rate = Fraction(clip.fps).limit_denominator(1001)
        pictures = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        context = pictures.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if height * width < 256 * 256:
            context.thread_count = 1  # for small pictures, starting threads takes longer
        sound = None
        if clip.audio is not None:
            sound = container.add_stream("aac", rate=int(clip.sample_rate))
            sound.layout = "mono" if clip.audio.shape[1] == 1 else "stereo"
            sound.bit_rate = 64000 * clip.audio.shape[1]
        converter = VideoReformatter()
        for image in itertools.chain(clip.video, itertools.chain.from_iterable(more)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = converter.reformat(
                frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if sound is not None:
            if len(clip.audio):
                frame = _audio_frame(np.clip(clip.audio, -1, 1), clip.sample_rate)
                container.mux(sound.encode(frame))
            container.mux(sound.encode())


def _check_clip(clip: Clip, name: str) -> None:
    video, audio = clip.video, clip.audio
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise UserError(
            f"{name}: video must be uint8 [F, H, W, 3], not {video.dtype} {list(video.shape)}"
        )
    if not video.size:
        raise UserError(f"{name}: the clip has no pictures to write")
    if not clip.fps > 0:
        raise UserError(f"{name}: fps must be positive, not {clip.fps}")
    check_even(*video.shape[1:3], name)
    if audio is None:
        return
    if audio.ndim != 2 or audio.shape[1] not in (1, 2):
        raise UserError(f"{name}: audio must be [samples, 1 or 2], not {list(audio.shape)}")
    if clip.sample_rate not in AAC_SAMPLE_RATES:
        rates = ", ".join(map(str, AAC_SAMPLE_RATES))
        raise UserError(f"{name}: AAC has no sample rate {clip.sample_rate}; resample to {rates}")
    _check_finite(audio, name)


def check_even(height: int, width: int, name: str = "clips") -> None:
    """UserError, about `name`, for a size that an mp4 cannot have."""
    if height % 2 or width % 2:
        raise UserError(
            f"{name}: H.264 in yuv420p needs even sizes; height {height} x width {width} is not"
        )


def _check_finite(audio: np.ndarray, name: str) -> None:
    if not np.isfinite(audio).all():
        raise UserError(f"{name}: the audio holds NaN or infinity")


def _audio_frame(audio: np.ndarray, sample_rate: int) -> av.AudioFrame:
    """[samples, 1 or 2] -> one libav frame that starts at time zero."""
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(audio.T, dtype=np.float32),
        format="fltp",
        layout="mono" if audio.shape[1] == 1 else "stereo",
    )
    frame.sample_rate = int(sample_rate)
    frame.pts, frame.time_base = 0, Fraction(1, int(sample_rate))
    return frame


# ---------------------------------------------------------------- small pieces


def _quiet() -> None:
    """libx264 prints a summary and libav warns on every damaged packet; errors reach us anyway."""
    av.logging.set_level(None)
    av.logging.set_libav_level(av.logging.PANIC)


def _fit_length(audio: np.ndarray, length: int) -> np.ndarray:
    """Trims or zero-pads [samples, channels] at the end."""
    audio = np.asarray(audio[:length], np.float32)
    return np.pad(audio, ((0, length - len(audio)), (0, 0)))
