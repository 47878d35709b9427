"""A clip in memory, and what it is written to: mp4 and PNG through PyAV, wav through soundfile."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import itertools
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter

from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing

AAC_SAMPLE_RATES = (
    *(7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000),
    *(44100, 48000, 64000, 88200, 96000),
)
BT709 = 1  # the code of H.273 for matrix, primaries and transfer
LIMITED_RANGE = 1
SHOWN_BYTES = 2**25  # of a clip that is put into the page of a notebook
ABOUT = "comment"  # the tag of containers for what made a clip


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


# ---------------------------------------------------------------- writing


def write_mp4(path: str | os.PathLike, clip: Clip, *, crf: int = 18) -> None:
    """Writes H.264 (yuv420p, BT.709) and AAC, atomically; folders on the way are created.

    crf: x264's constant quality, 0 (lossless) to 51. A clip whose audio is None gets no audio
    stream. Raises UserError for odd sizes, an empty clip, a sample rate AAC lacks, sound that is
    not mono or stereo or not finite, and a file that cannot be written.
    """
    with replacing(path, av.error.FFmpegError) as temporary:
        _mux(file_url(temporary), clip, [], crf=crf, name=str(path))


def through_h264(image: np.ndarray, crf: int) -> np.ndarray:
    """An image [H, W, 3] as it looks in a film of quality `crf`; uint8, sizes made even by a crop.

    Released models were trained on frames of films, and move an image that looks like one better.
    One picture of H.264 (preset veryfast, yuv420p), as in `ltx_pipelines/utils/media_io`.
    """
    height, width = (size // 2 * 2 for size in image.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
    buffer = io.BytesIO()
    quiet()
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
        _mux(file_url(temporary), clip, rest, crf=crf, name=str(path))


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


# ---------------------------------------------------------------- encoding


def _mux(
    target: str | io.BytesIO, clip: Clip, more: Iterable[np.ndarray], *, crf: int, name: str
) -> None:
    """Encodes a clip, with `more` frames after its own, into a file name or a file object.

    `name` is what errors call it.
    """
    _check_clip(clip, name)
    quiet()
    _, height, width, _ = clip.video.shape
    # The index goes to the front, so that players can stream; libav does it by opening the file
    # a second time, which a file object does not allow.
    options = {"movflags": "+faststart"} if isinstance(target, str) else {}
    with av.open(target, "w", format="mp4", container_options=options) as container:
        if clip.about:
            container.metadata[ABOUT] = clip.about
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


# ---------------------------------------------------------------- for reading too


def file_url(path: str | os.PathLike) -> str:
    """A path as libav takes it; without the scheme, a colon in a name would end one."""
    return f"file:{os.fspath(path)}"


def quiet() -> None:
    """libx264 prints a summary and libav warns on every damaged packet; errors reach us anyway."""
    av.logging.set_level(None)
    av.logging.set_libav_level(av.logging.PANIC)
