"""bench measures what a pipeline runs; nothing about its times is claimed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_codec

from ltx2_jax import bench
from ltx2_jax.models.codecs.audio_vae import AudioVAEConfig
from ltx2_jax.planning.bench import codec, step, train
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights.names.audio_vae import audio_vae_config
from ltx2_jax.weights.names.video_vae import video_vae_config
from ltx2_jax.weights.names.vocoder import vocoder_config

SMALL = ["codec", "--frames=9", "--height=32", "--width=64", "--calls=1"]


def test_bench_codec_prints_a_line_for_each_network_and_direction(monkeypatch, capsys):
    tiny = video_vae_config(tiny_codec.VIDEO_VAE), vocoder_config(tiny_codec.VOCODER)
    audio: AudioVAEConfig = audio_vae_config(tiny_codec.AUDIO_VAE)
    monkeypatch.setattr(codec, "VAES", {"2.3": tiny})
    monkeypatch.setattr(codec, "AUDIO_VAE", audio)
    assert bench.cli(SMALL) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("codec of 2.3: 9 frames of 64x32 at 24 fps on 8 cpu")
    assert head.split() == [
        *("seconds", "first", "frames/s", "TFLOP", "TFLOP/s", "of", "peak", "peak", "GiB")
    ]
    names = [" ".join(line.split()[:2]) for line in lines]
    assert names == ["encode video", "decode video", "encode audio", "decode audio"]
    for line in lines:
        seconds, first, rate, *_ = (float(x) for x in line.split()[2:5])
        assert 0 < seconds <= first
        np.testing.assert_allclose(rate * seconds, 9, rtol=0.1, atol=rate * 5e-4)  # 0.001 s printed


def test_an_illegal_size_is_refused_before_weights_are_made(capsys):
    assert bench.cli([*SMALL, "--frames=10"]) == 2
    assert bench.cli([*SMALL, "--height=33"]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert refused[0] == "bench: error: --frames=10 is not 8 k + 1"
    assert refused[1].startswith("bench: error: video height 33")


def test_random_weights_keep_activations_finite():
    from functools import partial

    from ltx2_jax.weights import mapping
    from ltx2_jax.weights.names import video_vae

    create = partial(video_vae.create, video_vae_config(tiny_codec.VIDEO_VAE))
    weights = codec.random_weights(create)
    out = mapping.build(create, weights).encode(jnp.zeros((1, 1, 32, 32, 3)))
    assert np.isfinite(np.asarray(out)).all()


def test_bench_weights_prints_a_line_for_each_way_of_reading(tmp_path, monkeypatch, capsys):
    from ltx2_jax.models.transformer.config import LTX2_3_22B
    from ltx2_jax.planning.bench import weights

    small = dataclasses.replace(
        LTX2_3_22B, num_heads=8, head_dim=16, audio_num_heads=8, audio_head_dim=8,
        context_dim=128, audio_context_dim=64,
    )  # fmt: skip
    monkeypatch.setattr(weights, "PRESETS", {"2.3": small})
    assert bench.cli(["weights", "--gigabytes=0.005", f"--folder={tmp_path}", "--calls=1"]) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"0\.01 GB, the transformer of 2\.3 with \d blocks, on 8 cpu", title)
    assert head.split() == ["seconds", "GB/s", "of", "reading"]
    names = [line[:32].strip() for line in lines]
    assert names == ["written", "read into memory", "loaded as stored", "loaded as float32"]
    assert list(tmp_path.iterdir()) == []


def test_a_synthetic_file_has_about_the_size_that_was_asked_for():
    from ltx2_jax.models.flops import total_parameters
    from ltx2_jax.models.transformer.config import LTX2_19B
    from ltx2_jax.planning.bench.weights import sized

    assert sized(LTX2_19B, 37.75).num_layers == 48
    assert abs(2 * total_parameters(sized(LTX2_19B, 6.0)) / 1e9 - 6) < 0.4
    assert sized(LTX2_19B, 0.1).num_layers == 1


def test_a_size_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.cli(["weights", "--gigabytes=-1"])
    assert "'-1' is not a number above 0" in capsys.readouterr().err


@pytest.fixture
def tiny_model(monkeypatch):
    """A small model in the place of the released one, on one device."""
    model = dataclasses.replace(tiny.MODEL, num_layers=1)
    short = {"num_layers": 1, "registers": 4}
    connector = dataclasses.replace(tiny.TEXT.video_connector, **short)
    audio = dataclasses.replace(tiny.TEXT.audio_connector, **short)
    monkeypatch.setattr(step, "MODELS", {"2.3": (model, connector, audio)})
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(step, "make_mesh", lambda *_: one)
    monkeypatch.setattr(train, "make_mesh", lambda *_: one)
    monkeypatch.setattr(step, "matmul_rate", lambda calls: 1e12)
    monkeypatch.setattr(train, "matmul_rate", lambda calls: 1e12)
    return ["--release=2.3", "--frames=9", "--height=64", "--width=64", "--calls=1"]


def test_bench_step_prints_parts_and_steps_per_minute(tiny_model, capsys, monkeypatch):
    # Of the five parts, and of two lengths of the loop.
    took = iter([0.001] * 5 + [0.010, 0.050])
    monkeypatch.setattr(step, "best_of", lambda call, calls: (call(), (next(took), 0.0))[1])
    assert bench.cli(["step", *tiny_model]) == 0
    title, head, *parts, whole, before, last = capsys.readouterr().out.splitlines()
    assert title.startswith("step of 2.3, 1 block: 1 clip of 9 frames of 64x64 on ")
    assert head.split()[:3] == ["ms", "TFLOP", "TFLOP/s"]
    names = ["AdaLN", "self-attention", "text", "cross-modal", "feed-forward"]
    assert [re.split(r"\s{2,}", part)[0] for part in parts] == names
    assert whole.startswith("step")
    assert before.startswith("before the loop")
    assert (float(whole.split()[1]), float(before.split()[-1])) == (10, 0)  # milliseconds
    assert last.startswith("6000 steps/min")
    assert "49.18" in last


def test_steps_that_are_lost_in_noise_are_told(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(step, "best_of", lambda call, calls: (0.01, 0.01))
    assert bench.cli(["step", *tiny_model]) == 2
    assert "5 steps took no longer than one: raise --calls" in capsys.readouterr().err


def test_the_parts_of_a_step_do_its_work():
    """Of the FLOPs counted, the parts leave only the ends of the network."""
    config_, request = step.config_of(bench._parser().parse_args(["step"]))
    terms = step.terms_of_a_step(config_, request)
    words = [word for _, word in step.PARTS.values()] + ["timestep"]
    parts = [sum(v for k, v in terms.items() if word in k) for word in words]
    assert sum(parts) + terms["input and output"] == pytest.approx(sum(terms.values()))
    assert all(sum(word in k for word in words) <= 1 for k in terms)


def test_bench_train_prints_the_rate_of_a_step(tiny_model, capsys):
    assert bench.cli(["train", *tiny_model, "--remat=projections"]) == 0
    title, _, line, last = capsys.readouterr().out.splitlines()
    assert title.startswith("train of 2.3, 1 block")
    rate = 60e3 / float(line.split()[1])
    assert float(last.split()[0]) == pytest.approx(rate, rel=0.02)
    assert last.endswith("remat projections")


def test_bench_refuses_a_mesh_that_does_not_fit(tiny_model, monkeypatch, capsys):
    monkeypatch.undo()
    assert bench.cli(["train", *tiny_model, "--mesh=3,1,1"]) == 2
    assert capsys.readouterr().err.startswith("bench: error: mesh (data=3")
