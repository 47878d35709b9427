"""A dataset as the official trainer's scripts prepare it: a folder `.precomputed` of `.pt` files.

    .precomputed/latents/clips/a.pt        .precomputed/audio_latents/clips/a.pt
    .precomputed/conditions/clips/a.pt     .precomputed/reference_latents/clips/a.pt   ...

One relative path names a sample in all folders. Here it is read as `data.records` are: `len`, and
`[i]` -> the fields of a record, axes in our order. The format does not say whose latents and text
features it holds. Sources: `ltx_trainer/datasets.py`, `scripts/process_{videos,captions}.py`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ltx2_jax.data.schema import BucketFields, Field, Schema
from ltx2_jax.data.torch_files import read_pt, write_pt
from ltx2_jax.diffusion.geometry import VIDEO_STRIDES
from ltx2_jax.errors import UserError

FOLDER = ".precomputed"
# The folders, and the fields of a record that their files become.
LATENTS, SOUND, TEXT = "latents", "audio_latents", "conditions"
FOLDERS = (
    LATENTS, SOUND, TEXT,
    "reference_latents", "reference_audio_latents", "video_masks", "audio_masks",
)  # fmt: skip
DEFAULT_FPS = 24.0  # where a file does not say


def precomputed_folder(path: str | os.PathLike) -> Path | None:
    """The `.precomputed` folder that `path` is or holds; None if it is none of the two."""
    path = Path(path)
    for folder in (path / FOLDER, path):
        if any((folder / name).is_dir() for name in (LATENTS, SOUND)):
            return folder if (folder / TEXT).is_dir() or folder.name == FOLDER else None
    return None


class Precomputed(Sequence):
    """A `.precomputed` folder, opened: `len`, and `[i]` -> dict of numpy arrays and strings.

    A record has the fields of `data.records` for the folders chosen, and with references and masks
    `video_reference` [F'', H'', W'', C], `video_reference_fps` [], `audio_reference` [A', M, C],
    `video_mask` [F', H', W'] and `audio_mask` [A], bool, True where a latent is given. Its caption
    is empty: the format keeps features alone.

    Safe to read from several threads. Arrays are read-only views.

    Attributes:
      precomputed: the `.precomputed` (pathlib.Path).
      sources: names of the folders that are read; incomplete: whether samples may lack a file.
      names: of each sample, its path below `folder / LATENTS`, or below the first source.
      buckets: int [n], of each sample, its entry of `schema.buckets`.
      skipped: samples that lack a file, list of {"source", "reason"}.
      schema: `Schema`; its `release` and `text_release` are those given.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        sources: Sequence[str] | None = None,
        *,
        release: str = "unknown",
        text_release: str = "unknown",
        incomplete: bool = False,
        strides: tuple[int, int, int] = VIDEO_STRIDES,
    ):
        """Finds the samples and looks at all their sizes; of text, at those of the first.

        Args:
          folder: a `.precomputed`, or the folder that holds it.
          sources: folders that a sample must have a file in, in any order; None takes latents,
            sound and text, as far as they are there.
          incomplete: takes samples that lack files, if they have text, and latents or sound.
          release, text_release: what the schema is to say of the latents and the text features.
          strides: of the codec that made the latents, to tell the size of the clips.

        Raises:
          UserError: naming the folder or the file: no such folder, no sample that has all files, a
            file that is damaged or holds something else.
        """
        found = precomputed_folder(folder)
        if found is None:
            raise UserError(f"{folder}: no {FOLDER} of the official trainer is here")
        self.folder = self.precomputed = found
        if sources is None:
            sources = [name for name in (LATENTS, SOUND, TEXT) if (found / name).is_dir()]
        self._choose(sources, incomplete)
        self.names, self.skipped = self._samples()
        if not self.names:
            first = self.skipped[0] if self.skipped else {"source": "*.pt", "reason": "not there"}
            raise UserError(
                f"{found}: no sample has a file in each of {', '.join(self.sources)}; the first: "
                f"{first['source']} {first['reason']}"
            )
        self._shares_text = False  # whether audio receives the text features of video
        self.schema, self.buckets = self._survey(release, text_release, strides)

    def _choose(self, sources: Sequence[str], incomplete: bool) -> None:
        """Takes the names of the folders to read, and whether samples need a file in each."""
        for name in sources:
            if name not in FOLDERS:
                there = ", ".join(FOLDERS)
                raise UserError(f"{self.precomputed}: no folder {name!r} is known, but {there}")
            if not (self.precomputed / name).is_dir():
                raise UserError(f"{self.precomputed / name}: no such folder of the dataset")
        self.sources = tuple(sources)
        self._primary = LATENTS if LATENTS in self.sources else self.sources[0]
        self.incomplete = incomplete

    def _samples(self) -> tuple[list[Path], list[dict[str, str]]]:
        """Their paths below the first folder, in order; and those that are left out, with reasons.

        What an interrupted script left, `a.pt.tmp.<n>`, is no file of the dataset.
        """
        main = [name for name in (LATENTS, SOUND) if name in self.sources]
        roots = [self.precomputed / s for s in (main if self.incomplete else [self._primary])]
        files = ((root, path) for root in roots for path in root.glob("**/*.pt"))
        found = {path.relative_to(root) for root, path in files if path.is_file()}
        needed = [TEXT] if self.incomplete else self.sources
        names, skipped = [], []
        for name in sorted(found):
            missing = [s for s in needed if not _file_of(self.precomputed, s, name).is_file()]
            if missing:
                reason = f"has no file in {', '.join(missing)}"
                skipped.append({"source": name.as_posix(), "reason": reason})
            else:
                names.append(name)
        return names, skipped

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        record = self._record(index, self.sources)
        where = f"{self.precomputed}: {self.names[index].as_posix()}"
        self.schema.check(record, where, self.buckets[index])
        return record

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, {len(self)} samples)"

    def file(self, source: str, index: int) -> Path:
        """The file of a sample in one of the folders."""
        return _file_of(self.precomputed, source, self.names[index])

    def _record(
        self, index: int, sources: Sequence[str], sizes_only: bool = False
    ) -> dict[str, Any]:
        record = {"id": np.int64(index)}
        for source in sources:
            path = self.file(source, index)
            if self.incomplete and not path.is_file():
                continue
            record |= _READERS[source](read_pt(path, sizes_only=sizes_only), path)
        if self._shares_text and "audio_text" in record:
            if not _same(record["video_text"], record.pop("audio_text")):
                raise UserError(
                    f"{self.file(TEXT, index)}: has features of its own for sound; "
                    "other files of this dataset have one for both"
                )
        for stream, axes in (("video", 3), ("audio", 1)):
            mask, latents = record.get(f"{stream}_mask"), record.get(stream)
            if mask is not None and latents is not None and mask.shape != latents.shape[:axes]:
                raise UserError(
                    f"{self.file(f'{stream}_masks', index)}: a mask of {list(mask.shape)} "
                    f"for latents of {list(latents.shape[:axes])}"
                )
        record.setdefault("fps", np.float32(DEFAULT_FPS))  # of sound alone
        return record | {"caption": "", "source": self.names[index].as_posix()}

    def _survey(
        self, release: str, text_release: str, strides: tuple[int, int, int]
    ) -> tuple[Schema, np.ndarray]:
        """The sizes of all samples, largest first, and which sample has which."""
        sized = [source for source in self.sources if source != TEXT]
        with ThreadPoolExecutor(8) as pool:
            records = pool.map(lambda i: self._record(i, sized, True), range(len(self)))
            found = [{k: Field.of(v) for k, v in record.items()} for record in records]
        text = {}
        if TEXT in self.sources:
            read = _text(read_pt(self.file(TEXT, 0)), self.file(TEXT, 0))
            self._shares_text = "audio_text" not in read or _same(
                read["video_text"], read["audio_text"]
            )
            if self._shares_text:
                read.pop("audio_text", None)
            text = {name: Field.of(value) for name, value in read.items()}
        keys = [tuple(sorted(fields.items())) for fields in found]
        order = sorted(set(keys), key=_largest_first)
        firsts = [keys.index(key) for key in order]
        buckets = [self._bucket(found[first] | text, first, strides) for first in firsts]
        places = {key: place for place, key in enumerate(order)}
        schema = Schema.of_buckets(
            buckets,
            release=release,
            text="features",
            text_release=text_release,
            codec="",
            codec_hash="",
            text_encoder="",
            text_encoder_hash="",
        )
        return schema, np.array([places[key] for key in keys])

    def _bucket(
        self, fields: Mapping[str, Field], first: int, strides: tuple[int, int, int]
    ) -> BucketFields:
        """The size in pixels of samples with these fields, of which one is at `first`."""
        frames, rows, columns = fields["video"].shape[:3] if "video" in fields else (0, 0, 0)
        time, height, width = strides
        record = self._record(first, [LATENTS], True) if frames else {"fps": DEFAULT_FPS}
        pixels = (frames - 1) * time + 1 if frames else 0, rows * height, columns * width
        return BucketFields(*pixels, fps=float(record["fps"]), fields=fields)


