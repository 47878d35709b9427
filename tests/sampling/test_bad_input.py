"""What cannot be is one line before the work begins; what is changed is said."""

import contextlib
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ltx2_jax import sample
from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.sampling import given, loading, loras, recipes, tasks
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.tasks import Asked, make_task
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights.lora_files import Lora, read_lora, write_lora
from ltx2_jax.weights.references import fingerprint
from ltx2_jax.weights.sources import open_release

GOLDEN = Path(__file__).parents[1] / "golden"
V20 = GOLDEN / "v2.0" / "checkpoint.safetensors"
GEMMA = GOLDEN / "v2.0" / "gemma"
STRIDES = (8, 32, 32)


def task(**asked):
    return make_task(Asked(**asked), strides=STRIDES, multiple=32, size=(64, 96))


def clip(frames=17, height=64, width=64, fps=24.0, sound=True):
    audio = np.zeros((round(frames / fps * 16000), 2), np.float32) if sound else None
    return media.Clip(np.zeros((frames, height, width, 3), np.uint8), fps, audio, 16000)


def pixels(height=64, width=96):
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 10}, "num_frames=10 is not 8*k+1: use 9 or 17"),
        ({"height": 65, "width": 96}, "height=65 is not a multiple of 32: use 64 or 96"),
        ({"height": 64, "width": 20}, "width=20 is not a multiple of 32: use 32"),
        ({"height": 64}, "height and width: give both"),
        ({"fps": -24.0}, "fps=-24 must be above 0"),
        ({"fps": float("nan")}, "fps=nan must be above 0"),
        ({"num_frames": 9, "duration": 1.0}, "num_frames and duration: give one"),
        ({"duration": -1.0}, "duration=-1 must be above 0"),
        ({"image": "nowhere.png"}, "nowhere.png: no such file"),
        ({"image": __file__}, "not a readable video file"),
        ({"image": (pixels(), 121)}, "frame 121 is not one of the clip's 121, 0 to 120"),
        ({"image": (pixels(), 0, 1.5)}, "strength 1.5 is not from 0 to 1"),
        ({"image": (pixels(), 0, 1.0, 99)}, "CRF 99 is not from 0 to 51"),
        ({"image": np.zeros((4, 4, 3))}, "not uint8 [H, W, 3], but float64"),
        ({"audio": __file__}, "not a readable"),
        ({"audio": (np.zeros((100, 2)), 16000), "audio_start": 1.0}, "nothing is left from 1 s on"),
        ({"audio": (np.zeros((100, 2)), 16000), "sound": False}, "audio and voice need sound"),
        ({"start": 0.1, "end": 0.2}, "start and end: of which clip?"),
        ({"extend": 1.0}, "extend: of which clip?"),
        ({"video": clip(), "start": 0.1}, "start and end: give both"),
        ({"video": clip(), "start": 0.5, "end": 0.4}, "not a span of the clip"),
        ({"video": clip(), "start": 0.5, "end": 1.5}, "which lasts 0.708 s"),
        ({"video": clip(), "start": -0.5, "end": 0.5}, "not a span of the clip"),
        ({"video": clip(), "num_frames": 25}, "the given clip has 17 frames"),
        ({"video": clip(), "image": pixels()}, "video with image or keyframes"),
        ({"video": clip(), "sound": False}, "nothing is left to make"),
        ({"picture": False, "sound": False}, "neither picture nor sound"),
        ({"picture": False, "image": pixels()}, "need a picture"),
        ({"retake": "all"}, "retake='all': choose from both, video, audio"),
        ({"num_generated_keyframes": 8, "num_frames": 9}, "8 keyframes need num_frames >= 10"),
    ],
)
def test_what_cannot_be_is_named(asked, message):
    with pytest.raises(UserError) as caught:
        task(**asked)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ({"image": pixels(64, 64)}, "image is 64x64, the clip 96x64: 33% of it is cropped, at top"),
        ({"image": pixels(64, 128)}, "25% of it is cropped, at left and right"),
        ({"video": clip(20)}, "20 frames are not 8 k + 1: the first 17 are used"),
        ({"video": clip(height=70)}, "the given clip is 64x70: it is made 64x64"),
        (
            {"num_frames": 17, "audio": (np.zeros((8000, 2), np.float32), 16000)},
            "the sound lasts 0.50 s, the clip 0.71: silence follows it",
        ),
        (
            {"num_frames": 17, "audio": (np.zeros((16000, 2), np.float32), 16000)},
            "the sound lasts 1.00 s, the clip 0.71: its end is left out",
        ),
        ({"references": [clip(9)]}, "the reference has 9 frames, the clip 121: its last one is"),
        ({"duration": 30.0, "picture": False}, "are more than the 20 s that the model was trained"),
    ],
)
def test_what_is_changed_is_said(asked, note):
    assert any(note in said for said in task(**asked).notes)


