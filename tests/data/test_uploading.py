"""prepare into a bucket: what counts is there, and a dataset appears whole, at its end."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import threading

import fake_bucket
import fsspec
import pytest
from test_sharded_work import (
    CONFIG,
    PLACES,
    Codec,
    Encoder,
    Killed,
    contents,
    films,
    killed_at,
    prepare,
)
from test_sharded_work import disk as disk

from ltx2_jax import files
from ltx2_jax import prepare as command
from ltx2_jax.blobs import content_hash
from ltx2_jax.data import uploading
from ltx2_jax.data.encoding import prepare_dataset
from ltx2_jax.data.fetching import local_dataset, open_in_bucket
from ltx2_jax.data.records import open_records
from ltx2_jax.errors import UserError

URL, AT, MAKING = "gs://bucket/sets/films", "bucket/sets/films", "bucket/sets/.films.prepare"
SIZE = ["--num-frames=9", "--height=16", "--width=16"]


def check_whole(bucket):
    """If there is an index, the files that it names are there, as long as it says."""
    if f"{AT}/dataset.json" in bucket.objects:
        index = json.loads(bucket.objects[f"{AT}/dataset.json"][0])
        for shard in index["shards"] + index["captions"]:
            assert len(bucket.objects[f"{AT}/{shard['file']}"][0]) == shard["bytes"]
        for name in ("codec", "text_encoder", "empty_caption", "table"):
            assert f"{AT}/{name}.safetensors" in bucket.objects


def checked_put(bucket, put, name, data):
    check_whole(bucket)
    found = put(name, data)
    check_whole(bucket)
    return found


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs:// in memory, looked at whenever it changes; nothing is left on the disk."""
    for name in ("here", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(uploading.tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(files, "REFRESH", 0.02)
    for bucket in fake_bucket.serve(monkeypatch):
        monkeypatch.setattr(bucket, "put", functools.partial(checked_put, bucket, bucket.put))
        yield bucket
    assert os.listdir(tmp_path / "here") == os.listdir(tmp_path / "scratch") == []


def upload(tmp_path, rows, config=CONFIG, **options):
    with files.replacing(tmp_path / "t.csv") as table:  # two processes write it
        table.write_text("\n".join(["video,caption", *rows]) + "\n")
    makers = {"codec": Codec(), "text_encoder": Encoder()}
    return prepare_dataset(tmp_path / "t.csv", URL, config, **makers, **options)


def assert_equals(tmp_path, bucket, whole):
    """Record by record and file by file; nothing else is in the bucket."""
    made = open_records(local_dataset(URL, str(tmp_path / "cache")))
    assert contents(made) == contents(whole)
    names = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(bucket.objects) == [f"{AT}/{name}" for name in names]
    for name in names:  # the header of a safetensors file has no order
        of = content_hash if name.endswith("safetensors") else lambda path: path.read_bytes()
        assert of(made.folder / name) == of(whole.folder / name)


SENT = [
    (uploading, name) for name in ("upload", "download", "copy_in_bucket", "remove_from_bucket")
]


def test_a_dataset_made_with_crashes_equals_one_made_on_a_disk(tmp_path, disk, bucket, monkeypatch):
    """Each run is one of a fresh machine; the one before was killed, and could not say so."""
    rows = films(disk, 23)
    del disk.films["f5.mp4"], disk.films["f20.mp4"]
    whole = prepare(tmp_path, rows, name="whole")
    rng, (left, crashed) = random.Random(1), killed_at(PLACES + SENT, monkeypatch)
    monkeypatch.setattr(files, "STALE", 0.05)
    while len(crashed) < 20 and f"{AT}/dataset.json" not in bucket.objects:
        left[0] = rng.randrange(1, 60)
        with contextlib.suppress(Killed):
            upload(tmp_path, rows)
            break
        marker = {"host": "h", "pid": 1, "since": 0, "refreshed": 0, "run": len(crashed)}
        bucket.put(f"{MAKING}/process-0/.run.json", json.dumps(marker).encode())
    left[0] = -1
    disk.reads.clear()
    upload(tmp_path, rows)
    assert len(disk.reads) < 23  # a part was done in between
    assert len(crashed) >= 8
    assert_equals(tmp_path, bucket, whole)


def test_two_processes_share_the_work_from_machines_of_their_own(tmp_path, disk, bucket):
    rows, found = films(disk, 23), []
    whole = prepare(tmp_path, rows, name="whole")
    disk.reads.clear()
    options = {"process": 1, "processes": 2}
    second = threading.Thread(target=lambda: found.append(upload(tmp_path, rows, **options)))
    second.start()
    assert len(upload(tmp_path, rows, process=0, processes=2)) == 21 + 2
    second.join()
    assert found == [None]
    names = sorted(name for name, _ in disk.reads)
    assert sum(names.count(f"f{i}.mp4") > 1 for i in range(23)) <= 1  # the first gives the length
    assert_equals(tmp_path, bucket, whole)


def test_a_second_run_into_one_folder_is_refused(tmp_path, disk, bucket, monkeypatch):
    rows, seen = films(disk, 4), []

    def read(path, **wanted):
        if not seen:
            seen.append(path)
            with pytest.raises(UserError, match=r"process-0: another run is writing here \(.*pro"):
                upload(tmp_path, rows)
        return disk.read(path, **wanted)

    monkeypatch.setattr("ltx2_jax.data.clips.read_clip", read)
    assert len(upload(tmp_path, rows)) == 4
    assert seen


@pytest.mark.parametrize("moment", ["keep", "finish"])
def test_a_run_that_was_taken_over_leaves_the_other_alone(
    moment, tmp_path, disk, bucket, monkeypatch
):
    """Also at its beginning, when it would remove what is not worth to be kept."""
    rows, does = films(disk, 8), getattr(uploading.BucketStaging, moment)
    other = {"host": "host-9", "pid": 7, "since": 5.0, "refreshed": 9e9, "run": "other"}
    there = []

    def taken(self, *given):
        if not there:
            bucket.put(f"{MAKING}/process-0/.run.json", json.dumps(other).encode())
            there.append(dict(bucket.objects))
        does(self, *given)

    monkeypatch.setattr(uploading.BucketStaging, moment, taken)
    monkeypatch.setattr(files, "REFRESH", 0.5)  # not before it looks itself
    with pytest.raises(UserError, match=r"another run has taken over \(host-9, process 7"):
        upload(tmp_path, rows)
    assert f"{MAKING}/state.json" in bucket.objects
    assert [bucket.objects] == there


def test_who_is_taken_over_at_the_end_publishes_nothing(tmp_path, disk, bucket, monkeypatch):
    copy = uploading.copy_in_bucket
    other = {"host": "host-9", "pid": 7, "since": 5.0, "refreshed": 9e9, "run": "other"}

    def copied(source, target):
        copy(source, target)
        bucket.put(f"{MAKING}/process-0/.run.json", json.dumps(other).encode())

    monkeypatch.setattr(uploading, "copy_in_bucket", copied)
    monkeypatch.setattr(files, "REFRESH", 0.5)  # not before it looks itself
    with pytest.raises(UserError, match=r"another run has taken over \(host-9, process 7"):
        upload(tmp_path, films(disk, 4))
    assert f"{AT}/dataset.json" not in bucket.objects
    assert f"{MAKING}/state.json" in bucket.objects


def test_no_dataset_appears_before_the_bucket_lists_all_its_files(
    tmp_path, disk, bucket, monkeypatch
):
    rows, copy = films(disk, 4), uploading.copy_in_bucket

    def lost(source, target):
        if target.name != "codec.safetensors":
            copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(uploading, "copy_in_bucket", lost)
        with pytest.raises(UserError, match=r"codec\.safetensors has None bytes, not \d+"):
            upload(tmp_path, rows)
    assert f"{AT}/dataset.json" not in bucket.objects
    assert len(upload(tmp_path, rows)) == 4


def test_what_others_send_is_a_sign_of_life(bucket):
    kind = uploading.BucketStaging
    with kind(URL, {}) as first, kind(URL, {}, process=1) as second:
        second._sign = 0.0
        first.write_json("clips-00000.json", {"count": 0, "bytes": 0})
        assert not second.published
        assert second._last_sign() > 0


def test_a_look_whether_a_bucket_can_be_written_leaves_nothing_there(bucket):
    uploading.check_place(URL)
    assert not bucket.objects


def test_another_dataset_takes_the_place_of_one_whole(tmp_path, disk, bucket, monkeypatch):
    """Also if it is half made, or half copied: then the same command goes on."""
    rows = films(disk, 6)
    upload(tmp_path, rows)
    other, copy, copies = dataclasses.replace(CONFIG, fps=12.0), uploading.copy_in_bucket, []
    with pytest.raises(UserError, match=r"gs://.*/films: holds a dataset with fps None, not 12"):
        upload(tmp_path, rows, other)

    def breaks(source, target):
        copies.append(target)
        if len(copies) == 3:
            raise OSError("503: later")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(uploading, "copy_in_bucket", breaks)
        with pytest.raises(UserError, match=r"^gs://.*/films: cannot be written \(503: later\)$"):
            upload(tmp_path, rows, other, overwrite=True)
    assert f"{AT}/dataset.json" not in bucket.objects
    with pytest.raises(UserError, match=r"gs://.*\.films\.prepare: .* half made .* other settings"):
        upload(tmp_path, rows)
    disk.reads.clear()
    upload(tmp_path, rows, other)
    assert not disk.reads
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows, other))


