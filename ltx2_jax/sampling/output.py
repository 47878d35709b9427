"""Clips out: files for a person to look at."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.files import replacing
from ltx2_jax.media.media import Clip


def write_clips(clips: Sequence[Clip], prompts: Sequence[str], folder: Path) -> None:
    """Clips to files, for a person to look at.

    `samples/NNN.mp4` are all clips and `samples/captions.csv` their prompts, in the columns that
    `prepare` reads; `sample.mp4` is the first clip, `samples.png` shows the first four. Small clips
    are enlarged, pixel by pixel, to be watchable.
    """
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("video", "caption"))
    rows.writerows((f"{i:03d}.mp4", prompt) for i, prompt in enumerate(prompts))
    for i, clip in enumerate(clips):
        enlarged(clip).save(folder / "samples" / f"{i:03d}.mp4")
    with replacing(folder / "samples" / "captions.csv") as temporary:
        temporary.write_text(table.getvalue(), encoding="utf-8")
    enlarged(clips[0]).save(folder / "sample.mp4")
    contact_sheet(folder / "samples.png", clips[:4], prompts[:4], title="generated clips")
    count = f"{len(clips)} clip{'s' if len(clips) > 1 else ''}"
    print(f"wrote {folder}/sample.mp4, {folder}/samples.png and {count} in {folder}/samples")


def enlarged(clip: Clip, shortest: int = 256) -> Clip:
    """A clip of at least `shortest` pixels a side, every pixel repeated."""
    factor = max(1, shortest // min(clip.video.shape[1:3]))
    video = clip.video.repeat(factor, axis=1).repeat(factor, axis=2)
    return dataclasses.replace(clip, video=video)