def _largest_first(fields: tuple[tuple[str, Field], ...]) -> tuple:
    shapes = {name: field.shape for name, field in fields}
    video, audio = shapes.get("video", ()), shapes.get("audio", ())
    return -math.prod(video) if video else 0, -math.prod(audio) if audio else 0, str(fields)


# ---- which samples are there ---------------------------------------------------------------------


def _file_of(folder: Path, source: str, name: Path) -> Path:
    """A sample's file; in the oldest layout text is not named after the clip, but numbered too."""
    if source == TEXT and name.name.startswith("latent_"):
        numbered = name.with_name(f"condition_{name.name.removeprefix('latent_')}")
        if (folder / source / numbered).is_file():
            return folder / source / numbered
    return folder / source / name


# ---- what a file says ----------------------------------------------------------------------------

Entries = Mapping[str, Any]


def _array(entries: Entries, name: str, path: Path, kinds: str, *ranks: int) -> np.ndarray:
    """A tensor of one of these numbers of axes, of float (f), integer (i) or bool (b) numbers."""
    array = entries.get(name)
    if not isinstance(array, np.ndarray):
        there = ", ".join(map(repr, entries)) or "nothing"
        raise UserError(f"{path}: no tensor {name!r}; it holds {there:.120}")
    kind = "f" if array.dtype == ml_dtypes.bfloat16 else array.dtype.kind.replace("u", "i")
    if kind not in kinds or array.ndim not in ranks or not array.size:
        raise UserError(f"{path}: {name!r} is {array.dtype.name}{list(array.shape)}")
    return array


