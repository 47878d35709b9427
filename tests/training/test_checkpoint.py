"""Checkpoints that are damaged, and disks that do not take one: one line that says what to do."""

import gc
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import pytest
from resume_config import get_config

from ltx2_jax.errors import UserError
from ltx2_jax.training.checkpoint import Checkpoints

# Where one array fails, Orbax leaves the coroutines of the others, which complain when collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ADVICE = "remove this folder, and the checkpoint before it is taken"


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Here, not in a later test."""
    yield
    gc.collect()


def large():
    return jax.random.normal(jax.random.key(0), (200_000,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with a checkpoint at step 3, and its state."""
    folder, state = tmp_path_factory.mktemp("saved"), {"params": {"a": large()}, "step": 3}
    state = jax.device_put(state, jax.devices()[0])
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, state, get_config())
        checkpoints.wait()
        assert [path.name for path in checkpoints.folder.iterdir()] == ["3"]
    return folder, state


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def cut(folder):
    """Halves what holds the numbers."""
    data = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "read", "what"),
    [
        (lambda p: (p / "_CHECKPOINT_METADATA").unlink(), "config", "its metadata is missing"),
        (lambda p: (p / "_CHECKPOINT_METADATA").write_text("{"), "data_position", "its metadata"),
        (lambda p: shutil.rmtree(p / "state"), "restore", "its arrays are missing"),
        (lambda p: shutil.rmtree(p / "state"), "restore_part", "its arrays are missing"),
        (cut, "restore", "OUT_OF_RANGE: "),
        (cut, "restore_part", "OUT_OF_RANGE: "),
    ],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(saved, tmp_path, damage, read, what):
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "3"
    damage(folder)
    with Checkpoints(tmp_path) as checkpoints:
        state = {"params": saved[1]["params"]} if read == "restore_part" else saved[1]
        arguments = (abstract(state),) if read.startswith("restore") else ()
        message = f"{re.escape(str(folder))}: damaged checkpoint .{what}.*{ADVICE}"
        with pytest.raises(UserError, match=message) as caught:
            getattr(checkpoints, read)(3, *arguments)
    assert "\n" not in str(caught.value)


def test_other_arrays_than_those_of_the_config_are_no_damage(saved):
    other = abstract({"params": {"b": jnp.ones(3)}, "step": saved[1]["step"]})
    with Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(UserError, match="does not hold the state of this config: ") as caught:
            checkpoints.restore(3, other)
    assert ADVICE not in str(caught.value)


@pytest.fixture
def small_disk():
    """No file becomes larger than 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"a": jnp.ones(3)}, get_config())
    checkpoints.wait()
    checkpoints.save(2, {"a": large()}, get_config())
    with pytest.raises(UserError, match=r"checkpoints: .* cannot be written \(.+\)") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
