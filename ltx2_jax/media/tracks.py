"""Which of a file's tracks is the film: its picture and its sound."""

from __future__ import annotations

from typing import Any

# Names of libav's dispositions.
COVERS = {"attached_pic", "timed_thumbnails", "still_image"}
ASIDES = {"comment", "lyrics", "karaoke", "dub", "hearing_impaired", "visual_impaired"}
ASIDES |= {"descriptions", "clean_effects", "non_diegetic", "dependent"}
STILL_CODECS = {"mjpeg", "png", "bmp", "tiff", "webp", "gif", "jpegxl", "jpeg2000"}


def best_stream(container: Any, kind: str, related: Any = None) -> Any:
    """The stream of an open container that is the film's "video" or "audio"; None without one.

    Covers are no picture. Commentaries and the like come last, as do stills beside a film; the
    file's default comes before others; then libav chooses, which knows programs and sizes.

    related: the picture that a sound is wanted for. Raises ValueError when nothing decodes it.
    """
    streams = [s for s in getattr(container.streams, kind) if not _names(s) & COVERS]
    libavs = container.streams.best(kind, related=related)

    def rank(stream: Any) -> tuple[bool, ...]:
        context = stream.codec_context
        return (
            context is None,  # no decoder
            bool(_names(stream) & ASIDES),
            context is not None and context.codec.name in STILL_CODECS,
            "default" not in _names(stream),
            libavs is None or stream.index != libavs.index,
        )

    best = min(streams, key=rank, default=None)
    if best is not None and best.codec_context is None:
        raise ValueError(f"this libav has no decoder for its {kind}")
    return best


def _names(stream: Any) -> set[str]:
    return {flag.name for flag in stream.disposition}