def _latents(entries: Entries, path: Path) -> tuple[np.ndarray, np.float32]:
    """[F', H', W', C] and frames per second, of [C, F', H', W'] or of tokens [F'*H'*W', C]."""
    array = _array(entries, "latents", path, "f", 4, 2)
    sizes = [entries.get(name) for name in ("num_frames", "height", "width")]
    if array.ndim == 4:
        array = np.moveaxis(array, 0, -1)
        sizes = [size or other for size, other in zip(sizes, array.shape, strict=False)]
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes) or (
        math.prod(sizes) != math.prod(array.shape[:-1])
        or (array.ndim == 4 and tuple(sizes) != array.shape[:-1])
    ):
        shape = list(entries["latents"].shape)
        raise UserError(f"{path}: 'latents' is {shape}, but its size is given as {sizes}")
    fps = entries.get("fps")
    fps = DEFAULT_FPS if fps is None else fps
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise UserError(f"{path}: 'fps' is {fps!r:.40}, not a frame rate")
    return array.reshape(*sizes, array.shape[-1]), np.float32(fps)


def _video(entries: Entries, path: Path) -> dict[str, Any]:
    video, fps = _latents(entries, path)
    return {"video": video, "fps": fps}


def _audio(entries: Entries, path: Path) -> dict[str, Any]:
    """[A, M, C] of [C, A, M]."""
    return {"audio": np.moveaxis(_array(entries, "latents", path, "f", 3), 0, -1)}


def _text(entries: Entries, path: Path) -> dict[str, Any]:
    """[S, Dv], [S, Da], mask [S]; older files have one feature for both streams."""
    video = "video_prompt_embeds" if "video_prompt_embeds" in entries else "prompt_embeds"
    read = {"video_text": _array(entries, video, path, "f", 2)}
    if "audio_prompt_embeds" in entries:
        read["audio_text"] = _array(entries, "audio_prompt_embeds", path, "f", 2)
    mask = _array(entries, "prompt_attention_mask", path, "ib", 1)
    read["text_mask"] = mask.astype(bool)
    for name, array in read.items():
        if len(array) != len(mask):
            raise UserError(f"{path}: {name} has {len(array)} tokens, its mask {len(mask)}")
    return read