def test_what_is_to_take_the_place_of_a_dataset_is_kept_while_that_one_is_used(
    tmp_path, disk, bucket, monkeypatch
):
    rows, other = films(disk, 4), dataclasses.replace(CONFIG, fps=12.0)
    upload(tmp_path, rows)
    write = uploading.BucketStaging.write_json

    def killed(self, name, values):
        write(self, name, values)
        if name == uploading.PUBLISHING:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(uploading.BucketStaging, "write_json", killed)
        with pytest.raises(Killed):
            upload(tmp_path, rows, other, overwrite=True)
    there = set(bucket.names(MAKING))
    assert len(upload(tmp_path, rows)) == 4
    assert set(bucket.names(MAKING)) == there
    disk.reads.clear()
    upload(tmp_path, rows, other, overwrite=True)
    assert not disk.reads
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows, other))


def test_clips_that_came_since_are_added_and_the_rest_is_kept(tmp_path, disk, bucket, capsys):
    rows = films(disk, 12)
    disk.missing |= {"f1.mp4", "f10.mp4"}
    assert len(upload(tmp_path, rows)) == 10
    disk.missing.remove("f10.mp4")
    disk.reads.clear()
    assert len(upload(tmp_path, rows)) == 11
    assert {name for name, _ in disk.reads} == {f"f{i}.mp4" for i in range(8, 12)}
    disk.missing.clear()
    upload(tmp_path, rows)
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows))
    capsys.readouterr()
    upload(tmp_path, rows)
    line = f"{URL}: 12 records are there already, made with the same settings\n"
    assert capsys.readouterr().out == line


