"""A model that was trained here does what a released one does, by the same flags."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from ltx2_jax import config as config_lib
from ltx2_jax import sample
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.data.records import read_schema
from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.sampling import wishes
from ltx2_jax.sampling.pipeline import ClipSize, Pipeline, maker_of_run, references_of
from ltx2_jax.sampling.tasks import Asked
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


@pytest.fixture(scope="module")
def maker(workdir):
    """What would make clips with the weights of the run, without them."""
    run, assets = config_lib.load(str(tiny.SMALL), {"workdir": str(workdir)}), workdir / "assets"
    schema = read_schema(assets)
    codec, size = load_codec(assets / schema.codec), ClipSize.of(schema)
    return maker_of_run(run, None, None, codec, size, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "two_stage"}, "a training run has one stage"),
        ({"changes": {"stage2.steps": 3}}, "--stage2.steps: the recipe one_stage has stage1, not"),
        ({"references": "film.mp4"}, "references: .*; this run trains on none"),
        ({"duration": "auto"}, "has no duration head"),
        ({"height": 33, "width": 32}, "height=33 is not a multiple of"),
        ({"num_frames": 10}, "num_frames=10 is not 2.k.1"),
        ({"video": "film.mp4", "start": 0.5, "end": 9}, "not a span of the clip"),
        ({"image": ["film.mp4", 40, 1.0]}, "frame 40 is not one of the clip's 9"),
    ],
)
def test_a_line_that_a_run_cannot_take_is_refused_without_its_weights(
    workdir, maker, tmp_path, given, message
):
    (tmp_path / "film.mp4").symlink_to(next(workdir.rglob("*.mp4")))
    where = "prompts.jsonl, line 7"
    wish = wishes.wish_of({"prompt": "a ball", **given}, tmp_path, where)
    with pytest.raises(UserError, match=f"^{where}: .*{message}"):
        wishes.check(maker, [wish])


def test_a_run_that_trains_on_references_takes_smaller_ones_by_its_factors(
    workdir, maker, tmp_path, monkeypatch
):
    run = config_lib.load(str(tiny.SMALL), {"workdir": str(workdir)})
    video = config_lib.StreamConfig(conditions=(config_lib.Condition("reference"),))
    tuned = dataclasses.replace(run, flow=dataclasses.replace(run.flow, video=video))
    shapes = {"video": (5, 4, 8, 24), "video_reference": (3, 2, 4, 24)}
    schema = SimpleNamespace(fields={n: SimpleNamespace(shape=s) for n, s in shapes.items()})
    assert references_of(run, schema) is None
    assert references_of(tuned, schema) == (2, 2)
    (tmp_path / "film.mp4").symlink_to(next(workdir.rglob("*.mp4")))
    monkeypatch.setattr(maker, "reads", (2, 1))
    asked = wishes.wish_of({"prompt": "a ball", "references": "film.mp4"}, tmp_path)
    wishes.check(maker, [asked])
    task, _ = maker._task(Asked(references=asked.given["references"]), maker.recipe, False)
    assert [(x.downscale, x.time_scale, len(x.pixels)) for x in task.references] == [(2, 1, 9)]


def test_a_run_makes_clips_as_long_as_its_own_at_their_rate_and_with_its_numbers(maker, workdir):
    task, _ = maker._task(Asked(), maker.recipe, False)
    assert (task.num_frames, task.fps) == (maker.frames, maker.fps) == (9, 8.0)
    run = config_lib.load(str(tiny.SMALL), {"workdir": str(workdir)})
    sample = dataclasses.replace(
        run.sample, steps=5, seed=7, video_guidance=2.0, audio_guidance=6.0, schedule="beta"
    )
    other = maker_of_run(
        dataclasses.replace(run, sample=sample), None, None, maker.codec,
        ClipSize(9, *maker.size, 8.0), maker.mesh,
    )  # fmt: skip
    (stage,) = other.recipe.stages
    assert (stage.steps, stage.schedule, stage.tokens, other.seed) == (5, "beta", None, 7)
    assert (stage.video.cfg, stage.audio.cfg) == (2, 6)


def test_a_clip_is_a_multiple_of_what_its_smaller_reference_needs(workdir, maker, monkeypatch):
    monkeypatch.setattr(maker, "reads", (2, 1))
    side = maker.codec.video.strides[1]
    size = {"height": 3 * side, "width": 4 * side}
    maker._task(Asked(**size), maker.recipe, False)
    asked = Asked(**size, references=media.read_clip(next(workdir.rglob("*.mp4"))))
    with pytest.raises(UserError, match=f"height={3 * side} is not a multiple of {2 * side}"):
        maker._task(asked, maker.recipe, False)