def test_one_thing_is_a_list_of_one():
    one = task(keyframes=(pixels(), 8), image=pixels(), references=clip(121))
    assert [len(x) for x in (one.keyframes, one.images, one.references)] == [1, 1, 1]
    assert one.keyframes[0].frame == 8
    many = task(keyframes=[(pixels(), 8), pixels()], references=[(clip(121), 0.5), clip(121)])
    assert [len(x) for x in (many.keyframes, many.images, many.references)] == [2, 0, 2]
    assert [r.strength for r in many.references] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("asked", "frames"),
    [
        ({}, 121),
        ({"duration": 1.0}, 25),
        ({"duration": 0.01}, 1),
        ({"duration": 1.0, "fps": 50.0}, 49),
        ({"audio": (np.zeros((16000, 2), np.float32), 16000)}, 25),
        ({"video": clip(20)}, 17),
        ({"video": clip(17), "extend": 0.4, "extend_before": 0.01}, 17 + 8 + 8),
    ],
)
def test_lengths_are_legal_and_near_what_is_asked(asked, frames):
    assert task(**asked).num_frames == frames


def test_a_sound_is_heard_from_its_start_for_as_long_as_is_asked_at_the_rate_of_the_frames():
    samples = np.tile(np.arange(3000, dtype=np.float32)[:, None], (1, 2))
    found = task(audio=(samples, 1000), audio_start=0.5, audio_max_duration=1.0, fps=50.0)
    assert found.num_frames == 49  # of 50, the nearest count
    np.testing.assert_array_equal(found.audio.samples, samples[500:1480])
    assert task(num_frames=17, audio=clip()).audio.rate == 16000


@pytest.mark.parametrize(("retake", "anew"), [("both", "va"), ("video", "v"), ("audio", "a")])
def test_a_retake_makes_anew_what_it_names_and_keeps_the_other_whole(retake, anew):
    found = task(video=clip(20), start=0.1, end=0.3, retake=retake)
    assert found.video.redo == ((0.1, 0.3) if "v" in anew else None)
    assert found.audio.redo == ((0.1, 0.3) if "a" in anew else None)
    assert found.video.is_whole(17) == ("v" not in anew)
    assert found.audio.is_whole(17 / 24) == ("a" not in anew)
    assert (len(found.video.pixels), len(found.audio.samples)) == (17, round(17 / 24 * 16000))


def test_a_silent_clip_stays_silent_where_its_picture_alone_is_retaken():
    silent = {"video": clip(sound=False), "start": 0.1, "end": 0.3}
    assert [task(**silent, retake=name).sound for name in ("video", "both")] == [False, True]


def test_what_a_clip_is_extended_by_lies_before_and_after_it():
    found = task(video=clip(17), extend_before=0.3, extend=0.7)  # 8 and 16 frames
    assert (found.num_frames, found.video.first, len(found.video.pixels)) == (41, 8, 17)
    assert found.audio.start == pytest.approx(8 / 24)
    assert found.audio.end == pytest.approx(25 / 24, abs=1e-3)
    assert not found.audio.is_whole(25 / 24)  # what comes before it is not there


