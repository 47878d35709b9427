"""What a host says is kept in a file of the workdir, on a disk or in a bucket."""

import fake_bucket
import pytest

from ltx2_jax import files, hosts
from ltx2_jax.hosts import logs


@pytest.fixture
def started(monkeypatch):
    """`started()` is as in a process that has just joined others."""

    monkeypatch.setattr(logs, "_log", logs._Log())

    def start():
        logs.close()
        logs.begin()

    yield start
    logs.close()


def texts(data):
    return [line.partition(" UTC  ")[2] for line in data.splitlines()]


def test_what_was_said_before_the_workdir_was_known_is_there_and_a_restart_goes_on(
    started, tmp_path
):
    for start in ("first", "second"):
        started()
        hosts.note(start)
        hosts.keep_log(tmp_path, 7)
        hosts.note("then")
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name == "host-07.log"
    assert texts(path.read_text()) == ["first", "then", "second", "then"]


def test_one_process_keeps_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_log", logs._Log())
    hosts.note("to nobody")
    hosts.keep_log(tmp_path, 0)
    logs.note_stacks()
    assert not list(tmp_path.iterdir())


def test_after_its_end_a_log_takes_nothing_and_another_may_begin(started, tmp_path):
    started()
    hosts.keep_log(tmp_path, 0)
    hosts.keep_log(tmp_path / "another", 0)  # it has one
    logs.close()
    hosts.note("late")
    started()
    hosts.keep_log(tmp_path / "next", 0)
    hosts.note("anew")
    assert (tmp_path / "logs" / "host-00.log").read_text() == ""
    assert texts((tmp_path / "next" / "logs" / "host-00.log").read_text()) == ["anew"]
    assert not (tmp_path / "another").exists()


def test_of_a_host_that_hangs_it_has_what_the_threads_were_doing(started, tmp_path):
    started()
    hosts.keep_log(tmp_path, 0)
    logs.note_stacks()
    assert "in test_of_a_host_that_hangs" in (tmp_path / "logs" / "host-00.log").read_text()


def test_in_a_bucket_it_is_sent_whole_when_a_process_ends_at_once(started, monkeypatch):
    for bucket in fake_bucket.serve(monkeypatch):
        for start in ("first", "second"):
            started()
            hosts.keep_log("gs://bucket/run", 12)
            hosts.note(start)
            files.last_words("lost", seconds=5)
            ((name, (data, *_)),) = bucket.objects.items()
        assert name == "bucket/run/logs/host-12.log"
        assert texts(data.decode()) == ["first", "second"]


def test_a_run_does_not_end_for_its_log(started, tmp_path):
    (tmp_path / "run").write_text("a file")
    started()
    hosts.keep_log(tmp_path / "run", 0)
    hosts.note("to nobody")
    assert (tmp_path / "run").read_text() == "a file"
