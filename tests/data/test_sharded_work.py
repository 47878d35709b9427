"""prepare in several runs and processes: what is done is done once, and nothing is lost."""

import contextlib
import dataclasses
import json
import os
import random
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from ltx2_jax.data import clips, encoding, inspection, merging, shards, staging, work
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.clips import PrepareConfig, Rates
from ltx2_jax.data.encoding import prepare_dataset
from ltx2_jax.data.inspection import describe, verify
from ltx2_jax.data.records import open_records
from ltx2_jax.data.table import Row
from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing
from ltx2_jax.media import scenes
from ltx2_jax.media.media import Clip, FileSize, TooShort
from ltx2_jax.media.scenes import Film

CONFIG = PrepareConfig(num_frames=9, height=16, width=16, batch_size=3)
BUCKETS = (Bucket(17, 16, 32), Bucket(9, 32, 16), Bucket(9, 16, 16), Bucket(1, 16, 16))


class Codec:
    release = "2.3"

    class video:
        strides = (8, 8, 8)
        channels = 1

        @staticmethod
        def encode(video):
            return video[:, ::8, ::8, ::8, :1].astype(np.float32)

    class audio:
        sample_rate = 1600
        latents_per_second = 25

        @staticmethod
        def encode(audio):
            return audio.reshape(len(audio), -1, 64, 2)[:, :, :1]

    def save(self, path):
        safetensors.numpy.save_file({"codec": np.zeros(1)}, path)


class Encoder:
    release, length, shared = "2.3", 16, True

    def features(self, captions):
        codes = np.zeros((len(captions), 16, 1), np.float32)
        for row, caption in enumerate(captions):
            codes[row, 16 - len(caption) :, 0] = [*caption.encode()]
        return codes, codes, codes[..., 0] > 0

    def save(self, path):
        safetensors.numpy.save_file({"encoder": np.zeros(1)}, path)


class Disk:
    """Films by name: their number of frames, height, width and sound; what is not there fails.

    Sound is a number, all the time, or a function of the seconds.
    """

    def __init__(self):
        self.films, self.reads, self.missing, self.changed = {}, [], set(), set()

    def add(self, name, frames=9, height=16, width=16, sound=True):
        self.films[name] = frames, height, width, sound

    def film(self, path):
        if path.name not in self.films or path.name in self.missing:
            raise UserError(f"{path}: no such file")
        return self.films[path.name]

    def size(self, path):
        frames, height, width, sound = self.film(path)
        rate = 12.0 if frames else 0.0
        seconds = frames / rate if frames else 5.0 if callable(sound) else float(sound)
        return FileSize(frames, height, width, rate, seconds, bool(sound))

    def read(self, path, *, num_frames, height, width, fps, sample_rate, start=0.0):
        self.reads.append((path.name, start))
        frames, _, _, sound = self.film(path)
        first = round(start * 12)
        if first + num_frames > frames:
            raise TooShort(f"{path}: too short", frames - first)
        number = int("".join(filter(str.isdigit, path.stem)) or 0)
        times = np.arange(first, first + num_frames)
        video = np.broadcast_to(
            (number + times)[:, None, None, None].astype(np.uint8), (num_frames, height, width, 3)
        )
        audio = np.full((round(num_frames / 12 * sample_rate), 2), number, np.float32)
        return Clip(video, 12.0, audio if sound else None, sample_rate)

    def sound(self, path, *, seconds, sample_rate, start=0.0):
        *_, sound = self.film(path)
        times = start + np.arange(round(seconds * sample_rate)) / sample_rate
        values = sound(times) if callable(sound) else np.full(len(times), sound)
        return np.repeat(values[:, None], 2, axis=1).astype(np.float32), (f"heard {path.name}",)


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(clips, "read_clip", disk.read)
    monkeypatch.setattr(clips, "file_size", disk.size)
    monkeypatch.setattr(clips, "read_sound", disk.sound)
    monkeypatch.setattr(work, "SHARD_ROWS", 4)
    monkeypatch.setattr(work, "SHARD_CAPTIONS", 3)

    def there(paths):
        names = [None if path.name in disk.missing else path.name for path in paths]
        return [f"another {name}" if name in disk.changed else name for name in names]

    for module in (encoding, work):
        monkeypatch.setattr(module, "fingerprints", there)
    return disk


def prepare(folder, rows, config=CONFIG, name="set", header="video,caption", **options):
    with replacing(folder / "t.csv") as table:  # two processes write it
        table.write_text("\n".join([header, *rows]) + "\n")
    makers = {"codec": Codec(), "text_encoder": Encoder()}
    return prepare_dataset(folder / "t.csv", folder / name, config, **makers, **options)


