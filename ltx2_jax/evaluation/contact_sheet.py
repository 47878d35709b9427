"""Clips on paper: frames above, sound below, on one time axis, with the onsets of both marked."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import audio_onsets, visual_onsets
from ltx2_jax.files import replacing
from ltx2_jax.media.media import Clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2430", "#7d8896", "#e3e7ec"
SOUND, HEARD, SEEN = "#8fa6bf", "#d1495b", "#00798c"

STRIP_INCHES = 13.0  # the width of a clip's time axis
LEFT, RIGHT, TOP, BOTTOM = 0.45, 0.30, 0.55, 0.40  # margins in inches
TITLE_INCHES, WAVE_INCHES, GAP_INCHES = 0.34, 0.80, 0.34


def contact_sheet(
    path: str | os.PathLike,
    clips: Sequence[Clip],
    captions: Sequence[str],
    *,
    max_frames: int = 25,
    dpi: int = 110,
    title: str | None = None,
) -> Path:
    """Writes a PNG with one strip for every clip, under its caption; returns the path.

    Frame k stands at the time k / fps (of a long clip every n-th frame, so that at most max_frames
    are shown); below it the waveform, from the same time axis, with a line at each audio onset and
    a triangle at each visual onset of `evaluation.sync`. Where sound and picture agree, line and
    triangle meet. The file is written atomically. Raises UserError without clips or when the
    captions are not one a clip.
    """
    if not clips or len(clips) != len(captions):
        raise UserError(f"{path}: {len(clips)} clips and {len(captions)} captions to show")
    strides = [math.ceil(len(clip.video) / max_frames) for clip in clips]
    spans = [_span(clip, stride) for clip, stride in zip(clips, strides, strict=True)]
    seconds = max(end - begin for begin, end in spans)
    heights = [
        STRIP_INCHES * stride / clip.fps / seconds * clip.video.shape[1] / clip.video.shape[2]
        for clip, stride in zip(clips, strides, strict=True)
    ]
    row_heights = [TITLE_INCHES + height + WAVE_INCHES + GAP_INCHES for height in heights]
    width = LEFT + STRIP_INCHES + RIGHT
    total = TOP + sum(row_heights) + BOTTOM - GAP_INCHES
    figure = _figure(width, total, dpi)
    _draw_legend(figure, title, total)
    top = total - TOP
    for index, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        begin, end = spans[index]
        size = STRIP_INCHES * (end - begin) / seconds
        figure.text(
            LEFT / width,
            (top - 0.24) / total,
            textwrap.shorten(caption, 150, placeholder=" …"),
            fontsize=11,
            color=INK,
            parse_math=False,  # a caption may well hold a $
        )
        floor = top - TITLE_INCHES - heights[index]
        frames = figure.add_axes(
            (LEFT / width, floor / total, size / width, heights[index] / total)
        )
        wave = figure.add_axes(
            (LEFT / width, (floor - WAVE_INCHES) / total, size / width, WAVE_INCHES / total)
        )
        _draw_frames(frames, clip, strides[index], begin, end)
        _draw_sound(wave, clip, begin, end, labelled=index == len(clips) - 1)
        _draw_onsets(frames, wave, clip)
        top -= row_heights[index]
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _figure(width: float, height: float, dpi: int) -> Figure:
    """An empty one, in inches. Commands that draw nothing do not wait for matplotlib."""
    if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
        # It may name a window system that this version lacks, which ends the import; none is opened
        # here. One that it has is taken all the same.
        backend = os.environ.pop("MPLBACKEND")
        import matplotlib

        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _span(clip: Clip, stride: int) -> tuple[float, float]:
    """The seconds a strip covers: every shown frame is as wide as the time to the next, centred."""
    shown = math.ceil(len(clip.video) / stride)
    return -0.5 * stride / clip.fps, (shown - 0.5) * stride / clip.fps


def _draw_frames(axes: Axes, clip: Clip, stride: int, begin: float, end: float) -> None:
    """One row of frames with hairlines between, drawn as a single nearest-neighbour image."""
    shown = list(clip.video[::stride])
    row = np.concatenate(shown, axis=1)
    axes.imshow(row, extent=(begin, end, 0, 1), interpolation="nearest", aspect="auto")
    edges = np.linspace(begin, end, len(shown) + 1)[1:-1]
    axes.vlines(edges, 0, 1, color="white", linewidth=1.0)
    axes.set(xlim=(begin, end), ylim=(0, 1), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_sound(axes: Axes, clip: Clip, begin: float, end: float, *, labelled: bool) -> None:
    axes.set(xlim=(begin, end), ylim=(-1, 1), yticks=[])
    axes.set_xticks(np.arange(0, end, _tick_step(end - begin)))
    axes.tick_params(axis="x", labelsize=8, colors=MUTED, length=3, color=GRID, pad=2)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if labelled:
        axes.set_xlabel("seconds", fontsize=8, color=MUTED, labelpad=2)
    if clip.audio is None:
        axes.text(
            0.5, 0.5, "no sound", transform=axes.transAxes, ha="center", va="center", color=MUTED
        )
        return
    mono = clip.audio.mean(axis=1)
    bins = max(1, min(len(mono), 1600))  # about one a pixel: more are not seen, only drawn
    cuts = np.linspace(0, len(mono), bins + 1).astype(int)[:-1]
    time = cuts / clip.sample_rate
    loudest = float(np.abs(mono).max(initial=0.0))
    # Every strip is scaled to its own peak: timing is what the sheet shows. The peak is written.
    scale = 0.92 / max(loudest, 0.02)
    low, high = np.minimum.reduceat(mono, cuts) * scale, np.maximum.reduceat(mono, cuts) * scale
    axes.fill_between(time, low, high, color=SOUND, linewidth=0.4, edgecolor=SOUND)
    corner = {"transform": axes.transAxes, "ha": "right", "fontsize": 7, "color": MUTED}
    axes.text(0.998, 0.04, f"peak {loudest:.2f}", **corner)


def _draw_onsets(frames: Axes, wave: Axes, clip: Clip) -> None:
    """Lines through the waveform for what is heard, triangles under the frames for what is seen."""
    seen = visual_onsets(clip.video, clip.fps)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.7}
    height = np.full(len(seen), 0.93)
    wave.plot(seen, height, "v", color=SEEN, markersize=7, clip_on=False, zorder=5, **edge)
    if clip.audio is not None:
        heard = audio_onsets(clip.audio, clip.sample_rate)
        wave.vlines(heard, -1, 1, color=HEARD, linewidth=1.4, zorder=4)
        frames.vlines(heard, 0, 0.12, color=HEARD, linewidth=1.4, zorder=4)


def _draw_legend(figure: Figure, title: str | None, total: float) -> None:
    width = figure.get_figwidth()
    height = (total - 0.32) / total
    if title:
        figure.text(LEFT / width, height, title, fontsize=13, fontweight="bold", color=INK)
    for text, mark, color, inches in (
        ("heard (audio onset)", "|", HEARD, 3.05),
        ("seen (visual onset)", "▼", SEEN, 1.45),
    ):
        place = (width - RIGHT - inches) / width
        figure.text(place, height, mark, fontsize=10, fontweight="bold", color=color)
        figure.text(place + 0.16 / width, height, text, fontsize=9, color=MUTED)


def _tick_step(seconds: float) -> float:
    """A round step that gives at most about a dozen ticks."""
    for step in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0):
        if seconds / step <= 12:
            return step
    return 30.0
