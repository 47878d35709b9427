"""What 2.5 adds: a split pack, keyframes that the model makes for itself, a duration head."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh

SPLIT = Path(__file__).parents[1] / "golden" / "v2.5" / "split"
FILES = [SPLIT / f"{name}.safetensors" for name in (
    "transformer", "text_encoder", "video_vae_conv", "audio_vae", "duration_head")]  # fmt: skip
SIZE = {"num_frames": 9, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe():
    mesh = make_mesh(devices=jax.devices()[:1])
    return Pipeline.from_pretrained(
        *FILES, mesh=mesh, dtype="float32", kind="distilled", keep=True,
        upsampler=SPLIT.parent / "upsampler_spatial.safetensors",
    )  # fmt: skip


def test_a_split_pack_is_a_model_with_its_own_text_encoder(pipe, capsys):
    assert pipe.release == "2.5"
    assert pipe.maker.files.text_encoder == FILES[1]
    (made,) = pipe.make(["a dog"], **SIZE)
    assert made.video.shape == (2, 2, 2, 4)
    assert made.audio.shape == (9, 16, 1)
    assert "8 steps of ancestral" in capsys.readouterr().out


def test_keyframes_that_the_model_makes_for_itself_change_the_clip_and_are_no_part_of_it(pipe):
    changes = {"stage1.stepper": "euler", "stage1.size": "1"}
    more = {**SIZE, "changes": changes, "skip_stage_2": True}
    (bare,), (keyed,) = (pipe.make(["a dog"], num_generated_keyframes=n, **more) for n in (0, 2))
    assert keyed.video.shape == bare.video.shape
    assert np.abs(keyed.video - bare.video).max() > 1e-3


def test_the_duration_head_decides_within_the_limits(pipe, capsys):
    wishes = {"height": 64, "width": 64, "skip_stage_2": True, "changes": {"stage1.sigmas": "1,0"}}
    (made,) = pipe.make(["a dog"], duration="auto", auto_duration=(0.3, 0.45), **wishes)
    assert made.task.num_frames == 9  # the only legal number between 7.2 and 10.8
    assert "s by the model, 9 frames" in capsys.readouterr().out
    with pytest.raises(UserError, match="give MIN and MAX"):
        pipe.make(["a dog"], auto_duration=(3.0, 1.0), **wishes)
    with pytest.raises(UserError, match="for one prompt at a time"):
        pipe.make(["a dog", "a cat"], duration="auto", **wishes)
    with pytest.raises(UserError, match="no frame count"):
        pipe.make(["a dog"], auto_duration=(0.4, 0.5), **wishes)
