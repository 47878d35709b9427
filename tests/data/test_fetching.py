"""Datasets of a bucket come to the disk whole, once, and never half."""

import contextlib
import shutil

import fake_bucket
import pytest
from test_records import assert_same, make_record, write

from ltx2_jax.data import fetching
from ltx2_jax.data.fetching import local_dataset
from ltx2_jax.data.records import open_records
from ltx2_jax.errors import UserError
from ltx2_jax.files import locked

URL = "gs://bucket/sets/clips"


@pytest.fixture
def bucket(monkeypatch):
    yield from fake_bucket.serve(monkeypatch)


@pytest.fixture
def sent(bucket, monkeypatch):
    """Names of the files that were copied, in order of their names; emptied by who looks."""
    copied, download = [], fetching.download

    def noted(place, target):
        copied.append(place.name)
        download(place, target)

    monkeypatch.setattr(fetching, "download", noted)
    return lambda: sorted(copied.pop() for _ in copied.copy())


def put(bucket, folder, count=5):
    """Writes a dataset of three shards and puts it into the bucket."""
    write(folder, count, shard_bytes=1600)
    for path in folder.iterdir():
        bucket.put(f"bucket/sets/clips/{path.name}", path.read_bytes())
    bucket.put("bucket/sets/clips/clips.d/other", b"not of the dataset")
    return sorted(path.name for path in folder.iterdir())


def test_it_is_copied_once_and_what_is_damaged_is_copied_again(tmp_path, bucket, sent, capsys):
    names = put(bucket, tmp_path / "set")
    assert len([name for name in names if name.endswith(".arrayrecord")]) > 1
    folder = local_dataset(URL, str(tmp_path / "cache"))
    assert capsys.readouterr().out.startswith(f"copying {len(names)} files, 0.0 GB, from {URL} to ")
    assert sent() == names
    for index, record in enumerate(open_records(folder)):
        assert_same(record, make_record(index))
    assert local_dataset(URL, str(tmp_path / "cache")) == folder
    assert sent() == []
    shard = next(path for path in (tmp_path / "cache").rglob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (shard.parent / ".half-12-ab").write_bytes(b"of a process that was killed")
    local_dataset(URL, str(tmp_path / "cache"))
    assert sent() == [shard.name]
    assert sorted(path.name for path in shard.parent.iterdir()) == names


def test_another_dataset_at_the_same_place_gets_a_folder_of_its_own(tmp_path, bucket):
    put(bucket, tmp_path / "set", 5)
    first = local_dataset(URL, str(tmp_path / "cache"))
    put(bucket, tmp_path / "other", 4)
    second = local_dataset(URL, str(tmp_path / "cache"))
    assert (len(open_records(first)), len(open_records(second))) == (5, 4)


def test_processes_that_share_a_disk_wait_for_each_other(tmp_path, bucket, monkeypatch):
    put(bucket, tmp_path / "set")
    folder = local_dataset(URL, str(tmp_path / "cache"))
    slept = []
    with contextlib.ExitStack() as other:
        assert other.enter_context(locked(folder))
        monkeypatch.setattr(fetching.time, "sleep", lambda _: slept.append(other.close()))
        assert local_dataset(URL, str(tmp_path / "cache")) == folder
    assert len(slept) == 1


def test_what_cannot_be_copied_is_one_line(tmp_path, bucket, monkeypatch):
    cache = str(tmp_path / "cache")
    assert local_dataset("some/folder", None) == "some/folder"
    with pytest.raises(UserError, match=f"{URL}: a dataset in a bucket .* --config.data.cache"):
        local_dataset(URL, None)
    with pytest.raises(UserError, match=f"{URL}: no dataset that prepare wrote is there"):
        local_dataset(URL, cache)
    put(bucket, tmp_path / "set")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"cache/clips-\w+: .* GB of gs://.* and 0.0 GB are free"):
        local_dataset(URL, cache)


def test_a_file_that_comes_cut_or_not_at_all_is_not_kept(tmp_path, bucket, monkeypatch):
    put(bucket, tmp_path / "set")
    monkeypatch.setattr(fetching, "download", lambda place, target: target.write_bytes(b"cut"))
    with pytest.raises(UserError, match=rf"{URL}/\S+: 3 bytes came of \d+"):
        local_dataset(URL, str(tmp_path / "cache"))

    def fail(*_):
        raise OSError("503: later")

    monkeypatch.setattr(fetching, "download", fail)
    with pytest.raises(UserError, match=rf"{URL}/\S+: cannot be copied \(503: later\)"):
        local_dataset(URL, str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    bucket.refuse = PermissionError("403: not yours")
    with pytest.raises(UserError, match=f"{URL}: cannot be read .403: not yours"):
        local_dataset(URL, str(tmp_path / "cache"))
