"""The loop around the step, with stand-ins for the step, the data and the disk."""

import contextlib
import dataclasses
import gc
import itertools
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src import distributed
from resume_config import get_config

from ltx2_jax.config import (
    CheckConfig,
    CheckpointConfig,
    MeshConfig,
    OptimConfig,
    ProfileConfig,
    SampleConfig,
    ValidationConfig,
)
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import DivergedError, UserError
from ltx2_jax.media.media import Clip
from ltx2_jax.models import flops
from ltx2_jax.sharding import make_mesh
from ltx2_jax.stop_signals import StopSignals
from ltx2_jax.training import checks, housekeeping, loop, runs
from ltx2_jax.training.boards import Shown
from ltx2_jax.training.goodput import read_starts
from ltx2_jax.training.housekeeping import Rows
from ltx2_jax.training.metrics import StepTimer, read_metrics
from ltx2_jax.training.state import optimizer


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No files of TensorBoard."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


class Disk:
    """Checkpoints in memory."""

    folder = Path("run/checkpoints")

    def __init__(self):
        self.saved, self.scores = {}, {}

    def save(self, step, state, config, scores):
        self.saved[step] = jax.device_get(state)
        self.scores[step] = scores

    def data_position(self, step):
        return step


class Run:
    """`take_steps` of a model of one weight, which is the number of steps behind it."""

    def __init__(self, monkeypatch, folder):
        self.patch, self.folder = monkeypatch, folder
        self.disk, self.taken, self.clips = Disk(), [], []
        self.bad = {}  # step -> what is wrong with its metrics
        self.broken = {}  # step -> weight in place of it
        self.stop_at, self.before_step = None, lambda: None
        self.shown = lambda step: None

    def make_train_step(self, config, strides, clock, *_, **__):
        self.of_codec = strides, clock
        return self.step

    def step(self, state, batch, null_text):
        self.before_step()
        self.taken.append((int(batch["video"][0]), len(batch["video"]), null_text["text_mask"]))
        step = int(state["step"]) + 1
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        weight = jnp.float32(self.broken.get(step, step))
        metrics = {"loss": 0.5 * step, "grad_norm": 1.0, "video_loss_quarters": np.arange(4.0) / 4}
        return {"params": weight, "ema": weight, "step": step}, metrics | self.bad.get(step, {})

    def __call__(self, start=0, **changes):
        config = tiny.config(workdir=str(self.folder), **changes)
        codec, records = MagicMock(), Source()
        codec.video.strides, codec.audio.clock = "strides", "clock"

        def examples(config, records, mesh, start):
            for k in itertools.count(start):
                yield {"video": np.full(8, k, np.float32), "id": np.arange(8)}

        def make_clips(weights, records, step):
            self.clips.append((float(weights), step))
            return self.shown(step)

        clock = itertools.count().__next__
        timer = StepTimer(tokens_per_step=1, flops_per_step=1, clock=clock)
        self.patch.setattr(loop, "load_codec", lambda *_, **__: codec)
        self.patch.setattr(loop, "make_train_step", self.make_train_step)
        self.patch.setattr(loop, "batches", examples)
        self.patch.setattr(loop, "step_timer", lambda *_: timer)
        weight = jnp.float32(start)
        state = {"params": weight, "ema": weight, "step": start}
        with contextlib.closing(StopSignals()) as stop:
            of = loop.Run(config, one_device(), records, self.disk, make_clips)
            return loop.take_steps(of, state, start, stop)

    @property
    def rows(self):
        return read_metrics(self.folder)


@pytest.fixture
def run(monkeypatch, tmp_path):
    return Run(monkeypatch, tmp_path)


EVERY_2, NEVER = CheckpointConfig(every_steps=2), CheckpointConfig(every_steps=1000)