def test_a_frame_below_zero_counts_from_the_end():
    assert task(num_frames=17, image=(pixels(), -1)).images[0].frame == 16


def test_a_reference_is_as_long_as_the_clip_and_a_short_one_stops_at_its_last_frame():
    numbered = np.tile(np.arange(25, dtype=np.uint8)[:, None, None, None], (1, 64, 64, 3))
    long, short = media.Clip(numbered, 24.0), media.Clip(numbered[:9], 24.0)
    asked = Asked(num_frames=17, references=[(long, 0.5, 0.25), short])
    found = make_task(asked, strides=STRIDES, multiple=32, size=(64, 96), scales=(2, 4)).references
    np.testing.assert_array_equal(found[0].pixels[:, 0, 0, 0], np.arange(17))
    np.testing.assert_array_equal(found[1].pixels[:, 0, 0, 0], [*range(9), *[8] * 8])
    assert [(r.strength, r.attention) for r in found] == [(0.5, 0.25), (1.0, 1.0)]
    assert [(r.downscale, r.time_scale) for r in found] == [(2, 4)] * 2


def test_a_dub_gives_its_size_rate_strength_and_voice_unless_another_voice_is_given():
    dub = clip(17, height=96, fps=25.0)
    found = task(dub=(dub, 0.5))
    assert (found.num_frames, found.height, found.width, found.fps) == (17, 96, 64, 25.0)
    assert [r.strength for r in found.references] == [0.5]
    assert (len(found.voice.samples), found.voice.rate) == (len(dub.audio), 16000)
    other = task(dub=dub, voice=(np.ones((100, 2), np.float32), 1000)).voice
    assert (len(other.samples), other.rate) == (100, 1000)


# ---------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage1.stpes": "3"}, "no field 'stpes'"),
        ({"stage1.steps": "many"}, "stage1.steps=many: expected int"),
        ({"stage1.steps": "0"}, "steps=0 must be at least 1"),
        ({"stage2.steps": "3"}, "has stage1, not that"),
        ({"stage1.stepper": "rk4"}, "stepper='rk4': choose from euler"),
        ({"stage1.sigmas": "(0.5, 0.7, 0)"}, "do not fall from at most 1 to 0"),
        ({"stage1.schedule": "cosine"}, "schedule='cosine': choose from ltx2"),
        ({"stage1.size": "0.3"}, "1 is the full size, 0.5 half of it"),
    ],
)
def test_a_number_of_a_recipe_that_cannot_be_is_named(change, message):
    with pytest.raises(UserError, match=r".") as caught:
        recipes.one_stage("2.3").replaced(change)
    assert message in str(caught.value)


def test_any_number_of_a_recipe_is_replaced():
    changes = {"stage1.video.cfg": "5", "stage2.sigmas": "0.8,0.3,0", "image_crf": "0"}
    recipe = recipes.distilled("2.5").replaced(changes)
    assert recipe.stages[0].video.cfg == 5
    assert recipe.stages[1].sigmas == (0.8, 0.3, 0.0)
    assert recipe.image_crf == 0
    assert "2 steps of euler, sigmas 0.8 0.3 0" in recipe.described()


def test_the_recipe_follows_release_kind_and_what_is_given():
    choose = recipes.choose
    assert choose("2.0", "dev", upsampler=False).stages[0].steps == 40
    assert choose("2.0", "dev", upsampler=False).stages[0].video.stg_blocks == (29,)
    assert choose("2.3", "dev", upsampler=False).stages[0].video.stg_blocks == (28,)
    assert [choose(r, "dev", upsampler=False).image_crf for r in ("2.0", "2.3", "2.5")] == [
        33,
        33,
        18,
    ]
    two = choose("2.3", "dev", upsampler=True, distilled_lora=True)
    assert (two.name, two.sound_of) == ("two_stage", 0)
    assert [s.distilled_lora for s in two.stages] == [0, 1]
    steppers = [choose(r, "distilled", upsampler=True).stages[0].stepper for r in ("2.3", "2.5")]
    assert steppers == ["euler", "ancestral"]
    assert choose("2.3", "distilled", upsampler=True).sound_of == -1
    hq = choose("2.3", "dev", upsampler=True, distilled_lora=True, name="hq")
    assert [s.distilled_lora for s in hq.stages] == [0.25, 0.5]
    for name, missing in (("two_stage", "upsampler"), ("hq", "upsampler"), ("best", "choose from")):
        with pytest.raises(UserError, match=missing):
            choose("2.3", "dev", upsampler=False, name=name)
    with pytest.raises(UserError, match="needs the distilled LoRA"):
        choose("2.3", "dev", upsampler=True, name="two_stage")


