import contextlib
import dataclasses
import json
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ltx2_jax import blobs
from ltx2_jax.data import records
from ltx2_jax.data.records import RecordWriter, open_records
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError


def make_record(index, dtype=np.float32):
    rng = np.random.default_rng(index)
    return {
        "id": np.int64(index),
        "video": rng.normal(size=(3, 2, 2, 4)).astype(dtype),
        "audio": rng.normal(size=(5, 1, 8)).astype(np.float16),
        "video_text": rng.normal(size=(6, 7)).astype(dtype),
        "text_mask": rng.integers(0, 2, 6).astype(bool),
        "fps": np.float32(23.976),
        "caption": f'clip {index}: "naïve", 球\n',
        "source": f"clips/{index}.mp4",
    }


def make_schema(record):
    return Schema(
        release="linear",
        text="features",
        text_release="random",
        num_frames=9,
        height=16,
        width=16,
        fps=23.976,
        codec="codec.safetensors",
        codec_hash="0123456789abcdef",
        text_encoder="text_encoder.safetensors",
        text_encoder_hash="fedcba9876543210",
        fields={name: Field.of(value) for name, value in record.items()},
    )


def write(folder, count=5, dtype=np.float32, **options):
    with RecordWriter(folder, **options) as writer:
        writer.start(make_schema(make_record(0, dtype)))
        for index in range(count):
            writer.write(make_record(index, dtype))
    return folder


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], str):
            assert a[name] == b[name]
        else:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_records_come_back_as_written(tmp_path, dtype):
    opened = open_records(write(tmp_path / "set", dtype=dtype))
    assert len(opened) == 5
    for index, record in enumerate(opened):
        assert_same(record, make_record(index, dtype))
    assert_same(opened[-1], make_record(4, dtype))
    with pytest.raises(IndexError):
        opened[5]


def test_a_record_is_plain_safetensors():
    data = blobs.serialize(make_record(3))
    theirs = safetensors.numpy.load(data)
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, make_record(3)[name])
    assert set(make_record(3)) - set(theirs) == {"caption", "source"}


def test_arrays_in_another_memory_order_are_written_right():
    record = {"id": 0, "video": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)}
    back = blobs.deserialize(blobs.serialize(record))
    np.testing.assert_array_equal(back["video"], record["video"])


def test_the_same_records_give_the_same_files(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_shards_are_numbered_and_read_as_one(tmp_path):
    folder = write(tmp_path / "set", count=7, shard_bytes=2000)
    shards = sorted(path.name for path in folder.glob("*.arrayrecord"))
    assert len(shards) > 2
    assert shards == [f"data-{i:05d}-of-{len(shards):05d}.arrayrecord" for i in range(len(shards))]
    assert [int(record["id"]) for record in open_records(folder)] == list(range(7))


def test_many_threads_read_the_same_records(tmp_path):
    opened = open_records(write(tmp_path / "set", count=7, shard_bytes=2000))
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 7, 100):
            if opened[index]["id"] != index:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_made_the_dataset_is_stored_with_it(tmp_path):
    with RecordWriter(tmp_path / "set", settings={"width": 16}) as writer:
        (writer.staging / "codec.safetensors").write_text("codec")
        writer.skip("bad.mp4", "no sound")
        writer.start(make_schema(make_record(0)))
        writer.write(make_record(0))
    opened = open_records(tmp_path / "set")
    assert opened.schema == make_schema(make_record(0))
    assert opened.settings == {"width": 16}
    assert opened.skipped == [{"source": "bad.mp4", "reason": "no sound"}]
    assert opened.codec_path.read_text() == "codec"
    assert opened.text_encoder_path == tmp_path / "set" / "text_encoder.safetensors"


# ---- all or nothing ------------------------------------------------------------------------------


def crash(folder, error=KeyboardInterrupt, **options):
    with RecordWriter(folder, **options) as writer:
        writer.start(make_schema(make_record(0)))
        writer.write(make_record(0))
        raise error