# --------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("start", [0, 3])
def test_every_step_takes_its_batch_and_is_logged_once(run, start):
    state, step = run(start, num_steps=5, checkpoint=EVERY_2)
    assert (step, float(state["params"])) == (5, 5.0)
    assert [number for number, _, _ in run.taken] == list(range(start, 5))
    for _, rows, mask in run.taken:
        assert rows == 8
        np.testing.assert_array_equal(mask, [False, True])  # of the empty caption
    assert run.of_codec == ("strides", "clock")
    assert [row["step"] for row in run.rows] == list(range(start + 1, 6))
    for row in run.rows:
        assert row["loss"] == 0.5 * row["step"]
        assert [row[f"video_loss_quarters_{i}"] for i in (1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75]
        assert row["data_wait"] >= 0
    assert not run.clips


def test_a_run_goes_on_in_the_data_where_its_checkpoint_says(run):
    run.disk.data_position = lambda step: 10 * step
    run(3, num_steps=5, checkpoint=NEVER)
    assert [number for number, _, _ in run.taken] == [30, 31]


def test_a_resumed_run_keeps_the_rows_up_to_where_it_goes_on(run):
    run.bad = {step: {"loss": 100.0 + step} for step in range(1, 5)}
    run(num_steps=4, checkpoint=NEVER)
    run.bad = {}
    run(2, num_steps=5, checkpoint=NEVER)
    assert [(row["step"], row["loss"]) for row in run.rows] == [
        (1, 101.0), (2, 102.0), (3, 1.5), (4, 2.0), (5, 2.5),
    ]  # fmt: skip


def test_a_step_is_waited_for_while_the_next_one_runs(run):
    logged = []
    run.before_step = lambda: logged.append(len(run.rows))
    run(num_steps=4, checkpoint=NEVER)
    assert logged == [0, 0, 1, 2]
    assert len(run.rows) == 4


def test_the_state_after_every_few_steps_is_saved_and_so_is_the_last(run):
    run(num_steps=5, checkpoint=EVERY_2)
    assert {step: float(state["params"]) for step, state in run.disk.saved.items()} == {
        2: 2.0, 4: 4.0, 5: 5.0,
    }  # fmt: skip


def test_minutes_between_saves_are_counted_from_where_a_run_goes_on(run):
    """A minute a step; who takes all steps for his own thinks that they last no time."""
    clock = partial(loop.Cadence, clock=lambda: 60.0 * len(run.taken))
    run.patch.setattr(loop, "Cadence", clock)
    run(1000, num_steps=1010, checkpoint=CheckpointConfig(every_steps=10**6, every_minutes=3))
    assert list(run.disk.saved) == [1003, 1006, 1009, 1010]


def test_a_stop_signal_ends_with_the_step_that_runs_and_saves_it(run, usual_signals):
    run.stop_at = 3
    sample = SampleConfig(preview_step=3)
    state, step = run(num_steps=9, checkpoint=NEVER, sample=sample)
    assert (step, float(state["params"])) == (3, 3.0)
    assert list(run.disk.saved) == [3]
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert not run.clips


def test_what_is_measured_of_a_step_is_in_its_row_and_no_step_time(run, usual_signals):
    asked = []

    def after(step, state, saved):
        assert float(state["params"]) == step
        asked.append((step, saved))
        return {"val_loss": np.float32(2.5)} if step == 3 else {}

    run.patch.setattr(loop.validation, "Validation", lambda *_: SimpleNamespace(after=after))
    run(num_steps=6, checkpoint=CheckpointConfig(every_steps=5))
    assert asked == [(1, False), (2, False), (3, False), (4, False), (5, True), (6, True)]
    assert [row["step"] for row in run.rows if row.get("val_loss") == 2.5] == [3]
    # Before 1 lies compilation, before 6 a checkpoint.
    assert [row["step"] for row in run.rows if "step_time" not in row] == [1, 3, 6]
    run.stop_at = 2  # there is no time left for what only a checkpoint would have
    run(num_steps=6, checkpoint=NEVER)
    assert asked[6:] == [(1, False), (2, False)]


def test_steps_are_replayed_and_traced_when_it_is_their_turn(run):
    traced = []
    for name in ("start_trace", "stop_trace"):
        run.patch.setattr(jax.profiler, name, lambda *_: traced.append(len(run.taken)))
    run(num_steps=5, checkpoint=NEVER, profile=ProfileConfig(steps="2:4"))
    assert traced == [1, 3]
    run.taken.clear()
    run(num_steps=5, checkpoint=NEVER, check=CheckConfig(replay_every=2))
    assert [number for number, _, _ in run.taken] == [0, 1, 1, 1, 2, 3, 3, 3, 4]


def test_garbage_is_looked_for_between_steps(run):
    looked = []
    run.patch.setattr(housekeeping, "COLLECT_EVERY", 2)
    run.patch.setattr(gc, "collect", lambda: looked.append(len(run.taken)))
    run(num_steps=5, checkpoint=NEVER)
    assert looked == [0, 2, 4]


def test_only_where_no_step_runs_is_a_wait_for_data_one_from_its_beginning(run):
    waited = []

    @contextlib.contextmanager
    def waiting_for_data(running=None):
        waited.append(running and running["loss"])
        yield

    run.patch.setattr(loop.goodput, "waiting_for_data", waiting_for_data)
    run(num_steps=3, checkpoint=NEVER)
    assert waited == [None, 0.5, 1.0, 1.5]


def test_clips_are_made_once_on_the_way_and_are_no_step_time(run):
    run(
        num_steps=7, checkpoint=CheckpointConfig(every_steps=5), sample=SampleConfig(preview_step=3)
    )
    assert run.clips == [(3.0, 3)]
    # Before 1 lies compilation, before 6 a checkpoint; 3 is logged when the clips are made.
    assert [row["step"] for row in run.rows if "step_time" not in row] == [1, 3, 6]


@pytest.mark.parametrize("best", [None, "val_sync_lag_ms"])
def test_clips_are_made_after_a_checkpoint_unless_they_tell_which_is_the_best(run, best):
    """What they are worth stands in the row of their step either way."""
    saved = []
    clip = Clip(np.zeros((1, 2, 2, 3), np.uint8), 8.0)

    def shown(step):
        saved.append(sorted(run.disk.saved))
        return Shown([clip], ["a"], None, {"val_sync_lag_ms": 100.0 - step})

    run.shown = shown
    validation = ValidationConfig(clips_every=2, best=best)
    run(num_steps=4, checkpoint=EVERY_2, validation=validation)
    lags = [row.get("val_sync_lag_ms") for row in run.rows]
    assert [row["loss"] for row in run.rows] == [0.5, 1.0, 1.5, 2.0]
    if best is None:  # those after the last step are no part of the steps
        assert saved == [[2]]
        assert run.disk.scores == {2: {}, 4: {}}
        assert lags == [None, 98.0, None, None]
    else:
        assert saved == [[], [2]]
        assert run.disk.scores == {2: {"val_sync_lag_ms": 98.0}, 4: {"val_sync_lag_ms": 96.0}}
        assert lags == [None, 98.0, None, 96.0]


def test_the_last_clips_are_shown_where_the_metrics_are(run):
    run(num_steps=4, checkpoint=EVERY_2)
    shown, seen = (
        Shown([Clip(np.zeros((1, 2, 2, 3), np.uint8), 8.0)], ["a"], None, {"val_x": 2.0}),
        [],
    )
    board = SimpleNamespace(log=lambda *given: seen.append(given), show=lambda *given: None)
    config = tiny.config(workdir=str(run.folder))
    of = loop.Run(config, one_device(), [], run.disk, lambda *_: shown, board=board)
    loop.last_clips(of, "weights", 4)
    assert run.rows[-1]["step"] == 4
    assert (run.rows[-1]["loss"], run.rows[-1]["val_x"]) == (2.0, 2.0)
    assert seen == [(4, {"val_x": 2.0})]


# ------------------------------------------------------------------------------ a run that is lost


STRICT = OptimConfig(max_bad_steps=1)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_ends_the_run_one_step_later(run, name):
    run.bad = {3: {name: float("nan")}}
    with pytest.raises(DivergedError, match=f"{name} is nan at step 3: lower"):
        run(num_steps=100, checkpoint=NEVER, optim=STRICT)
    assert len(run.taken) <= 4
    assert not run.disk.saved


def test_a_few_bad_steps_are_named_with_their_clips_and_too_many_in_a_row_end_the_run(run, capsys):
    bad = {"grad_norm": float("nan")}
    run.bad = {2: bad, 4: bad, 5: bad}
    optim = OptimConfig(max_bad_steps=3)
    _, step = run(num_steps=6, checkpoint=NEVER, optim=optim)
    assert step == 6
    said = [line for line in capsys.readouterr().out.splitlines() if "changed nothing" in line]
    assert said[1] == (
        "step 4 changed nothing: loss 2, grad_norm nan; 2 such steps so far; its clips: "
        "0, 1, 2, 3, 4, 5, 6, 7"
    )
    assert [row["step"] for row in run.rows if row["grad_norm"] is None] == [2, 4, 5]
    run.bad[6] = bad
    with pytest.raises(DivergedError, match="grad_norm is nan at step 6: lower") as caught:
        run(num_steps=9, checkpoint=NEVER, optim=optim)
    assert caught.value.exit_code == 3


def test_what_is_not_finite_is_never_saved(run):
    run.bad = {4: {"loss": float("inf")}}
    with pytest.raises(UserError, match="loss is inf at step 4: lower"):
        run(num_steps=9, checkpoint=EVERY_2, optim=STRICT)
    assert list(run.disk.saved) == [2]
    run.bad, run.broken = {}, {4: np.inf}
    with pytest.raises(UserError, match="a weight is not finite at step 4: lower"):
        run(num_steps=9, checkpoint=EVERY_2)
    assert list(run.disk.saved) == [2]


def test_a_checkpoint_that_fails_at_once_is_named(run):
    run.bad = {4: {"loss": float("nan")}}
    with pytest.raises(UserError, match=r"at step 4, the first from .* remove run/checkpoints/3, "):
        run(3, num_steps=9, checkpoint=NEVER, optim=STRICT)
    run.bad, run.broken = {}, {4: np.nan}
    with pytest.raises(UserError, match=r"at step 4, the first from .* remove run/checkpoints/3, "):
        run(3, num_steps=9, checkpoint=EVERY_2)


# --------------------------------------------------------------------------------- start and end


class Training:
    """`train` with everything but its order replaced; what happened is in `events`."""

    best = None

    def __init__(
        self, monkeypatch, folder, latest, reached, during=lambda *_: 0, at_end=lambda: 0, **changes
    ):
        self.events, self.at_end = [], at_end
        self.config = tiny.config(workdir=str(folder), num_steps=9, **changes)
        self.records, self.latest_step, self.reached = MagicMock(), latest, reached
        self.state = {"params": "last", "ema": "averaged"}

        def note(name, result=None):
            return lambda *args, **kw: self.events.append((name, args, kw)) or result

        for name in ("check_alone", "before_work"):
            monkeypatch.setattr(loop.checks, name, note(name))
        monkeypatch.setattr(loop.checks, "check_same_makers", note("check_same_makers"))
        monkeypatch.setattr(loop, "Checkpoints", lambda *args, **kw: self.opened(*args, **kw))
        monkeypatch.setattr(loop, "dataset", note("dataset", self.records))
        for name in ("keep_assets", "abstract_state", "describe"):
            monkeypatch.setattr(loop, name, note(name))
        monkeypatch.setattr(loop, "first_state", note("first_state", self.state))
        monkeypatch.setattr(loop.validation, "check", note("check_validation"))
        kept = note("programs_kept", contextlib.nullcontext())
        monkeypatch.setattr(loop, "programs_kept", kept)

        def take_steps(*args):
            self.events.append(("take_steps", args, {}))
            during(*args)
            return self.state, reached

        monkeypatch.setattr(loop, "take_steps", take_steps)
        self.wait = note("wait")
        loop.train(self.config, self.make_clips, note("check_clips"))

    def opened(self, workdir, keep, **_):
        self.events.append(("open", (str(workdir), keep), {}))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def make_clips(self, weights, records, step):
        self.events.append(("clips", (weights, records, step), {}))
        self.at_end()

    def of(self, name):
        return [(args, kw) for event, args, kw in self.events if event == name]


@pytest.mark.parametrize(("decay", "weights"), [(0.9, "averaged"), (None, "last")])
def test_clips_at_the_end_are_of_the_averaged_weights_if_there_are_any(
    monkeypatch, tmp_path, decay, weights
):
    optim = OptimConfig(ema_decay=decay)
    training = Training(monkeypatch, tmp_path, latest=None, reached=9, optim=optim)
    assert training.of("clips") == [((weights, training.records, 9), {})]
    # All that can be refused is before the first step; a run is on disk before its clips are made.
    assert [name for name, _, _ in training.events] == [
        "check_alone", "before_work", "check_validation", "programs_kept", "open", "dataset",
        "keep_assets", "check_clips", "abstract_state", "describe", "first_state", "take_steps",
        "wait", "clips",
    ]  # fmt: skip
    # Those on the way are made in the same manner.
    ((of, *_), _), *_ = training.of("take_steps")
    of.clips(training.state, 4)
    assert training.of("clips")[-1] == ((weights, training.records, 4), {})


def test_a_run_that_was_stopped_makes_no_clips_and_says_how_it_goes_on(
    monkeypatch, tmp_path, capsys
):
    training = Training(monkeypatch, tmp_path, latest=None, reached=4)
    assert not training.of("clips")
    assert training.of("wait")
    output = capsys.readouterr().out
    assert output.startswith("stopped and saved at step 4; the same command resumes\ngoodput ")


def test_a_signal_in_the_last_step_is_one_to_stop_and_after_it_ends_at_once(
    monkeypatch, tmp_path, usual_signals
):
    def signalled(run, state, start, stop):
        stop.begin()
        signal.raise_signal(signal.SIGTERM)

    training = Training(monkeypatch, tmp_path, latest=None, reached=9, during=signalled)
    assert training.of("wait")
    assert not training.of("clips")

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the clips went on")

    begin = {"during": lambda *args: args[-1].begin(), "at_end": interrupted}
    with pytest.raises(KeyboardInterrupt):
        Training(monkeypatch, tmp_path, latest=None, reached=9, **begin)


@pytest.mark.parametrize(("latest", "clips"), [(9, 1), (6, 0)])
def test_a_finished_run_makes_its_clips_again_even_if_they_tell_which_is_the_best(
    monkeypatch, tmp_path, latest, clips
):
    best = ValidationConfig(clips_every=3, best="val_sync_lag_ms")
    training = Training(monkeypatch, tmp_path, latest=latest, reached=9, validation=best)
    assert len(training.of("clips")) == clips


def test_the_time_of_a_run_counts_from_before_its_checks(monkeypatch, tmp_path):
    began = time.time() - 50
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: began))
    Training(monkeypatch, tmp_path, latest=None, reached=9)
    assert [start["began"] for start in read_starts(tmp_path)] == [began]