# ------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(V20, text_encoder=GEMMA, dtype="float32")


def test_a_lora_of_another_release_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not fit these weights"):
        Pipeline.from_pretrained(V20, text_encoder=GEMMA,
                                 loras=[GOLDEN / "v2.3" / "lora.safetensors"])  # fmt: skip
    ours = read_lora(GOLDEN / "v2.0" / "lora.safetensors")
    write_lora(tmp_path / "new.safetensors", Lora(ours.targets, {"model_version": "2.3.0"}))
    with pytest.raises(UserError, match=r"is for LTX-2 2.3, these weights are 2.0"):
        Pipeline.from_pretrained(V20, text_encoder=GEMMA, loras=[tmp_path / "new.safetensors"])


def test_a_text_encoder_of_another_release_is_refused():
    with pytest.raises(UserError, match="needs a Gemma 3 text encoder"):
        Pipeline.from_pretrained(V20, text_encoder=GOLDEN / "v2.5" / "gemma")
    with pytest.raises(UserError, match="has no text encoder: give --text-encoder-path"):
        Pipeline.from_pretrained(V20)


def test_parts_of_a_model_that_are_missing_or_of_another_are_refused():
    split = GOLDEN / "v2.5" / "split"
    with pytest.raises(UserError, match="has no video vae"):
        Pipeline.from_pretrained(split / "transformer.safetensors", text_encoder=GEMMA)
    with pytest.raises(UserError, match="needs the spatial upsampler x2"):
        Pipeline.from_pretrained(
            GOLDEN / "v2.3" / "checkpoint.safetensors",
            text_encoder=GOLDEN / "v2.3" / "gemma",
            upsampler=GOLDEN / "v2.3" / "upsampler_temporal.safetensors",
        )


@pytest.fixture
def files():
    return loading.Files.open([V20], GEMMA, None, None)


def test_a_transformer_of_other_latents_than_the_vae_is_refused(files, monkeypatch):
    real = files.release.config
    few = SimpleNamespace(in_channels=7)
    config = lambda name, **how: few if name == "transformer" else real(name, **how)  # noqa: E731
    monkeypatch.setattr(files.release, "config", config)
    with pytest.raises(UserError, match=r"its latents have \d+ channels, the transformer takes 7"):
        files._check()


@pytest.mark.parametrize(
    ("transformer", "vae", "fits"),
    [("2.5", "2.3", True), ("2.3", "2.5", True), ("2.0", "2.3", False), ("2.3", "2.0", False)],
)
def test_a_vae_of_another_release_fits_where_latents_stayed(
    files, monkeypatch, transformer, vae, fits
):
    release_of = {"transformer": transformer, "video_vae": vae}.get
    monkeypatch.setattr(files.release, "release_of", release_of)
    why = f"is the video VAE of LTX-2 {vae}, the transformer is of {transformer}"
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match=why):
        files._check()


def test_a_model_is_distilled_if_its_name_or_its_user_says_so(files):
    assert files.kind == "dev"
    assert loading.Files.open([V20], GEMMA, None, "distilled").kind == "distilled"