def test_a_crash_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        crash(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_the_old_dataset_untouched(tmp_path):
    write(tmp_path / "set")
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        crash(tmp_path / "set", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_process_killed_while_writing_leaves_no_dataset(tmp_path):
    writer = RecordWriter(tmp_path / "set")
    writer.__enter__()
    writer.start(make_schema(make_record(0)))
    writer.write(make_record(0))  # and never __exit__
    with pytest.raises(UserError, match="no dataset here"):
        open_records(tmp_path / "set")
    write(tmp_path / "set", count=2)  # the next attempt is not in the way of what was left
    assert len(open_records(tmp_path / "set")) == 2


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    with RecordWriter(tmp_path / "set") as alive:
        killed = alive.staging.with_name(".set.0123abcd.partial")
        other = alive.staging.with_name(".other.0123abcd.partial")
        for folder in (killed, other):
            folder.mkdir()
            (folder / "shard-0").touch()
        write(tmp_path / "set", count=2)
        assert alive.staging.exists()
        assert other.exists()
        assert not killed.exists()
        alive.start(make_schema(make_record(0)))
        alive.write(make_record(0))
        shutil.rmtree(tmp_path / "set")
    assert len(open_records(tmp_path / "set")) == 1


def test_nothing_is_removed_where_nobody_knows_whether_its_writer_lives(tmp_path, monkeypatch):
    left = tmp_path / ".set.0123abcd.partial"
    left.mkdir()
    monkeypatch.setattr(records, "locked", lambda path: contextlib.nullcontext(None))
    write(tmp_path / "set")
    assert left.exists()


def test_a_failed_rename_puts_the_old_dataset_back(tmp_path, monkeypatch):
    write(tmp_path / "set")
    rename = records.Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(records.Path, "rename", fail)
    with pytest.raises(OSError, match="disk on fire"):
        write(tmp_path / "set", count=1, overwrite=True)
    assert len(open_records(tmp_path / "set")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwrite_replaces_a_dataset_and_nothing_else(tmp_path):
    write(tmp_path / "set")
    with pytest.raises(UserError, match="holds a dataset"):
        write(tmp_path / "set", count=2)
    write(tmp_path / "set", count=2, overwrite=True)
    assert len(open_records(tmp_path / "set")) == 2

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="holds files and no dataset"):
        write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "photos" / "a.jpg", overwrite=True)


def test_an_empty_folder_may_become_a_dataset(tmp_path):
    (tmp_path / "set").mkdir()
    assert len(open_records(write(tmp_path / "set"))) == 5


def test_a_dataset_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="no record was written"), RecordWriter(tmp_path / "set"):
        pass
    assert not list(tmp_path.iterdir())


# ---- refusals by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": np.zeros((3, 2, 2, 5), np.float32)}, r"'video' is float32\[3, 2, 2, 5\]"),
        ({"audio": np.zeros((5, 1, 8), np.float32)}, r"'audio' is float32.*dataset's is float16"),
        ({"caption": None}, "'caption' is missing, the dataset's is str"),
        ({"extra": "text"}, "'extra' is str, the dataset's is missing"),
    ],
)
def test_a_record_of_another_shape_is_refused(tmp_path, change, message):
    record = {k: v for k, v in {**make_record(1), **change}.items() if v is not None}
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(make_schema(make_record(0)))
        writer.write(make_record(0))
        with pytest.raises(UserError, match=f"record 1: field {message}"):
            writer.write(record)
    assert len(open_records(tmp_path / "set")) == 1


def test_a_mismatch_names_dataset_field_and_both_values(tmp_path):
    opened = open_records(write(tmp_path / "set"))
    opened.require(release="linear", video=(None, None, None, 4), video_text=[6, 7])
    with pytest.raises(UserError, match=r"set: release is 'linear', '2\.3' is needed"):
        opened.require(release="2.3")
    with pytest.raises(UserError, match=r"set: text_release is 'random', '2\.3' is needed"):
        opened.require(text="features", text_release="2.3")
    with pytest.raises(UserError, match="set: codec_hash is '0123456789abcdef', 'ffff' is needed"):
        opened.require(release="linear", codec_hash="ffff")
    with pytest.raises(UserError, match=r"set: video is \(3, 2, 2, 4\), \(None, 128\) is needed"):
        opened.require(video=(None, 128))
    with pytest.raises(UserError, match=r"set: no field 'features'; its records hold id, video"):
        opened.require(features=(6, 3840))