def _video_reference(entries: Entries, path: Path) -> dict[str, Any]:
    video, fps = _latents(entries, path)
    return {"video_reference": video, "video_reference_fps": fps}


def _audio_reference(entries: Entries, path: Path) -> dict[str, Any]:
    return {"audio_reference": _audio(entries, path)["audio"]}


def _video_mask(entries: Entries, path: Path) -> dict[str, Any]:
    return {"video_mask": _array(entries, "mask", path, "fib", 3) > 0.5}


def _audio_mask(entries: Entries, path: Path) -> dict[str, Any]:
    return {"audio_mask": _array(entries, "mask", path, "fib", 1) > 0.5}


_READERS = {
    LATENTS: _video,
    SOUND: _audio,
    TEXT: _text,
    "reference_latents": _video_reference,
    "reference_audio_latents": _audio_reference,
    "video_masks": _video_mask,
    "audio_masks": _audio_mask,
}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two features are one: stored once, or equal byte by byte."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    address = [x.__array_interface__["data"][0] for x in (a, b)]
    return (address[0] == address[1] and a.strides == b.strides) or a.tobytes() == b.tobytes()


# ---- writing -------------------------------------------------------------------------------------


class PrecomputedWriter:
    """Writes records into a `.precomputed` folder, file by file as the official scripts do.

    A file that is there is replaced. Latents are stored in bfloat16 and sound in float32, text
    features in bfloat16, as there.
    """

    def __init__(self, folder: str | os.PathLike):
        """`folder` gets a sub-folder `.precomputed`, unless it is one."""
        folder = Path(folder)
        self.folder = folder if folder.name == FOLDER else folder / FOLDER

    def write(self, record: Mapping[str, Any], name: str, latents_per_second: float = 25) -> None:
        """Writes the files of one record.

        Args:
          record: fields of `data.records` and those of `Precomputed`.
          name: the clip's path in its table; the files have it, with the suffix .pt.
          latents_per_second: of sound.
        """
        for source, entries in official_entries(record, latents_per_second).items():
            write_pt(self.folder / source / sample_name(name), entries)


def sample_name(source: str) -> Path:
    """Where a clip's files lie in every folder: its path with the suffix .pt, inside the dataset.

    Absolute paths are mirrored without the slash.
    """
    path = Path(source)
    parts = [part for part in path.parts if part not in (path.anchor, "..")]
    return Path(*parts).with_suffix(".pt")


def official_entries(
    record: Mapping[str, Any], latents_per_second: float = 25
) -> dict[str, dict[str, Any]]:
    """Folder to entries of its file, in the order in which the official scripts write them."""
    bf16 = ml_dtypes.bfloat16
    files: dict[str, dict[str, Any]] = {}
    for source, name in ((LATENTS, "video"), ("reference_latents", "video_reference")):
        if name in record:
            fps = record["fps" if name == "video" else "video_reference_fps"]
            frames, rows, columns, _ = record[name].shape
            files[source] = {
                "latents": np.ascontiguousarray(np.moveaxis(record[name], -1, 0), bf16),
                "num_frames": frames,
                "height": rows,
                "width": columns,
                "fps": float(fps),
            }
    for source, name in ((SOUND, "audio"), ("reference_audio_latents", "audio_reference")):
        if name in record:
            steps, bins, _ = record[name].shape
            files[source] = {
                "latents": np.ascontiguousarray(np.moveaxis(record[name], -1, 0), np.float32),
                "num_time_steps": steps,
                "frequency_bins": bins,
                "duration": steps / latents_per_second,
            }
    if "video_text" in record:
        video = np.ascontiguousarray(record["video_text"], bf16)
        audio = (
            np.ascontiguousarray(record["audio_text"], bf16) if "audio_text" in record else video
        )
        files[TEXT] = {
            "video_prompt_embeds": video,
            "prompt_attention_mask": np.asarray(record["text_mask"], np.int64),
            "audio_prompt_embeds": audio,
        }
    for source, name in (("video_masks", "video_mask"), ("audio_masks", "audio_mask")):
        if name in record:
            files[source] = {"mask": np.asarray(record[name], np.float32)}
    return files
