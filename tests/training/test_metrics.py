"""The metrics files of a run, whole and interrupted."""

import errno
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import fake_bucket
import pytest

from ltx2_jax import files
from ltx2_jax.errors import UserError
from ltx2_jax.training import metrics
from ltx2_jax.training.goodput import Goodput
from ltx2_jax.training.metrics import MetricsLogger, StepTimer, read_metrics


def run(folder, first, last, **extra):
    with MetricsLogger(folder, total_steps=10, start_step=first - 1) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"loss": 1 / step, **extra})


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # importing it raises ImportError


@pytest.fixture(autouse=True)
def quiet(without_tensorboard):
    return None


def test_rows_come_back_as_logged(tmp_path):
    run(tmp_path / "new" / "folder", 1, 3)
    want = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert read_metrics(tmp_path / "new" / "folder") == want


def test_losses_can_be_followed_by_size_and_dataset(tmp_path, monkeypatch):
    scalars = []
    module = ModuleType("tensorboardX")
    module.SummaryWriter = lambda *_, **__: SimpleNamespace(
        add_scalar=lambda *scalar: scalars.append(scalar), close=lambda: None
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    run(tmp_path, 1, 1, dataset="/data/my films", bucket="768x512x121-silent", mfu=0.5)
    (row,) = read_metrics(tmp_path)
    assert (row["dataset"], row["bucket"]) == ("/data/my films", "768x512x121-silent")
    assert set(scalars) == {
        ("loss", 1.0, 1), ("loss/data/my_films/768x512x121-silent", 1.0, 1), ("mfu", 0.5, 1),
    }  # fmt: skip
    scalars.clear()
    run(tmp_path, 2, 2, bucket="sound-126", video_loss=0.25)
    assert {
        ("loss/sound-126", 0.5, 2), ("video_loss", 0.25, 2), ("video_loss/sound-126", 0.25, 2),
    } < set(scalars)  # fmt: skip


def test_each_row_is_on_disk_when_log_returns(tmp_path):
    with MetricsLogger(tmp_path, total_steps=3) as logger:
        logger.log(1, {"loss": 0.5})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_killed_and_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path):
    run(tmp_path / "unbroken", 1, 8)
    run(tmp_path / "killed", 1, 6)
    file = tmp_path / "killed" / metrics.FILE_NAME
    file.write_bytes(file.read_bytes() + b'{"step": 7, "lo\xc3')
    run(tmp_path / "killed", 5, 8)  # the last checkpoint was step 4
    unbroken = tmp_path / "unbroken" / metrics.FILE_NAME
    assert file.read_bytes() == unbroken.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == [metrics.FILE_NAME]


def test_a_new_run_starts_an_empty_file(tmp_path):
    run(tmp_path, 1, 5)
    run(tmp_path, 1, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_values_that_are_not_finite_stay_valid_json_under_their_name(tmp_path):
    run(tmp_path, 1, 1, grad_norm=math.inf, video_loss=math.nan)
    text = (tmp_path / metrics.FILE_NAME).read_text()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "loss": 1.0, "grad_norm": None, "video_loss": None}


