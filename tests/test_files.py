import contextlib
import errno
import fcntl
import json
import os
import re
import time

import fake_bucket
import fsspec
import pytest

from ltx2_jax import files
from ltx2_jax.errors import UserError
from ltx2_jax.files import (
    Mirror,
    is_passing,
    local_folder,
    location,
    locked,
    only_run,
    read_run,
    replacing,
)

RUN = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs:// in memory; the current folder must stay empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "REFRESH", 0.05)
    yield from fake_bucket.serve(monkeypatch)
    assert os.listdir(tmp_path / "here") == []


# --------------------------------------------------------------------------------- names and files


@pytest.mark.parametrize(
    "name",
    ["s3://bucket/run", "g://bucket/run", "gs:/bucket/run", "gs://", "gs:///run", "file:///tmp/x"],
)
def test_a_scheme_that_cannot_be_served_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"^{name}: .* give a folder or gs://bucket/folder$"):
        location(name)


def test_a_folder_that_would_be_taken_for_a_bucket_is_refused():
    with pytest.raises(UserError, match=r"^/gs/bucket/run: would be taken for gs://"):
        location("/gs/bucket/run")


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch):
    def get(protocol):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", get)
    with pytest.raises(UserError, match=r"^gs://b/run: .* pip install 'ltx2_jax\[gcs\]'$"):
        location("gs://b/run")


def test_other_names_are_folders(tmp_path, bucket):
    for name in ("run", "a:b/c", "2024:/x", "../gs/run", str(tmp_path)):
        assert str(location(name)) == name
    assert str(location(tmp_path) / "a" / "b") == str(tmp_path / "a" / "b")
    assert str(location(RUN) / "a" / "b") == "gs://bucket/run/a/b"


def test_lists_of_a_bucket_are_not_remembered(bucket, monkeypatch):
    """Other hosts and other libraries write there too."""
    monkeypatch.setattr(fsspec.config, "conf", {})
    location(RUN)
    assert fsspec.config.conf["gs"] == {"use_listings_cache": False}


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (MemoryError(), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("not a film"), False),
    ],
)
def test_whether_another_try_may_help_is_known_of_what_was_made_of_an_error(error, passing):
    def told():
        try:
            raise error
        except Exception:
            raise UserError("cannot be read") from None

    def told_again():
        try:
            told()
        except UserError as first:
            raise UserError(f"a.mp4: {first}") from first

    with pytest.raises(UserError, match=r"a\.mp4: cannot be read") as caught:
        told_again()
    assert is_passing(caught.value) == is_passing(error) == passing


