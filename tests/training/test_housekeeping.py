"""What the loop does beside its steps."""

import dataclasses
import gc
import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ltx2_jax import hosts
from ltx2_jax.config import CheckConfig, ProfileConfig
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checks, housekeeping
from ltx2_jax.training.housekeeping import ForSizes, Profile, Reader, Replay, Rows, Steps


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that would have been slept."""
    slept = []
    monkeypatch.setattr(housekeeping.time, "sleep", slept.append)
    return slept


class Disk:
    """Batches that are their position; the next reads raise `errors`."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __call__(self, position):
        for number in itertools.count(position):
            if self.errors:
                raise self.errors.pop(0)
            yield {"id": np.array([number])}


def read(disk, start=3, count=2):
    reader = Reader(disk, start, tiny.config())
    return [int(reader.next(step)["id"][0]) for step in range(1, count + 1)], reader.position


def test_what_cannot_be_read_is_tried_again_and_no_batch_is_left_out(pauses):
    assert read(Disk()) == ([3, 4], 5)
    assert not pauses
    assert read(Disk(OSError("503"), OSError("503"))) == ([3, 4], 5)
    assert pauses == [0.5, 1.0]


def test_what_stays_unreadable_is_named_with_its_step(pauses):
    with pytest.raises(UserError, match=r"the data of step 1 cannot be read: a disk is gone"):
        read(Disk(*[OSError("a disk is gone")] * 9))
    assert pauses == [0.5, 1, 2, 4]
    pauses.clear()
    # A record that was looked at and is damaged stays so: the file is named sooner.
    with pytest.raises(UserError, match=r"step 1 cannot be read: data/00000: damaged"):
        read(Disk(*[UserError("data/00000: damaged")] * 9))
    assert pauses == [0.5]


def test_how_long_a_host_waits_is_told_as_it_usually_is(monkeypatch):
    times, told = iter([0.0, 10.0, 100.0, 110.0, 200.0, 200.0]), []
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(housekeeping, "time", clock)
    monkeypatch.setattr(hosts, "progress", lambda *_, data_wait=None: told.append(data_wait))
    reader = Reader(Disk(), 0, tiny.config())
    for step in (1, 2, 3):
        reader.next(step)
    assert [wait for wait in told if wait is not None] == pytest.approx([1.0, 1.9, 1.71])
    assert reader.waited == 0


def test_clips_of_another_type_have_a_program_of_their_own():
    step = jax.jit(lambda state, batch: state + batch["video"].sum())
    batches = [{"video": jnp.ones(3, dtype)} for dtype in (jnp.float32, jnp.bfloat16)]
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        args = jnp.float32(0), batches[0]
        program = ForSizes("the step", step, tiny.config(), args, batches[1:])
        assert [float(program(jnp.float32(2), batch)) for batch in batches] == [5, 5]


def test_a_replayed_step_that_gives_other_bits_ends_the_run():
    config = tiny.config(check=CheckConfig(replay_every=4))
    noise = iter([0.0, 0.0, 0.0, 1e-7])

    def make_step(donate):
        assert not donate
        return lambda state, batch: ({"a": state["a"] + next(noise), "nan": state["nan"]}, {})

    state = {"a": jnp.arange(3.0), "nan": jnp.full(2, jnp.nan)}
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        ready = partial(ForSizes, config=config, args=(state, {}), batches=())
        replay = Replay(config, make_step, ready, state)
        replay.before(3, (state, {}))
        replay.before(4, (state, {}))
        with pytest.raises(hosts.LostError, match=r"step 8 gave other bits .*, on this machine"):
            replay.before(8, (state, {}))


def test_the_checked_program_takes_its_turn_and_is_compiled_only_if_asked_for():
    def make_step(checked=False):
        made.append(checked)
        return lambda state, batch: (state, checked)

    made = []
    ready = partial(ForSizes, config=tiny.config(), args=({}, {}), batches=())
    steps = Steps(tiny.config(check=CheckConfig(sdc_every=3)), make_step, ready)
    assert [steps(step, {}, {})[1] for step in range(1, 8)] == [0, 0, 1, 0, 0, 1, 0]
    assert made == [False, True]
    Steps(tiny.config(), make_step, ready)
    assert made == [False, True, False]


