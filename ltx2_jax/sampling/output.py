"""Clips out: decoded, what was given put back in its place, and files for a person to look at."""

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ltx2_jax.codecs.interface import Codec
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.files import replacing
from ltx2_jax.media.media import Clip, stream_mp4, write_pngs, write_wav
from ltx2_jax.media.picture import covering
from ltx2_jax.models.codecs.inputs import to_uint8
from ltx2_jax.sampling.given import kept_frames, with_known_sound
from ltx2_jax.sampling.tasks import Task
from ltx2_jax.weights.tensor_files import TensorFile

LATENTS = "ltx2_jax.clip_latents.1"  # the number changes with the file's layout
SUFFIXES = (".mp4", ".png", ".wav")


@dataclass(frozen=True)
class Made:
    """A clip as the sampler leaves it: latents, and what was asked for."""

    video: np.ndarray | None  # [F', H', W', C]; None: sound alone
    audio: np.ndarray | None  # [A, M, C]; None: picture alone
    task: Task
    prompt: str = ""
    about: dict[str, Any] = field(default_factory=dict)  # what made it, as JSON can hold it

    def clip(self, codec: Codec) -> Clip:
        """The whole clip in memory."""
        sound, rate = self.sound(codec)
        pixels = [*self.frames(codec)] or [np.zeros((0, 0, 0, 3), np.uint8)]
        about = json.dumps(self.about) if self.about else ""
        return Clip(np.concatenate(pixels), self.task.fps, sound, rate, about=about)

    def write(self, path: Path, codec: Codec, *, crf: int = 19) -> list[Path]:
        """Writes .mp4, .png (a file a frame, and .wav beside it) or .wav; returns the files.

        Frames are written as they are decoded: memory does not grow with the length of the clip.
        """
        suffix, files = path.suffix.lower(), [path]
        if suffix == ".wav" and self.audio is None:
            raise UserError(f"{path}: the clip has no sound to write")
        sound, rate = self.sound(codec)
        if suffix == ".wav":
            write_wav(path, sound, rate)
            return files
        if not self.task.picture:
            raise UserError(f"{path}: the clip has no picture to write; give a name in .wav")
        with tqdm(
            desc=f"decoding {path.name}", total=self.task.num_frames, unit="frame", disable=None
        ) as bar:

            def counted() -> Iterator[np.ndarray]:
                for chunk in self.frames(codec):
                    yield chunk
                    bar.update(len(chunk))

            if suffix == ".png":
                files = write_pngs(path, counted())
                if sound is not None:
                    files.append(path.with_suffix(".wav"))
                    write_wav(files[-1], sound, rate)
            else:
                stream_mp4(path, counted(), fps=self.task.fps, audio=sound, sample_rate=rate,
                           crf=crf, about=json.dumps(self.about) if self.about else "")  # fmt: skip
        return files

    def frames(self, codec: Codec) -> Iterator[np.ndarray]:
        """uint8 [f, H, W, 3] in time order; frames that were given are those that were given."""
        task = self.task
        if not task.picture:
            return
        if task.video is not None and task.video.is_whole(task.num_frames):
            yield _even(task.video.pixels)
            return
        kept, position = kept_frames(task, codec.video.strides[0]), 0
        for chunk in codec.video.decode_chunks(self.video[None]):
            pixels = np.array(to_uint8(chunk[0]))
            for i in np.flatnonzero(kept[position : position + len(pixels)]):
                known = task.video.pixels[position + i - task.video.first]
                if known.shape != pixels[i].shape:
                    known = np.clip(np.rint(covering(known, *pixels.shape[1:3])), 0, 255)
                pixels[i] = known
            position += len(pixels)
            yield pixels

    def sound(self, codec: Codec) -> tuple[np.ndarray | None, int]:
        """float32 [samples, 1 or 2] as long as the picture, and its rate.

        A sound that is given whole comes back as it was given, at its own rate.
        """
        rate, known = codec.audio.output_sample_rate, self.task.audio
        if self.task.sound and known is not None and known.is_whole(self.task.seconds):
            return known.samples, known.rate
        if not self.task.sound or self.audio is None:
            return None, rate
        samples = round(self.task.seconds * rate)
        made = np.asarray(codec.audio.decode(np.asarray(self.audio)[None], samples))[0]
        return with_known_sound(self.task, np.array(made), rate), rate


