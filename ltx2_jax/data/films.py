"""Films that are trained on as they are: records that are made when they are first read.

    dataset.json and what else `prepare` writes, but for the records of clips
    ../clips/HASH.arrayrecord    one of them, once it was read

A dataset like any other, for few films: `data.survey` makes it by what the files say of themselves.
A clip is decoded and encoded by whoever reads it first, in the thread that reads, and kept. The
hash in its name is of what made it: another film, codec or part of a film is another file.
"""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltx2_jax import hosts
from ltx2_jax.blobs import serialize
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.clips import Failure, Item, PrepareConfig, read_item
from ltx2_jax.data.latents import Record, encode_samples, rates_of
from ltx2_jax.data.shards import Shards, write_shard
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.errors import UserError
from ltx2_jax.media.clip_files import fingerprints

VERSION = 1  # of how a clip is made, and of its file
CLIPS = "clips"  # the folder of all clips, beside the dataset
TOLD_EVERY = 30.0  # seconds


def clip_name(item: Item, row: Row, config: PrepareConfig, codec_hash: str) -> str:
    """The file of a clip: a hash of what it is made from, as its files are now."""
    files = fingerprints([row.path, *row.others.values()])
    part = [item.bucket, item.start, item.seconds, config.fps]
    about = [VERSION, codec_hash, part, row.sound_alone, list(row.others), files]
    return f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.arrayrecord"


def to_json(item: Item) -> list[Any]:
    """For dataset.json; `Item(*...)` again, but for the type of its bucket."""
    return [item.row, item.window, item.bucket, item.start, item.seconds]


class Films(Sequence):
    """The clips of a dataset, without their text: `len`, and `[i]` -> fields of a record.

    Safe to read from several threads, while others run programs on all devices: one clip is encoded
    at a time, by one device, which waits for no other.
    """

    def __init__(self, folder: Path, contents: dict[str, Any]):
        """`contents` are those of dataset.json. Nothing else is looked at before a clip is read.

        Raises KeyError, TypeError or ValueError for contents of another kind.
        """
        self._folder, self._table = folder, contents["films"]["table"]
        self._items, self._names = [], []
        for (row, window, bucket, *rest), name in contents["films"]["clips"]:
            bucket = None if bucket is None else Bucket(*bucket)
            self._items.append(Item(row, window, bucket, *rest))
            self._names.append(name)
        self._codec_hash = contents["schema"]["codec_hash"]
        self._codec_path = folder / contents["schema"]["codec"]
        known = {field.name for field in dataclasses.fields(PrepareConfig)}
        settings = {k: v for k, v in contents["settings"].items() if k in known}
        settings["buckets"] = tuple(Bucket(*bucket) for bucket in settings["buckets"])
        self._config = PrepareConfig(**settings)
        self._codec: Codec | None = None
        self._locks = [threading.Lock() for _ in self._items]
        self._devices = threading.Lock()
        self._told = time.monotonic()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        item = self._items[index]
        with self._locks[index]:
            record = self._kept(index)
            if record is None:
                record = self._made(index)
        # These are of the table, and no part of what is kept.
        return record | {"id": np.int64(item.row), "source": self._rows[item.row].name}

    def changed(self) -> bool:
        """Whether a film is another one than when the dataset was made, or gone."""
        return any(map(self._changed, range(len(self))))

    def _changed(self, index: int) -> bool:
        item = self._items[index]
        name = clip_name(item, self._rows[item.row], self._config, self._codec_hash)
        return name != self._names[index]

    @cached_property
    def _rows(self) -> list[Row]:
        rows = read_table(self._table)
        if self._items[-1].row >= len(rows):
            raise UserError(f"{self._table}: has changed since {self._folder} was made of it")
        return rows

    def _path(self, index: int) -> Path:
        return self._folder.parent / CLIPS / self._names[index]

    def _kept(self, index: int) -> Record | None:
        """None where there is none, or one that a disk has damaged."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            return Shards(path.parent, [{"file": path.name, "records": 1, "bytes": 0}])[0]
        except (UserError, RuntimeError, ValueError):
            return None

    def _made(self, index: int) -> Record:
        item = self._items[index]
        row = self._rows[item.row]
        if self._changed(index):
            raise UserError(
                f"{row.path}: has changed, or is gone, since the training began: the same command "
                "looks at it again"
            )
        failed = f"repair it or take it out of {self._table}, and the same command goes on"
        with self._devices:
            if self._codec is None:
                self._codec = load_codec(self._codec_path, devices=jax.local_devices()[:1])
            codec = self._codec
        try:
            sample = read_item(item, row, self._config, rates_of(codec))
        except UserError as error:
            text = str(error).removeprefix(f"{row.path}: ")
            raise UserError(f"{row.path}: {text}; {failed}") from error
        with self._devices:
            ((_, record),) = encode_samples([sample], self._rows, codec, self._config)
        if isinstance(record, Failure):
            raise UserError(f"{row.path}: {record.reason}; {failed}")
        write_shard(self._path(index), [serialize(record)])
        self._tell()
        return record

    def _tell(self) -> None:
        """Says now and then how many clips are kept, and when all are, who made them goes."""
        if all(self._path(index).exists() for index in range(len(self))):
            self._codec = None  # its weights are on a device that has better things to hold
        elif time.monotonic() < self._told + TOLD_EVERY:
            return
        self._told = time.monotonic()
        count = sum(self._path(index).exists() for index in range(len(self)))
        hosts.say(f"films    {count} of {len(self)} clips are encoded")
