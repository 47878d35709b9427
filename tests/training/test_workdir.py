"""Whether the workdir is one place for all hosts."""

import os

import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.training import workdir


class Host:
    """One of two hosts; what the first says is known, and the other refuses nothing."""

    def __init__(self, monkeypatch, index, token="abc"):
        monkeypatch.setattr(workdir.hosts, "count", lambda: 2)
        monkeypatch.setattr(workdir.hosts, "index", lambda: index)
        monkeypatch.setattr(workdir.hosts, "broadcast", lambda text: token)
        monkeypatch.setattr(workdir.hosts, "agree", lambda check: check())


def test_the_first_host_writes_and_removes_what_the_others_look_for(tmp_path, monkeypatch):
    Host(monkeypatch, 0)
    assert workdir.opened(tmp_path / "run") == tmp_path / "run"
    assert os.listdir(tmp_path / "run") == []
    Host(monkeypatch, 1)
    (tmp_path / "run" / ".probe-abc").write_text(".probe-abc")
    workdir.opened(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [".probe-abc"]  # the first removes it


def test_disks_of_their_own_are_refused(tmp_path, monkeypatch):
    Host(monkeypatch, 1)
    with pytest.raises(UserError, match=r"run: is not shared: .* gs://bucket/folder, or a file"):
        workdir.opened(tmp_path / "run", seconds=0.1)


def test_a_place_where_nobody_can_write_is_refused(tmp_path, monkeypatch):
    Host(monkeypatch, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be a workdir \(Not a directory\)"):
        workdir.opened(tmp_path / "file" / "run")


def test_one_process_with_a_disk_leaves_it_alone(tmp_path):
    assert str(workdir.opened(tmp_path / "run")) == str(tmp_path / "run")
    assert os.listdir(tmp_path) == []
    assert str(workdir.opened("some/run")) == "some/run"
