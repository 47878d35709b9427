"""The record format: a folder with `dataset.json` and ArrayRecord shards.

    dataset.json                      schema, shards, skipped clips, the settings it was made with
    data-00000-of-00002.arrayrecord   one record per clip
    codec.safetensors                 what made the latents
    text_encoder.safetensors          what made the text features, and its tokenizer
    empty_caption.safetensors         features of the empty caption, for captions that are dropped
    table.safetensors                 of every record its size, where there are several

A record is one safetensors blob: numeric fields as tensors, strings as JSON in its metadata. It
describes itself, keeps bfloat16, and reading it can never run code.

Fields of a record (F' H' W' latent frames, rows, columns; A M audio latent frames, mel bins; C
channels; S text tokens; Dv Da widths of the text features for video and audio):

    id          int64   []             position of the clip in its table
    video       float   [F', H', W', C]
    audio       float   [A, M, C]
    video_text  float   [S, Dv]        text features before the connectors, left padded
    audio_text  float   [S, Da]        absent where audio receives those of video
    text_mask   bool    [S]            True where there is a token
    fps         float32 []             frames per second of the clip
    caption     str
    source      str                    the clip's path as its table gives it
"""

import contextlib
import glob
import json
import os
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ltx2_jax.blobs import deserialize, serialize, unpack
from ltx2_jax.data.precomputed import Precomputed, precomputed_folder
from ltx2_jax.data.schema import Schema, renamed
from ltx2_jax.errors import UserError
from ltx2_jax.files import locked, reason

VERSION = 3
OLDER = (2,)  # versions that are read: of one size
INDEX_NAME = "dataset.json"
TABLE_NAME = "table.safetensors"
NAMES_NAME = "names.json"  # of a dataset whose records are files of a .precomputed
EMPTY_CAPTION_NAME = "empty_caption.safetensors"