def test_the_mesh_has_the_sizes_that_the_config_says(monkeypatch, tmp_path):
    sizes = MeshConfig(data=1, model=1, sequence=4, slices=2)
    training = Training(monkeypatch, tmp_path, latest=None, reached=9, mesh=sizes)
    ((of, *_), _), *_ = training.of("take_steps")
    assert list(of.mesh.shape.values()) == [2, 1, 1, 4]  # slices, data, model, sequence


def test_what_stays_of_checkpoints_and_may_fail_is_what_the_config_says(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "Checkpoints", lambda *given, **named: (given, named))
    kept = CheckpointConfig(keep=5, keep_every=100, max_failures=7)
    best = ValidationConfig(every=1, best="val_loss")
    given, named = loop._checkpoints(
        tiny.config(checkpoint=kept, validation=best), tmp_path, "check"
    )
    assert given == (tmp_path,)
    assert named == {
        "keep": 5, "keep_every": 100, "best": "val_loss", "max_failures": 7, "check": "check",
    }  # fmt: skip


@pytest.mark.parametrize(("latest", "start"), [(None, 0), (6, 6)])
def test_a_run_goes_on_from_the_newest_checkpoint_and_its_own_dataset(
    monkeypatch, tmp_path, latest, start
):
    keep = CheckpointConfig(keep=5)
    training = Training(monkeypatch, tmp_path, latest=latest, reached=9, checkpoint=keep)
    assert training.of("open") == [((str(tmp_path), 5), {})]
    assert training.of("dataset")[0][1] == {"anew": start == 0}
    assert len(training.of("check_same_makers")) == (start > 0)
    assert training.of("first_state")[0][0][:3] == (training.config, training, start)
    of, state, since, _ = training.of("take_steps")[0][0]
    assert (of.config, of.records, of.checkpoints) == (training.config, training.records, training)
    assert (state, since) == (training.state, start)