def test_an_ic_lora_without_its_reference_is_refused(tmp_path):
    ours = read_lora(GOLDEN / "v2.0" / "lora.safetensors")
    metadata = {"reference_spatial_scale_factor": "2"}
    write_lora(tmp_path / "ic.safetensors", Lora(ours.targets, metadata))
    pipe = Pipeline.from_pretrained(V20, text_encoder=GEMMA, loras=[tmp_path / "ic.safetensors"])
    with pytest.raises(UserError, match="is an IC-LoRA, which reads a reference clip"):
        pipe.make(["a dog"], num_frames=9, height=64, width=64)


def test_references_without_an_ic_lora_and_slots_of_older_models_are_refused(pipe):
    size = {"num_frames": 9, "height": 64, "width": 64}
    with pytest.raises(UserError, match="only an IC-LoRA reads them"):
        pipe.make(["a dog"], references=[clip(9)], **size)
    with pytest.raises(UserError, match=r"only for models of LTX-2 2\.5"):
        pipe.make(["a dog"], num_generated_keyframes=2, **size)
    with pytest.raises(UserError, match="has no duration head"):
        pipe.make(["a dog"], duration="auto")


def test_guidance_on_a_distilled_model_is_said(pipe, capsys):
    recipe = recipes.distilled("2.0", upsampler=False).replaced({"stage1.video.cfg": "3"})
    pipe.maker._tell(recipe, task(num_frames=9), [1])
    assert "guidance on a distilled model" in capsys.readouterr().out
    pipe.maker._tell(recipes.distilled("2.0", upsampler=False), task(num_frames=9), [1])
    assert "guidance on" not in capsys.readouterr().out


@pytest.mark.parametrize("strength", ["much", "1,2", "nan", "1/x"])
def test_a_strength_that_is_none_is_named(strength):
    with pytest.raises(UserError, match="is not a number, VIDEO,AUDIO,CROSS"):
        loras.adapter(Lora({}), strength)


def test_strengths_are_of_streams_and_stages():
    strengths = loras.adapter(Lora({}), "1,0.5,0/0.3").strengths
    assert strengths == (loras.Strength(1, 0.5, 0), loras.Strength(0.3, 0.3, 0.3))
    lora = read_lora(GOLDEN / "v2.0" / "lora.safetensors")
    parts = loras.by_stream(lora, loras.Strength(1, 0.5, 0.25))
    names = {strength: set(part.targets) for part, strength in parts}
    assert sum(map(len, names.values())) == len(lora.targets)
    for strength, modules in names.items():
        for module in modules:
            cross = any(name in module for name in ("audio_to_video", "video_to_audio", "av_ca"))
            assert strength == (0.25 if cross else 0.5 if "audio" in module else 1)
    assert {s for _, s in loras.by_stream(lora, loras.Strength(1, 0, 0))} == {1}


def test_a_lora_has_the_strength_of_its_stage_and_one_that_reads_a_clip_is_off_after_the_first():
    at = lambda adapter: [adapter.at(stage) for stage in range(3)]  # noqa: E731
    assert at(loras.adapter(Lora({}), "1/0.5")) == [loras.even(1), *[loras.even(0.5)] * 2]
    assert at(loras.adapter(Lora({}), 0.5)) == [loras.even(0.5)] * 3
    factors = {"reference_downscale_factor": "2", "reference_temporal_scale_factor": "4"}
    reads = Lora({}, factors)
    assert loras.adapter(reads).scales == (2, 4)
    assert at(loras.adapter(reads)) == [loras.even(1), loras.OFF, loras.OFF]
    assert at(loras.adapter(reads, "1/0.5")) == [loras.even(1), *[loras.even(0.5)] * 2]


def test_loras_are_opened_with_the_strengths_that_they_are_given_with():
    file = GOLDEN / "v2.0" / "lora.safetensors"
    maker = Pipeline.from_pretrained(
        V20, text_encoder=GEMMA, loras=[(file, "0.5/0.25"), file], distilled_lora=(file, 0.75)
    ).maker
    strengths = [[s.video for s in adapter.strengths] for adapter in maker.adapters]
    assert strengths == [[0.5, 0.25], [1, 0]]  # it says that it reads a clip
    assert maker.distilled_lora[1] == 0.75
    fast = maker.distilled_lora[0]
    numbers = sum(target.a.size + target.b.size for target in fast.targets.values())
    assert loras.lora_bytes(fast) == 2 * numbers


