"""Signals to one process: a loop finishes its step first, and whoever insists is heard at once."""

import signal
import time

import pytest

from ltx2_jax import hosts, stop_signals
from ltx2_jax.hosts import INTERRUPTED, STOPPED
from ltx2_jax.stop_signals import SIGNALS, StopSignals, exit_code, termination_interrupts

pytestmark = pytest.mark.usefixtures("usual_signals")


def interrupts(number):
    """Whether a signal interrupts what runs."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        return True
    return False


@pytest.fixture
def stop():
    """A loop that has begun, within a command."""
    with termination_interrupts(stopped=STOPPED):
        stop = StopSignals()
        stop.begin()
        yield stop
        stop.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_loop_every_signal_interrupts_and_then_all_is_as_before(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with termination_interrupts():
        assert interrupts(number)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_that_someone_ignores_is_ignored():
    """As nohup does with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with termination_interrupts():
        assert not interrupts(signal.SIGHUP)
        assert interrupts(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_loop_a_signal_is_noted_and_a_second_ctrl_c_interrupts_at_once(stop, number):
    assert not stop.asked()
    assert not interrupts(number)
    assert not interrupts(signal.SIGTERM)
    assert stop.asked()
    assert interrupts(signal.SIGINT)
    # The first one says how the run ended.
    assert stop.number == number
    assert exit_code() == (INTERRUPTED if number == signal.SIGINT else STOPPED)


def test_several_hosts_stop_at_the_first_step_that_none_of_them_has_begun(stop, monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "hear", lambda key: str(int(signal.SIGTERM)))
    monkeypatch.setattr(hosts, "exchange", lambda where, mine, seconds: ["3", mine, "5"])
    assert not any([stop.asked() for _ in range(4)])
    stop_signals._vote()
    assert [stop.asked() for _ in range(3)] == [False, True, True]  # the fifth, and then the sixth
    assert (stop.number, exit_code()) == (signal.SIGTERM, STOPPED)


def test_after_a_loop_a_signal_interrupts_again(stop):
    stop.close()
    assert interrupts(signal.SIGTERM)


def test_an_interruption_within_a_callback_of_the_garbage_collector_is_not_lost():
    """Python drops what is raised in one, so it comes a little later."""
    unharmed = []

    def gc_callback():
        signal.raise_signal(signal.SIGTERM)
        unharmed.append(True)

    def work():
        gc_callback()
        time.sleep(10)

    with termination_interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert unharmed