def test_a_half_written_last_line_is_left_out_and_a_whole_one_kept(tmp_path):
    run(tmp_path, 1, 2)
    with (tmp_path / metrics.FILE_NAME).open("a") as file:
        file.write('{"step": 3, "loss": 0.25}')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with (tmp_path / metrics.FILE_NAME).open("a") as file:
        file.write('\n{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / metrics.FILE_NAME).write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a row"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a row"):
        MetricsLogger(tmp_path, total_steps=3)


def test_a_folder_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_only_process_zero_writes(tmp_path):
    with MetricsLogger(tmp_path / "run", total_steps=2, process_index=1) as logger:
        logger.log(1, {"loss": 1.0})
        logger.note("unseen")
    assert not (tmp_path / "run").exists()


def test_an_exception_closes_the_files_and_passes(tmp_path, capsys):
    def fail():
        with MetricsLogger(tmp_path, total_steps=2) as logger:
            logger.log(1, {"loss": 1.0})
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        fail()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_the_bar_starts_at_the_resumed_step_and_shows_the_loss(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=10, start_step=6) as logger:
        logger.log(8, {"loss": 0.1234567, "loss_sigma_0": 9.0})
        logger.note("checkpoint at step 8")
    shown = capsys.readouterr().err
    assert "6/10" in shown
    assert "8/10" in shown
    assert "loss=0.123" in shown
    assert "loss_sigma_0" not in shown
    assert "checkpoint at step 8" in shown


class FakeWriter:
    def __init__(self, folder, purge_step):
        self.purge_step, self.scalars, self.closed = purge_step, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_value_and_forgets_replayed_steps(tmp_path, monkeypatch):
    writers = []
    module = ModuleType("tensorboardX")
    module.SummaryWriter = lambda *args, **kw: writers.append(FakeWriter(*args, **kw)) or writers[0]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with MetricsLogger(tmp_path, total_steps=9, start_step=4) as logger:
        logger.log(5, {"loss": 2.0, "lr": 0.1})
    (writer,) = writers
    assert writer.purge_step == 5
    assert writer.scalars == [("loss", 2.0, 5), ("lr", 0.1, 5)]
    assert writer.closed


def timer(times, **kwargs):
    return StepTimer(tokens_per_step=600, flops_per_step=3e12, clock=iter(times).__next__, **kwargs)


def test_step_time_throughput_and_mfu():
    step = timer([10.0, 12.0, 18.0], peak_flops=6e12)
    assert step.tick() == {}  # compilation
    assert step.tick() == {"step_time": 2.0, "tokens_per_second": 300.0, "mfu": 0.25}
    assert step.tick(steps=3) == {"step_time": 2.0, "tokens_per_second": 300.0, "mfu": 0.25}


def test_an_unknown_peak_leaves_the_mfu_out():
    step = timer([0.0, 1.0])
    step.tick()
    assert set(step.tick()) == {"step_time", "tokens_per_second"}


def test_other_work_between_steps_is_not_step_time():
    step = timer([0.0, 1.0, 100.0, 101.0])
    step.tick()
    step.tick()
    step.restart()
    assert step.tick() == {}
    assert step.tick()["step_time"] == 1.0


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield from fake_bucket.serve(monkeypatch)
    assert not list((tmp_path / "here").iterdir())


def test_in_a_bucket_rows_are_there_at_the_end_and_a_resumed_run_goes_on(bucket, tmp_path):
    run("gs://bucket/killed", 1, 6)
    run("gs://bucket/killed", 5, 8)
    run(tmp_path / "unbroken", 1, 8)
    rows = bucket.objects["bucket/killed/metrics.jsonl"][0]
    assert rows == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
    assert read_metrics("gs://bucket/killed") == read_metrics(tmp_path / "unbroken")
    assert read_metrics("gs://bucket/none") == []


def test_in_a_bucket_rows_of_a_run_that_failed_are_there_too(bucket):
    def fail():
        with MetricsLogger("gs://bucket/run", total_steps=2) as logger:
            logger.log(1, {"loss": 1.0})
            assert not bucket.objects
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        fail()
    assert read_metrics("gs://bucket/run") == [{"step": 1, "loss": 1.0}]


class FullDisk:
    name = "metrics.jsonl"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self.write("what is in its buffer")


def test_a_full_disk_is_told_once_and_ends_no_run(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=9) as logger:
        logger.log(1, {"loss": 1.0})
        logger._file.close()
        logger._file = FullDisk()
        for step in (2, 3):
            logger.log(step, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    error = capsys.readouterr().err
    assert error.count("metrics.jsonl: a row cannot be written (No space left on device)") == 1


def test_a_full_disk_keeps_no_account_and_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.os, "replace", lambda *_: FullDisk().write(""))
    with Goodput(tmp_path, 9) as spent:
        for _ in range(3):
            spent.write()
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1
    with pytest.raises(RuntimeError, match="diverged"), Goodput(tmp_path, 9):
        raise RuntimeError("diverged")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_of_tensorboard_that_has_died_is_left_alone(tmp_path, monkeypatch):
    """Its queue would take ten values and then stop the training."""
    module = ModuleType("tensorboardX")
    writer = FakeWriter("", 0)
    worker = SimpleNamespace(is_alive=lambda: not writer.scalars)
    writer.file_writer = SimpleNamespace(event_writer=SimpleNamespace(_worker=worker))
    module.SummaryWriter = lambda *_, **__: writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    run(tmp_path, 1, 9)
    assert writer.scalars == [("loss", 1.0, 1)]
    assert not writer.closed  # which would wait for it
