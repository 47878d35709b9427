"""The door of this room: a clip, and how it comes from files and gets into them."""

from ltx2_jax.media.reading import (
    DEINTERLACED,
    FileSize,
    TooShort,
    file_size,
    read_about,
    read_clip,
    read_image,
    read_sound,
    read_wav,
    read_whole_sound,
)
from ltx2_jax.media.sound import to_stereo
from ltx2_jax.media.writing import (
    Clip,
    check_even,
    stream_mp4,
    through_h264,
    write_mp4,
    write_pngs,
    write_wav,
)
from ltx2_jax.models.codecs.resample import resample

__all__ = [
    "DEINTERLACED",
    "Clip",
    "FileSize",
    "TooShort",
    "check_even",
    "file_size",
    "read_about",
    "read_clip",
    "read_image",
    "read_sound",
    "read_wav",
    "read_whole_sound",
    "resample",
    "stream_mp4",
    "through_h264",
    "to_stereo",
    "write_mp4",
    "write_pngs",
    "write_wav",
]