def test_a_crash_after_the_dataset_is_there_costs_nothing(tmp_path, disk, bucket, monkeypatch):
    rows = films(disk, 6)
    with monkeypatch.context() as patch:
        patch.setattr(uploading.BucketStaging, "remove", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            upload(tmp_path, rows)
    assert bucket.names(MAKING)
    disk.reads.clear()
    assert len(upload(tmp_path, rows)) == 6
    assert not disk.reads
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows))


def test_a_bucket_that_copies_no_files_itself_gets_them_from_here(
    tmp_path, disk, bucket, monkeypatch
):
    def zonal(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(type(fsspec.filesystem("gs")), "cp_file", zonal)
    rows = films(disk, 4)
    upload(tmp_path, rows)
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows))


def test_what_came_too_late_of_another_dataset_is_not_taken(tmp_path, disk, bucket):
    rows = films(disk, 8)
    upload(tmp_path, rows, dataclasses.replace(CONFIG, fps=12.0))
    late = bucket.objects.pop(f"{AT}/data-00000-of-00002.arrayrecord")[0]
    for name in bucket.names(AT):
        del bucket.objects[f"{AT}/{name}"]
    bucket.put(f"{MAKING}/clips-00000.arrayrecord", late)
    about = {"bytes": len(late), "count": 4, "failures": [], "files": {}, "notes": {}}
    bucket.put(f"{MAKING}/clips-00000.json", json.dumps(about).encode())
    upload(tmp_path, rows)
    assert_equals(tmp_path, bucket, prepare(tmp_path, rows))


