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
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing
from ltx2_jax.models.codecs.resample import resample

AAC_SAMPLE_RATES = (
    *(7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000),
    *(44100, 48000, 64000, 88200, 96000),
)
# Timestamps of some containers are rounded to milliseconds. Audio frames follow one another without
# a seam unless their stamps disagree by more than this, which only a real gap does.
AUDIO_GAP_SECONDS = 0.02
SIDE_GAIN = 0.707  # -3 dB, of centre and surround channels in a down-mix
# Titles and the like are not looked at, and may be in any encoding. PyAV >= 19 never minds.
_ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
BT709 = 1  # the code of H.273 for matrix, primaries and transfer
LIMITED_RANGE = 1


@dataclasses.dataclass(frozen=True)
class Clip:
    """A picture track with its sound.

    video: uint8 [F, H, W, 3], RGB. fps: frames per second. audio: float32 [samples, channels] in
    [-1, 1], or None for a silent medium (which is not the same as a track of zeros).
    """

    video: np.ndarray
    fps: float
    audio: np.ndarray | None = None
    sample_rate: int = 16000

    @property
    def duration(self) -> float:
        """Seconds of picture: every frame lasts 1 / fps."""
        return len(self.video) / self.fps

    def save(self, path: str | os.PathLike) -> None:
        """Writes .mp4 (H.264 + AAC) or .wav (the sound alone), by suffix.

        Raises UserError for another suffix, for a .wav of a clip without sound, and as `write_mp4`.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".mp4":
            write_mp4(path, self)
        elif suffix == ".wav":
            if self.audio is None:
                raise UserError(f"{path}: the clip has no sound to write; save it as .mp4")
            write_wav(path, self.audio, self.sample_rate)
        else:
            raise UserError(f"{path}: cannot save as {suffix or 'no suffix'!r}; use .mp4 or .wav")

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        _mux(buffer, self, [], crf=18, name="clip")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        width = max(256, self.video.shape[2])
        title = html.escape(f"{len(self.video)} frames at {self.fps:g} fps")
        return (
            f'<video controls loop width="{width}" title="{title}" '
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
) -> Clip:
    """Reads the beginning of a video file.

    num_frames: take the first so many frames; None takes all. fps: resample by taking, at every
    output time, the source frame nearest in time; None keeps the file's frames and rate. height,
    width: scale to cover this size, then crop the centre (both or neither). sample_rate: resample
    the sound; None keeps the file's rate.

    The sound comes back as stereo (see `to_stereo`), float32 [round(F / fps * sample_rate), 2],
    trimmed or padded with zeros; it is None where the file has no audio stream.

    Raises UserError, naming the file, when it is missing, unreadable, has no video stream, no
    frames, fewer frames than asked for, or, with fps None, frames that do not keep to its rate.
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
    with _opened(path) as container:
        if not container.streams.video:
            raise UserError(f"{path}: the file has no video stream")
        video, start, rate = _decode_video(container, num_frames, size, fps)
    if len(video) == 0:
        raise UserError(f"{path}: the video stream has no frames")
    if num_frames is not None and len(video) < num_frames:
        at = f" at {fps:g} fps" if fps is not None else ""
        raise UserError(f"{path}: {num_frames} frames wanted, but it has only {len(video)}{at}")
    if not rate > 0:
        raise UserError(f"{path}: the file does not say its frame rate; convert it to mp4 first")
    duration = len(video) / rate
    audio, source_rate = None, sample_rate or 16000
    with _opened(path) as container:
        if container.streams.audio:
            audio, source_rate = _decode_audio(container, start, duration)
    if audio is not None:
        if sample_rate is not None:
            audio = resample(audio, source_rate, sample_rate)
            source_rate = sample_rate
        audio = _fit_length(audio, round(duration * source_rate))
    return Clip(video=video, fps=rate, audio=audio, sample_rate=source_rate)


