"""Small films written by PyAV alone, with the oddities that real ones have."""

import fractions
import struct

import av
import numpy as np


def write_film(
    path,
    images,
    *,
    fps=25,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    tags=None,
    stamps=None,
    tones=(),
    seconds=None,
    sound_start=0.0,
    dispositions=(),
    silent=False,
):
    """images: uint8 [F, H, W, 3], or frames of libav. Image k is shown at stamps[k] / fps.

    One stereo track of 48 kHz for each of `tones` (Hz), `seconds` long from `sound_start` on. tags:
    attributes of the codec context, such as color_trc.
    """
    stamps = range(len(images)) if stamps is None else stamps
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=fps, options=options or {})
        first = as_frame(images[0])
        video.width, video.height, video.pix_fmt = first.width, first.height, pix_fmt
        for name, value in (tags or {}).items():
            setattr(video.codec_context, name, value)
        tracks = [container.add_stream("aac", rate=48000, layout="stereo") for _ in tones]
        for track, disposition in zip(tracks, dispositions, strict=False):
            track.disposition = disposition
        for stamp, image in zip(stamps, images, strict=True):
            frame = as_frame(image)
            frame.pts, frame.time_base = stamp, fractions.Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        times = np.arange(round((seconds or len(images) / fps) * 48000)) / 48000
        for tone, track in zip(tones, tracks, strict=True):
            wave = (0.0 if silent else 0.5) * np.sin(2 * np.pi * tone * times)
            pair = np.stack([wave, wave]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(pair, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 48000, round(sound_start * 48000)
            frame.time_base = fractions.Fraction(1, 48000)
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


def as_frame(image):
    if isinstance(image, av.VideoFrame):
        return image
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def assert_same(one, other):
    """The same streams, times and sound in both files, and the same pictures.

    Not byte for byte: of 1,500 files of the same pictures that libx264 wrote, on one thread, eight
    differed from the rest by a few bytes of a packet.
    """
    (one, pictures), (other, others) = map(content, (one, other))
    assert one == other
    np.testing.assert_array_less(np.abs(pictures - others).mean(axis=(1, 2, 3)), 1)


def content(path):
    """(what each stream says of itself, its times and its sound; pictures, int [F, H, W, 3])."""
    with av.open(str(path)) as container:
        told = [dict(container.metadata), *(s.codec_context.name for s in container.streams)]
        pictures, told = [], [*told, *(s.average_rate for s in container.streams.video)]
        for frame in container.decode():
            told.append((type(frame), frame.pts))
            if isinstance(frame, av.VideoFrame):
                pictures.append(frame.to_ndarray(format="rgb24").astype(int))
            else:
                told.append(frame.to_ndarray().tobytes())
    return told, np.stack(pictures)


def plain(colour, frames=10, height=64, width=96):
    """uint8 [frames, height, width, 3] of one colour."""
    return np.broadcast_to(np.array(colour, np.uint8), (frames, height, width, 3))


def numbered(frames=20, height=64, width=96):
    """Frame k is grey, 40 + 8 k."""
    return np.stack([plain(40 + 8 * k, 1, height, width)[0] for k in range(frames)])


def number(image):
    """Which frame of `numbered` an image is."""
    return round((float(image[8:-8, 8:-8].mean()) - 40) / 8)


QUADRANTS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def quadrants(frames=3, height=64, width=96):
    """Red, green / blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(QUADRANTS):
        row, column = divmod(index, 2)
        image[row * height // 2 :, column * width // 2 :] = colour
    image[height // 2 :, : width // 2] = QUADRANTS[2]
    return np.broadcast_to(image, (frames, height, width, 3))


def corners(image):
    """Which of QUADRANTS stands at the top left, top right, bottom left, bottom right."""
    height, width = image.shape[:2]
    seen = [image[int(y * height), int(x * width)] for y in (0.25, 0.75) for x in (0.25, 0.75)]
    distance = np.abs(np.array(seen, int)[:, None] - QUADRANTS).sum(axis=-1)
    assert distance.min(axis=1).max() < 30
    return distance.argmin(axis=1).tolist()


def tone_of(audio, rate):
    """The loudest frequency, in Hz, of [samples, channels]."""
    wave = audio[:, 0] * np.hanning(len(audio))
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


def set_display_matrix(path, a, b, c, d):
    """Of an mp4: where its pictures are put, (x, y) to (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4
    at += (24 if content[at] == 0 else 36) + 16
    assert struct.unpack(">9i", content[at : at + 36])[8] == 0x40000000
    one = 0x10000
    rows = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    content[at : at + 36] = struct.pack(">9i", *rows)
    path.write_bytes(content)