def test_damaged_shards_are_named(tmp_path):
    shard = write(tmp_path / "set") / "data-00000-of-00001.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrayrecord: damaged shard"):
        open_records(tmp_path / "set")

    # The same size: found when a reader looks at the footer, or at the checksum of the record.
    shard.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrayrecord: damaged shard"):
        open_records(tmp_path / "set")[0]

    flipped = bytearray(content)
    at = content.index(make_record(2)["video"].tobytes()[:8])
    flipped[at] ^= 0xFF
    shard.write_bytes(flipped)
    opened = open_records(tmp_path / "set")
    assert_same(opened[1], make_record(1))
    with pytest.raises(UserError, match=r"arrayrecord: damaged shard: cannot read record 2"):
        opened[2]

    shard.unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrayrecord: .* missing"):
        open_records(tmp_path / "set")


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no dataset here .*ltx2_jax\.prepare"):
        open_records(tmp_path / "nowhere")
    index = write(tmp_path / "set") / "dataset.json"
    contents = json.loads(index.read_text())

    index.write_text(json.dumps({**contents, "version": 99}))
    with pytest.raises(UserError, match=r"dataset\.json: dataset version is 99"):
        open_records(tmp_path / "set")
    index.write_text(json.dumps({**contents, "schema": {"release": "linear"}}))
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        open_records(tmp_path / "set")
    index.write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        open_records(tmp_path / "set")


def test_schema_survives_json():
    schema = make_schema(make_record(0))
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert dataclasses.replace(schema, release="2.0") != schema


def test_content_hash_ignores_the_order_of_metadata_and_sees_every_value(tmp_path):
    tensors = {"a": np.arange(4.0), "b": np.zeros((2, 2), np.float32)}

    def hash_of(tensors, metadata):
        path = tmp_path / "codec.safetensors"
        safetensors.numpy.save_file(tensors, path, metadata)
        return blobs.content_hash(path)

    metadata = {str(i): "x" for i in range(8)}
    hashes = {hash_of(tensors, metadata) for _ in range(8)}
    hashes.add(hash_of(dict(reversed(tensors.items())), metadata))
    assert len(hashes) == 1
    assert hash_of(tensors, {**metadata, "0": "y"}) not in hashes
    assert hash_of({**tensors, "b": np.eye(2, dtype=np.float32)}, metadata) not in hashes
    assert hash_of({**tensors, "b": np.zeros(4, np.float32)}, metadata) not in hashes


def test_a_dataset_of_the_version_before_is_read(tmp_path):
    """Its clips had one size, and its words for the release of latents and text were others."""
    index = write(tmp_path / "set") / "dataset.json"
    contents = json.loads(index.read_text())
    contents["version"] = 2
    (bucket,) = contents["schema"].pop("buckets")
    contents["schema"] |= bucket
    for part in (contents["schema"], contents["settings"]):
        part |= {"generation": "linear", "text_generation": "random"}
        part.pop("release", None), part.pop("text_release", None)
    index.write_text(json.dumps(contents))
    opened = open_records(tmp_path / "set")
    assert (opened.schema.release, opened.schema.text_release) == ("linear", "random")
    assert opened.settings["release"] == "linear"
    assert opened.schema == make_schema(make_record(0))
    for index, record in enumerate(opened):
        assert_same(record, make_record(index))


def test_records_of_several_sizes_say_which_they_have(tmp_path):
    large, small = make_record(0), make_record(1)
    small["video"] = small["video"][:2]
    sizes = [make_schema(record).buckets[0] for record in (large, small)]
    known = {name: getattr(make_schema(large), name) for name in (
        "release", "text", "text_release", "codec", "codec_hash", "text_encoder",
        "text_encoder_hash")}  # fmt: skip
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(Schema.of_buckets(sizes, **known))
        for record, size in ((small, 1), (large, 0), (small, 1)):
            writer.write(record, size)
        with pytest.raises(UserError, match=r"field 'video' is float32\[2, 2, 2, 4\]"):
            writer.write(small, 0)
    opened = open_records(tmp_path / "set")
    assert opened.buckets.tolist() == [1, 0, 1]
    assert opened.schema.buckets == tuple(sizes)
    assert_same(opened[2], small)
    (tmp_path / "set" / "table.safetensors").write_bytes(blobs.serialize({"bucket": np.array([0])}))
    with pytest.raises(UserError, match=r"table\.safetensors: damaged: not a size for each of 3"):
        open_records(tmp_path / "set")