def test_latents_are_upsampled_by_the_mean_and_deviation_of_their_codec(pipe):
    stored = load_file(V20)
    for found, name in zip(pipe.maker.files.statistics, ("mean", "std"), strict=True):
        want = stored[f"vae.per_channel_statistics.{name}-of-means"]
        np.testing.assert_array_equal(found, want)


def test_an_upsampler_of_another_codec_or_kind_is_refused(pipe):
    files = pipe.maker.files
    config = open_release(GOLDEN / "v2.0" / "upsampler_spatial.safetensors").config("upsampler")
    for changes, message in (
        ({"in_channels": 5}, "up: upsamples latents of 5 channels, those of .* have "),
        ({"temporal_upsample": True, "dims": 3}, "up: makes frames 2 times as many and sizes 2 "),
        ({"rational_resampler": True, "spatial_scale": 1.5}, "up: makes frames 1 .* sizes 1.5 "),
    ):
        changed = dataclasses.replace(config, **changes)
        other = SimpleNamespace(name="up", config=lambda network, changed=changed: changed)
        with pytest.raises(UserError, match=message):
            dataclasses.replace(files, upsampler=other)._check()
    fits = SimpleNamespace(name="up", config=lambda network: config)
    dataclasses.replace(files, upsampler=fits)._check()


def test_a_clip_says_which_files_made_it_and_what_tells_them_from_others(pipe):
    path = GOLDEN / "v2.0" / "upsampler_spatial.safetensors"
    files = dataclasses.replace(pipe.maker.files, upsampler=open_release(path))
    assert files.named() == {str(p.resolve()): fingerprint(p) for p in (V20, GEMMA, path)}


def test_a_prompt_is_encoded_once_and_the_encoder_read_again_when_it_was_freed():
    loads, asked = [], []

    class Encoder:
        shared = False

        def features(self, prompts):
            asked.append(list(prompts))
            lengths = np.asarray([[[len(prompt)]] for prompt in prompts], np.float32)
            return lengths, -lengths, np.zeros((len(prompts), 1), bool)

    texts = loading.Texts(lambda: loads.append(1) or Encoder())
    found = texts(["aaa", "b", "aaa"])
    assert found["video_text"].ravel().tolist() == [3, 1, 3]
    assert found["audio_text"].ravel().tolist() == [-3, -1, -3]
    texts(["b", "cc"])
    assert (asked, len(loads)) == ([["aaa", "b"], ["cc"]], 1)
    texts.free()
    texts(["aaa", "cc"])  # known without it
    assert len(loads) == 1
    texts(["dddd"])
    assert len(loads) == 2


class Fused(loading.Weights):
    """Weights that are read as a number of their own; a LoRA adds its name."""

    def _load(self):
        self.read = getattr(self, "read", 0) + 1
        return {"transformer": {"read": self.read}}


def test_loras_are_put_into_weights_that_were_read_again(pipe, monkeypatch):
    def fuse(weights, parts, *_, **__):
        names = [*weights.get("loras", []), *(lora.name for lora, _ in parts)]
        return weights | {"loras": names}, dict(weights)

    monkeypatch.setattr(loading, "parts", lambda loras: loras)
    monkeypatch.setattr(loading, "fuse", fuse)
    monkeypatch.setattr(loading, "unfuse", lambda weights, originals: originals or weights)
    maker, style = pipe.maker, ((Lora({}, name="style"), loras.even(1.0)),)
    weights = Fused(maker.files.release, maker.weights.config, maker.mesh)
    first = weights.params(style)
    assert first == {"transformer": {"read": 1, "loras": ["style"]}}
    assert weights.params(style) is first
    none = {"transformer": {"read": 1, "loras": []}}
    assert weights.params() == none  # as if there had been none
    for number, forget in ((2, weights.free), (3, lambda: weights.move(maker.mesh))):
        weights.params(style)
        forget()
        assert weights.params(style) == {"transformer": {"read": number, "loras": ["style"]}}


