"""What --status says of a run, from its files."""

import json

import jax
import pytest

from ltx2_jax import train
from ltx2_jax.errors import UserError
from ltx2_jax.training import goodput
from ltx2_jax.training.goodput import Goodput
from ltx2_jax.training.status import status

NOW = 1.8e9  # 2027-01-15 08:00 UTC


def written(folder, *, end=None, rows=(), run=None, saved=None):
    """A run of 100 steps that began an hour ago at step 0 and reached 40."""
    if end is not None:
        times = iter([NOW - 3600, NOW - 3600, NOW - 3600, NOW - 3000, *[NOW - 10] * 9])
        try:
            with Goodput(folder, 100, clock=lambda: next(times)):
                goodput.goes_on(0)
                goodput.reached(100 if end == "finished" else 40)
                if end == "failed":
                    raise RuntimeError("loss is nan")
        except RuntimeError:
            pass
    if rows:
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / "metrics.jsonl").write_text(text)
    if run is not None:
        found = {"host": "host-3", "pid": 42, "since": NOW - 3600, "run": "a", "refreshed": run}
        (folder / ".run.json").write_text(json.dumps(found))
    if saved is not None:
        (folder / "checkpoints" / "30").mkdir(parents=True)
        noted = json.dumps({"commit_timestamp_nsecs": int(saved * 1e9)})
        (folder / "checkpoints" / "30" / "_CHECKPOINT_METADATA").write_text(noted)
    return status(folder, clock=lambda: NOW).splitlines()


ROWS = [
    {"step": 40, "loss": 0.5, "step_time": 5.0, "tokens_per_second": 12345.6, "mfu": 0.634},
    {"step": 41, "loss": 0.25, "slowest_host": 7.0, "slowest_data_wait": 0.5},
]


def test_a_run_that_goes_on(tmp_path):
    state, *lines = written(tmp_path, end="stopped", rows=ROWS, run=NOW - 4, saved=NOW - 720)
    assert state == (
        f"{tmp_path}: running on host-3, process 42, since 2027-01-15 07:00 UTC, last sign 4 s ago"
    )
    assert lines[:6] == [
        "  step        41 of 100",
        "  loss        0.25",
        "  speed       5 s a step, 12,346 tokens/s, 63.4 % MFU",
        "  slowest     host 7, waits 0.5 s a step for data",
        "  checkpoint  step 30, 12 min ago",
        "  time left   88.3 min",  # 59 steps at the pace of all 40, 3590 s
    ]
    assert lines[6].startswith("  goodput ")


@pytest.mark.parametrize(
    ("end", "run", "state"),
    [
        ("stopped", NOW - 600, "no sign for 10 min of the run on host-3, process 42, since 2027-"),
        ("stopped", None, "stopped 2027-01-15 07:59 UTC, 10 s ago"),
        ("finished", None, "finished 2027-01-15 07:59 UTC, 10 s ago"),
        ("failed", None, "failed 2027-01-15 07:59 UTC, 10 s ago: loss is nan"),
    ],
)
def test_a_run_that_does_not(tmp_path, end, run, state):
    first, *lines = written(tmp_path, end=end, run=run)
    assert first.startswith(f"{tmp_path}: {state}")
    assert not any("time left" in line for line in lines)
    assert "  checkpoint  none yet" in lines


def test_parts_of_a_run_are_enough(tmp_path):
    cut = written(tmp_path, rows=[{"step": 3, "loss": None}])
    assert cut == [f"{tmp_path}: not running", "  step        3", "  checkpoint  none yet"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 4, "loss": 1.5}\n{"step": 5, "lo')
    assert written(tmp_path)[1:3] == ["  step        4", "  loss        1.5"]


def test_of_a_long_file_only_the_end_is_read(tmp_path):
    rows = [{"step": step, "loss": float(step)} for step in range(1, 5000)]
    rows[0]["step_time"] = 5.0  # which says nothing of the steps since
    lines = written(tmp_path, rows=rows)
    assert lines[1:3] == ["  step        4,999", "  loss        4999"]
    assert not any("speed" in line for line in lines)


def test_where_there_is_no_run_it_says_so(tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path}: no run there"):
        status(tmp_path)
    assert train.cli([f"--status={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere: no run there" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert train.cli(["--status=s3://bucket/run"]) == 2
    assert "s3://bucket/run: s3:// cannot be written to" in capsys.readouterr().err


def test_no_device_is_touched(tmp_path, monkeypatch, capsys):
    written(tmp_path, end="stopped", rows=ROWS, run=NOW, saved=NOW)
    for name in ("devices", "local_devices", "process_index", "process_count", "default_backend"):
        monkeypatch.setattr(jax, name, lambda *_: pytest.fail("a device"))
    assert train.cli(["--status", str(tmp_path)]) == 0
    assert "step        41 of 100" in capsys.readouterr().out


def test_status_stands_alone(capsys):
    for argv in (
        ["--status=x", "--config=y"],
        ["--status=x", "--config.seed=1"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            train.cli(argv)
        assert caught.value.code == 2
    assert "--status" in capsys.readouterr().err
