"""Datasets: what a host reads, what the index must say, and what of a clip gets into a record."""

import dataclasses
import json
import time

import numpy as np
import pytest
import safetensors.numpy

from ltx2_jax.blobs import content_hash
from ltx2_jax.data import clips, encoding, latents
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.clips import ClipReader, Item, PrepareConfig, Rates, Sample
from ltx2_jax.data.encoding import OtherDataset, prepare_dataset
from ltx2_jax.data.inspection import describe, verify
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.records import RecordWriter, open_records, read_schema
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.data.table import Row
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip

# ------------------------------------------------------------------------------------- the loader


class Source:
    """Ten records in memory; remembers which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        return {"id": np.int64(index)}


def settled(items):
    """Their number, when threads have added none for a while."""
    before, count = -1, len(items)
    while before != count:
        time.sleep(0.3)
        before, count = count, min(len(items), 100)
    return count


@pytest.mark.parametrize("part", [0, 1])
def test_a_host_reads_its_own_rows_and_no_others(part):
    source = Source()
    rows = range(2 * part, 2 * part + 2)
    batches = iter(make_dataset(source, batch_size=4, seed=3, rows=rows, threads=0))
    taken = np.concatenate([next(batches)["id"] for _ in range(5)])
    assert source.read == taken.tolist()


def test_few_batches_wait_for_the_step():
    source = Source()
    batches = iter(make_dataset(source, batch_size=2, seed=3, threads=1))
    next(batches)
    assert settled(source.read) <= 2 * (1 + 2 + 1)  # taken, waiting, being read


# ------------------------------------------------------------------------------------ the records


def record(index):
    return {"id": np.int64(index), "video": np.full((2, 3), index, np.float32), "caption": "text"}


SCHEMA = Schema(
    **dict.fromkeys(("release", "text", "text_release", "codec_hash"), "linear"),
    **{"codec": "codec.safetensors", "text_encoder": "text.safetensors", "text_encoder_hash": ""},
    **{"num_frames": 9, "height": 16, "width": 8, "fps": 12.0},
    fields={name: Field.of(value) for name, value in record(0).items()},
)


def write(folder, count=4, **options):
    with RecordWriter(folder, **options) as writer:
        writer.start(SCHEMA)
        for index in range(count):
            writer.write(record(index))
    return folder


def test_arrays_of_a_record_are_read_only(tmp_path):
    opened = open_records(write(tmp_path / "set"))
    with pytest.raises(ValueError, match="read-only"):
        opened[0]["video"][:] = 1


def edit(folder, change):
    index = folder / "dataset.json"
    contents = json.loads(index.read_text())
    change(contents)
    index.write_text(json.dumps(contents))


def test_an_index_that_counts_other_records_than_its_shards_is_damaged(tmp_path):
    folder = write(tmp_path / "set", shard_bytes=1)  # a record each
    edit(folder, lambda contents: contents.update(num_records=3))
    with pytest.raises(UserError, match=r"dataset\.json: damaged: .*num_records"):
        open_records(folder)

    def exchange(contents):
        contents["num_records"] = 4
        contents["shards"][0]["records"], contents["shards"][1]["records"] = 2, 0

    edit(folder, exchange)
    opened = open_records(folder)
    assert opened[3]["id"] == 3
    with pytest.raises(UserError, match=r"data-00000-of-00004.*damaged shard: 1 records, 2 were"):
        opened[0]


def test_a_schema_is_read_without_its_records(tmp_path):
    folder = write(tmp_path / "set")
    (folder / "data-00000-of-00001.arrayrecord").unlink()
    assert read_schema(folder) == SCHEMA
    edit(folder, lambda contents: contents.pop("schema"))
    with pytest.raises(UserError, match=r"dataset\.json: damaged: KeyError"):
        read_schema(folder)


def test_features_of_the_empty_caption_that_cannot_be_read_are_named(tmp_path):
    folder = write(tmp_path / "set")
    with pytest.raises(UserError, match=r"empty_caption\.safetensors: cannot be read \(No such"):
        open_records(folder).empty_caption()
    (folder / "empty_caption.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"empty_caption\.safetensors: cannot be read .*anew"):
        open_records(folder).empty_caption()


def test_the_first_of_two_writers_of_one_dataset_wins(tmp_path):
    def overtaken():
        with RecordWriter(tmp_path / "set") as slow:
            slow.start(SCHEMA)
            slow.write(record(0))
            write(tmp_path / "set", count=3)

    with pytest.raises(UserError, match="set: holds a dataset"):
        overtaken()
    assert len(open_records(tmp_path / "set")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_dataset_tells_how_long_its_clips_last_together(tmp_path):
    slow = dataclasses.replace(SCHEMA, fps=9 / 1800)  # a clip of 9 frames lasts half an hour
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(slow)
        for index in range(5):
            writer.write(record(index))
    assert next(describe(open_records(tmp_path / "set"))) == "5 records, 2.50 hours"


def test_verify_names_what_is_not_finite_and_rates_that_are_none(tmp_path):
    more = {"fps": np.float32(12), "source": "0.mp4"}
    fields = {name: Field.of(value) for name, value in (record(0) | more).items()}
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(dataclasses.replace(SCHEMA, fields=fields))
        writer.write(record(0) | more)
        writer.write(
            record(1)
            | more
            | {"video": np.full((2, 3), np.inf, np.float32)}
            | {"id": np.int64(1), "source": "1.mp4"}
        )
        writer.write(record(2) | more | {"fps": np.float32(0), "source": "2.mp4"})
    assert list(verify(open_records(tmp_path / "set"))) == [
        "record 1 (1.mp4): video is not finite",
        "record 2 (2.mp4): fps is 0.0",
    ]


# ------------------------------------------------------------------------------- clips to records

CONFIG = PrepareConfig(num_frames=9, height=16, width=8, text_length=3)


class Codec:
    """One latent for the picture and one for every 64 samples of sound."""

    release = "2.3"

    def __init__(self):
        self.batches = []
        self.video = self.audio = self
        self.strides, self.sample_rate, self.latents_per_second = (4, 8, 8), 1600, 25

    def encode(self, values):
        if values.dtype == np.uint8:
            self.batches.append(len(values))
            value = values[:, 0, 0, 0, 0].astype(np.float32)
            return np.where(value == 13, np.nan, value)[:, None, None, None, None]
        return values.reshape(len(values), -1, 64, 2)[:, :, None, 0]

    def save(self, path):
        safetensors.numpy.save_file({"codec": np.zeros(1)}, path)


class Encoder:
    release, length, shared = "2.3", 3, True

    def features(self, captions):
        lengths = np.asarray([len(caption) for caption in captions], np.float32)
        video = np.broadcast_to(lengths[:, None, None], (len(captions), 3, 1))
        return video, video, np.tile([False, True, True], (len(captions), 1))

    def save(self, path):
        safetensors.numpy.save_file({"encoder": np.zeros(1)}, path)


@pytest.fixture
def reads(monkeypatch):
    """Clips by name: x is none, d cannot be encoded; others hold their number. Names as read."""
    names = []

    def read_clip(path, *, num_frames, height, width, fps, sample_rate, start):
        names.append(path.name)
        kind, number = path.stem[0], int(path.stem[1:])
        if kind == "x":
            raise UserError(f"{path}: not a film")
        pixels = np.full((num_frames, height, width, 3), 13 if kind == "d" else number, np.uint8)
        sound = np.arange(2 * 3000, dtype=np.float32).reshape(-1, 2)  # longer than the picture
        return Clip(pixels, fps or 12.0, sound, sample_rate, notes=(f"of kind {kind}",))

    monkeypatch.setattr(clips, "read_clip", read_clip)
    return names


def prepare(folder, names, config=CONFIG, **options):
    options = {"codec": Codec(), "text_encoder": Encoder()} | options
    rows = "".join(f"{name}.mp4,{'x' * int(name[1:])}\n" for name in names)
    (folder / "t.csv").write_text("video,caption\n" + rows)
    return prepare_dataset(folder / "t.csv", folder / "set", config, **options)


def test_clips_are_encoded_in_batches_as_asked_and_keep_their_captions(tmp_path, reads):
    codec = Codec()
    names = ["b1", "x2", "b3", "b4", "d13", "b5", "b6"]
    made = prepare(tmp_path, names, dataclasses.replace(CONFIG, batch_size=4), codec=codec)
    assert codec.batches == [4, 4]  # x2 is not among them, and the second is filled up
    for item in made:
        number = item["video"].item()
        assert item["caption"] == "x" * int(number)
        np.testing.assert_array_equal(item["video_text"], np.full((3, 1), number))
        assert item["source"] == f"b{number:.0f}.mp4"
    assert len(made) == 5


def test_clips_that_wait_for_others_of_their_size_take_no_more_memory_than_they_may(monkeypatch):
    """Else the size that holds the most is encoded before its batch is full."""
    frames, rows = [1, 9, 9, 1, 9, 1], [Row(f"{i}.mp4", f"{i}.mp4", "") for i in range(6)]
    samples = [
        Sample(Item(row, 0, Bucket(count, 16, 8)), np.zeros((count, 16, 8, 3), np.uint8), None, 12)
        for row, count in enumerate(frames)
    ]
    monkeypatch.setattr(latents, "WAITING_BYTES", samples[1].nbytes + samples[2].nbytes)
    made = latents.encode_samples(samples, rows, Codec(), CONFIG)
    assert [item.row for item, _ in made] == [1, 2, 0, 3, 5, 4]


def test_sound_longer_than_the_picture_is_cut_to_whole_latents(tmp_path, reads):
    made = prepare(tmp_path, ["b1"])
    # 9 frames at 12 a second last 18.75 latents of 64 samples.
    np.testing.assert_array_equal(made[0]["audio"][:, 0, 0], 128 * np.arange(19))


def test_clips_left_out_are_listed_in_the_order_of_the_table_and_none_of_their_notes_counts(
    tmp_path, reads
):
    names = ["d1", "x2", "b3", "b4"]
    made = prepare(tmp_path, names, dataclasses.replace(CONFIG, batch_size=4))
    assert [clip["source"] for clip in made.skipped] == ["d1.mp4", "x2.mp4"]
    assert encoding.clip_notes(made) == {"of kind b": 2}


def test_the_schema_says_what_made_the_records(tmp_path, reads):
    config = dataclasses.replace(CONFIG, fps=20.0)
    made = prepare(tmp_path, ["b1"], config)
    schema = made.schema
    assert (schema.num_frames, schema.height, schema.width, schema.fps) == (9, 16, 8, 20.0)
    assert schema.codec_hash == content_hash(made.codec_path)
    assert schema.text_encoder_hash == content_hash(made.text_encoder_path)
    assert schema.codec_hash != schema.text_encoder_hash
    # The encoder's length and release, whatever the config says.
    other = dataclasses.replace(config, text_length=5, text_release="2.0", release="2.0")
    assert len(prepare(tmp_path, ["b1"], other)) == 1
    assert (schema.release, schema.text_release, schema.text) == ("2.3", "2.3", "features")


@pytest.mark.parametrize("change", [{"num_frames": 13}, {"height": 24}, {"width": 16}])
def test_another_size_is_another_dataset_and_another_batch_is_not(tmp_path, reads, change):
    prepare(tmp_path, ["b1"])
    reads.clear()
    prepare(tmp_path, ["b1"], dataclasses.replace(CONFIG, batch_size=1))
    assert not reads
    (name, value), *_ = change.items()
    with pytest.raises(OtherDataset, match=f"with {name} {getattr(CONFIG, name)}, not {value};"):
        prepare(tmp_path, ["b1"], dataclasses.replace(CONFIG, **change))


def test_large_clips_are_encoded_fewer_at_once_and_decoded_no_further_ahead(
    tmp_path, reads, monkeypatch
):
    hour = dataclasses.replace(CONFIG, num_frames=3600 * 24, height=720, width=1280)
    half = dataclasses.replace(CONFIG, num_frames=97, height=720, width=1280)  # 268 MB
    assert [clips.fitting(16, config.sizes) for config in (CONFIG, half, hour)] == [16, 2, 1]
    monkeypatch.setattr(clips, "fitting", lambda count, sizes: 2)
    rows = [Row(f"b{i}.mp4", tmp_path / f"b{i}.mp4", "") for i in range(60)]
    samples = iter(ClipReader(rows, CONFIG, Rates(1600, 25)))
    assert next(samples).item.row == 0
    assert settled(reads) <= 3
    samples.close()
