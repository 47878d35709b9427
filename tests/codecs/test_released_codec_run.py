"""Released codecs through prepare, the pipeline and sample, from mp4 files to mp4 files."""

from pathlib import Path

import film
import jax
import numpy as np
import pytest
import tiny
import tiny_codec

from ltx2_jax import prepare, sample
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import load
from ltx2_jax.data.records import open_records
from ltx2_jax.demo import synthetic
from ltx2_jax.media.media import read_clip
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training.checks import check_records

CLIPS = synthetic.SyntheticConfig(num_clips=8, num_frames=9, height=32, width=32, fps=8.0)
SIZE = [
    "--num-frames=9",
    "--height=32",
    "--width=32",
    "--text-length=16",
    "--vocab-size=320",
    "--text-widths=24,16",
]


@pytest.fixture(scope="module")
def codec_files(tmp_path_factory):
    return tiny_codec.write(tmp_path_factory.mktemp("codec"), split=True, version="2.3.0")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return synthetic.write_dataset(tmp_path_factory.mktemp("clips"), CLIPS)


@pytest.fixture(scope="module")
def dataset(codec_files, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    assert prepare.cli([str(table), str(out), *SIZE, "--codec", *map(str, codec_files)]) == 0
    return out


def test_prepare_encodes_with_a_released_codec_and_keeps_its_name(dataset, codec_files, table):
    records = open_records(dataset)
    records.require(release="2.3", video=(2, 1, 1, 4), audio=(28, 16, 2))
    assert (dataset / "codec.safetensors").stat().st_size < 2000
    codec = load_codec(records.codec_path)
    assert codec.paths == codec_files
    clip = read_clip(table.parent / records[0]["source"], num_frames=9, sample_rate=16000)
    np.testing.assert_allclose(
        records[0]["video"], codec.video.encode(clip.video[None])[0], atol=2e-2
    )


def test_a_flag_of_the_linear_codec_beside_a_released_one_is_refused(
    codec_files, table, tmp_path, capsys
):
    flags = ["--video-channels=8", "--codec", *map(str, codec_files)]
    assert prepare.cli([str(table), str(tmp_path / "out"), *SIZE, *flags]) == 2
    assert "--video-channels: only for a linear codec" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_released_codec_does_not_fit_is_refused(
    codec_files, table, tmp_path, capsys
):
    flags = ["--codec", *map(str, codec_files), "--height=48"]
    assert prepare.cli([str(table), str(tmp_path / "out"), *SIZE, *flags]) == 2
    assert "48" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clips_are_sampled_through_it_and_large_ones_are_streamed(dataset, tmp_path, monkeypatch):
    flags = {"workdir": str(tmp_path), "data.path": str(dataset), "sample.steps": "1"}
    flags["data.release"] = "2.3"
    channels = {"in_channels": "4", "audio_in_channels": "32"}
    for name, value in channels.items():
        flags |= {f"model.{name}": value, f"model.{name.replace('in_', 'out_')}": value}
    config = load(str(Path(__file__).parents[1] / "resume_config.py"), flags)
    one = make_mesh(devices=jax.devices()[:1])
    check_records(config, open_records(dataset), one)
    pipe = Pipeline.from_assets(config, tiny.params(config), dataset, one)
    prompts = ["a red ball bounces once", "a blue lamp flashes twice"]
    clips = pipe(prompts)
    for number, clip in enumerate(clips):
        assert (clip.video.shape, clip.audio.shape) == ((9, 32, 32, 3), (27000, 2))
        assert (clip.fps, clip.sample_rate) == (8.0, 24000)
        clip.save(tmp_path / f"held-{number}.mp4")

    monkeypatch.setattr(sample, "LARGE", 0)
    monkeypatch.setattr(Pipeline, "from_workdir", lambda *_, **__: pipe)
    out = tmp_path / "out"
    assert sample.cli([f"--workdir={tmp_path}", f"--out={out}", *prompts]) == 0
    for number in range(2):
        film.assert_same(out / "samples" / f"{number:03d}.mp4", tmp_path / f"held-{number}.mp4")
    assert [path.name for path in out.iterdir()] == ["samples"]