def test_a_file_goes_into_a_bucket_whole_or_not_at_all(bucket):
    with replacing(f"{RUN}/clips/a.txt") as temporary:
        temporary.write_text("new")
        assert not bucket.objects
    assert bucket.objects["bucket/run/clips/a.txt"][0] == b"new"

    def fail():
        with replacing(f"{RUN}/clips/a.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    bucket.refuse = LookupError("403\nforbidden")
    with pytest.raises(UserError, match=r"clips/a.txt: cannot be written \(403 forbidden\)"):
        with replacing(f"{RUN}/clips/a.txt") as temporary:
            temporary.write_text("refused")
    assert bucket.objects["bucket/run/clips/a.txt"][0] == b"new"
    assert not temporary.exists()


def test_files_of_a_bucket_can_be_read_where_only_a_disk_will_do(bucket, tmp_path):
    assert local_folder(tmp_path) == tmp_path
    bucket.put("bucket/run/assets/a", b"1")
    bucket.put("bucket/run/assets/below/b", b"2")
    copy = local_folder(f"{RUN}/assets")
    assert [path.name for path in copy.iterdir()] == ["a"]
    assert (copy / "a").read_bytes() == b"1"
    assert list(local_folder(f"{RUN}/nothing").iterdir()) == []


def test_a_file_that_grows_is_sent_whole_again_and_again_and_at_the_end(bucket, capsys):
    bucket.put("bucket/run/log", b"1\n")
    bucket.put("bucket/run/other", b"not asked for")
    mirror = Mirror(RUN, ["log", "none"], seconds=0.02)
    assert [path.name for path in mirror.folder.iterdir()] == ["log"]
    with (mirror.folder / "log").open("a") as file:
        file.write("2\n")
    (mirror.folder / "sub").mkdir()
    (mirror.folder / "sub" / "events").write_text("e")
    (mirror.folder / ".half").write_text("a temporary name")
    end = time.monotonic() + 30
    while bucket.objects["bucket/run/log"][0] != b"1\n2\n":
        assert time.monotonic() < end
        time.sleep(0.01)
    bucket.refuse = LookupError("503")
    (mirror.folder / "log").write_text("1\n2\n3\n")
    while "503" not in capsys.readouterr().err:
        assert time.monotonic() < end
        time.sleep(0.01)
    bucket.refuse = None
    mirror.close()
    mirror.close()
    assert bucket.objects["bucket/run/log"][0] == b"1\n2\n3\n"
    assert bucket.names("bucket/run") == ["log", "other", "sub/events"]
    assert not mirror.folder.exists()


def test_a_file_that_changes_and_keeps_its_length_is_sent_again(bucket):
    with contextlib.closing(Mirror(RUN)) as mirror:
        (mirror.folder / "step").write_text("1")
        files.last_words("to have it sent", seconds=30)
        assert bucket.objects["bucket/run/step"][0] == b"1"
        (mirror.folder / "step").write_text("2")
        os.utime(mirror.folder / "step", ns=(1, 1))
    assert bucket.objects["bucket/run/step"][0] == b"2"


def test_where_there_is_no_bucket_nothing_is_sent(tmp_path):
    mirror = Mirror(tmp_path / "run", ["log"])
    assert mirror.folder == tmp_path / "run"
    mirror.close()
    assert mirror.folder.exists()


def test_what_fails_in_time_is_told_with_what_was_to_be_done():
    def fail(error):
        raise error

    for error, message in (
        (UserError("clips: holds files"), "clips: holds files"),
        (LookupError("403"), "gs://a: nothing can be made there (403)"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            files.in_time(lambda e=error: fail(e), 30, "gs://a", "nothing can be made there")
    with pytest.raises(UserError, match=r"^gs://a: no answer in 0 s$"):
        files.in_time(lambda: time.sleep(1), 0.01, "gs://a", "refused")


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


def no_locks(monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_the_disk_knows_no_locks_nothing_is_held(tmp_path, monkeypatch):
    no_locks(monkeypatch)
    with locked(tmp_path) as held:
        assert held is None


# --------------------------------------------------------------------------- who runs in a workdir


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
    workdir = tmp_path / "new" / "run"
    with only_run(workdir) as check:
        who = (
            rf"{workdir}: another run is writing here \(.+, process {os.getpid()}, since 20.* UTC\)"
        )
        with pytest.raises(UserError, match=who):
            only_run(workdir).__enter__()
        with only_run(workdir, process_index=1):  # of the same run
            pass
        check()
        assert read_run(workdir)["pid"] == os.getpid()
    assert read_run(workdir) is None
    with only_run(workdir):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be a workdir \(.+\)"):
        only_run(tmp_path / "file").__enter__()


@pytest.mark.parametrize("kind", ["bucket", "disk"])
def test_where_there_are_no_locks_a_run_that_lives_keeps_others_out(
    kind, bucket, tmp_path, monkeypatch
):
    no_locks(monkeypatch)
    workdir = RUN if kind == "bucket" else tmp_path / "run"
    with only_run(workdir):
        with pytest.raises(
            UserError, match=rf"{workdir}: another run is writing here \(.*since 20"
        ):
            only_run(workdir).__enter__()
    with only_run(workdir):  # one that has ended does not
        pass


def other(bucket, age):
    """The file of a run elsewhere, written so many seconds ago; its clock is wrong."""
    run = {"host": "host-9", "pid": 7, "since": 5.0, "refreshed": 9e9, "run": "other"}
    bucket.put("bucket/run/.run.json", json.dumps(run).encode())
    data, written, generation = bucket.objects["bucket/run/.run.json"]
    bucket.objects["bucket/run/.run.json"] = (data, written - age, generation)


def test_a_run_that_was_killed_long_ago_is_replaced_at_once(bucket, capsys):
    other(bucket, age=100)
    with only_run(RUN):
        assert read_run(RUN)["pid"] == os.getpid()
    assert capsys.readouterr().out == ""
    assert bucket.names("bucket/run") == []


def test_a_run_that_was_killed_just_now_is_waited_for_and_then_replaced(
    bucket, monkeypatch, capsys
):
    monkeypatch.setattr(files, "STALE", 0.2)
    other(bucket, age=0)
    with only_run(RUN):
        pass
    waiting, taken = capsys.readouterr().out.splitlines()
    who = "(host-9, process 7, since 1970-01-01 00:00 UTC)"
    assert waiting.startswith(f"{RUN}: another run was writing here {who}: waiting up to ")
    assert taken == f"{RUN}: taken over from the run that stopped {who}"


def test_a_run_that_ends_while_it_is_waited_for_makes_way(bucket, monkeypatch, capsys):
    other(bucket, age=0)
    there = ["bucket/run/.run.json"]
    monkeypatch.setattr(files.time, "sleep", lambda _: there and bucket.objects.pop(there.pop()))
    with only_run(RUN):
        assert read_run(RUN)["pid"] == os.getpid()
    assert "taken over" not in capsys.readouterr().out


def test_a_run_that_was_replaced_learns_it_and_leaves_the_other_alone(bucket):
    with only_run(RUN) as check:
        check()
        other(bucket, age=0)
        with pytest.raises(UserError, match=r"another run has taken over \(host-9, process 7, "):
            check()
        time.sleep(0.2)  # it does not take it back
        assert read_run(RUN)["host"] == "host-9"
    assert read_run(RUN)["host"] == "host-9"


def test_a_run_says_again_that_it_lives_when_its_bucket_is_back(bucket):
    with only_run(RUN):
        bucket.refuse = LookupError("503")
        time.sleep(0.2)
        bucket.refuse = None
        before, end = read_run(RUN)["refreshed"], time.monotonic() + 30
        while read_run(RUN)["refreshed"] == before:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_of_two_runs_that_start_at_once_one_is_left(bucket, monkeypatch):
    # It wrote right after us.
    monkeypatch.setattr(files.time, "sleep", lambda _: other(bucket, age=0))
    with pytest.raises(UserError, match=r"another run has taken over \(host-9"):
        only_run(RUN).__enter__()


def test_a_process_that_ends_at_once_sends_what_is_unsent_and_leaves_the_workdir_free(bucket):
    with only_run(RUN), contextlib.closing(Mirror(RUN)) as mirror, files.saying((1).__truediv__):
        (mirror.folder / "log").write_text("1")
        assert bucket.names("bucket/run") == [".run.json"]
        files.last_words("killed", seconds=30)
        assert bucket.names("bucket/run") == ["log"]
    files.last_words("nothing is left to do", seconds=30)
    with files.saying(lambda why: time.sleep(1)):
        began = time.monotonic()
        files.last_words("late", seconds=0.1)
        assert time.monotonic() - began < 0.9


def test_of_what_is_still_to_be_said_the_latest_comes_first():
    said = []
    with files.saying(lambda why: said.append(f"first {why}")):
        with files.saying(lambda why: said.append(f"second {why}")):
            files.last_words("killed", seconds=30)
    files.last_words("again", seconds=30)
    assert said == ["second killed", "first killed"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}', "null"])
def test_a_broken_file_of_a_run_is_nobodys(tmp_path, text):
    (tmp_path / ".run.json").write_text(text)
    assert read_run(tmp_path) is None