def test_a_state_is_restored_or_begins_with_given_weights_or_with_fresh_ones(monkeypatch):
    optim = OptimConfig(learning_rate=1.0, warmup_steps=10, weight_decay=0.0, ema_decay=0.9)
    config, mesh = tiny.config(optim=optim), one_device()
    stored = config
    disk = SimpleNamespace(
        restore=lambda step, abstract: ("restored", step, abstract), config=lambda step: stored
    )
    monkeypatch.setattr(loop, "init_state", lambda key, config: jax.random.uniform(key))
    given = dataclasses.replace(config, init_from="somewhere")
    monkeypatch.setattr(loop.initial, "load", lambda *_: {"a": {"weight": jnp.full(2, 7.0)}})
    assert loop.first_state(config, disk, 5, "abstract", mesh) == ("restored", 5, "abstract")
    for start in (0, 5):  # of a new run, and of one that began without them
        state = loop.first_state(given, disk, start, "abstract", mesh)
        np.testing.assert_array_equal(state["params"]["a"]["weight"], [7, 7])
        np.testing.assert_array_equal(state["ema"]["a"]["weight"], [7, 7])
        assert state["step"] == start
        # Adam's first update is the learning rate, here of the warm-up.
        gradient = jax.tree.map(jnp.ones_like, state["params"])
        updates, _ = optimizer(given).update(gradient, state["opt"], state["params"])
        np.testing.assert_allclose(updates["a"]["weight"], -(start + 1) / 10, rtol=1e-4)
    stored = given  # a run that began with them has left them behind
    assert loop.first_state(given, disk, 5, "abstract", mesh) == ("restored", 5, "abstract")
    one, same, other = (
        float(loop.first_state(dataclasses.replace(config, seed=seed), disk, 0, "abstract", mesh))
        for seed in (1, 1, 2)
    )
    assert one == same != other