def films(disk, count):
    rows = []
    for i in range(count):
        disk.add(f"f{i}.mp4")
        rows.append(f"f{i}.mp4,caption {i % 7}")
    return rows


def contents(records):
    """All that a dataset says of its clips, to be compared."""
    found = []
    for i, record in enumerate(records):
        arrays = {
            k: v if isinstance(v, str) else (v.dtype.name, v.tolist()) for k, v in record.items()
        }
        found.append((arrays, int(records.buckets[i]), records.captions(i)))
    return found, records.schema, records.skipped


def test_captions_are_stored_once_and_join_their_clips(tmp_path, disk):
    made = prepare(tmp_path, films(disk, 10))
    assert [record["caption"] for record in made] == [f"caption {i % 7}" for i in range(10)]
    for record in made:
        text = bytes(record["video_text"][record["text_mask"], 0].astype(np.uint8)).decode()
        assert text == record["caption"]
        assert record["video"][0, 0, 0, 0] == record["id"]
    stored = sum(part["records"] for part in index_of(tmp_path / "set")["captions"])
    assert stored == 7
    assert list(verify(made)) == []


def test_captions_of_all_shards_are_counted_where_they_may_be_cut(tmp_path, disk, capsys):
    full = ["b" * 16, "c" * 16, "d" * 16, "e" * 16]  # two in each of two shards
    captions = ["a", full[0], full[1], "ff", full[2], full[3], "g" * 9]
    rows = [
        f"{row.split(',')[0]},{text}" for row, text in zip(films(disk, 7), captions, strict=True)
    ]
    prepare(tmp_path, rows)
    assert "captions that fill all 16 tokens: 4; what is longer" in capsys.readouterr().out


def index_of(folder):
    return json.loads((folder / "dataset.json").read_text())


class Killed(BaseException):
    """Not an error that anything handles."""


PLACES = [
    (clips, "read_clip"), (work, "serialize"), (work, "encode_captions"),
    (merging, "content_hash"), (work, "bucket_of"), (work, "write_empty_caption"),
    (encoding.Staging, "write_json"), (encoding.Staging, "finish"), (encoding.Staging, "publish"),
]  # fmt: skip


def killed_at(places, monkeypatch):
    """Kills at the call of one of the places that counts `left[0]` down to 0; who was `crashed`."""
    left, crashed = [0], []
    for module, name in places:
        original = getattr(module, name)

        def breaks(*args, original=original, name=name, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                crashed.append(name)
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, breaks)
    return left, crashed


def test_a_dataset_made_with_crashes_equals_one_made_without(tmp_path, disk, monkeypatch):
    """A crash anywhere: while decoding, encoding, writing, or giving the folder its name."""
    rows = films(disk, 23)
    del disk.films["f5.mp4"], disk.films["f20.mp4"]
    whole = contents(prepare(tmp_path, rows, name="whole"))
    rng, (left, crashed) = random.Random(1), killed_at(PLACES, monkeypatch)
    # Threads read ahead, so how far a run comes is not the same each time.
    while len(crashed) < 20 and not (tmp_path / "broken").exists():
        left[0] = rng.randrange(1, 16)
        with contextlib.suppress(Killed):
            prepare(tmp_path, rows, name="broken")
    left[0] = -1
    disk.reads.clear()
    made = prepare(tmp_path, rows, name="broken")
    assert len(disk.reads) < 23  # a part was done in between
    assert len(crashed) >= 8
    assert contents(made) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "t.csv", "whole"]


def test_a_full_disk_costs_the_shard_in_hand(tmp_path, disk, monkeypatch):
    rows, writes = films(disk, 6), []

    def full(path, blobs):
        writes.append(path.name)
        if path.name.startswith("clips"):
            raise UserError(f"{path}: cannot be written (No space left on device)")
        return shards.write_shard(path, blobs)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_shard", full)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(tmp_path, rows)
        assert writes == [f"captions-0000{i}.arrayrecord" for i in (0, 1)] + [
            "clips-00000.arrayrecord"
        ]
        writes.clear()
        with pytest.raises(UserError, match="No space left on device"):
            prepare(tmp_path, rows)
        assert writes == ["clips-00000.arrayrecord"]  # the captions are kept
    assert len(prepare(tmp_path, rows)) == 6