def test_a_shard_counts_when_all_of_it_is_there(tmp_path, disk, bucket):
    with uploading.BucketStaging(URL, {"a": 1}) as staging:
        staging.finish("clips", 3, [b"1", b"22"], {})
        assert staging.done("clips", 3)["count"] == 2
        assert not list(staging.folder.glob("*.arrayrecord"))
    order = [name for name in bucket.objects if "clips" in name]  # as they were sent
    assert order == [f"{MAKING}/clips-00003.{suffix}" for suffix in ("arrayrecord", "json")]
    bucket.put(f"{MAKING}/clips-00003.arrayrecord", b"cut")
    with uploading.BucketStaging(URL, {"a": 1}) as staging:
        assert staging.read_json("clips-00003.json")["count"] == 2
        assert staging.done("clips", 3) is None


def test_who_waits_for_a_process_that_is_gone_is_told(bucket, monkeypatch):
    """What a process writes itself is no sign of another."""
    monkeypatch.setattr("ltx2_jax.data.staging.LOST_SECONDS", 0.2)
    with uploading.BucketStaging(URL, {"a": 1}):
        pass
    with uploading.BucketStaging(URL, {"a": 1}, process=1) as staging:
        with pytest.raises(UserError, match=r"^gs://.*\.films\.prepare: waited .* none is at work"):
            staging.wait(lambda: False, "finishes")


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_makes_looks_at_and_checks_a_dataset_in_a_bucket(
    tmp_path, disk, bucket, capsys, monkeypatch
):
    """With a codec that is fitted by one run, and fetched by the next."""
    rows = films(disk, 6)
    table = "\n".join(["video,caption", *rows, "none.mp4,no"]) + "\n"
    bucket.put("bucket/films/t.csv", table.encode())
    argv = ["gs://bucket/films/t.csv", URL, *SIZE, "--video-channels=2", "--audio-channels=2"]
    monkeypatch.setattr(command, "_text_encoder", lambda args: Encoder())
    with monkeypatch.context() as patch:
        patch.setattr(uploading.Staging, "finish", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command.cli(argv)
    codec = bucket.objects[f"{MAKING}/codec.safetensors"][0]
    assert command.cli(argv) == 0
    assert bucket.objects[f"{AT}/codec.safetensors"][0] == codec
    out = capsys.readouterr().out
    report = bucket.objects[f"{AT}/report.txt"][0].decode()
    assert out == f"{report}in {URL}\n"
    assert "skipped none.mp4: no such file" in report
    assert "% of the audio variance" in report
    assert command.cli(["--inspect", URL]) == 0
    assert capsys.readouterr().out.startswith("6 records, 0.00 hours\n")
    assert command.cli(["--verify", URL]) == 2
    assert capsys.readouterr().err.endswith("name a folder of a disk with --cache\n")
    assert command.cli(["--verify", URL, f"--cache={tmp_path / 'cache'}"]) == 0
    assert "6 records read, 0 faults" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data-.*: records are read on disks alone"):
        open_in_bucket(URL)[0]


@pytest.mark.parametrize(
    ("out", "error", "line"),
    [
        (
            URL,
            PermissionError("403: no access"),
            r"no dataset can .* there \(403: no access\)",
        ),
        (URL, FileNotFoundError("bucket"), r"no dataset can .* there \(no such bucket\)"),
        ("gs://bucket", None, "give a folder in the bucket, such as gs://bucket/clips"),
        (f"{URL} --to-precomputed", None, "written to disks alone; copy the folder there then"),
        ("s3://bucket/films", None, "s3:// cannot be written to; give a folder or gs://bucket/fo"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_refused_before_any_work(
    out, error, line, bucket, monkeypatch, capsys
):
    bucket.refuse = error
    monkeypatch.setattr(command, "_codec", lambda args: pytest.fail("the codec was loaded"))
    assert command.cli(["no.csv", *out.split(), *SIZE]) == 2
    assert re.fullmatch(rf"prepare: error: {out.split()[0]}: {line}.*\n", capsys.readouterr().err)
