"""The record format: a folder with `dataset.json` and ArrayRecord shards.

    dataset.json                      schema, shards, skipped clips, the settings it was made with
    data-00000-of-00002.arrayrecord   one record per clip
    codec.safetensors                 what made the latents
    text_encoder.safetensors          what made the text features, and its tokenizer
    empty_caption.safetensors         features of the empty caption, for captions that are dropped
    captions-00000-of-00001.arrayrecord  one record per caption, where they lie apart
    table.safetensors                 of every record its size and its captions

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

Text and caption lie apart where `prepare` wrote them: once for all clips that have the caption. A
dataset may hold clips of several sizes, and clips that lack a stream; the schema has the fields of
each kind. References and masks are `video_reference` [F", H", W", C] with `video_reference_fps` [],
`audio_reference` [A', M, C], `video_mask` bool [F', H', W'] and `audio_mask` bool [A].
"""

import contextlib
import glob
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ltx2_jax.blobs import serialize, unpack
from ltx2_jax.data.films import Films
from ltx2_jax.data.precomputed import Precomputed, precomputed_folder
from ltx2_jax.data.schema import Schema, renamed
from ltx2_jax.data.shards import OPTIONS, TABLE_NAME, Shards, Table
from ltx2_jax.errors import UserError
from ltx2_jax.files import locked, read_bytes, reason

VERSION = 3
OLDER = (2,)  # versions that are read: of one size
INDEX_NAME = "dataset.json"
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
        check_target(self._folder, self._overwrite)
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
        """In place of `write`: the records are the files of a `.precomputed`.

        The folder that is written is to be moved in there.
        """
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

    def _shard_path(self, index: int) -> Path:
        return self.staging / f"shard-{index}"

    def _open_shard(self) -> None:
        path = self._shard_path(len(self._shards))
        try:
            self._shard = ArrayRecordWriter(str(path), OPTIONS)
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
            sources, incomplete = list(self._linked.sources), self._linked.incomplete
            contents["linked"] = {"sources": sources, "incomplete": incomplete}
        if len(self._schema.buckets) > 1:
            table = {"bucket": np.array(self._buckets, np.int32)}
            (self.staging / TABLE_NAME).write_bytes(serialize(table))
        text = json.dumps(contents, indent=1, ensure_ascii=False)
        (self.staging / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
        # Again: another process may have finished the same dataset in the meantime.
        check_target(self._folder, self._overwrite)
        put_in_place(self.staging, self._folder)


def check_target(folder: Path, overwrite: bool) -> None:
    """UserError unless a dataset may be put at `folder`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder")
    if not any(folder.iterdir()):
        return
    if not (folder / INDEX_NAME).exists():
        raise UserError(f"{folder}: holds files and no dataset; choose another folder")
    if not overwrite:
        raise UserError(f"{folder}: holds a dataset; choose another folder or overwrite")


def put_in_place(staging: Path, folder: Path) -> None:
    """Gives a finished folder the name of the dataset, in place of one that is there."""
    # A folder with files in it cannot be replaced in one step: the old one steps aside, and
    # back if the new one cannot take its place.
    aside = staging.with_suffix(".old")
    replaces = (folder / INDEX_NAME).exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
        folder.rename(aside)
    try:
        staging.rename(folder)
    except BaseException:
        if replaces:
            aside.rename(folder)
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
      folder: pathlib.Path; of a bucket epath.Path, and there the records cannot be read.
      schema: `Schema`.
      buckets: int [n], of each record, its entry of `schema.buckets`.
      skipped: clips left out when it was made, list of {"source", "reason"}.
      settings: what it was made with.
      films: what makes the clips when they are first read; None where they are in shards.
    """

    def __init__(self, folder: str | os.PathLike, sizes: Mapping[str, int] | None = None):
        """See `open_records`, and `open_in_bucket`: `sizes` are those of its files in a bucket."""
        self.folder = Path(folder) if sizes is None else folder
        contents = _read_index(self.folder)
        try:
            self.schema = Schema.from_json(contents["schema"])
            self.skipped = contents["skipped"]
            self.settings = renamed(contents["settings"])
            self.films = Films(self.folder, contents) if "films" in contents else None
            self._shards = self.films or Shards(self.folder, contents["shards"])
            apart = contents.get("captions", [])
            self._captions = Shards(self.folder, apart) if apart else None
            if len(self._shards) != contents["num_records"]:
                raise ValueError("num_records is not the sum over the shards")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{self.folder / INDEX_NAME}: damaged: {error!r}") from None
        if self.films is None:
            self._shards.check(sizes)
        several = len(self.schema.buckets) > 1 or self._captions is not None
        self._table = Table(self.folder, several, len(self), len(self.schema.buckets))
        self.buckets = self._table.buckets
        if self._captions is not None:
            self._captions.check(sizes)
            self._table.check_captions(len(self._captions))

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_caption(index, 0.0)

    def with_caption(self, index: int, draw: float) -> dict[str, Any]:
        """Record `index` with one of its captions: the one at `draw`, in [0, 1), of their weights.

        0 is the first that has a weight; a record has one caption unless its table gave it several.
        """
        index = range(len(self))[index]
        record = self._shards[index]
        if self._captions is not None:
            record |= self._captions[self._table.caption(index, draw)]
        if self.films is not None:  # of which is known what they say of themselves
            self.schema.check(record, f"{self.folder}: {record['source']}", self.buckets[index])
        return record

    def captions(self, index: int) -> list[tuple[str, float]]:
        """All captions of a record, with the share of draws that takes each."""
        index = range(len(self))[index]
        if self._captions is None:
            return [(self._shards[index]["caption"], 1.0)]
        return [(self._captions[i]["caption"], w) for i, w in self._table.shares(index)]

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, {len(self)} records)"