def test_connectors_that_are_loaded_are_not_read_again(pipe, monkeypatch):
    maker, read = pipe.maker, []
    weights = loading.Weights(maker.files.release, maker.weights.config, maker.mesh)
    monkeypatch.setattr(weights, "_network", lambda name, config: read.append(name) or {name: 1})
    assert weights.connectors()[1] == {"connectors": 1}
    assert weights.params()["connectors"] is weights.connectors()[1]
    assert read == ["connectors", "connectors", "transformer"]


def test_loras_beside_the_weights_take_the_place_of_those_before(pipe, monkeypatch):
    monkeypatch.setattr(loading, "parts", lambda loras: loras)
    found = lambda loras, *_, **__: {lora.name: {"a": 3} for lora, _ in loras}  # noqa: E731
    monkeypatch.setattr(loading, "adapters", found)
    config = dataclasses.replace(pipe.maker.weights.config, quantized="int8")
    weights = loading.Weights(pipe.maker.files.release, config, pipe.maker.mesh)
    plain = {"x": {"weight": 1}, "y": {"weight": 2}}
    monkeypatch.setattr(weights, "_load", lambda: {"transformer": plain})
    for names in (["x"], ["y"], ["x", "y"], []):
        loras_of = tuple((Lora({}, name=name), loras.even(1.0)) for name in names)
        want = {n: w | ({"adapter": {"a": 3}} if n in names else {}) for n, w in plain.items()}
        assert weights.params(loras_of) == {"transformer": want}


# ----------------------------------------------------------------------------------------- memory


