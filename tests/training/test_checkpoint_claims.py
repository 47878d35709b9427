"""What a checkpoint keeps of a run, who may go on from it, and which weights are taken of it."""

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.errors import UserError
from ltx2_jax.fields import to_json
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checks, runs, saved
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.runs import stored_config, weights_of_run
from ltx2_jax.training.saving import Attempt


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def changed(config, path, value):
    name, _, rest = path.partition(".")
    value = changed(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.num_layers", 2),
        ("text.length", 32),
        ("seed", 5),
        ("data.batch_size", 16),
        ("data.batch_tokens", 100),
        ("optim.optimizer", "muon"),
        ("optim.first_moment_dtype", "bfloat16"),
        ("data.synthetic.num_clips", 5),
        ("data.codec.griffin_lim_iterations", 3),
        ("optim.ema_decay", None),
    ],
)
def test_a_run_does_not_go_on_with_another(path, value, tmp_path):
    ours = get_config()
    with pytest.raises(UserError, match=f"another config .*{path}"):
        checks.check_same_run(changed(ours, path, value), ours, tmp_path)


def test_a_run_from_given_weights_goes_on_without_them_or_with_the_same_alone(tmp_path):
    ours = changed(get_config(), "init_from", "weights")
    for same in (ours, get_config()):
        checks.check_same_run(same, ours, tmp_path)
    with pytest.raises(UserError, match=r"init_from: 'weights' -> 'others'"):
        checks.check_same_run(changed(ours, "init_from", "others"), ours, tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.remat", "block"),
        ("model.dtype", "bfloat16"),
        ("model.attention", "xla"),
        ("optim.ema_decay", 0.5),
        ("optim.learning_rate", 1.0),
        ("mesh.model", 2),
        ("num_steps", 99),
        ("data.read_threads", 1),
    ],
)
def test_a_run_goes_on_with_what_it_may_change_and_says_so(path, value, tmp_path, capsys):
    ours = get_config()
    checks.check_same_run(changed(ours, path, value), ours, tmp_path)
    assert capsys.readouterr().out.startswith(f"changed since the checkpoint: {path}: ")
    begun = dataclasses.replace(ours, init_from="weights")
    checks.check_same_run(ours, begun, tmp_path)  # where it began need not be said again


def saved_state(step):
    values = {"params": {"a": jnp.full(3, float(step))}, "ema": {"a": jnp.full(3, 10.0 * step)}}
    return jax.device_put(values | {"step": jnp.int32(step)}, jax.devices()[0])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run that saved at 1, 2 and 3 and keeps two."""
    folder = tmp_path_factory.mktemp("kept")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, saved_state(step), get_config())
    return folder


@pytest.fixture
def of_one_array(monkeypatch):
    """The networks of any config are one array."""
    leaf = saved_state(0)["params"]["a"]
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    asked = []
    monkeypatch.setattr(
        runs.ltx2, "abstract_params", lambda *_, **kw: asked.append(kw) or {"a": shape}
    )
    return asked


def test_the_newest_checkpoints_stay_each_with_its_config_and_place_in_the_data(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step == 3
        assert [checkpoints.data_position(step) for step in (2, 3)] == [2, 3]
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved_state(2)
        )
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, like), saved_state(2))
        part = checkpoints.restore_part(3, {"ema": like["ema"]})
        assert part.keys() == {"ema"}
        np.testing.assert_array_equal(part["ema"]["a"], [30, 30, 30])
    assert stored_config(workdir) == get_config()
    assert stored_config(workdir / "elsewhere") is None


def test_a_run_is_sampled_from_its_newest_averaged_weights_unless_others_are_asked_for(
    workdir, of_one_array
):
    for options, value in (
        ({}, 30.0),
        ({"step": 2}, 20.0),
        ({"average": False}, 3.0),
        ({"step": 2, "average": False}, 2.0),
    ):
        config, weights, step = weights_of_run(workdir, one_device(), **options)
        assert (config, step) == (get_config(), options.get("step", 3))
        np.testing.assert_array_equal(weights["a"], np.full(3, value))
    assert of_one_array[-1] == {"for_sampling": False}
    weights_of_run(workdir, one_device(), for_sampling=True)
    assert of_one_array[-1] == {"for_sampling": True}
    with pytest.raises(UserError, match="no checkpoint 1 there"):
        weights_of_run(workdir, one_device(), step=1)


def test_a_run_without_average_is_sampled_from_its_last_weights(tmp_path, of_one_array):
    config = changed(get_config(), "optim.ema_decay", None)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, saved_state(4), config)
    _, weights, step = weights_of_run(tmp_path, one_device())
    assert step == 4
    np.testing.assert_array_equal(weights["a"], [4, 4, 4])


def test_the_stored_config_is_that_of_the_newest_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, saved_state(step), changed(get_config(), "num_steps", 10 * step))
    assert stored_config(tmp_path).num_steps == 20


@pytest.mark.parametrize(("status", "mark"), [("", ""), (" M ltx2_jax/train.py\n", "+")])
def test_a_revision_says_whether_files_differ_from_it(monkeypatch, tmp_path, status, mark):
    def run(command, **_):
        return SimpleNamespace(stdout="0123456789ab\n" if "rev-parse" in command else status)

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(saved, "__file__", str(tmp_path / "ltx2_jax" / "training" / "saved.py"))
    monkeypatch.setattr(saved.subprocess, "run", run)
    assert saved._revision.__wrapped__() == f"0123456789ab{mark}"


def test_a_save_that_was_left_says_nothing_of_the_next_one():
    class Pending:
        def __init__(self):
            self.fails = threading.Event()

        def result(self):
            assert self.fails.wait(30)
            raise OSError("too late")

    attempt, left = Attempt(), Pending()
    attempt.begin(1)
    attempt.follow(left)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "save")
    attempt.begin(2)
    left.fails.set()
    thread.join(30)
    attempt.follow(SimpleNamespace(result=lambda: None))
    assert attempt.end() == ("", True)


def test_what_a_killed_run_left_half_written_stays_until_the_next_save(tmp_path):
    left = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        time.sleep(0.2)  # Orbax removes in a thread
    assert left.exists()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(8, saved_state(8), get_config())
        checkpoints.wait()
    assert [path.name for path in left.parent.iterdir()] == ["8"]


def test_a_checkpoint_of_the_version_before_is_read(monkeypatch, tmp_path):
    """Its config said `text.generation`."""
    stored = json.loads(to_json(get_config()))
    stored["text"]["generation"] = stored["text"].pop("release")
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints, "_metadata", lambda step: {"config": stored})
        assert checkpoints.config(3) == get_config()