# ------------------------------------------------------------------------------------ data, reports


class Source:
    """Records in memory."""

    folder = "memory"
    codec_path = schema = None

    def __len__(self):
        return 40

    def empty_caption(self):
        return {"text_mask": np.array([False, True])}

    def __getitem__(self, index):
        return {"id": np.int64(index), "caption": "text"}


def ids(config, start=0, mesh=None, count=3):
    examples = loop.batches(config, Source(), mesh or one_device(), start)
    return np.stack([batch["id"] for batch in itertools.islice(examples, count)])


def test_batches_follow_the_seed_from_the_step_on_and_are_those_of_this_host(monkeypatch):
    config = tiny.config(data=dataclasses.replace(tiny.config().data, read_threads=0))
    whole = ids(config, count=7)
    first = make_dataset(Source(), batch_size=8, seed=config.seed, threads=0)
    np.testing.assert_array_equal(whole, [batch["id"] for batch in itertools.islice(first, 7)])
    np.testing.assert_array_equal(ids(config, start=4), whole[4:])
    assert (ids(dataclasses.replace(config, seed=1), count=7) != whole).any()
    monkeypatch.setattr(loop, "rows_of_host", lambda *_: (1, 6))
    np.testing.assert_array_equal(ids(config, start=4), whole[4:][:, [1, 6]])