def test_hosts_that_hold_the_same_row_show_the_same_example(monkeypatch):
    said = ["[[0, 7], [2, 9]]", "[[1, 5], [2, 9]]"]
    monkeypatch.setattr(hosts, "gather", lambda *_: said)
    rows = Rows((7, 9), (0, 2), position=1, waited=0.0)
    assert checks.all_ids(rows) == {0: 7, 1: 5, 2: 9}
    said[1] = "[[1, 5], [2, 8]]"
    with pytest.raises(hosts.LostError, match="row 2 is example 8 on host-1 and 9 on host-0"):
        checks.all_ids(rows)


def test_hosts_that_drifted_apart_are_named(monkeypatch):
    config = tiny.config(check=CheckConfig(compare_every=2))
    health = checks.Health(config, 0, "checkpoints")
    rows = Rows((7,), (0,), position=5, waited=0.0)
    values = {"loss": 1.0, "grad_norm": 1.0}
    asked = []

    def gather(value):
        asked.append(value)
        return [value, value.replace('"data position": 5', '"data position": 6')]

    monkeypatch.setattr(hosts, "gather", gather)
    health.note(values, 1, None, rows)
    assert not asked
    with pytest.raises(hosts.LostError, match="host-1 has data position 6, host-0 has 5, in step"):
        health.note(values, 2, None, rows)
    # Losses are compared in all of their digits.
    near = lambda value: [value, value.replace((1.0).hex(), (1 + 2**-50).hex())]  # noqa: E731
    monkeypatch.setattr(hosts, "gather", near)
    with pytest.raises(hosts.LostError, match=r"host-1 has loss 0x1\.\w*4p\+0, host-0 has 0x1\.0"):
        health.note(values, 2, None, rows)


def test_a_step_that_changed_nothing_is_named_with_its_dataset(capsys):
    rows = Rows((7, 9), (0, 1), position=5, waited=0.0, labels={"dataset": "a/films"})
    checks.Health(tiny.config(), 0, "checkpoints").note(
        {"loss": 1.0, "grad_norm": float("inf")}, 3, None, rows
    )
    assert capsys.readouterr().out.endswith("its clips: 7, 9 of a/films\n")


def test_a_trace_is_of_the_steps_that_were_asked_for(monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", events.append)

    def traced(steps):
        events.clear()
        config = tiny.config(workdir=str(tmp_path), profile=ProfileConfig(steps=steps))
        with Profile(config) as profile:
            for step in range(1, 8):
                profile.before(step)
                events.append(step)
                profile.after(step, f"{step} is done")
        return events

    folder = str(tmp_path / "profile")
    assert traced("3:5") == [1, 2, folder, 3, 4, "4 is done", "stop", 5, 6, 7]
    assert traced("6:9") == [1, 2, 3, 4, 5, folder, 6, 7, "stop"]  # the run ends before it
    for wrong in ("3", "5:3", "5:5", "0:2", "a:b", "3:5:7"):
        with pytest.raises(UserError, match=f"profile.steps='{wrong}': expected FIRST:END"):
            ProfileConfig(steps=wrong)


def test_garbage_is_looked_for_at_the_same_steps_on_all_hosts(monkeypatch):
    collected, thawed = [], []
    monkeypatch.setattr(gc, "unfreeze", lambda: thawed.append(1))
    with housekeeping.same_collections() as collect:
        assert not gc.isenabled()
        assert not thawed
        monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
        for step in range(1, 401):
            collect(step)
    assert gc.isenabled()
    assert thawed
    assert len(collected) == 4


def test_programs_are_kept_in_the_workdir_unless_the_user_says_where(monkeypatch, tmp_path):
    cache = SimpleNamespace(reset_cache=lambda: asked.append("opened anew"))
    monkeypatch.setattr(housekeeping, "compilation_cache", cache)
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *change: asked.append(change))
    config = tiny.config(workdir=str(tmp_path))
    name = "jax_compilation_cache_dir"
    for given, wanted, want in (
        (
            None,
            True,
            [(name, str(tmp_path / "compile_cache")), "opened anew", (name, None), "opened anew"],
        ),
        ("/elsewhere", True, []),
        (None, False, []),
    ):
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(jax.config), name, given, raising=False)
            with housekeeping.programs_kept(dataclasses.replace(config, compile_cache=wanted)):
                pass
        assert asked == want