class RecordWriter:
    """Writes a dataset folder that appears complete or not at all.

    Use as a context manager. Everything goes into a hidden folder beside the target, which takes
    the target's name when the block ends without an exception; otherwise it is deleted. Other
    files of the dataset (codec, text encoder) belong in `staging` before the block ends.

        with RecordWriter("data/bounce") as writer:
            codec.save(writer.staging / "codec.safetensors")
            writer.start(schema)
            writer.write({"id": 0, "video": ..., ...})

    Attributes:
      staging: the hidden folder (pathlib.Path).
      num_records: records written so far.
      skipped: list of {"source", "reason"} that goes into dataset.json.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        shard_bytes: int = 256 * 2**20,
    ):
        """Prepares to write `folder`; nothing is created before the `with` block is entered.

        Args:
          folder: the dataset to be; its parents are created.
          settings: JSON values to keep with the dataset: how it was made.
          overwrite: replace a dataset that is there. Anything else that is there stays.
          shard_bytes: a shard is closed when it holds this much.
        """
        self._folder = Path(os.path.abspath(folder))
        self._settings = dict(settings or {})
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self.staging = self._folder.with_name(
            f".{self._folder.name}.{uuid.uuid4().hex[:8]}.partial"
        )
        self.num_records = 0
        self.skipped: list[dict[str, str]] = []
        self._schema: Schema | None = None
        self._shard: ArrayRecordWriter | None = None
        self._shards: list[dict[str, Any]] = []
        self._buckets: list[int] = []
        self._linked: Precomputed | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "RecordWriter":
        self._check_target()
        self._remove_abandoned()
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.staging.parent}: cannot write here: {error.strerror}") from None
        self._held.enter_context(locked(self.staging))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if self._shard is not None:
                self._close_shard()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
            self._held.close()

    def start(self, schema: Schema) -> None:
        """Sets what every record must look like; once, before the first `write`."""
        self._schema = schema

    def write(self, record: Mapping[str, Any], bucket: int = 0) -> None:
        """Appends one record, of one of the schema's `buckets`.

        Raises:
          UserError: it does not fit the schema, or the disk does not take it.
        """
        if self._schema is None:
            raise RuntimeError("start() sets the schema and comes before write()")
        self._schema.check(record, f"{self._folder}: record {self.num_records}", bucket)
        data = serialize(record)
        if self._shard is None:
            self._open_shard()
        try:
            self._shard.write(data)
        except RuntimeError as error:
            raise UserError(f"{self._folder}: cannot write a record: {error}") from None
        self.num_records += 1
        self._buckets.append(bucket)
        self._shards[-1]["records"] += 1
        self._shards[-1]["bytes"] += len(data)
        if self._shards[-1]["bytes"] >= self._shard_bytes:
            self._close_shard()

    def link(self, samples: Precomputed) -> None:
        """In place of `write`: the records are the files of a `.precomputed`, where they are."""
        self._linked = samples
        self.num_records = len(samples)
        self._buckets = samples.buckets.tolist()
        names = [name.as_posix() for name in samples.names]
        (self.staging / NAMES_NAME).write_text(json.dumps(names, indent=0), encoding="utf-8")

    def skip(self, source: str, reason: str) -> None:
        """Notes that a clip was left out."""
        self.skipped.append({"source": source, "reason": reason})

    def _remove_abandoned(self) -> None:
        """What writers of the same dataset left that were killed; those alive hold theirs."""
        pattern = f".{glob.escape(self._folder.name)}.*.partial"
        for staging in self._folder.parent.glob(pattern):
            with contextlib.suppress(OSError), locked(staging) as abandoned:
                if abandoned:
                    shutil.rmtree(staging, ignore_errors=True)

    def _check_target(self) -> None:
        if not self._folder.exists():
            return
        if not self._folder.is_dir():
            raise UserError(f"{self._folder}: is a file; choose another folder")
        if not any(self._folder.iterdir()):
            return
        if not (self._folder / INDEX_NAME).exists():
            raise UserError(f"{self._folder}: holds files and no dataset; choose another folder")
        if not self._overwrite:
            raise UserError(f"{self._folder}: holds a dataset; choose another folder or overwrite")

    def _shard_path(self, index: int) -> Path:
        return self.staging / f"shard-{index}"

    def _open_shard(self) -> None:
        # One record per chunk, so that random access never decompresses a neighbour. Latents hardly
        # compress and pass through quickly; padded text features shrink several times.
        path = self._shard_path(len(self._shards))
        try:
            self._shard = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        except RuntimeError as error:
            raise UserError(f"{path}: cannot write: {error}") from None
        self._shards.append({"records": 0, "bytes": 0})

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        try:
            shard.close()
        except RuntimeError as error:
            raise UserError(f"{self._folder}: cannot finish a shard: {error}") from None

    def _finish(self) -> None:
        if self.num_records == 0:
            raise UserError(f"{self._folder}: no record was written")
        for index, shard in enumerate(self._shards):
            shard["file"] = f"data-{index:05d}-of-{len(self._shards):05d}.arrayrecord"
            self._shard_path(index).rename(self.staging / shard["file"])
            shard["bytes"] = (self.staging / shard["file"]).stat().st_size
        contents = {
            "version": VERSION,
            "num_records": self.num_records,
            "schema": self._schema.to_json(),
            "shards": self._shards,
            "skipped": self.skipped,
            "settings": self._settings,
        }
        if self._linked is not None:
            where = {"folder": str(self._linked.folder.resolve())}
            contents["linked"] = where | {"sources": list(self._linked.sources)}
        if len(self._schema.buckets) > 1:
            table = {"bucket": np.array(self._buckets, np.int32)}
            (self.staging / TABLE_NAME).write_bytes(serialize(table))
        text = json.dumps(contents, indent=1, ensure_ascii=False)
        (self.staging / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
        # Again: another process may have finished the same dataset in the meantime.
        self._check_target()
        self._move_into_place()

    def _move_into_place(self) -> None:
        # A folder with files in it cannot be replaced in one step: the old one steps aside, and
        # back if the new one cannot take its place.
        aside = self.staging.with_suffix(".old")
        replaces = (self._folder / INDEX_NAME).exists()
        if replaces:
            self._folder.rename(aside)
        try:
            self.staging.rename(self._folder)
        except BaseException:
            if replaces:
                aside.rename(self._folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


class _Made:
    """What made a dataset in a folder: files beside its records."""

    folder: Path
    schema: Schema

    @property
    def codec_path(self) -> Path:
        """The codec that made the latents."""
        return self.folder / self.schema.codec

    @property
    def text_encoder_path(self) -> Path:
        """The text encoder that made the text features."""
        return self.folder / self.schema.text_encoder

    def empty_caption(self) -> dict[str, np.ndarray]:
        """Text fields of a record whose caption is empty.

        Raises:
          UserError: the file is missing or damaged.
        """
        path = self.folder / EMPTY_CAPTION_NAME
        try:
            return unpack(np.fromfile(path, np.uint8))[0]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}); prepare it anew") from None

    def require(self, **expected: Any) -> None:
        """`Schema.require` of this dataset."""
        self.schema.require(self.folder, **expected)


class Records(_Made, Sequence):
    """A dataset folder, opened: `len`, and `[i]` -> dict of numpy arrays and strings.

    Safe to read from several threads. Arrays are read-only. Shards are opened when first read.

    Attributes:
      folder: pathlib.Path.
      schema: `Schema`.
      buckets: int [n], of each record, its entry of `schema.buckets`.
      skipped: clips left out when it was made, list of {"source", "reason"}.
      settings: what it was made with.
    """

    def __init__(self, folder: str | os.PathLike):
        """See `open_records`."""
        self.folder = Path(folder)
        contents = _read_index(self.folder)
        try:
            self.schema = Schema.from_json(contents["schema"])
            self.skipped = contents["skipped"]
            self.settings = renamed(contents["settings"])
            self._shards = [(s["file"], s["records"], s["bytes"]) for s in contents["shards"]]
            if sum(count for _, count, _ in self._shards) != contents["num_records"]:
                raise ValueError("num_records is not the sum over the shards")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.folder / INDEX_NAME}: damaged: {error!r}") from None
        for name, _, size in self._shards:
            path = self.folder / name
            if not path.exists():
                raise UserError(f"{path}: this shard of the dataset is missing")
            if path.stat().st_size != size:
                raise UserError(
                    f"{path}: damaged shard: {path.stat().st_size} bytes, {size} were written"
                )
        self._ends = np.cumsum([count for _, count, _ in self._shards])
        self.buckets = _read_buckets(self.folder, len(self), len(self.schema.buckets))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self._shards[shard][1]
        reader = self._reader(shard)
        try:
            return deserialize(reader.read([index - first])[0])
        except (RuntimeError, ValueError, KeyError) as error:
            path = self.folder / self._shards[shard][0]
            raise UserError(f"{path}: damaged shard: cannot read record {index}: {error}") from None

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, {len(self)} records)"

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                name, count, _ = self._shards[shard]
                path = self.folder / name
                # No read-ahead: the shuffled next record is somewhere else.
                reader = ArrayRecordReader(
                    str(path),
                    "readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                if reader.num_records() != count:
                    raise UserError(
                        f"{path}: damaged shard: {reader.num_records()} records, "
                        f"{count} were written"
                    )
                self._readers[shard] = reader
            return self._readers[shard]


class Linked(_Made, Precomputed):
    """A dataset folder whose records are the files of a `.precomputed`, read where they are.

    Attributes:
      folder: of the dataset; `precomputed` is that of the files.
      settings: what it was made with.
    """

    def __init__(self, folder: Path, contents: Mapping[str, Any]):
        """See `open_records`."""
        self.folder = folder
        try:
            linked = contents["linked"]
            self.precomputed = Path(linked["folder"])
            self.schema = Schema.from_json(contents["schema"])
            self.skipped, self.settings = contents["skipped"], contents["settings"]
            self._shares_text = "audio_text" not in self.schema.fields
            sources = [str(source) for source in linked["sources"]]
            names = json.loads((folder / NAMES_NAME).read_text(encoding="utf-8"))
            self.names = [Path(name) for name in names]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / INDEX_NAME}: damaged: {error!r}") from None
        self.buckets = _read_buckets(folder, len(self), len(self.schema.buckets))
        if not self.precomputed.is_dir():
            raise UserError(f"{folder}: names {self.precomputed}, which is not there; put it back")
        self._choose(sources)


def open_records(folder: str | os.PathLike) -> Records | Linked:
    """Opens the dataset in `folder`.

    Raises:
      UserError: no dataset there, written by another version, or a shard is missing or truncated.
    """
    folder = Path(folder)
    if not (folder / INDEX_NAME).exists() and precomputed_folder(folder) is not None:
        raise UserError(
            f"{folder}: a .precomputed does not say what made it; a dataset that does, and copies "
            f"nothing: python -m ltx2_jax.prepare --from-precomputed {folder} OUT --link "
            "--codec FILE --text-encoder FILE GEMMA"
        )
    contents = _read_index(folder)
    return Linked(folder, contents) if "linked" in contents else Records(folder)


def _read_buckets(folder: Path, count: int, sizes: int) -> np.ndarray:  # int [count]
    """Of each of `count` records, which of so many sizes it has."""
    if sizes == 1:
        return np.zeros(count, np.int32)
    path = folder / TABLE_NAME
    try:
        buckets = deserialize(path.read_bytes())["bucket"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    if buckets.shape != (count,) or not np.isin(buckets, np.arange(sizes)).all():
        raise UserError(f"{path}: damaged: not one of the dataset's sizes for every record")
    return buckets


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no dataset here ({INDEX_NAME} is missing); "
            "python -m ltx2_jax.prepare makes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if version not in (VERSION, *OLDER):
        read = ", ".join(map(str, (*OLDER, VERSION)))
        raise UserError(
            f"{path}: dataset version is {version!r}, this program reads {read}; prepare it anew"
        )
    return contents


def read_schema(folder: str | os.PathLike) -> Schema:
    """The schema in a folder's dataset.json, without opening the records.

    Raises UserError as `open_records` does for the index.
    """
    try:
        return Schema.from_json(_read_index(Path(folder))["schema"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{Path(folder) / INDEX_NAME}: damaged: {error!r}") from None