def test_weights_that_need_more_than_a_device_are_split_and_too_large_ones_refused(pipe):
    release = pipe.maker.files.release
    needed = loading.weight_bytes(release, "transformer", "connectors")
    room = round(needed / loading.SHARE) + 8
    assert dict(loading.fitting_mesh(release, 8, room).shape)["model"] == 1
    assert dict(loading.fitting_mesh(release, 8, room // 2 + 8).shape)["model"] == 2
    assert dict(loading.fitting_mesh(release, 8, room // 8 + 8).shape)["model"] == 8
    with pytest.raises(UserError, match=r"too little memory: .* GiB are missing; use more devices"):
        loading.fitting_mesh(release, 8, room // 9)


def test_quantised_weights_and_blocks_on_the_host_need_less_of_a_device_and_adapters_more(pipe):
    release = pipe.maker.files.release
    shapes = release.networks["transformer"].shapes
    matrices = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("transformer_blocks.") and name.endswith("weight") and len(shape) == 2
    }
    whole = loading.weight_bytes(release, "transformer")
    assert whole == 2 * sum(map(math.prod, shapes.values()))
    halved = loading.weight_bytes(release, "transformer", form="int8")
    assert halved == whole - sum(matrices.values())  # a byte for each in the place of two
    left = loading.weight_bytes(release, "transformer", blocks=1)
    later = [size for name, size in matrices.items() if "_blocks.0." not in name]
    assert left == whole - 2 * sum(later) < whole
    needed = loading.weight_bytes(release, "transformer", "connectors")
    room = round(needed / loading.SHARE) + 8

    def split(room, **how):
        return dict(loading.fitting_mesh(release, 8, room, **how).shape)["model"]

    assert (split(room), split(room, adapters=needed // 2)) == (1, 2)
    assert split(room, adapters=needed // 2, offload=True) == 1
    two = loading.weight_bytes(release, "transformer", "connectors", blocks=2)
    assert split(round(two / loading.SHARE) + 8, offload=True) == 1


def test_the_memory_of_the_host_must_hold_what_its_devices_have_of_the_transformer(
    pipe, monkeypatch
):
    release = pipe.maker.files.release
    needed = loading.weight_bytes(release, "transformer")
    whole, halves = (make_mesh(n, 2 // n, 1, devices=jax.devices()[:2]) for n in (2, 1))
    room = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * needed - 1}
    monkeypatch.setattr(loading.os, "sysconf", room.get)
    loading.check_host(release, halves, None)  # a half for each of two devices
    with pytest.raises(UserError, match=r"--offload: .* GiB of weights, for 2 devices, do not fit"):
        loading.check_host(release, whole, None)


def test_networks_stay_beside_one_another_only_where_there_is_room_for_twice_their_weights(
    pipe, monkeypatch
):
    files, mesh = pipe.maker.files, make_mesh(1, 2, 1, devices=jax.devices()[:2])
    with open_release(files.text_encoder) as language:
        split = loading.weight_bytes(language, "gemma", "text_projection")
    split += loading.weight_bytes(files.release, "transformer", "connectors")
    needed = split / 2 + loading.weight_bytes(files.release, *loading.CODEC)
    for share, fits in ((1.01, True), (0.99, False)):
        room = share * 2 * needed / loading.SHARE
        monkeypatch.setattr(loading, "device_bytes", lambda room=room: room)
        assert loading.fit_together(files, mesh) == fits
    monkeypatch.setattr(loading, "device_bytes", lambda: None)
    assert not loading.fit_together(files, mesh)


def test_a_lack_of_memory_is_one_line(pipe):
    with pytest.raises(UserError) as caught, pipe.phase("stage 1"):
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Attempting to allocate 12.5G. That was not possible"
        )
    assert str(caught.value).startswith("too little memory for stage 1 (12.5G more were asked for)")
    assert "fewer frames" in str(caught.value)
    with pytest.raises(RuntimeError), pipe.phase("stage 1"):
        raise RuntimeError("another")


# ---------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["a dog", "--output-path=clip.avi"],
            "cannot write .avi; use .mp4, .png, .wav or a folder",
        ),
        (
            ["a dog", "--output-path=/proc/none/clip.mp4"],
            "--output-path: /proc/none/clip.mp4 cannot",
        ),
        (["  "], "prompt 1 is blank"),
        (["--prompts=prompts.txt"], "--prompts: line 2 of prompts.txt is blank"),
        (["--prompts=none.txt"], "--prompts: none.txt cannot be read"),
        (["--again=clip.mp4"], "--again: clip.mp4 does not say what made it"),
        (["--from-latents=prompts.txt"], "prompts.txt"),
        (["--from-latents=none"], "none: no such file"),
    ],
)
def test_the_command_refuses_before_it_loads_anything(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    Path("prompts.txt").write_text("a dog\n\na cat\n")
    media.write_mp4("clip.mp4", clip(2))
    assert sample.cli([str(V20), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--image", "dog.png"],
        ["--image", "dog.png", "first", "1"],
        ["--video-conditioning", "pose.mp4"],
        ["--lora", "a.safetensors", "1", "2"],
        ["--stage=3"],
        ["--stage1.steps"],
        ["--sceed=3"],
    ],
)
def test_a_flag_that_cannot_be_read_is_named(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.cli(["model.safetensors", "a dog", *flags])
    assert caught.value.code == 2
    assert flags[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_known_sound_stays_and_meets_the_new_one_without_a_jump():
    rate, rng = 1000, np.random.default_rng(0)
    known = tasks.KnownAudio(rng.normal(size=(1000, 2)).astype(np.float32), rate, redo=(0.3, 0.6))
    asked = tasks.Task(25, 64, 64, 25.0, audio=known)
    made = np.ones((1000, 2), np.float32)
    heard = given.with_known_sound(asked, made, rate)
    np.testing.assert_array_equal(heard[:300], known.samples[:300])
    np.testing.assert_array_equal(heard[600:], known.samples[600:])
    np.testing.assert_array_equal(heard[310:590], made[310:590])
    steps = np.abs(np.diff(heard[[299, 300]], axis=0)), np.abs(np.diff(heard[[599, 600]], axis=0))
    assert max(map(np.max, steps)) < 0.1 * np.abs(known.samples[[299, 600]] - 1).max() + 1e-6
