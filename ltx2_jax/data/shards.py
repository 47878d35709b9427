"""The files of a dataset: ArrayRecord shards, and the table of what their records are."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ltx2_jax.blobs import deserialize
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, read_bytes, reason, replacing

T = TypeVar("T")

TABLE_NAME = "table.safetensors"
# One record per chunk, so that random access never decompresses a neighbour. Latents hardly
# compress and pass through quickly; padded text features shrink several times.
OPTIONS = "group_size:1,zstd:1"


def write_shard(path: Path, blobs: Iterable[bytes]) -> tuple[int, int]:
    """Writes an ArrayRecord file, whole or not at all, and none of no blobs: how many, and bytes.

    Raises:
      UserError: the disk does not take it.
    """
    blobs = iter(blobs)
    blob, count = next(blobs, None), 0
    if blob is None:
        path.unlink(missing_ok=True)
        return 0, 0
    with replacing(path) as temporary:
        writer = _on_disk(path, ArrayRecordWriter, str(temporary), OPTIONS)
        try:
            while blob is not None:  # what makes them may fail too, and says so itself
                _on_disk(path, writer.write, blob)
                blob, count = next(blobs, None), count + 1
        finally:
            _on_disk(path, writer.close)
        size = temporary.stat().st_size
    return count, size


def _on_disk(path: Path, call: Callable[..., T], *arguments: Any) -> T:
    """A call of the library, whose errors are those of the disk."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


class Waiting:
    """Blobs that wait for their order on the disk, in a file that a crash leaves no trace of.

    A context manager.
    """

    def __init__(self, folder: Path):
        """`folder`: on whose disk."""
        self._folder = folder
        self._file = self._tried(tempfile.TemporaryFile, dir=folder)

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which has been told
            self._file.close()

    def put(self, blob: bytes) -> tuple[int, int]:
        """Keeps one; returns what `get` wants.

        Raises:
          UserError: the disk does not take it.
        """
        start = self._tried(self._file.seek, 0, os.SEEK_END)
        return start, self._tried(self._file.write, blob)

    def get(self, place: tuple[int, int]) -> bytes:
        """What was kept. Raises UserError as `put` does."""
        self._tried(self._file.seek, place[0])
        return self._tried(self._file.read, place[1])

    def _tried(self, call: Callable[..., T], *arguments: Any, **more: Any) -> T:
        try:
            return call(*arguments, **more)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({reason(error)})") from None


class Shards(Sequence):
    """Records in several ArrayRecord files, in order. Files are opened when first read."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]]):
        """`shards`: of dataset.json, {"file", "records", "bytes"} each."""
        self._folder = folder
        self._shards = [(s["file"], s["records"], s["bytes"]) for s in shards]
        self._ends = np.cumsum([count for _, count, _ in self._shards])
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def check(self, sizes: Mapping[str, int] | None = None) -> None:
        """UserError for a file that is missing or has another size; a bucket's are `sizes`."""
        for name, _, size in self._shards:
            path = self._folder / name
            if not (path.exists() if sizes is None else name in sizes):
                raise UserError(f"{path}: this shard of the dataset is missing")
            found = path.stat().st_size if sizes is None else sizes[name]
            if found != size:
                raise UserError(f"{path}: damaged shard: {found} bytes, {size} were written")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self._shards[shard][1]
        reader = self._reader(shard)
        try:
            return deserialize(reader.read([index - first])[0])
        except (RuntimeError, ValueError, KeyError) as error:
            path = self._folder / self._shards[shard][0]
            raise UserError(f"{path}: damaged shard: cannot read record {index}: {error}") from None

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                name, count, _ = self._shards[shard]
                path = self._folder / name
                if in_bucket(path):
                    raise UserError(f"{path}: records are read on disks alone; copy the dataset")
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


class Table:
    """table.safetensors: of every record its size, and which captions it has.

    Attributes:
      buckets: int [n], see `Records`.
    """

    def __init__(self, folder: Path, there: bool, count: int, sizes: int):
        """`there`: whether the dataset has one; without it all records are of the first size."""
        self._path = folder / TABLE_NAME
        self._arrays = {"bucket": np.zeros(count, np.int32)}
        if there:
            try:
                self._arrays = deserialize(read_bytes(self._path))
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{self._path}: cannot be read ({reason(error)})") from None
        self.buckets = self._arrays.get("bucket", np.zeros(0))
        if self.buckets.shape != (count,) or not np.isin(self.buckets, np.arange(sizes)).all():
            raise UserError(f"{self._path}: damaged: not a size for each of {count} records")

    def check_captions(self, count: int) -> None:
        """UserError unless every record names some of so many captions, with weights."""
        starts, ids, weights = map(self._arrays.get, ("caption_start", "caption", "weight"))
        if starts is None or ids is None or weights is None or not (
            len(starts) == len(self.buckets) + 1
            and starts[0] == 0
            and (np.diff(starts) > 0).all()
            and starts[-1] == len(ids) == len(weights)
            and np.isin(ids, np.arange(count)).all()
            and (weights >= 0).all()
            and (np.add.reduceat(weights, starts[:-1]) > 0).all()
        ):  # fmt: skip
            raise UserError(f"{self._path}: damaged: not a caption for every record")

    def shares(self, index: int) -> list[tuple[int, float]]:
        """The captions of a record and their shares, which add up to 1."""
        first, end = self._arrays["caption_start"][index : index + 2]
        weights = self._arrays["weight"][first:end].astype(np.float64)
        ids = self._arrays["caption"][first:end]
        return [(int(i), float(w)) for i, w in zip(ids, weights / weights.sum(), strict=True)]

    def caption(self, index: int, draw: float) -> int:
        """The caption of a record at `draw` in [0, 1)."""
        ids, shares = zip(*self.shares(index), strict=True)
        place = int(np.searchsorted(np.cumsum(shares), draw, side="right"))
        return ids[min(place, len(ids) - 1)]