class Linked(_Made, Precomputed):
    """A `.precomputed` with a dataset.json beside its files, which are its records.

    Attributes:
      settings: what it was made with.
    """

    def __init__(self, folder: Path, contents: Mapping[str, Any]):
        """See `open_records`."""
        self.folder = self.precomputed = folder
        try:
            linked = contents["linked"]
            self.schema = Schema.from_json(contents["schema"])
            self.skipped, self.settings = contents["skipped"], contents["settings"]
            self._shares_text = "audio_text" not in self.schema.fields
            sources = [str(source) for source in linked["sources"]]
            names = json.loads((folder / NAMES_NAME).read_text(encoding="utf-8"))
            self.names = [Path(name) for name in names]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / INDEX_NAME}: damaged: {error!r}") from None
        several = len(self.schema.buckets) > 1
        self.buckets = Table(folder, several, len(self), len(self.schema.buckets)).buckets
        self._choose(sources, bool(linked.get("incomplete")))


def open_records(folder: str | os.PathLike) -> Records | Linked:
    """Opens the dataset in `folder`.

    Raises:
      UserError: no dataset there, written by another version, or a shard is missing or truncated.
    """
    folder = _home(folder)
    contents = _read_index(folder)
    return Linked(folder, contents) if "linked" in contents else Records(folder)


def _home(folder: str | os.PathLike) -> Path:
    """Where the dataset.json is: here, or in the `.precomputed` in here.

    Raises:
      UserError: that has none yet.
    """
    folder = Path(folder)
    official = None if (folder / INDEX_NAME).exists() else precomputed_folder(folder)
    if official is None:
        return folder
    if not (official / INDEX_NAME).exists():
        raise UserError(
            f"{folder}: a .precomputed does not say what made it; tell it once: python -m "
            f"ltx2_jax.prepare --from-precomputed {folder} --codec FILE --text-encoder FILE GEMMA"
        )
    return official


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        contents = json.loads(read_bytes(path).decode())
        version = contents["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no dataset here ({INDEX_NAME} is missing); "
            "python -m ltx2_jax.prepare makes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from None
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
        return Schema.from_json(_read_index(_home(folder))["schema"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{Path(folder) / INDEX_NAME}: damaged: {error!r}") from None
