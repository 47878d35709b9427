import errno
import fcntl
import os

import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.files import locked, only_run, replacing


def test_a_file_appears_when_the_block_ends_with_the_folders_on_the_way(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below.txt"
    with pytest.raises(UserError, match=r"below\.txt: cannot be written \(.+\)") as caught:
        with replacing(path):
            pass
    assert "\n" not in str(caught.value)


def test_errors_of_a_library_are_reported_like_those_of_the_system(tmp_path):
    with pytest.raises(UserError, match=r"x: cannot be written \(no codec\)"):
        with replacing(tmp_path / "x", LookupError):
            raise LookupError("no\ncodec")


def test_an_unfinished_file_is_not_found_by_its_suffix(tmp_path):
    with replacing(tmp_path / "clip.mp4") as temporary:
        temporary.write_text("half")
        assert not list(tmp_path.glob("*.mp4"))


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    plain, replaced = tmp_path / "plain", tmp_path / "replaced"
    plain.write_text("")
    with replacing(replaced) as temporary:
        temporary.write_text("")
    assert replaced.stat().st_mode == plain.stat().st_mode


def test_a_lock_keeps_others_out_until_its_block_ends(tmp_path):
    for path in (tmp_path / "file", tmp_path):
        with locked(path) as first, locked(path) as second:
            assert (first, second) == (True, False)
        with locked(path) as third:
            assert third


def test_where_the_disk_knows_no_locks_nobody_is_kept_out_and_nothing_is_held(
    tmp_path, monkeypatch
):
    def flock(descriptor, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path) as held:
        assert held is None
    with only_run(tmp_path), only_run(tmp_path):
        pass


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
    workdir = tmp_path / "new" / "run"
    with only_run(workdir):
        with pytest.raises(UserError, match=r"run: another run is writing here"):
            only_run(workdir).__enter__()
        with only_run(workdir, process_index=1):  # of the same run
            pass
    with only_run(workdir):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be a workdir \(.+\)"):
        only_run(tmp_path / "file").__enter__()
