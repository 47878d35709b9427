"""When a run saves."""

import itertools

import pytest

from ltx2_jax.config import CheckpointConfig
from ltx2_jax.errors import UserError
from ltx2_jax.training import cadence
from ltx2_jax.training.cadence import Cadence


class Steps:
    """Steps that take so many seconds each, by a clock that nothing else moves."""

    def __init__(self, seconds, start=0, **config):
        self.now, self.seconds = 1000.0, seconds
        self.cadence = Cadence(CheckpointConfig(**config), start, clock=lambda: self.now)

    def saves(self, first, last):
        """Steps after which it saved, and when."""
        found = []
        for step in range(first, last + 1):
            self.now += self.seconds(step)
            if self.cadence.due(step):
                found.append((step, self.now - 1000))
        return found


def test_without_minutes_only_the_steps_count():
    steps = Steps(lambda step: 1e6, every_steps=4, start=6)
    assert [step for step, _ in steps.saves(7, 17)] == [8, 12, 16]


@pytest.mark.parametrize("seconds", [0.3, 7.0, 40.0, 170.0, 1000.0])
def test_saves_are_so_many_minutes_apart_to_within_half_a_step(seconds):
    steps = Steps(lambda step: seconds, every_steps=10**9, every_minutes=5)
    times = [0, *(time for _, time in steps.saves(1, max(8, int(2000 / seconds))))]
    assert len(times) > 4
    for before, after in itertools.pairwise(times):
        assert abs(after - before - max(300, seconds)) <= seconds / 2


def test_a_first_step_that_compiles_and_a_pace_that_changes_put_no_save_far_off():
    def seconds(step):
        return 250 if step == 1 else 5 if step < 100 else 20 if step < 200 else 1

    steps = Steps(seconds, every_steps=10**9, every_minutes=5)
    times = [0, *(time for _, time in steps.saves(1, 900))]
    assert len(times) > 8
    for before, after in itertools.pairwise(times):
        assert abs(after - before - 300) <= 60


def test_steps_and_minutes_count_together_and_a_save_of_either_starts_the_minutes():
    steps = Steps(lambda step: 60, every_steps=8, every_minutes=5)
    assert [step for step, _ in steps.saves(1, 24)] == [5, 8, 13, 16, 21, 24]


def test_all_hosts_save_by_the_clock_of_the_first_and_seldom_ask_for_it(monkeypatch):
    told = []
    monkeypatch.setattr(cadence.hosts, "broadcast", lambda text: told.append(text) or text)
    first = Steps(lambda step: 1.0, every_steps=10**9, every_minutes=10).saves(1, 2000)
    assert len(first) == 3
    assert len(told) < 40
    monkeypatch.setattr(cadence.hosts, "broadcast", lambda _: told.pop(0))
    slow = Steps(lambda step: 77.0, every_steps=10**9, every_minutes=10).saves(1, 2000)
    assert [step for step, _ in slow] == [step for step, _ in first]
    assert told == []


@pytest.mark.parametrize(
    "wrong", [{"every_minutes": 0.0}, {"every_minutes": float("nan")}, {"keep_every": -1}]
)
def test_a_time_or_number_that_means_nothing_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name}=.* must be above 0"):
        CheckpointConfig(**wrong)