def to_stereo(
    audio: np.ndarray,  # [samples, channels]
    layout: str = "",
) -> np.ndarray:
    """Any channel layout to two channels: float32 [samples, 2].

    Mono is duplicated. 5.1 and 7.1 (libav's order L R C LFE and then pairs of surrounds) keep left
    and right, add centre and the surrounds of their side at 0.707, drop the low-frequency channel
    and are divided by the sum of gains, 2.414 and 3.121. Six or eight channels that the file does
    not name are taken to be these. Every other layout is averaged into both channels. The same
    rules as the official trainer's audio preprocessing, which goes by the number alone.
    """
    channels = audio.shape[1]
    family = layout.partition("(")[0]
    if channels == 2:
        return audio.astype(np.float32)
    surround = {6: "5.1", 8: "7.1"}.get(channels)
    if surround and family in (surround, "", f"{channels} channels"):
        sides = [audio[:, side::2][:, 2:].sum(axis=1) for side in (0, 1)]
        centre = audio[:, 2]
        norm = 1.0 + SIDE_GAIN * (channels // 2 - 1)
        mixed = [(audio[:, i] + SIDE_GAIN * (centre + sides[i])) / norm for i in (0, 1)]
        return np.stack(mixed, axis=1).astype(np.float32)
    return np.repeat(audio.mean(axis=1, keepdims=True), 2, axis=1).astype(np.float32)


def read_wav(path: str | os.PathLike, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Reads a sound file: (float32 [samples, channels], sample rate), resampled if a rate is given.

    Raises UserError when the file is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
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
        _mux(str(temporary), clip, [], crf=crf, name=str(path))


def stream_mp4(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],  # uint8 [f, H, W, 3]
    *,
    fps: float,
    audio: np.ndarray | None = None,  # [samples, 1 or 2] in [-1, 1]
    sample_rate: int = 16000,
    crf: int = 18,
) -> None:
    """`write_mp4` of a clip that arrives in pieces, in time order; one piece is held at a time.

    Nothing is left under `path` when the chunks end with an exception. Raises UserError as
    `write_mp4` does; chunks without a frame are passed over, but there must be one with some.
    """
    chunks = (chunk for chunk in chunks if len(chunk))
    first = next(chunks, np.zeros((0, 2, 2, 3), np.uint8))
    # A copy of one frame, so that nothing keeps the first piece alive once it is encoded.
    clip = Clip(first[:1].copy(), fps, audio, sample_rate)
    rest = itertools.chain(iter([first[1:]]), chunks)
    del first
    with replacing(path, av.error.FFmpegError) as temporary:
        _mux(str(temporary), clip, rest, crf=crf, name=str(path))


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
    """An open container; whatever is found wrong inside the block becomes a UserError."""
    _quiet()
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a video file")
        with av.open(str(path), **_ANY_TITLE) as container:
            yield container
    except UserError:
        raise
    # Not only libav's errors: PyAV refuses sound that changes its format on the way, for one. A bad
    # clip among thousands must not end the work on all.
    except Exception as error:
        raise UserError(f"{path}: not a readable video file ({reason(error)})") from None


def _check_codec(stream: av.stream.Stream) -> None:
    if stream.codec_context is None:
        raise ValueError(f"this libav has no decoder for its {stream.type}")


def _decode_video(
    container: av.container.InputContainer,
    num_frames: int | None,
    size: tuple[int, int] | None,
    fps: float | None,
) -> tuple[np.ndarray, float, float]:
    """-> uint8 [F, H, W, 3], the first frame's time in seconds, the output's frames per second."""
    stream = container.streams.video[0]
    _check_codec(stream)
    if stream.codec_context.width * stream.codec_context.height >= 256 * 256:
        stream.thread_type = "AUTO"  # for small pictures, starting threads takes longer
    source_rate = float(stream.average_rate or stream.guessed_rate or 0)
    limit = float("inf") if num_frames is None else num_frames
    images: list[np.ndarray] = []
    converter = VideoReformatter()  # a frame's own is set up anew, with threads, every time
    start, previous_time, previous = 0.0, 0.0, None

    def take_until(time: float) -> None:
        """Emits the frame before for the output times that lie before `time`."""
        if previous is None or len(images) >= limit or len(images) / fps >= time:
            return
        image = _to_rgb(previous, size, converter)
        while len(images) < limit and len(images) / fps < time:
            images.append(image)

    for index, frame in enumerate(container.decode(stream)):
        if frame.time is None and not source_rate:
            break  # nothing dates this stream; the caller names the file
        time = index / source_rate if frame.time is None else frame.time
        if index == 0:
            start = time
        time -= start
        if fps is None:
            if source_rate and abs(time * source_rate - index) > 0.5:
                raise UserError(
                    f"{container.name}: its frames do not keep to {source_rate:g} per second: "
                    f"number {index} is at {time:.2f} s, not {index / source_rate:.2f} s; give "
                    "one frame rate for all (--fps)"
                )
            images.append(_to_rgb(frame, size, converter))
        else:
            take_until((previous_time + time) / 2)
        previous, previous_time = frame, time
        if len(images) >= limit:
            break
    if fps is not None:
        # A hair less than the end, so that rounding does not add one frame to an exact length.
        take_until(previous_time + 1 / (source_rate or fps) - 1e-6)
    video = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
    return video, start, fps if fps is not None else source_rate


def _to_rgb(
    frame: av.VideoFrame, size: tuple[int, int] | None, converter: VideoReformatter
) -> np.ndarray:
    """uint8 [H, W, 3], upright; with a size, scaled to cover it and cropped in the middle."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # PyAV 14.0 does not tell it
    if size is None:
        return np.ascontiguousarray(
            np.rot90(converter.reformat(frame, format="rgb24").to_ndarray(), turns)
        )
    height, width = size
    frame_height, frame_width = frame.height, frame.width
    if turns % 2:
        frame_height, frame_width = frame_width, frame_height
    scale = max(height / frame_height, width / frame_width)
    full = max(height, round(frame_height * scale)), max(width, round(frame_width * scale))
    scaled_height, scaled_width = full[::-1] if turns % 2 else full
    scaled = converter.reformat(
        frame, scaled_width, scaled_height, format="rgb24", interpolation="BICUBIC"
    )
    image = np.rot90(scaled.to_ndarray(), turns)
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _decode_audio(
    container: av.container.InputContainer, start: float, duration: float
) -> tuple[np.ndarray, int]:
    """-> float32 [samples, 2] from `start` on, a little longer than `duration`; its sample rate."""
    stream = container.streams.audio[0]
    _check_codec(stream)
    rate = int(stream.codec_context.sample_rate)
    # Interleaved, because PyAV 18 reads past the planes of a planar frame of eight channels.
    to_float = av.AudioResampler(format="flt")
    # The resampler's filter looks ahead; a few more samples keep the end as it is in the file.
    length = round(duration * rate) + 256
    track, position = np.zeros((length, 2), np.float32), None
    for decoded in container.decode(stream):
        for frame in to_float.resample(decoded):
            interleaved = frame.to_ndarray().reshape(frame.samples, -1)
            samples = to_stereo(interleaved, frame.layout.name)
            if decoded.time is not None:
                stamped = round((decoded.time - start) * rate)
                if position is None or abs(stamped - position) > AUDIO_GAP_SECONDS * rate:
                    position = stamped
            position = position or 0
            begin, end = max(position, 0), min(position + len(samples), length)
            if begin < end:
                track[begin:end] = samples[begin - position : end - position]
            position += len(samples)
        if position is not None and position >= length:
            break
    return track, rate


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
