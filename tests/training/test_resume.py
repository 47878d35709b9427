"""The train command: killed, stopped, resumed, and continued on another mesh."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ltx2_jax.training.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "resume_config.py"
STEPS = 12


def command(workdir, *flags, devices=1):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
    }
    arguments = [f"--config={CONFIG}", f"--config.workdir={workdir}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "ltx2_jax.train", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(workdir, process, step):
    while True:
        rows = read_metrics(workdir)
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run: its folder and what it printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, finish(command(workdir))


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
    assert untimed == [1, 5, 9]  # checkpoints are written at 4, 8 and 12


def test_killed_at_any_moment_the_run_continues_bit_for_bit(uninterrupted, tmp_path):
    workdir = seeded(uninterrupted, tmp_path)
    for step in (5, 8):  # checkpoints are written at 4, 8 and 12
        process = command(workdir)
        wait_for_step(workdir, process, step)
        process.kill()
        process.communicate()
    finish(command(workdir))
    assert losses(workdir) == losses(uninterrupted[0])


def test_a_stop_signal_saves_and_the_same_command_resumes(uninterrupted, tmp_path):
    workdir = seeded(uninterrupted, tmp_path)
    process = command(workdir)
    wait_for_step(workdir, process, 1)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    stopped = int(output.split("stopped and saved at step ")[1].split(";")[0])
    assert 1 <= stopped < STEPS
    # More devices see the same examples in the same order, and so nearly the same losses.
    output = finish(command(workdir, "--config.mesh.model=2", "--config.mesh.data=2", devices=4))
    assert f"steps {stopped} to {STEPS}" in output
    ours, theirs = losses(workdir), losses(uninterrupted[0])
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)


def test_a_checkpoint_of_another_config_is_refused_by_field(uninterrupted):
    process = command(uninterrupted[0], "--config.model.num_layers=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "model.num_layers: 1 -> 2" in output
    assert "Traceback" not in output


def test_the_config_of_a_run_is_stored_with_its_checkpoint(uninterrupted):
    from ltx2_jax.training.checkpoint import Checkpoints

    with Checkpoints(uninterrupted[0]) as checkpoints:
        assert checkpoints.latest_step == STEPS
        assert checkpoints.data_position(STEPS) == STEPS
        stored = checkpoints.config(STEPS)
    assert stored.num_steps == STEPS
    assert stored.workdir == str(uninterrupted[0])