def test_what_is_done_is_not_done_again(tmp_path, disk, monkeypatch):
    rows = films(disk, 12)
    finish, calls = encoding.Staging.finish, []

    def third(self, kind, shard, *rest):
        calls.append(kind)
        if kind == "clips" and calls.count("clips") == 3:
            raise Killed
        finish(self, kind, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(encoding.Staging, "finish", third)
        with pytest.raises(Killed):
            prepare(tmp_path, rows)
    disk.reads.clear()
    assert len(prepare(tmp_path, rows)) == 12
    assert {name for name, _ in disk.reads} <= {"f0.mp4", *(f"f{i}.mp4" for i in range(8, 12))}


def test_two_processes_share_the_work_and_give_the_same_dataset(tmp_path, disk):
    rows = films(disk, 23)
    whole = contents(prepare(tmp_path, rows, name="whole"))
    disk.reads.clear()
    second = threading.Thread(
        target=prepare, args=(tmp_path, rows), kwargs={"process": 1, "processes": 2}
    )
    second.start()
    made = prepare(tmp_path, rows, process=0, processes=2)
    second.join()
    assert contents(made) == whole
    names = sorted(name for name, _ in disk.reads)
    assert sum(names.count(f"f{i}.mp4") > 1 for i in range(23)) <= 1  # the first gives the length


def test_a_process_that_comes_when_all_is_done_has_nothing_to_do(tmp_path, disk, monkeypatch):
    """Whether the dataset appears before it looks, while it waits, or before it looks for work."""
    rows, options = films(disk, 4), {"process": 1, "processes": 2}
    waits, there = encoding.Staging.wait, []

    def finished_meanwhile(self, *given):
        there.append(self)
        if len(there) == 1:
            prepare(tmp_path, rows)
        waits(self, *given)

    monkeypatch.setattr(encoding.Staging, "wait", finished_meanwhile)
    assert prepare(tmp_path, rows, **options) is None
    assert len(prepare(tmp_path, rows, **options)) == 4


def test_clips_are_tried_again_though_their_process_is_gone(tmp_path, disk, watched):
    """The other process may have seen that all is done before the first one undid a shard."""
    rows, config = films(disk, 8), dataclasses.replace(CONFIG, scenes=True)
    for name in disk.films:
        disk.add(name, 30)
    disk.missing.add("f6.mp4")  # in the second shard of clips, and the fourth of films
    assert prepare(tmp_path, rows, config).skipped[-1]["source"] == "f6.mp4"
    disk.missing.clear()
    disk.reads.clear()
    watched.clear()
    made = prepare(tmp_path, rows, config, process=0, processes=2)
    assert "f6.mp4" in [record["source"] for record in made]
    assert {name for name, _ in disk.reads} == {f"f{i}.mp4" for i in range(4, 8)}
    assert watched == ["f6.mp4", "f7.mp4"]


def test_a_crash_after_the_folder_has_its_name_costs_nothing(tmp_path, disk, monkeypatch):
    rows = films(disk, 6)

    def named(folder, target):
        folder.rename(target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(staging, "put_in_place", named)
        with pytest.raises(Killed):
            prepare(tmp_path, rows)
    disk.reads.clear()
    (tmp_path / "set" / ".clips-00000.json.77-0123abcd").write_text("of a process that was killed")
    (tmp_path / ".set.old").mkdir()
    assert len(prepare(tmp_path, rows)) == 6
    assert not disk.reads
    prepare(tmp_path, rows, name="calm")
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("set", "calm")]
    assert names[0] == names[1]
    assert not (tmp_path / ".set.old").exists()


def test_files_of_a_run_that_was_killed_at_the_end_are_not_in_the_dataset(
    tmp_path, disk, monkeypatch
):
    rows = films(disk, 12)
    disk.missing |= {f"f{i}.mp4" for i in range(4)}  # a whole shard
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_schema", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(tmp_path, rows)
    disk.missing.clear()
    assert len(prepare(tmp_path, rows)) == 12
    found = sorted(path.name for path in (tmp_path / "set").glob("data-*"))
    assert found == [f"data-0000{i}-of-00003.arrayrecord" for i in range(3)]


def test_a_second_run_into_one_folder_is_refused(tmp_path, disk, monkeypatch):
    rows, seen = films(disk, 4), []

    def read(path, **wanted):
        if not seen:
            seen.append(path)
            with pytest.raises(UserError, match="set: another prepare is at work on it"):
                prepare(tmp_path, rows)
        return disk.read(path, **wanted)

    monkeypatch.setattr(clips, "read_clip", read)
    assert len(prepare(tmp_path, rows)) == 4
    assert seen


def test_a_half_made_dataset_with_other_settings_is_refused_until_overwrite(
    tmp_path, disk, monkeypatch
):
    rows = films(disk, 6)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "finish", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(tmp_path, rows)
    other = dataclasses.replace(CONFIG, fps=12.0)
    with pytest.raises(UserError, match=r"half made there with other settings; .*--overwrite"):
        prepare(tmp_path, rows, other)
    assert len(prepare(tmp_path, rows, other, overwrite=True)) == 6


def test_records_of_a_shard_that_are_gone_are_made_again(tmp_path, disk, monkeypatch):
    rows = films(disk, 6)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "finish", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(tmp_path, rows)
    (tmp_path / ".set.prepare" / "clips-00001.arrayrecord").unlink()
    disk.reads.clear()
    assert len(prepare(tmp_path, rows)) == 6
    assert {name for name, _ in disk.reads} == {"f4.mp4", "f5.mp4"}


def test_a_disk_without_links_gets_copies(tmp_path, disk, monkeypatch):
    rows = films(disk, 6)
    whole = contents(prepare(tmp_path, rows, name="whole"))

    def link(*given):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(staging.os, "link", link)
    assert contents(prepare(tmp_path, rows)) == whole


def test_who_waits_goes_on_as_long_as_another_process_gives_signs_of_life(tmp_path, monkeypatch):
    now = [time.time()]
    clock = SimpleNamespace(time=lambda: now[0], sleep=lambda _: now.append(now.pop() + 1000))
    monkeypatch.setattr(staging, "time", clock)
    with staging.Staging(tmp_path / "set", {}) as first:
        waits, looks = staging.Staging(tmp_path / "set", {}, process=1), []
        lock = first.folder / "lock-0"

        def there():
            looks.append(os.utime(lock, (now[0], now[0])))
            return len(looks) == 9

        waits.wait(there, "ends")
        with pytest.raises(UserError, match="another process ends, and none is at work; the same"):
            waits.wait(lambda: False, "ends")
        os.utime(lock, (0, 0))
        first.alive()
        assert lock.stat().st_mtime > 1e9


def test_clips_that_came_since_are_added_and_the_rest_is_kept(tmp_path, disk):
    rows = films(disk, 12)
    disk.missing |= {"f1.mp4", "f10.mp4"}
    made = prepare(tmp_path, rows)
    assert [clip["source"] for clip in made.skipped] == ["f1.mp4", "f10.mp4"]
    disk.reads.clear()
    assert len(prepare(tmp_path, rows)) == 10
    assert not disk.reads  # they are still missing
    disk.missing.remove("f10.mp4")
    added = prepare(tmp_path, rows)
    assert sorted(int(record["id"]) for record in added) == [0, *range(2, 12)]
    assert {name for name, _ in disk.reads} == {f"f{i}.mp4" for i in range(8, 12)}
    disk.missing.clear()
    whole = contents(prepare(tmp_path, rows, name="whole"))
    assert contents(prepare(tmp_path, rows)) == whole


def test_a_clip_that_was_unusable_is_tried_again_once_it_is_another_file(tmp_path, disk):
    rows = films(disk, 3)
    disk.add("f1.mp4", 5)
    assert [clip["source"] for clip in prepare(tmp_path, rows).skipped] == ["f1.mp4"]
    disk.add("f1.mp4", 9)
    disk.changed.add("f1.mp4")
    assert [record["source"] for record in prepare(tmp_path, rows)] == [f"f{i}.mp4" for i in "012"]
    disk.changed.add("f2.mp4")  # which was used
    with pytest.raises(encoding.OtherDataset, match=r"f2\.mp4 was another file when"):
        prepare(tmp_path, rows)


def test_other_parts_of_the_same_films_are_another_dataset(tmp_path, disk):
    disk.add("film0.mp4", 48)
    prepare(tmp_path, ["film0.mp4,a,1"], header="video,caption,start")
    with pytest.raises(encoding.OtherDataset, match="with another table"):
        prepare(tmp_path, ["film0.mp4,a,2"], header="video,caption,start")


def test_a_file_that_could_not_be_told_apart_then_is_no_other_one_now(tmp_path, disk, monkeypatch):
    rows = films(disk, 2)
    with monkeypatch.context() as patch:
        patch.setattr(work, "fingerprints", lambda paths: [None for _ in paths])
        prepare(tmp_path, rows)
    disk.reads.clear()
    assert len(prepare(tmp_path, rows)) == 2
    assert not disk.reads


def test_clips_that_are_added_have_the_length_of_the_first(tmp_path, disk, monkeypatch):
    """Of the first of all, not the first of their shard."""
    rows = films(disk, 6)
    disk.missing.add("f4.mp4")
    prepare(tmp_path, rows)
    disk.missing.clear()

    def faster(path, **wanted):
        clip = disk.read(path, **wanted)
        return dataclasses.replace(clip, fps=24.0) if path.name == "f4.mp4" else clip

    monkeypatch.setattr(clips, "read_clip", faster)
    made = prepare(tmp_path, rows)
    assert len(made) == 5
    assert "at 24 frames per second its sound lasts 0.36 s" in made.skipped[0]["reason"]


def test_a_failure_of_the_disk_is_tried_again_and_one_of_the_film_is_not(
    tmp_path, disk, monkeypatch
):
    rows = films(disk, 3)
    faults = {"f0.mp4": OSError(5, "Input/output error"), "f1.mp4": ValueError("not a film")}

    def read(path, **wanted):
        if error := faults.get(path.name):
            disk.reads.append((path.name, 0))
            raise UserError(f"{path}: {error}") from error
        return disk.read(path, **wanted)

    monkeypatch.setattr(clips, "read_clip", read)
    assert len(prepare(tmp_path, rows)) == 1
    faults.pop("f0.mp4")
    assert len(prepare(tmp_path, rows)) == 2
    disk.reads.clear()
    assert len(prepare(tmp_path, rows)) == 2
    assert not disk.reads


# ---- sizes, windows, streams ---------------------------------------------------------------------

MIXED = dataclasses.replace(CONFIG, buckets=BUCKETS, incomplete=True)


def test_every_clip_goes_to_its_bucket_and_films_give_many(tmp_path, disk):
    disk.add("wide.mp4", 40, 100, 200)
    disk.add("tall.mp4", 20, 200, 100)
    disk.add("square.mp4", 9, 50, 50)
    disk.add("short.mp4", 5, 100, 200)
    rows = [f"{name}.mp4,{name}" for name in ("wide", "tall", "square", "short")]
    made = prepare(tmp_path, rows, dataclasses.replace(MIXED, stride=8))
    sizes = [str(made.schema.buckets[i]) for i in made.buckets]
    assert sizes == ["32x16x17"] * 3 + ["16x32x9"] * 2 + ["16x16x9"] + ["16x16x1"]
    starts = [int(record["video"][0, 0, 0, 0]) for record in made]
    assert starts == [0, 8, 16, 0, 8, 0, 0]
    assert list(verify(made)) == []


def test_sizes_are_listed_largest_first_whatever_comes_first_in_the_table(tmp_path, disk):
    disk.add("square.mp4", 9, 50, 50)
    disk.add("wide.mp4", 17, 100, 200)
    made = prepare(tmp_path, ["square.mp4,a", "wide.mp4,b", "square.mp4,c"], MIXED)
    assert [str(size) for size in made.schema.buckets] == ["32x16x17", "16x16x9"]
    assert made.buckets.tolist() == [1, 0, 1]
    assert made.schema.num_frames == 17


def test_a_stream_that_is_missing_is_missing_in_the_record(tmp_path, disk):
    disk.add("film1.mp4", 9)
    disk.add("silent2.mp4", 9, sound=False)
    disk.add("image3.png", 1)
    disk.add("noise4.wav", 0, 0, 0, sound=5)
    rows = ["film1.mp4,,a", "silent2.mp4,,b", "image3.png,,c", ",noise4.wav,d"]
    config = dataclasses.replace(MIXED, buckets=(Bucket(9, 16, 16), Bucket(1, 16, 16)))
    made = prepare(tmp_path, rows, config, header="video,audio,caption")
    assert [("video" in r, "audio" in r) for r in made] == [
        (True, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip
    assert len(made.schema.buckets) == 4
    assert made[2]["fps"] == 1
    assert made[3]["audio"].shape == (9, 1, 2)  # as long as 9 frames at 25 a second
    assert (made[3]["audio"] == 5).all()
    lines = "\n".join(describe(made))
    assert "2 records without audio" in lines
    assert "1 x sound alone" in lines
    strict = prepare(
        tmp_path, rows, dataclasses.replace(config, incomplete=False), "strict",
        header="video,audio,caption",
    )  # fmt: skip
    assert [clip["reason"] for clip in strict.skipped] == [
        "no sound",
        "an image; --incomplete takes it",
        "sound without picture; --incomplete takes it",
    ]


def test_sound_alone_need_not_be_as_long_as_that_of_the_films(tmp_path, disk):
    disk.add("film1.mp4")
    disk.add("noise.wav", 0, 0, 0, sound=5)
    config = dataclasses.replace(CONFIG, incomplete=True)
    rows = ["film1.mp4,,a", ",noise.wav,b"]
    made = prepare(tmp_path, rows, config, header="video,audio,caption")
    assert [len(record["audio"]) for record in made] == [19, 9]  # 9 frames at 12 and at 25 a second


def test_memory_does_not_grow_with_the_length_of_a_film(tmp_path, disk, monkeypatch):
    """Latents wait for the end of their shard on the disk."""

    def encode(video):  # to a megabyte for each clip
        first = video[:, 0, 0, 0, 0].astype(np.float32)
        return np.broadcast_to(first[:, None, None, None, None], (len(video), 4, 64, 64, 16))

    monkeypatch.setattr(Codec.video, "encode", encode)
    disk.add("film0.mp4", 9 + 59)
    tracemalloc.start()
    made = prepare(tmp_path, ["film0.mp4,a"], dataclasses.replace(CONFIG, stride=1))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [int(record["video"].max()) for record in made] == list(range(60))
    assert most < 24e6


def test_latents_that_wait_on_a_full_disk_are_told(tmp_path, monkeypatch):
    full = lambda dir: open("/dev/full", "r+b", buffering=0)  # noqa: E731
    monkeypatch.setattr(shards.tempfile, "TemporaryFile", full)
    with shards.Waiting(tmp_path) as waiting:
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            waiting.put(b"1")


SCENES = dataclasses.replace(CONFIG, stride=8, scenes=True)


@pytest.fixture
def watched(disk, monkeypatch):
    """Films of 12 frames a second are cut at frame 10, and film3 at 5 too; names as watched."""
    names = []

    def watch(path, alive=None):
        names.append(path.name)
        try:
            frames, *_ = disk.film(path)
        except UserError:
            return Film((), 0.0, "no such file")
        cuts = [10] if "3" not in path.name else [5, 10]
        return Film(tuple(((k - 1) / 12, k / 12) for k in cuts), frames / 12)

    monkeypatch.setattr(scenes, "watch", watch)
    monkeypatch.setattr(work, "SHARD_FILMS", 2)
    return names


def test_every_scene_is_a_film_of_its_own_and_films_are_watched_once(
    tmp_path, disk, watched, monkeypatch
):
    for i in range(5):
        disk.add(f"film{i}.mp4", 30)
    disk.add("image9.png", 1)
    rows = [f"film{i}.mp4,a,," for i in range(5)]
    rows += ["film0.mp4,b,1.5,", "film4.mp4,c,,0.8", "image9.png,d,,"]
    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "_make_makers", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(tmp_path, rows, SCENES, header="video,caption,start,end")
    assert len(watched) == 5  # film0 and film4 are in the table twice
    made = prepare(tmp_path, rows, SCENES, header="video,caption,start,end")
    assert sorted(watched) == [f"film{i}.mp4" for i in range(5)]
    firsts = [(r["source"], int(r["video"][0, 0, 0, 0]) - r["id"] % 5) for r in made]
    each = [(f"film{i}.mp4", k) for i in range(5) for k in (0, 10, 18) if (i, k) != (3, 0)]
    assert firsts == [*each, ("film0.mp4", 18), ("film4.mp4", 3)]
    assert made.skipped[0] == {
        "source": "film3.mp4",
        "reason": "of its 3 scenes 2 have less than 9 frames",
    }


def test_two_processes_find_scenes_and_later_runs_know_them(tmp_path, disk, watched):
    rows = films(disk, 9)
    for name in disk.films:
        disk.add(name, 30)
    whole = contents(prepare(tmp_path, rows, SCENES, name="whole"))
    watched.clear()
    disk.missing |= {"f1.mp4"}
    second = threading.Thread(
        target=prepare, args=(tmp_path, rows, SCENES), kwargs={"process": 1, "processes": 2}
    )
    second.start()
    made = prepare(tmp_path, rows, SCENES, process=0, processes=2)
    second.join()
    assert sorted(watched) == sorted(disk.films)
    assert made.skipped[0] == {"source": "f1.mp4", "reason": "no such file"}
    disk.missing.clear()
    watched.clear()
    assert contents(prepare(tmp_path, rows, SCENES)) == whole
    assert watched == ["f0.mp4", "f1.mp4"]  # the others of its shard are kept


def test_scenes_are_part_of_what_a_dataset_is(tmp_path, disk, watched, monkeypatch):
    disk.add("film0.mp4", 30)
    made = prepare(tmp_path, ["film0.mp4,a"], SCENES)
    assert made.settings["scenes"] == scenes.RULE
    with pytest.raises(UserError, match=r"holds a dataset with scenes '64x36 .*', not None"):
        prepare(tmp_path, ["film0.mp4,a"], dataclasses.replace(SCENES, scenes=False))
    monkeypatch.setattr(encoding, "RULE", "another rule")
    with pytest.raises(UserError, match=r"scenes '64x36 .*', not 'another rule'"):
        prepare(tmp_path, ["film0.mp4,a"], SCENES)


def test_a_film_is_used_as_far_as_it_could_be_watched(tmp_path, disk, watched, monkeypatch):
    disk.add("film0.mp4", 40)
    found = Film(((0.75, 10 / 12),), 2.5, "timestamps run backwards", True)
    monkeypatch.setattr(scenes, "watch", lambda path, alive: found)
    rows = ["film0.mp4,a,", "film0.mp4,b,3"]
    made = prepare(tmp_path, rows, SCENES, header="video,caption,start")
    assert [int(record["video"][0, 0, 0, 0]) for record in made] == [0, 10, 18]
    assert [clip["reason"] for clip in made.skipped] == [
        "from 2.5 s: timestamps run backwards",
        "from 3 s: timestamps run backwards",
    ]
    monkeypatch.setattr(scenes, "watch", lambda path, alive: Film((), 40 / 12))  # the disk is back
    assert len(prepare(tmp_path, rows, SCENES, header="video,caption,start")) == 4


def test_a_dry_run_tells_what_each_film_gives(tmp_path, disk, watched):
    for i in range(4):
        disk.add(f"film{i}.mp4", 30)
    disk.add("short.mp4", 8)
    rows = [Row(name, tmp_path / name, "") for name in disk.films]
    lines = list(inspection.foresee(rows, SCENES, Rates(1600, 25, (8, 8, 8)), 100))
    assert lines[:5] == [
        "film0.mp4: 3 clips", "film1.mp4: 3 clips", "film2.mp4: 3 clips", "film3.mp4: 2 clips",
        "short.mp4: 0 clips",
    ]  # fmt: skip
    assert lines[5] == "11 clips of 16x16x9"
    # 2 x 2 x 2 latents of 100 float32 numbers each.
    assert lines[6] == "11 clips of 5 rows; their video latents take 3.52e-05 GB"
    assert sorted(lines[7:]) == [
        "1 left out: has only 8 frames; the shortest bucket has 9",
        "1 left out: of its 3 scenes 2 have less than 9 frames",
    ]


def test_a_part_of_a_film_is_taken_by_its_start_and_end(tmp_path, disk):
    disk.add("film0.mp4", 48)
    rows = ["film0.mp4,a,1,", "film0.mp4,b,0.5,1.5", "film0.mp4,c,3.5,", "film0.mp4,d,9,"]
    made = prepare(tmp_path, rows, header="video,caption,start,end")
    assert [int(record["video"][0, 0, 0, 0]) for record in made] == [12, 6]
    assert [clip["reason"] for clip in made.skipped] == [
        "has only 6 frames; the shortest bucket has 9",
        "it ends at 4.00 s, before start=9",
    ]


def test_the_last_clips_of_a_film_that_says_too_much_are_told(tmp_path, disk, monkeypatch):
    disk.add("film0.mp4", 30)
    monkeypatch.setattr(clips, "file_size", lambda path: FileSize(40, 16, 16, 12.0, 40 / 12, True))
    made = prepare(tmp_path, ["film0.mp4,a"], dataclasses.replace(CONFIG, stride=10))
    assert len(made) == 3
    assert made.skipped == [{"source": "film0.mp4", "reason": "from 2.5 s: too short"}]


def test_a_film_shorter_than_it_says_takes_another_size_and_its_later_clips_do_not(
    tmp_path, disk, monkeypatch
):
    monkeypatch.setattr(
        clips, "file_size", lambda path: FileSize(40, 100, 200, 12.0, 40 / 12, True)
    )
    disk.add("film0.mp4", 10)
    disk.add("film1.mp4", 20)
    config = dataclasses.replace(MIXED, stride=17)
    made = prepare(tmp_path, ["film0.mp4,a", "film1.mp4,b"], config)
    assert [str(made.schema.buckets[i]) for i in made.buckets] == ["16x16x9", "32x16x17"]
    assert [(clip["source"], clip["reason"]) for clip in made.skipped] == [
        (f"film{i}.mp4", "from 1.41667 s: too short") for i in (0, 1)
    ]


def test_captions_have_weights_and_one_is_drawn(tmp_path, disk):
    disk.add("film0.mp4")
    rows = ["film0.mp4,one,two,3,", "film0.mp4,one,,,0"]
    made = prepare(tmp_path, rows[:1], header="video,caption,caption_b,weight_b,weight")
    assert made.captions(0) == [("one", 0.25), ("two", 0.75)]
    draws = [made.with_caption(0, draw)["caption"] for draw in (0.0, 0.2, 0.3, 0.99)]
    assert draws == ["one", "one", "two", "two"]
    header = "video,caption,caption_b,weight_b,weight"
    never = prepare(tmp_path, ["film0.mp4,one,two,1,0"], name="never", header=header)
    assert never[0]["caption"] == "two"  # the first that has a weight
    with pytest.raises(UserError, match=r"t\.csv:2: the weights of its captions are all 0"):
        prepare(tmp_path, rows[1:], header="video,caption,caption_b,weight_b,weight")


def test_references_and_masks_stand_beside_their_clip(tmp_path, disk):
    disk.add("film1.mp4", 17)
    disk.add("other2.mp4", 17)
    disk.add("mask255.png", 1)
    disk.add("sound.wav", 0, 0, 0, sound=1)
    config = dataclasses.replace(CONFIG, num_frames=17, reference_downscale=2, reference_slowdown=2)
    made = prepare(
        tmp_path,
        ["film1.mp4,a,other2.mp4,mask255.png,sound.wav,sound.wav"],
        config,
        header="video,caption,reference_video,video_mask,reference_audio,audio_mask",
    )
    (record,) = made
    assert record["video_reference"].shape == (2, 1, 1, 1)
    assert record["video_reference_fps"] == 6
    assert record["video_reference"][1, 0, 0, 0] == 2 + 15  # frame 8 of those kept is frame 15
    assert record["video_mask"].shape == (3, 2, 2)
    assert record["video_mask"].all()
    assert record["audio_reference"].shape == record["audio"].shape
    assert record["audio_mask"].tolist() == [True] * len(record["audio"])


def test_what_stands_beside_a_part_of_a_film_is_taken_from_where_the_part_begins(tmp_path, disk):
    """Its own sound, a reference and a mask of each stream: all from second 1, frame 12, on."""
    disk.add("film1.mp4", 40)
    disk.add("other2.mp4", 40)
    disk.add("mask116.mp4", 40)  # light from frame 12 on
    disk.add("clock.wav", 0, 0, 0, sound=lambda seconds: seconds)
    disk.add("given.wav", 0, 0, 0, sound=lambda seconds: seconds >= 1.4)
    row = "film1.mp4,a,1,clock.wav,other2.mp4,mask116.mp4,clock.wav,given.wav"
    columns = "video,caption,start,audio,reference_video,video_mask,reference_audio,audio_mask"
    made = prepare(tmp_path, [row] * 5, header=columns)  # in two shards
    record = made[4]
    assert record["video"][:, 0, 0, 0].tolist() == [13, 21]
    assert record["video_reference"][:, 0, 0, 0].tolist() == [14, 22]
    assert record["video_mask"].all()
    clock = 1 + np.arange(19) / 25  # 9 frames at 12 a second are 19 latents, nearly
    for name in ("audio", "audio_reference"):
        np.testing.assert_allclose(record[name][:18, 0, 0], clock[:18], atol=1e-5)
    # The mask's 1200 samples are spread over 19 latents: the one at 1.4 s is number 10.1.
    assert record["audio_mask"].tolist() == [False] * 11 + [True] * 8
    assert encoding.clip_notes(made) == {"heard clock.wav": 5}


def test_sound_alone_is_as_long_as_the_longest_size_that_its_part_fills(tmp_path, disk):
    disk.add("clock.wav", 0, 0, 0, sound=lambda seconds: seconds)  # 5 s
    rows = [",clock.wav,a,2,", ",clock.wav,b,4.5,", ",clock.wav,c,1,1.4", ",clock.wav,d,4.9,"]
    config = dataclasses.replace(CONFIG, buckets=BUCKETS[:3], incomplete=True)  # 17 and 9 frames
    made = prepare(tmp_path, rows, config, header="video,audio,caption,start,end")
    for record, start, latents in zip(made, (2, 4.5, 1), (17, 9, 9), strict=True):
        expected = start + np.arange(latents) / 25
        np.testing.assert_allclose(record["audio"][:, 0, 0], expected, atol=1e-5)
    (left,) = made.skipped
    assert left["reason"] == "has 0.10 s of sound; the shortest bucket 0.36"


def test_a_mask_counts_frames_as_the_codec_does():
    pixels = np.zeros((17, 16, 16))
    pixels[8, :8, :8] = 1  # the last frame of the second latent
    pixels[9, 8:, 8:] = 1  # the first of the third
    pixels[0, :8, 8:12] = 1  # half of the pixels: not more
    mask = clips.latent_mask(pixels, (8, 8, 8))
    assert np.argwhere(mask).tolist() == [[1, 0, 0], [2, 1, 1]]


def test_verify_names_a_damaged_record(tmp_path, disk):
    made = prepare(tmp_path, films(disk, 6))
    shard = next((tmp_path / "set").glob("data-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    faults = list(verify(open_records(tmp_path / "set")))
    assert faults
    assert all("damaged" in line for line in faults)
    assert len(made) == 6
