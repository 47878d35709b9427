"""The train command: killed, stopped, resumed, and continued on another mesh."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ltx2_jax import train
from ltx2_jax.config import load
from ltx2_jax.training import loop
from ltx2_jax.training.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "resume_config.py"
STEPS = 16


def command(workdir, signalled="", code=0):
    """What the command prints, in a process of its own on one device, and that it ends so."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(
        [sys.executable, "-m", "ltx2_jax.train", f"--config={CONFIG}:{signalled}",
         f"--config.workdir={workdir}", f"--config.num_steps={STEPS}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run: its folder and what it printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, command(workdir)


def seeded(uninterrupted, workdir):
    """A workdir with the data of the finished run, so that only training is repeated."""
    os.symlink(uninterrupted[0] / "data", workdir / "data")
    return workdir


def test_a_run_leaves_a_clip_with_sound_and_a_contact_sheet(uninterrupted):
    from ltx2_jax.media.media import read_clip

    workdir, output = uninterrupted
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    clip = read_clip(workdir / "sample.mp4")
    assert clip.video.shape[0] == 9
    assert min(clip.video.shape[1:3]) >= 256
    assert clip.audio is not None
    assert (workdir / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "generated clips: " in output
    assert "real clips: " in output


def test_the_time_of_a_step_leaves_out_compilation_and_checkpoints(uninterrupted):
    untimed = [row["step"] for row in read_metrics(uninterrupted[0]) if "step_time" not in row]
    assert untimed == [1, 5, 9, 13]  # checkpoints are written at 4, 8, 12 and 16


def test_killed_stopped_and_on_another_mesh_the_run_goes_on(uninterrupted, tmp_path, capsys):
    workdir = seeded(uninterrupted, tmp_path)
    # Step 9 is logged while the checkpoint of step 8 is written.
    command(workdir, "9,SIGKILL", code=-signal.SIGKILL)
    output = command(workdir, "10,SIGTERM", code=143)
    assert re.search(r"steps [48] to 16 ", output)
    stopped = int(re.search(r"stopped and saved at step (\d+);", output)[1])
    assert 10 <= stopped <= 12
    # So far bit for bit what was not interrupted.
    theirs = losses(uninterrupted[0])
    assert losses(workdir) == {step: theirs[step] for step in range(1, stopped + 1)}
    # More devices see the same examples in the same order, and so nearly the same losses.
    changes = {"workdir": workdir, "num_steps": STEPS, "mesh.data": 4, "mesh.model": 2}
    config = load(str(CONFIG), {name: str(value) for name, value in changes.items()})
    loop.train(config, make_clips=lambda *_: None)
    assert f"steps {stopped} to {STEPS}" in capsys.readouterr().out
    ours = losses(workdir)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)


def test_a_checkpoint_of_another_config_is_refused_by_field(uninterrupted, capsys):
    flags = f"--config.workdir={uninterrupted[0]}", "--config.model.num_layers=2"
    assert train.cli([f"--config={CONFIG}", *flags]) == 2
    assert "model.num_layers: 1 -> 2" in capsys.readouterr().err


def test_the_config_of_a_run_is_stored_with_its_checkpoint(uninterrupted):
    from ltx2_jax.training.checkpoint import Checkpoints

    with Checkpoints(uninterrupted[0]) as checkpoints:
        assert checkpoints.latest_step == STEPS
        assert checkpoints.data_position(STEPS) == STEPS
        stored = checkpoints.config(STEPS)
    assert stored.num_steps == STEPS
    assert stored.workdir == str(uninterrupted[0])
