"""A model that was trained here does what a released one does, by the same flags."""

import jax
import numpy as np
import pytest
import tiny

from ltx2_jax import sample
from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What train leaves of an untrained model."""
    return tiny.workdir(tmp_path_factory.mktemp("workdir"))


def test_a_retake_by_flags_of_a_workdir(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))
    film = next(workdir.rglob("*.mp4"))
    given, out = media.read_clip(film), tmp_path / "clip.png"
    argv = [str(workdir), "a red ball bounces once", f"--video-path={film}", "--start-time=0.6",
            "--end-time=1.1", "--steps=3", f"--output-path={out}"]  # fmt: skip
    assert sample.cli(argv) == 0, capsys.readouterr().err
    frames = np.stack([media.read_image(file) for file in sorted(tmp_path.glob("clip-*.png"))])
    # At 8 frames a second and 2 frames a latent, 0.6 to 1.1 s touch frames 3 to 8.
    assert len(frames) == len(given.video) == 9
    same = [np.array_equal(a, b) for a, b in zip(frames, given.video, strict=True)]
    assert same == [True] * 3 + [False] * 6
    assert "3 steps of euler" in capsys.readouterr().out
    sound, rate = media.read_wav(tmp_path / "clip.wav")
    changed = np.abs(sound - given.audio).max(axis=1) > 1e-4
    assert not changed[: round(0.6 * rate)].any()
    assert changed[round(0.7 * rate) : round(1.0 * rate)].any()


def test_what_only_released_models_have_is_refused(workdir, capsys):
    argv = [str(workdir), "a ball", "--lora", "style.safetensors"]
    assert sample.cli(argv) == 2
    assert "--lora: is for released models" in capsys.readouterr().err
    pipe = Pipeline.from_workdir(workdir)
    for wish, message in (
        ({"recipe": "two_stage"}, "a training run has one stage"),
        ({"duration": "auto"}, "has no duration head"),
        ({"enhance_prompt": True}, "give --prompt-enhancer-gemma-root"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(["a ball"], **wish)
    with pytest.raises(UserError, match="sample= is for clips of a run"):
        pipe(["a ball"], sample=pipe.config.sample, seed=3)
