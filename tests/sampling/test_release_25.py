"""What 2.5 adds: a split pack, keyframes that the model makes for itself, a duration head."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.models.text.duration_head import DurationHead
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh

SPLIT = Path(__file__).parents[1] / "golden" / "v2.5" / "split"
FILES = [SPLIT / f"{name}.safetensors" for name in (
    "transformer", "text_encoder", "video_vae_conv", "audio_vae", "duration_head")]  # fmt: skip
SIZE = {"num_frames": 9, "height": 64, "width": 64}


def opened(keep):
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = {"dtype": "float32", "kind": "distilled", "keep": keep}
    return Pipeline.from_pretrained(*FILES, mesh=mesh, **settings)


@pytest.fixture(scope="module")
def pipe():
    return opened(keep=True)  # read once for all tests


@pytest.fixture(scope="module")
def bare(pipe):
    (made,) = pipe.make(["a dog"], **SIZE)
    return made


def test_a_split_pack_is_a_model_with_its_own_text_encoder(pipe, bare):
    assert pipe.release == "2.5"
    assert pipe.maker.files.text_encoder == FILES[1]
    assert bare.video.shape == (2, 2, 2, 4)
    assert bare.audio.shape == (9, 16, 1)
    assert bare.about["recipe"]["stages"][0]["stepper"] == "ancestral"


def test_what_is_not_needed_is_not_in_memory(monkeypatch):
    """Each is gone when the next one comes."""
    pipe = opened(keep=False)
    maker, order = pipe.maker, []

    def held():
        return {
            "text": maker.texts._encoder is not None,
            "codec": maker._codec is not None and "params" in vars(maker._codec.video),
            "transformer": maker.weights._params is not None,
        }

    def noting(name, work):
        def run(*args):
            order.append((name, [part for part, there in held().items() if there]))
            return work(*args)

        return run

    monkeypatch.setattr(maker.texts, "_load", noting("text", maker.texts._load))
    monkeypatch.setattr(maker, "open_codec", noting("codec", maker.open_codec))
    monkeypatch.setattr(maker.weights, "_load", noting("transformer", maker.weights._load))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pipe.make(["a dog"], **SIZE, image=(pixels, 0), changes={"image_crf": "0"})
    # A codec is opened for its strides, before anything is worked on; its weights come later.
    assert order == [("codec", []), ("text", []), ("transformer", [])]
    assert not any(held().values())


def test_keyframes_that_the_model_makes_for_itself_change_the_clip_and_are_no_part_of_it(
    pipe, bare
):
    (keyed,) = pipe.make(["a dog"], num_generated_keyframes=2, **SIZE)
    assert keyed.video.shape == bare.video.shape
    assert np.abs(keyed.video - bare.video).max() > 1e-3


def test_the_duration_head_decides_within_the_limits(pipe, bare, capsys):
    wishes = {"height": 64, "width": 64}
    (made,) = pipe.make(["a dog"], duration="auto", auto_duration=(0.3, 0.45), **wishes)
    assert made.task.num_frames == 9  # the only legal number between 7.2 and 10.8
    np.testing.assert_array_equal(made.video, bare.video)
    assert "s by the model, 9 frames" in capsys.readouterr().out
    with pytest.raises(UserError, match="give MIN and MAX"):
        pipe.make(["a dog"], auto_duration=(3.0, 1.0), **wishes)
    with pytest.raises(UserError, match="for one prompt at a time"):
        pipe.make(["a dog", "a dog"], duration="auto", **wishes)
    with pytest.raises(UserError, match="no frame count"):
        pipe.make(["a dog"], auto_duration=(0.4, 0.5), **wishes)


def test_the_length_is_what_the_head_says_of_the_prompt_at_the_frame_rate_asked(pipe, monkeypatch):
    def head(self, video, audio):  # [1, S, E], one prompt's: the negative one has no say
        assert video.shape[0] == audio.shape[0] == 1
        return jnp.full(1, 1.05)

    monkeypatch.setattr(DurationHead, "__call__", head)
    for limits, fps, frames in (
        ((0.01, 60.0), 24.0, 25),  # 25.2
        ((0.01, 60.0), 50.0, 49),  # 52.5
        ((0.3, 0.8), 24.0, 17),  # at most 19.2
        ((1.3, 2.0), 24.0, 33),  # at least 31.2
    ):
        assert pipe.maker._auto_frames(["a dog"], "", limits, fps) == frames
