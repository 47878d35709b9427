"""Where the time of a run goes, on a clock that moves only when told."""

import json
import threading

import pytest

from ltx2_jax import files
from ltx2_jax.training import goodput
from ltx2_jax.training.goodput import Goodput, duration, read_starts, total


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def run(clock, folder, first, last, saved=None, die_at=None):
    """Steps of 1 s with stalls of 2 s for data, and a save of 5 s after every tenth."""
    with Goodput(folder, 40, clock=clock) as spent:
        clock.sleep(3)
        with goodput.part("restore" if first else "init"):
            clock.sleep(4)
        goodput.goes_on(first)
        for step in range(first + 1, last + 1):
            with goodput.part("compile" if step == first + 1 else "step"):
                clock.sleep(30 if step == first + 1 else 0.25)
            with goodput.waiting_for_data():
                clock.sleep(2 if step % 5 == 0 else 0)
            clock.sleep(0.75)
            goodput.reached(step)
            if step == die_at:
                spent.write()
                return None  # what comes of it is put back by the caller
            if step % 10 == 0:
                with goodput.part("checkpoint"):
                    clock.sleep(5)
        with goodput.part("sampling"):
            clock.sleep(7)
        return str(spent)


def test_the_parts_are_what_was_spent_on_them_and_sum_up_to_the_time_that_passed(clock, tmp_path):
    began = clock()
    run(clock, tmp_path, 0, 25)
    killed = read_starts(tmp_path)
    clock.sleep(100)
    run(clock, tmp_path, 20, 40)
    found = total(read_starts(tmp_path))
    assert sum(found.parts.values()) + found.stopped == pytest.approx(clock() - began, rel=1e-6)
    parts = {name: pytest.approx(value, abs=0.5) for name, value in {
        "init": 3 + 4 + 3, "restore": 4, "compile": 2 * 30, "data": 2 * (5 + 4),
        "checkpoint": 5 * (2 + 2), "sampling": 2 * 7, "lost": 5 * 1.0, "step": 40 * 1.0,
    }.items()}  # fmt: skip
    assert found.parts == parts
    assert (found.stopped, found.lost_steps, found.starts) == (100, 5, 2)
    ran = clock() - began - 100
    assert found.share == pytest.approx(40 / ran, abs=0.01)
    assert killed[0] == read_starts(tmp_path)[0]


def test_one_line_tells_it(clock, tmp_path):
    line = run(clock, tmp_path, 0, 20)
    assert line == (
        "goodput 24 % of 81.8 s: init 7 s, compile 30 s, step 19.8 s, data 8 s, checkpoint 10 s, "
        "sampling 7 s"
    )
    clock.sleep(50)
    line = run(clock, tmp_path, 10, 20)
    assert " in 2 starts: init 10 s, restore 4 s, compile 60 s, " in line
    assert line.endswith("sampling 14 s, lost 9.83 s (10 steps), stopped 50 s")


def test_a_start_that_was_killed_has_its_line(clock, tmp_path):
    with Goodput(tmp_path, 100, clock=clock):
        goodput.goes_on(0)
        clock.sleep(50)
        goodput.reached(7)
        (line,) = read_starts(tmp_path)  # of a run that goes on
        assert (line["step"], line["end"]) == (7, None)
        assert line["seconds"]["step"] == 50
        clock.sleep(1)
        goodput.reached(8)  # too soon to be written
        assert read_starts(tmp_path)[0]["step"] == 7


def test_a_start_that_took_no_step_loses_none_and_hides_none(clock, tmp_path):
    for first, steps in ((0, 9), (None, 0), (6, 1)):
        with Goodput(tmp_path, 100, clock=clock):
            clock.sleep(10)
            if first is not None:
                goodput.goes_on(first)
                for step in range(first + 1, first + steps + 1):
                    clock.sleep(1)
                    goodput.reached(step)
    assert [line["lost_steps"] for line in read_starts(tmp_path)] == [0, 0, 3]


def test_steps_that_a_killed_start_logged_and_did_not_save_are_lost(clock, tmp_path):
    with Goodput(tmp_path, 100, clock=clock):
        goodput.goes_on(0)
        clock.sleep(20)
        goodput.reached(20)
    rows = [json.dumps({"step": step}) for step in range(1, 28)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 2')
    with Goodput(tmp_path, 100, clock=clock):
        goodput.goes_on(10)
    assert read_starts(tmp_path)[1]["lost_steps"] == 17


@pytest.mark.parametrize(
    ("step", "error", "end"),
    [
        (4, None, "finished"),
        (3, None, "stopped"),
        (3, KeyboardInterrupt(), "interrupted"),
        (3, RuntimeError("out of\nmemory"), "failed: out of memory"),
    ],
)
def test_how_a_start_ended_is_noted(clock, tmp_path, step, error, end):
    def start():
        with Goodput(tmp_path, 4, clock=clock):
            goodput.goes_on(0)
            goodput.reached(step)
            if error is not None:
                raise error

    if error is None:
        start()
    else:
        with pytest.raises(type(error)):
            start()
    assert read_starts(tmp_path)[-1]["end"] == end
    with goodput.part("step"), goodput.waiting_for_data():  # nobody counts any more
        goodput.reached(9)


def test_a_start_that_ends_at_once_notes_why(clock, tmp_path):
    with Goodput(tmp_path, 4, clock=clock):
        files.last_words("host-1: the disk is gone", seconds=30)
        assert read_starts(tmp_path)[-1]["end"] == "failed: host-1: the disk is gone"
    files.last_words("another one", seconds=30)
    assert read_starts(tmp_path)[-1]["end"] == "stopped"


class Running:
    """Arrays that the devices have not done yet."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        self.done.wait()
        return self


def test_waiting_for_data_counts_from_when_the_devices_were_idle(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(goodput.jax, "block_until_ready", lambda x: x.block_until_ready())
    with Goodput(tmp_path, 4, clock=clock) as spent:
        goodput.goes_on(0)
        busy = Running()
        with goodput.waiting_for_data(busy):
            clock.sleep(5)
        assert spent._line["seconds"]["data"] == 0  # the devices are still at work
        busy.done.set()
        noted, note = threading.Event(), spent._note_end
        monkeypatch.setattr(spent, "_note_end", lambda *args: note(*args) or noted.set())
        done = Running()
        with goodput.waiting_for_data(done):
            clock.sleep(3)
            done.done.set()
            assert noted.wait(30)
            clock.sleep(2)
        assert spent._line["seconds"]["data"] == 2
        assert spent._line["seconds"]["step"] == 8


def test_lines_that_are_broken_are_left_out(tmp_path):
    assert read_starts(tmp_path) == []
    good = {"began": 1, "now": 2, "first": 0, "step": 1, "lost_steps": 0}
    good["seconds"] = dict.fromkeys(goodput.PARTS, 0.0)
    lines = ["{", "[]", "{}", json.dumps(good), json.dumps(good)[:40]]
    (tmp_path / "goodput.jsonl").write_text("\n".join(lines))
    assert read_starts(tmp_path) == [good]


def test_durations_are_short():
    shown = [duration(x) for x in (0.0123, 5, 119, 120, 5400, 7200, 100_000, 10**6)]
    assert shown == [
        "0.0123 s", "5 s", "119 s", "2 min", "90 min", "2 h", "27.8 h", "11.6 days",
    ]  # fmt: skip
