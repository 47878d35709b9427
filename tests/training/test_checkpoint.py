"""Checkpoints that are damaged, and disks that do not take one: the run goes on where it can."""

import errno
import gc
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checkpoint, saved
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.runs import stored_config

# Where one array fails, Orbax leaves the coroutines of the others, which complain when collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ADVICE = "remove this folder, and the checkpoint before it is taken"


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Here, not in a later test."""
    yield
    gc.collect()


def large(seed=0):
    return jax.random.normal(jax.random.key(seed), (200_000,))


def state_at(step):
    return jax.device_put({"params": {"a": large(step)}, "step": step}, jax.devices()[0])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """With checkpoints at steps 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, state_at(step), get_config())
    assert names(folder) == ["2", "3"]
    return folder


@pytest.fixture
def copy(workdir, tmp_path):
    """Of that workdir, to be damaged."""
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def cut(folder):
    """Halves what holds the numbers."""
    data = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


DAMAGES = {
    "no metadata": (lambda p: (p / "_CHECKPOINT_METADATA").unlink(), "its metadata is missing"),
    "cut metadata": (lambda p: (p / "_CHECKPOINT_METADATA").write_text("{"), "its metadata is"),
    "no arrays": (lambda p: shutil.rmtree(p / "state"), "its arrays are missing"),
    "cut array": (cut, "OUT_OF_RANGE: "),
}


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        ("no metadata", "config"),
        ("cut metadata", "data_position"),
        ("no arrays", "restore"),
        ("no arrays", "restore_part"),
        ("cut array", "restore"),
        ("cut array", "restore_part"),
    ],
)
def test_who_only_reads_is_told_which_checkpoint_is_damaged_and_what_to_do(copy, damage, read):
    folder = copy / "checkpoints" / "3"
    damage, what = DAMAGES[damage]
    damage(folder)
    with Checkpoints(copy) as checkpoints:
        state = state_at(3)
        state = {"params": state["params"]} if read == "restore_part" else state
        arguments = (abstract(state),) if read.startswith("restore") else ()
        message = f"{re.escape(str(folder))}: damaged checkpoint .{what}.*{ADVICE}"
        with pytest.raises(UserError, match=message) as caught:
            getattr(checkpoints, read)(3, *arguments)
    assert "\n" not in str(caught.value)
    assert names(copy) == ["2", "3"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_passes_over_a_damaged_checkpoint_and_keeps_it(copy, damage, capsys):
    damage, _ = DAMAGES[damage]
    damage(copy / "checkpoints" / "3")
    left = contents(copy / "checkpoints" / "3")
    assert stored_config(copy) == get_config()
    with Checkpoints(copy, keep=2) as checkpoints:
        restored = checkpoints.restore(checkpoints.latest_step, abstract(state_at(0)))
        assert checkpoints.latest_step == 2
        jax.tree.map(np.testing.assert_array_equal, restored, state_at(2))
        checkpoints.save(3, state_at(3), get_config())  # its number is free
    assert names(copy) == ["2", "3", "3.damaged"]
    assert contents(copy / "checkpoints" / "3.damaged") == left
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{copy}/checkpoints/3: damaged checkpoint (")
    assert line.endswith("kept as 3.damaged, and the one before it is taken")


def test_one_that_is_damaged_again_gets_a_name_of_its_own(copy):
    (copy / "checkpoints" / "3.damaged").mkdir()
    cut(copy / "checkpoints" / "3")
    with Checkpoints(copy, keep=2) as checkpoints:
        checkpoints.restore(3, abstract(state_at(0)))
    assert names(copy) == ["2", "3.damaged", "3.damaged-again"]


def test_where_no_whole_checkpoint_is_left_nothing_begins_anew(copy):
    for step in ("2", "3"):
        cut(copy / "checkpoints" / step)
    refused = r"no whole checkpoint is left there \(2.damaged, 3.damaged\): repair one"
    with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(UserError, match=refused):
        checkpoints.restore(3, abstract(state_at(0)))
    with pytest.raises(UserError, match=refused):  # nor at the next start
        Checkpoints(copy, keep=2).__enter__()


@pytest.mark.parametrize("lost", [None, "commit_success.txt"])
def test_a_copied_workdir_goes_on_where_it_was_even_without_the_mark_of_its_end(copy, lost):
    if lost is not None:
        for path in list(copy.rglob(lost)):
            path.unlink()
    with Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.latest_step == 3
        restored = checkpoints.restore(3, abstract(state_at(0)))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(3))


def test_other_arrays_than_those_of_the_config_are_no_damage(workdir):
    other = abstract({"params": {"b": jnp.ones(3)}, "step": state_at(3)["step"]})
    for keep in (None, 2):
        with Checkpoints(workdir, keep=keep) as checkpoints:
            with pytest.raises(
                UserError, match="does not hold the state of this config: "
            ) as caught:
                checkpoints.restore(3, other)
        assert ADVICE not in str(caught.value)
    assert names(workdir) == ["2", "3"]


# ------------------------------------------------------------------------------- saves that fail


@pytest.fixture
def small_disk():
    """No file becomes larger than 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"a": jnp.ones(3)}, get_config())
    checkpoints.wait()
    checkpoints.save(2, {"a": large()}, get_config())
    with pytest.raises(UserError, match=r"checkpoints: .* cannot be written \(.+\)") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["1"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("small_disk")
def test_a_run_goes_on_over_so_many_failed_saves_and_keeps_the_last_good_one(tmp_path, capsys):
    with Checkpoints(tmp_path, keep=2, max_failures=2) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, get_config())
        for step in (2, 3):
            checkpoints.save(step, {"a": large()}, get_config())
        checkpoints.save(4, {"a": jnp.ones(3)}, get_config())
        checkpoints.wait()
        assert names(tmp_path) == ["1", "4"]
        told = capsys.readouterr().out.splitlines()
        ends = "with 2 more in a row", "if the next one cannot either"
        for step, end, line in zip((2, 3), ends, told, strict=True):
            assert line.startswith(f"{tmp_path}/checkpoints: checkpoint {step} cannot be written (")
            assert "step 1 is the last that is there; the run goes on" in line
            assert line.endswith(f"the run goes on, and ends {end}")
        # One that could be written forgives those before it.
        for step in (5, 6, 7):
            checkpoints.save(step, {"a": large()}, get_config())
        with pytest.raises(UserError, match="checkpoint 7 cannot be written"):
            checkpoints.save(8, {"a": jnp.ones(3)}, get_config())
    assert names(tmp_path) == ["1", "4"]


@pytest.fixture
def broken_disk(monkeypatch):
    """Saves of `steps` fail, as often as they say: {step: times}."""
    steps, save = {}, checkpoint.ocp.training.Checkpointer.save_async

    def save_or_fail(self, step, *args, **kwargs):
        if steps.get(step, 0) > 0:
            steps[step] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_async", save_or_fail)
    return steps


def test_the_last_save_of_a_run_is_tried_twice(broken_disk, tmp_path, capsys):
    with Checkpoints(tmp_path, keep=2, max_failures=3) as checkpoints:
        broken_disk |= {7: 1, 8: 2}
        checkpoints.save(7, {"a": jnp.ones(3)}, get_config())
        checkpoints.wait()
        assert names(tmp_path) == ["7"]
        assert "checkpoint 7 cannot be written (Input/output error)" in capsys.readouterr().out
        checkpoints.save(8, {"a": jnp.ones(3)}, get_config())
        with pytest.raises(UserError, match=r"checkpoint 8 cannot be written \(tried twice\)"):
            checkpoints.wait()
    assert names(tmp_path) == ["7"]
    broken_disk[9] = 1
    with Checkpoints(tmp_path, keep=2, max_failures=3) as checkpoints:  # whose end waits too
        checkpoints.save(9, {"a": jnp.ones(3)}, get_config())
    assert names(tmp_path) == ["7", "9"]


def test_what_fails_on_one_host_is_known_to_all(tmp_path, monkeypatch, capsys):
    """Of this host nothing has failed; the others say what has of theirs."""
    others = iter(["", "No space left on device", "", ""])

    def gather(value, seconds=300, *_):
        return [value, next(others, "") if seconds > 300 else value]

    monkeypatch.setattr(checkpoint.hosts, "gather", gather)
    with Checkpoints(tmp_path, keep=2, max_failures=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"a": jnp.full(3, step)}, get_config())
    output = capsys.readouterr().out
    assert "checkpoint 2 cannot be written (host 1: No space left on device)" in output
    assert "3" in names(tmp_path)


def test_a_run_that_was_replaced_saves_no_more(tmp_path):
    def check():
        raise UserError("another run has taken over")

    with Checkpoints(tmp_path, keep=2, check=check) as checkpoints:
        with pytest.raises(UserError, match="taken over"):
            checkpoints.save(1, {"a": jnp.ones(3)}, get_config())
    assert names(tmp_path) == []


# -------------------------------------------------------------------------- what stays, who wrote


def test_every_so_many_steps_one_stays_for_good(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(2, 12, 2):
            checkpoints.save(step, {"a": jnp.ones(3)}, get_config())
    assert names(tmp_path) == ["10", "4", "8"]


def test_a_checkpoint_says_who_wrote_it_and_what_has_changed_since(tmp_path, capsys):
    def mesh(data):
        return jax.set_mesh(make_mesh(data=data, devices=jax.devices()[:data]))

    with mesh(2), Checkpoints(tmp_path, keep=1) as checkpoints:
        state = jax.device_put({"a": np.ones(3)}, jax.devices()[0])
        checkpoints.save(5, state, get_config())
    with mesh(4), Checkpoints(tmp_path, keep=1) as checkpoints:
        made = checkpoints.made_by(5)
        assert made["hosts"] == 1
        assert made["mesh"]["data"] == 2
        assert made["versions"]["jax"] == jax.__version__
        assert made["versions"].keys() == {"jax", "flax", "orbax-checkpoint", "ltx2_jax"}
        assert made["revision"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", made["revision"])
        checkpoints.restore(5, abstract(state))
    assert capsys.readouterr().out == "changed since the checkpoint: mesh.data: 2 -> 4\n"


def test_the_newest_is_found_and_dated_without_opening_it(workdir, tmp_path):
    step, written = saved.newest_saved(workdir)
    folder = workdir / "checkpoints" / "3"
    assert step == 3
    assert abs(written - folder.stat().st_mtime) < 60
    assert saved.newest_saved(tmp_path) is None
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5.damaged").mkdir()
    assert saved.newest_saved(tmp_path) is None
    (tmp_path / "checkpoints" / "6").mkdir()
    assert saved.newest_saved(tmp_path) == (6, 0.0)


def test_small_arrays_that_many_devices_hold_are_saved_without_a_program_for_each(tmp_path):
    home = jax.sharding.NamedSharding(make_mesh(data=8), jax.sharding.PartitionSpec())
    values = {f"{rows}": np.full((rows, 8), rows, np.float32) for rows in range(8, 80, 8)}
    state = jax.device_put({"params": values, "step": 1}, home)
    programs = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, state, get_config())
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not programs
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(1, abstract(state))
    np.testing.assert_array_equal(found["params"]["8"], values["8"])