def schema(**changes):
    """Of records that fit `get_config`."""
    fields = {
        "video": np.zeros((5, 3, 2, 8)),
        "audio": np.zeros((11, 1, 8)),
        "video_text": np.zeros((16, 24)),
        "audio_text": np.zeros((16, 16)),
        "text_mask": np.zeros(16, bool),
    } | changes.pop("fields", {})
    values = {"release": "linear", "codec_hash": "", "text_encoder_hash": ""}
    values |= {"codec": "codec.safetensors", "text_encoder": "text_encoder.safetensors"}
    values |= {"text": "features", "text_release": "random"}
    values |= {"num_frames": 9, "height": 24, "width": 16, "fps": 8.0}
    fields = {name: Field.of(value) for name, value in fields.items() if value is not None}
    return Schema(**(values | changes), fields=fields)


def test_throughput_and_mfu_are_of_the_global_batch_on_all_devices(monkeypatch):
    config = get_config()  # batches of 8
    monkeypatch.setattr(loop.chips, "peak_flops", lambda kind: 1e12)
    timer = loop.step_timer(config, SimpleNamespace(schema=schema()))
    assert timer.tokens_per_step == 8 * (5 * 3 * 2 + 11)
    assert timer.flops_per_step == 8 * flops.train_flops(config.model, 30, 11, 16)
    assert timer.peak_flops == 1e12 * jax.device_count()
    monkeypatch.setattr(loop.chips, "peak_flops", lambda kind: None)
    assert loop.step_timer(config, SimpleNamespace(schema=schema())).peak_flops is None


