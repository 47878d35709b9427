"""Files with bytes changed, moved and cut off: each is read, or refused in one line, in no time.

MUTATIONS=1000 tries ten times as many of each kind as a usual run.
"""

import json
import os
import random
import resource
import time

import film
import numpy as np
import pyarrow.parquet
import pytest

from ltx2_jax.data.records import RecordWriter, open_records, read_schema
from ltx2_jax.data.schema import BucketFields, Field, Schema
from ltx2_jax.data.table import read_table
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import file_size, read_clip

COUNT = int(os.environ.get("MUTATIONS", "100"))
SECONDS = 5.0  # that one file may take
MEGABYTES = 500  # that all may add to the memory of the process


def mutated(data: bytes, rng: random.Random, *, same_size: bool = False) -> bytes:
    """One to eight changes; half of the bytes that are put in are digits and signs of text."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data))
        byte = rng.choice((rng.randrange(256), rng.choice(b'0129-.,:;"[]{}\\/ \n\0')))
        kind = 0 if same_size else rng.randrange(4)
        if kind == 0:
            data[place] = byte
        elif kind == 1:
            data[place:place] = bytes([byte]) * rng.choice((1, 1, 3, 40))
        elif kind == 2:
            del data[place : place + rng.randrange(1, 20)]
        else:
            end = place + rng.randrange(1, 60)
            data[place:place] = data[place:end]
        data = data or bytearray(b"0")
    return bytes(data)


def try_all(path, original, read, *, seed, count=COUNT, **how):
    """Reads `count` mutations at `path`; how many were refused."""
    rng, refusals = random.Random(seed), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        path.write_bytes(mutated(original, rng, **how))
        began = time.perf_counter()
        try:
            read()
        except UserError as error:
            refusals.append(str(error))
        assert time.perf_counter() - began < SECONDS
    path.write_bytes(original)
    assert all(len(text.splitlines()) == 1 for text in refusals)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024
    return len(refusals)


TABLES = {
    "t.csv": (
        "video,audio,caption,caption_b,weight_b,start,end,reference_video\n"
        'a.mp4,,"one, two",three,0.5,1,2.5,b.mp4\n,b.wav,x,,,,,\n'
    ),
    "t.json": json.dumps(
        [{"media_path": "a.mp4", "caption": "é", "start": 1, "weight": 2, "caption_b": "z"}] * 2
    ),
    "t.jsonl": '{"video": "a.mp4", "caption": "a", "end": 3.5}\n' * 3,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    assert try_all(
        tmp_path / name, TABLES[name].encode(), lambda: read_table(tmp_path / name), seed=1
    )


def test_parquet_tables(tmp_path):
    rows = pyarrow.Table.from_pylist(json.loads(TABLES["t.json"]) * 3)
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(rows, path, compression="snappy", row_group_size=4)
    assert try_all(path, path.read_bytes(), lambda: read_table(path), seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of two sizes."""
    folder = tmp_path_factory.mktemp("mutations") / "set"
    records = [
        {"id": np.int64(i), "video": np.full((3 + i % 2, 2), i, np.float32), "source": "x"}
        for i in range(6)
    ]
    sizes = [
        BucketFields(9, 16, 16, 24.0, {k: Field.of(v) for k, v in record.items()})
        for record in records[1::-1]
    ]
    words = ["release", "text", "text_release", "codec", "codec_hash"]
    made_by = dict.fromkeys([*words, "text_encoder", "text_encoder_hash"], "linear")
    with RecordWriter(folder) as writer:
        writer.start(Schema.of_buckets(sizes, **made_by))
        for i, record in enumerate(records):
            writer.write(record, 1 - i % 2)
    return folder


def read_all(folder):
    opened = open_records(folder)
    read_schema(folder)
    for index in range(min(len(opened), 10)):
        opened.schema.check(opened[index], f"record {index}", int(opened.buckets[index]))


@pytest.mark.parametrize(
    ("pattern", "same_size"), [("dataset.json", False), ("table.*", False), ("data-*", True)]
)
def test_datasets(folder, pattern, same_size):
    (path,) = folder.glob(pattern)
    assert try_all(path, path.read_bytes(), lambda: read_all(folder), seed=2, same_size=same_size)
    read_all(folder)


def test_films(tmp_path):
    path = film.write_film(tmp_path / "a.mp4", film.numbered(12, 32, 32), tones=[440])

    def read():
        file_size(path)
        read_clip(path, num_frames=9, height=16, width=16, sample_rate=16000, start=0.04)

    assert try_all(path, path.read_bytes(), read, seed=3, count=COUNT // 2)