def _even(pixels: np.ndarray) -> np.ndarray:
    """Without the last row and column of an odd size, which films cannot have."""
    return pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]


# ------------------------------------------------------------------------------- latents as files


def save_latents(path: Path, made: Made) -> None:
    """Writes the latents of a clip, to be decoded another time.

    Raises:
      UserError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {"video": made.video, "audio": made.audio}
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items() if x is not None}
    task = made.task
    sizes = {"num_frames": task.num_frames, "height": task.height, "width": task.width}
    metadata = {
        "kind": LATENTS,
        "clip": json.dumps({**sizes, "fps": task.fps}),
        "about": json.dumps(made.about),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def read_latents(path: Path) -> Made:
    """The inverse of `save_latents`, without what was given.

    Raises:
      UserError: the file is missing or another one.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    file = TensorFile(path)
    try:
        if file.metadata.get("kind") != LATENTS:
            raise UserError(f"{path}: holds no latents that --save-latents wrote")
        tensors = {name: np.array(file.read(name)) for name in file.tensors}
        clip, about = (json.loads(file.metadata[name]) for name in ("clip", "about"))
    finally:
        file.close()
    video, audio = tensors.get("video"), tensors.get("audio")
    task = Task(**clip, picture=video is not None, sound=audio is not None)
    return Made(video, audio, task, about=about)


# ---------------------------------------------------------------------------- for a person to see


def write_clips(clips: Sequence[Clip], prompts: Sequence[str], folder: Path) -> Path | None:
    """Clips to files, for a person to look at; the picture of some of them, if they have pictures.

    `samples/NNN.mp4` are all clips and `samples/captions.csv` their prompts, in the columns that
    `prepare` reads; `sample.mp4` is the first clip, `samples.png` shows the first four. Small clips
    are enlarged, pixel by pixel, to be watchable. Sound alone is `samples/NNN.wav`.
    """
    names = [f"{i:03d}{'.mp4' if len(clip.video) else '.wav'}" for i, clip in enumerate(clips)]
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("video", "caption"))
    rows.writerows(zip(names, prompts, strict=True))

    def write(name: str, clip: Clip) -> None:
        (enlarged(clip) if len(clip.video) else clip).save(folder / "samples" / name)

    # Closed, so that whoever interrupts it does not wait for the rest.
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        contextlib.closing(pool.map(write, names, clips)) as writing,
    ):
        list(writing)
    with replacing(folder / "samples" / "captions.csv") as temporary:
        temporary.write_text(table.getvalue(), encoding="utf-8")
    count = f"{len(clips)} clip{'s' if len(clips) > 1 else ''}"
    seen = [i for i, clip in enumerate(clips) if len(clip.video)]
    if not seen:
        print(f"wrote {count} in {folder}/samples")
        return None
    enlarged(clips[seen[0]]).save(folder / "sample.mp4")
    sheet, first = folder / "samples.png", seen[:4]
    shown = [clips[i] for i in first], [prompts[i] for i in first]
    contact_sheet(sheet, *shown, title="generated clips")
    print(f"wrote {folder}/sample.mp4, {sheet} and {count} in {folder}/samples")
    return sheet


def enlarged(clip: Clip, shortest: int = 256) -> Clip:
    """A clip of at least `shortest` pixels a side, every pixel repeated."""
    if (factor := shortest // min(clip.video.shape[1:3])) < 2:
        return clip
    video = clip.video.repeat(factor, axis=1).repeat(factor, axis=2)
    return dataclasses.replace(clip, video=video)