def test_throughput_follows_the_size_of_every_batch():
    config, rows = get_config(), []
    timer = StepTimer(tokens_per_step=1, flops_per_step=1, clock=itertools.count().__next__)
    logger = SimpleNamespace(log=lambda step, values: rows.append(values))
    shapes = {"video": (5, 3, 2, 8), "audio": (11, 1, 8)}
    for step, size in enumerate((8, 8, 4)):
        of = Rows((), (), step, 0.25, shapes, size)
        loop.log(logger, timer, partial(loop.work, config), step, {"loss": 1.0}, of)
    assert [row.get("tokens_per_second") for row in rows] == [None, 8 * 41, 4 * 41]
    assert {row["data_wait"] for row in rows} == {0.25}


def test_a_run_says_what_is_about_to_run(capsys):
    records = MagicMock(schema=schema())
    records.__len__.return_value = 12
    abstract = {"params": {"a": jnp.zeros((1000, 100)), "b": jnp.zeros(20_000)}}
    abstract["opt"] = {"a": jnp.zeros((1000, 100))}
    loop.describe(get_config(), records, abstract, make_mesh(4, 1, 2), 7)
    data, model, devices, run = capsys.readouterr().out.splitlines()
    assert data.split(None, 1)[1] == (
        "12 clips of 9 frames, 24x16 at 8 fps; latents [5, 3, 2, 8] and [11, 1, 8]"
    )
    assert "0.12 M parameters, 1 blocks, video 24 and audio 16 wide" in model
    assert "data 4 x model 1 x sequence 2; 1 MB of train state" in devices
    assert "steps 7 to 12 in workdir/resume" in run


def test_what_sampling_needs_is_copied_out_of_the_dataset(tmp_path):
    names = ("codec.safetensors", "text_encoder.safetensors", "dataset.json")
    for name in (*names, "data-00000-of-00001.arrayrecord"):
        (tmp_path / name).write_text(name)
    paths = {"codec_path": tmp_path / names[0], "text_encoder_path": tmp_path / names[1]}
    loop.keep_assets(SimpleNamespace(folder=tmp_path, **paths), tmp_path / "run" / "assets")
    found = {path.name: path.read_text() for path in (tmp_path / "run" / "assets").iterdir()}
    assert found == {name: name for name in names}


def test_only_the_first_process_writes(monkeypatch, tmp_path, run):
    monkeypatch.setattr(distributed.global_state, "process_id", 1)
    run(num_steps=3, checkpoint=EVERY_2)
    assert list(run.disk.saved) == [2, 3]  # of which every process writes its shards
    loop.keep_assets(MagicMock(), tmp_path / "assets")
    monkeypatch.setattr(loop, "open_records", lambda folder: folder)
    config = dataclasses.replace(get_config(), workdir=str(tmp_path))
    assert loop.dataset(config) == tmp_path / "data" / "records"
    assert not list(tmp_path.iterdir())


def test_every_host_has_a_folder_of_its_own_for_the_data_of_a_run_in_a_bucket(monkeypatch):
    assert loop.data_folder("runs/a") == (Path("runs/a/data"), True)
    monkeypatch.setattr(loop, "location", lambda workdir: workdir)  # which asks for its library
    found = []
    for host in (0, 1):
        monkeypatch.setattr(distributed.global_state, "process_id", host)
        found += [loop.data_folder(f"gs://bucket/runs/{name}") for name in "ab"]
    assert len({folder for folder, _ in found}) == 4
    assert not any(shared for _, shared in found)


