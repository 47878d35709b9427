"""The launch scripts: as they are printed, and from end to end against a stand-in for gcloud."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
FLAGS = ["--config=configs/ltx2_19b.py", "--config.workdir=gs://b/my run", "--config.seed=1"]


def output(*words, **settings):
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **settings)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sbatch"])
def test_scripts_are_clean_by_shellcheck(script):
    assert output("shellcheck", str(LAUNCH / script)) == (0, "", "")


# ------------------------------------------------------------------------------- Cloud TPU, printed


def tpu(*words, **settings):
    return output(str(LAUNCH / "tpu.sh"), *words, **settings)


def test_a_dry_run_prints_every_command_and_runs_none(tmp_path):
    nothing = {"PATH": f"{tmp_path}:/usr/bin:/bin"}  # no gcloud there
    words = ["--type=v5p-128", "--zone=us-east5-a", "--project=p", "--spot", "--slices=2"]
    code, out, err = tpu("run", "my-run", *words, "--dry-run", "--", *FLAGS, env=nothing)
    assert (code, err) == (0, "")
    create, copy_0, copy_1, install_0, install_1, train_0, train_1 = out.splitlines()
    assert (
        create.split()
        == (
            "gcloud compute tpus queued-resources create my-run --zone=us-east5-a --project=p "
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
            "--node-count=2 --node-prefix=my-run --spot"
        ).split()
    )
    for node, lines in enumerate([(copy_0, install_0, train_0), (copy_1, install_1, train_1)]):
        for line in lines:
            assert f" my-run-{node}" in line
            assert "--zone=us-east5-a --project=p --worker=all" in line
    assert "pip install" in install_0
    assert (
        r"ltx2_jax.train --config=configs/ltx2_19b.py --config.workdir=gs://b/my\\ run" in train_0
    )
    code, out, _ = tpu("down", "my-run", "--zone=z", "--dry-run")
    assert (
        out.split()
        == ("gcloud compute tpus queued-resources delete my-run --zone=z --force --quiet").split()
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fly", "x"], "unknown command 'fly'"),
        (["up"], "NAME ''"),
        (["up", "My_run", "--zone=z"], "NAME 'My_run'"),
        (["up", "x", "--type=v5p-8"], "--zone=ZONE is missing"),
        (["up", "x", "--zone=z"], "--type=TYPE is missing"),
        (["up", "x", "--zone=z", "--type=h100-8"], "no runtime is known"),
        (["up", "x", "--zone=z", "--type=v5p-8", "--slices=0"], "--slices=0"),
        (["train", "x", "--zone=z"], "the flags of the training come after --"),
        (["down", "x", "--zone=z", "--", "--config=c"], "down takes no flags"),
        (["down", "x", "--zone=z", "--config=c"], "unknown option '--config=c'"),
        (["tail", "x", "--zone=z", "--host=a"], "--host=a is not the number"),
    ],
)
def test_a_wrong_word_is_one_line(words, said):
    code, out, err = tpu(*words, env={"PATH": "/usr/bin:/bin"})
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# --------------------------------------------------------------------- Cloud TPU, from end to end


@pytest.fixture
def cloud(tmp_path):
    """Settings of commands that find the stand-ins; hosts are folders below tmp_path/cloud."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "bin").mkdir()
    for name, source in {"gcloud": "fake_gcloud.py", "python3.12": "fake_python.py"}.items():
        shutil.copy(HERE / source, tmp_path / "bin" / name)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "FAKE_GCLOUD": str(tmp_path / "cloud"), "LTX2_POLL_SECONDS": "0.1"}
    yield {"env": os.environ | settings | {"ZONE": "us-east5-a"}}
    for pid in tmp_path.glob("cloud/*/*/ltx2_jax_run/pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass


def wait_for(what, *, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_training_from_up_to_down(tmp_path, cloud):
    step = tmp_path / "step"
    assert tpu("up", "first", "--type=v5p-16", **cloud)[0] == 0
    assert tpu("train", "first", "--", f"--config.workdir={tmp_path}", **cloud)[0] == 0
    wait_for(step.exists)
    code, out, _ = tpu("status", "first", **cloud)
    assert (code, out.split()[:2]) == (0, ["ACTIVE", "step"])
    code, _, err = tpu("train", "first", "--", f"--config.workdir={tmp_path}", **cloud)
    assert (code != 0, "runs here already" in err) == (True, True)
    code, out, _ = tpu("stop", "first", **cloud)
    reached = int(step.read_text())
    assert (code, f"stopped and saved at step {reached}" in out) == (0, True)
    # Stand-ins of hosts do not know each other: host 1 counts to its end.
    home = tmp_path / "cloud" / "first" / "1" / "ltx2_jax_run"
    wait_for((home / "exit").exists)
    (tmp_path / "hold").touch()  # to be found at work
    assert tpu("train", "first", "--", f"--config.workdir={tmp_path}", **cloud)[0] == 0
    wait_for(lambda: f"run      steps {reached} to 30" in (home / "log").read_text())
    code, out, _ = tpu("stacks", "first", **cloud)
    assert (code, "stack of first/0" in out, "stack of first/1" in out) == (0, True, True)
    (tmp_path / "hold").unlink()
    wait_for((home / "exit").exists)
    assert tpu("down", "first", **cloud)[0] == 0
    assert not (tmp_path / "cloud" / "first").exists()


def end_with(workdir, code, host="any"):
    """Tells the trainings there how to end; they look at any moment."""
    (workdir / "exit.part").write_text(f"{code} {host}")
    (workdir / "exit.part").replace(workdir / "exit")


def test_run_asks_again_when_preempted_and_starts_again_after_a_lost_host(tmp_path, cloud):
    step, request = tmp_path / "step", tmp_path / "cloud" / "first.json"
    words = ["run", "first", "--type=v5p-16", "--slices=2", "--spot"]
    words += ["--", f"--config.workdir={tmp_path}"]
    running = subprocess.Popen(
        [str(LAUNCH / "tpu.sh"), *words], stderr=subprocess.PIPE, text=True, **cloud
    )
    try:
        wait_for(step.exists)
        (tmp_path / "hold").touch()  # none is done before all have begun again
        # Before the trainings are gone: who sees that first starts them where they were.
        request.write_text(request.read_text().replace('"ACTIVE"', '"SUSPENDED"'))
        for pid in (tmp_path / "cloud").glob("first-*/*/ltx2_jax_run/pid"):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        wait_for(lambda: not request.exists() or "SUSPENDED" not in request.read_text())
        wait_for(lambda: len(list((tmp_path / "cloud").glob("first-*/*/ltx2_jax_run/pid"))) == 4)
        end_with(tmp_path, 42)
        wait_for(lambda: not (tmp_path / "exit").exists())
        (tmp_path / "hold").unlink()
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
        running.stderr.close()
    assert running.returncode == 0, said
    assert "first was preempted; it is asked for again" in said
    assert "the training ended with 42 and is started again" in said
    assert said.splitlines()[-1] == "tpu.sh: first is done"
    assert step.read_text() == "30"
    assert not request.exists()  # given back


@pytest.mark.parametrize(("code", "host"), [(2, "any"), (3, "any"), (1, "first/1")])
def test_run_does_not_repeat_a_mistake(tmp_path, cloud, code, host):
    """Also where the first host had to be ended, because it waited for the one that failed."""
    end_with(tmp_path, code, host)
    if host != "any":
        (tmp_path / "hold").touch()
    words = ["run", "first", "--type=v5p-16", "--", f"--config.workdir={tmp_path}"]
    returned, _, said = tpu(*words, **cloud)
    assert (returned, f"ended with {code}; see launch/tpu.sh tail first" in said) == (code, True)
    assert ("some hosts ended and others go on: they are ended" in said) == (host != "any")


# ------------------------------------------------------------------------------------ GKE and SLURM


def jobset(*words):
    return output(sys.executable, str(LAUNCH / "jobset.py"), *words)


def test_a_jobset_says_hosts_chips_and_which_exits_are_final():
    words = ["my-run", "--slice=v5p:4x4x8", "--slices=2", "--image=i", "--grace=120", "--", *FLAGS]
    code, out, err = jobset(*words)
    assert (code, err) == (0, "")
    spec = yaml.safe_load(out)["spec"]
    (jobs,) = spec["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (2, 32, 32)
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["containers"][0]["args"] == FLAGS
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert pod["terminationGracePeriodSeconds"] == 120
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    # Kubernetes takes a podFailurePolicy with this alone.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # The schema of a JobSet has a name among what a rule must say, and takes no hyphens in it.
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "--slice=v9:2x2", "--image=i", "--", "--config=c"], "the chips are v4"),
        (["x", "--slice=v5p:4x4", "--image=i", "--", "--config=c"], "a slice of v5p is like"),
        (["X_1", "--slice=v5p:4x4x4", "--image=i", "--", "--config=c"], "small letters"),
        (["x", "--slice=v5p:4x4x4", "--image=i"], "come after --"),
    ],
)
def test_a_jobset_of_wrong_words_is_refused(words, said):
    code, out, err = jobset(*words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol, which note what they were asked."""
    for name, code in {"srun": "$CODE", "scontrol": "0"}.items():
        file = tmp_path / name
        file.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\nexit {code}\n')
        file.chmod(0o755)

    def run(code, *words):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "CODE": str(code)}
        returned, out, _ = output("bash", str(LAUNCH / "slurm.sbatch"), *words, env=env)
        calls = tmp_path / "calls"
        return returned, out, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize(("code", "again"), [(0, 0), (2, 0), (3, 0), (130, 0), (42, 1), (143, 1)])
def test_a_slurm_job_is_queued_again_unless_it_is_final(slurm, code, again):
    returned, _, calls = slurm(code, *FLAGS)
    assert returned == code
    assert calls[0] == "srun --kill-on-bad-exit=1 python -m ltx2_jax.train " + " ".join(FLAGS)
    assert calls[1:] == ["scontrol requeue 7"] * again


def test_a_slurm_dry_run_prints_the_command(slurm):
    returned, out, calls = slurm(1, "--dry-run", "--config=c.py")
    assert (returned, calls) == (0, [])
    assert out.split() == "srun --kill-on-bad-exit=1 python -m ltx2_jax.train --config=c.py".split()
    assert slurm(1)[0] == 2
