"""A workdir in a bucket: what is written there, by which way, and nothing elsewhere."""

import dataclasses
import json
import os
import sys
import time

import fake_bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax import convert, files, sample, train
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip
from ltx2_jax.sampling.output import write_clips
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import loop, runs, saved, workdir
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.metrics import read_metrics
from ltx2_jax.training.runs import stored_config, weights_of_run

RUN = "gs://bucket/my/run"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs:// in memory; the current folder must stay empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(files, "REFRESH", 0.1)
    yield from fake_bucket.serve(monkeypatch)
    assert os.listdir(tmp_path / "here") == []


def state_at(step):
    values = {"params": {"a": jnp.full(3, float(step))}, "ema": {"a": jnp.full(3, 10.0 * step)}}
    return jax.device_put(values | {"step": jnp.int32(step)}, jax.devices()[0])


def large(step):
    return {"a": jax.random.normal(jax.random.key(step), (50_000,))}


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def of_steps(bucket):
    names = bucket.names("bucket/my/run/checkpoints")
    return sorted({name.split("/")[0] for name in names})


def test_checkpoints_are_kept_restored_and_put_aside_there_as_on_a_disk(bucket, capsys):
    with Checkpoints(RUN, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, large(step), get_config())
    assert of_steps(bucket) == ["2", "3"]
    assert stored_config(RUN) == get_config()
    assert saved.newest_saved(RUN)[0] == 3
    # The largest object of 3, with its numbers, is cut.
    below = bucket.below("bucket/my/run/checkpoints/3/")
    name = max(below, key=lambda name: len(below[name][0]))
    bucket.put(name, below[name][0][: len(below[name][0]) // 2])
    # A save that was killed, and one that was copied without its last file.
    bucket.put("bucket/my/run/checkpoints/4/state/d/half", b"half")
    noted = json.dumps({"commit_timestamp_nsecs": 1})
    bucket.put("bucket/my/run/checkpoints/5/_CHECKPOINT_METADATA", noted.encode())
    with Checkpoints(RUN, keep=2) as checkpoints:
        assert checkpoints.latest_step == 3
        restored = checkpoints.restore(3, like(large(0)))
        assert checkpoints.latest_step == 2
        jax.tree.map(np.testing.assert_array_equal, restored, large(2))
        assert of_steps(bucket) == ["2", "3.damaged", "4", "5.damaged"]
        checkpoints.save(6, large(6), get_config())
    assert of_steps(bucket) == ["2", "3.damaged", "5.damaged", "6"]
    output = capsys.readouterr().out
    assert "checkpoints/5: damaged checkpoint (commit_success.txt is missing" in output
    assert "kept as 3.damaged" in output


class Small:
    """`loop.train` of a state of one weight, with all that it reads and writes."""

    def __init__(self, monkeypatch, **changes):
        self.config = dataclasses.replace(get_config(), workdir=RUN, **changes)
        self.taken = []
        clips = dataclasses.replace(self.config.data.synthetic, num_clips=2)
        data = dataclasses.replace(self.config.data, synthetic=clips, read_threads=0)
        self.config = dataclasses.replace(self.config, data=data)
        mesh = make_mesh(devices=jax.devices()[:1])
        monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: mesh)
        monkeypatch.setattr(loop, "init_state", lambda key, config: state_at(0))
        monkeypatch.setattr(loop, "make_train_step", lambda *_: self.step)

    def step(self, state, batch, null_text):
        self.taken.append(int(state["step"]) + 1)
        metrics = {"loss": jnp.float32(self.taken[-1]), "grad_norm": jnp.float32(1)}
        return state_at(self.taken[-1]), metrics

    def __call__(self, **changes):
        clips = []
        config = dataclasses.replace(self.config, **changes)
        loop.train(
            config, lambda weights, records, step: clips.append((float(weights["a"][0]), step))
        )
        return clips


def test_a_whole_run_is_in_the_bucket_and_goes_on_from_there(bucket, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loop.tempfile, "gettempdir", lambda: str(tmp_path))
    small = Small(monkeypatch)
    assert small(num_steps=5) == [(50.0, 5)]
    assert small(num_steps=7) == [(70.0, 7)]
    assert small.taken == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in read_metrics(RUN)] == [1, 2, 3, 4, 5, 6, 7]
    top = sorted({name.split("/")[0] for name in bucket.names("bucket/my/run")})
    assert top == ["assets", "checkpoints", "goodput.jsonl", "metrics.jsonl"]
    assert bucket.names("bucket/my/run/assets") == [
        "codec.safetensors", "dataset.json", "text_encoder.safetensors",
    ]  # fmt: skip
    assert of_steps(bucket) == ["5", "7"]
    capsys.readouterr()
    assert train.cli(["--status", RUN]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{RUN}: finished 20")
    assert "step        7 of 7\n" in output
    assert "checkpoint  step 7, " in output
    assert "in 2 starts" in output


def test_a_bucket_that_does_not_let_us_in_is_refused_before_any_work(bucket, monkeypatch):
    monkeypatch.setattr(loop.checks, "before_work", lambda *_: pytest.fail("work began"))
    config = dataclasses.replace(get_config(), workdir=RUN)
    bucket.refuse = PermissionError("403: no permission\nto write")
    with pytest.raises(UserError, match=r"my/run: cannot be a workdir \(403: no .* to write\)"):
        loop.train(config, None)
    bucket.refuse = LookupError("what a library may raise")
    with pytest.raises(UserError, match=r"my/run: cannot be a workdir \(what a library may raise"):
        loop.train(config, None)
    assert not bucket.objects


def test_a_network_that_does_not_answer_is_refused_in_time(bucket, monkeypatch):
    monkeypatch.setattr(bucket, "touch", lambda: time.sleep(1))
    with pytest.raises(UserError, match="my/run: no answer in 0 s"):
        workdir.opened(RUN, seconds=0.1)


def test_weights_are_read_from_there_and_clips_go_beside_them(bucket, monkeypatch):
    with Checkpoints(RUN, keep=1) as checkpoints:
        checkpoints.save(4, state_at(4), get_config())
    shape = like(state_at(0))["params"]
    monkeypatch.setattr(runs.ltx2, "abstract_params", lambda *_, **__: shape)
    _, weights, step = weights_of_run(RUN, None)
    assert step == 4
    np.testing.assert_array_equal(weights["a"], [40, 40, 40])
    assert "training run, step 4" in convert.inspect(RUN)
    assert str(sample.output_folder(RUN, None)) == f"{RUN}/out-001"
    bucket.put("bucket/my/run/out-001/samples.png", b"")
    out = sample.output_folder(RUN, None)
    assert str(out) == f"{RUN}/out-002"
    pixels, sound = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((4000, 2), np.float32)
    clip = Clip(video=pixels, audio=sound, fps=8.0, sample_rate=16000)
    write_clips([clip], ["a light"], out)
    assert bucket.names("bucket/my/run/out-002") == [
        "sample.mp4", "samples.png", "samples/000.mp4", "samples/captions.csv",
    ]  # fmt: skip
    assert bucket.objects["bucket/my/run/out-002/sample.mp4"][0][4:8] == b"ftyp"