def test_synthetic_clips_are_prepared_in_the_size_they_are_rendered_in(monkeypatch, tmp_path):
    calls = {}

    def prepare_dataset(table, out, sizes, **makers):
        calls.update(table=table, out=out, sizes=sizes, makers=makers)
        return SimpleNamespace(skipped=[])

    monkeypatch.setattr(loop, "prepare_dataset", prepare_dataset)
    monkeypatch.setattr(loop, "open_records", lambda folder: folder)
    monkeypatch.setattr(
        loop.synthetic, "write_dataset", lambda folder, clips: calls.update(rendered=folder)
    )
    config = get_config()
    clips = dataclasses.replace(config.data.synthetic, height=24, width=16, num_frames=17)
    data = dataclasses.replace(config.data, synthetic=clips)
    config = dataclasses.replace(config, data=data, workdir=str(tmp_path))
    assert loop.dataset(config) == calls["out"] == tmp_path / "data" / "records"
    assert calls["table"] == calls["rendered"] / "captions.csv"
    sizes = calls["sizes"]
    assert (sizes.num_frames, sizes.height, sizes.width, sizes.text_length) == (17, 24, 16, 16)
    assert calls["makers"] == {"codec": config.data.codec, "text_encoder": config.text.encoder}
    given = dataclasses.replace(config, data=dataclasses.replace(data, path="given"))
    monkeypatch.setattr(loop, "open_datasets", lambda parts: parts)
    assert loop.dataset(given) == (("given", 1.0),)


# --------------------------------------------------------------------------------- what is refused


def test_the_stored_config_is_looked_at_where_there_is_one_and_else_the_given_weights(monkeypatch):
    asked = []
    config, mesh = get_config(), make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(checks, "check_same_run", lambda *args: asked.append(args[1]))
    monkeypatch.setattr(checks.initial, "check", lambda config: asked.append("weights"))
    begun, given = (SimpleNamespace(init_from=source) for source in (None, "weights"))
    for stored in (None, begun, given):
        monkeypatch.setattr(runs, "stored_config", lambda workdir, stored=stored: stored)
        checks.before_work(config, mesh)
    assert asked == ["weights", begun, "weights", given]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"video": np.zeros((5, 3, 2, 9))}}, "9 video channels"),
        ({"fields": {"audio": np.zeros((11, 2, 8))}}, "16 audio channels"),
        ({"fields": {"video_text": np.zeros((16, 25))}}, "video_text is"),
        ({"fields": {"audio_text": np.zeros((16, 24))}}, "audio_text is"),
        ({"fields": {"audio_text": None}}, r"video_text is \(16, 24\), \(16, 16\)"),
        ({"fields": {"text_mask": np.zeros(15)}}, "text_mask is"),
        ({"text_release": "2.3"}, "text_release is '2.3'"),
        ({"release": "2.3"}, "latents are those of '2.3'"),
        ({"text": "ids"}, "text is 'ids'"),
    ],
)
def test_records_that_the_model_cannot_read_are_refused(changes, message):
    checks.check_schema(get_config(), schema(), Path("a/set"))
    with pytest.raises(UserError, match=f"a/set: .*{message}"):
        checks.check_schema(get_config(), schema(**changes), Path("a/set"))


def test_a_mesh_divides_heads_over_models_and_video_tokens_over_the_sequence():
    records = SimpleNamespace(schema=schema(), folder=Path("a/set"))  # 2 heads, 5 x 3 x 2 tokens
    checks.check_records(get_config(), records, make_mesh(2, 2, 2))
    with pytest.raises(UserError, match=r"model=4 does not divide 2 attention heads; .*: 1, 2$"):
        checks.check_records(get_config(), records, make_mesh(2, 4, 1))
    with pytest.raises(UserError, match=r"sequence=4 does not divide 30 video tokens .*: 1, 2$"):
        checks.check_records(get_config(), records, make_mesh(2, 1, 4))
