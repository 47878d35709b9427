"""Every task and every recipe, through the command, with a tiny random release file."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from pod import pod
from safetensors.numpy import load_file

from ltx2_jax import sample
from ltx2_jax.diffusion import geometry
from ltx2_jax.media import media
from ltx2_jax.sampling import stages
from ltx2_jax.sampling.given import Encoded, Placed
from ltx2_jax.sampling.making import Maker
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.tasks import Picture, Task
from ltx2_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "v2.0"
MODEL = [str(GOLDEN / "checkpoint.safetensors"), "a dog barks twice"]
MODEL += [f"--gemma-root={GOLDEN / 'gemma'}", "--dtype=float32"]
UPSAMPLER = f"--spatial-upsampler-path={GOLDEN / 'upsampler_spatial.safetensors'}"
LORA = str(GOLDEN / "lora.safetensors")
DISTILLED = [f"--distilled-checkpoint-path={MODEL[0]}", *MODEL[1:]]
SIZE = ["--height=64", "--width=64"]
FRAMES, FPS, RATE = 9, 24.0, 24000  # latents of 3 x 2 x 2 and 9


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """One pipeline for each set of files, kept in memory."""
    patch, opened = pytest.MonkeyPatch(), {}
    load = Pipeline.from_pretrained

    def cached(*files, **settings):
        key = repr((files, settings))
        if key not in opened:
            mesh = make_mesh(devices=jax.devices()[:1])
            opened[key] = load(*files, **{**settings, "keep": True, "mesh": mesh})
        return opened[key]

    patch.setattr(Pipeline, "from_pretrained", cached)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media that tasks are given: a film of 17 frames with sound, an image, a sound."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    video = np.kron(rng.integers(0, 255, (17, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    time = np.arange(round(17 / FPS * RATE)) / RATE
    audio = 0.3 * np.stack([np.sin(2 * np.pi * f * time) for f in (440, 660)], 1)
    media.write_mp4(folder / "film.mp4", media.Clip(video, FPS, audio.astype(np.float32), RATE))
    sound = audio[: round(9 / FPS * RATE)].astype(np.float32)
    media.write_mp4(folder / "talk.mp4", media.Clip(video[:9], FPS, sound, RATE))
    media.write_mp4(folder / "short.mp4", media.Clip(video[:9], FPS, None, RATE))
    media.write_pngs(folder / "image.png", [video[:1, :, :40]])
    media.write_wav(folder / "sound.wav", sound[:, ::-1] * 0.5, RATE)
    return folder


@pytest.fixture
def make(tmp_path, capsys):
    """Runs the command; returns what it wrote, the latents and what it said."""

    def make(*flags, name="clip.mp4", model=MODEL, size=SIZE):
        out, latents = tmp_path / name, tmp_path / "latents.safetensors"
        argv = [*model, *size, f"--output-path={out}", f"--save-latents={latents}", *flags]
        assert sample.cli([str(word) for word in argv]) == 0, capsys.readouterr().err
        found = load_file(latents) if latents.exists() else None  # else one a clip
        return out, found, capsys.readouterr().out

    return make


def frames_of(path):
    files = sorted(path.parent.glob(f"{path.stem}-*.png"))
    return np.stack([media.read_image(file) for file in files])


# --------------------------------------------------------------------------------------- recipes


def test_text_becomes_picture_and_sound_by_the_recipe_of_the_release(make):
    out, _, said = make("--num-frames=9", "--num-inference-steps=2", "--seed=3")
    clip = media.read_clip(out)
    assert clip.video.shape == (FRAMES, 64, 64, 3)
    assert (clip.fps, clip.sample_rate, len(clip.audio)) == (FPS, RATE, 9000)
    assert "recipe one_stage" in said
    assert "2 steps of euler" in said
    assert "video cfg 3 stg 1 rescale 0.7 modality 3; audio cfg 7" in said
    assert "64x64, 9 frames at 24 fps (0.38 s), seed 3" in said
    assert "seconds: " in said
    about = json.loads(media.read_about(out))
    assert (about["seed"], about["recipe"]["stages"][0]["steps"]) == (3, 2)
    assert about["model"].keys() >= {str((GOLDEN / "checkpoint.safetensors").resolve())}


def test_two_processes_make_the_clip_that_one_makes(make, tmp_path):
    """Its guidance passes lie on both; the first writes."""
    flags = ("--num-frames=9", "--num-inference-steps=2", "--seed=3")
    _, latents, _ = make(*flags)
    out, kept = tmp_path / "both.mp4", tmp_path / "both.safetensors"
    written = (f"--output-path={out}", f"--save-latents={kept}")
    ended = pod(tmp_path, 2, 1, "-m", "ltx2_jax.sample", *MODEL, *SIZE, *flags, *written)
    assert ended.codes == [0, 0], ended.err
    assert f"wrote {out}" in ended.out[0]
    assert "wrote" not in ended.out[1]
    assert media.read_clip(out).video.shape == (FRAMES, 64, 64, 3)
    found = load_file(kept)
    for name in ("video", "audio"):
        np.testing.assert_allclose(found[name], latents[name], atol=1e-4)


def test_again_repeats_a_clip_and_other_flags_change_it(make, tmp_path):
    out, latents, _ = make("--num-frames=9", "--num-inference-steps=2", "--seed=3")
    again, same, _ = make(f"--again={out}", name="again.mp4", model=[], size=[])
    np.testing.assert_array_equal(same["video"], latents["video"])
    np.testing.assert_array_equal(same["audio"], latents["audio"])
    assert media.read_clip(again).video.shape == (FRAMES, 64, 64, 3)
    _, other, _ = make(f"--again={out}", "--seed=4", name="other.mp4", model=[], size=[])
    assert np.abs(other["video"] - latents["video"]).max() > 0.1


@pytest.mark.parametrize("recipe", ["two_stage", "hq"])
def test_recipes_of_two_stages_upsample_and_fuse_the_distilled_lora(recipe, make):
    flags = ["--num-frames=9", f"--recipe={recipe}", "--stage1.steps=2", UPSAMPLER]
    _, latents, said = make(*flags, "--distilled-lora", LORA, "1")
    assert latents["video"].shape == (2, 2, 2, 4)
    assert latents["audio"].shape == (9, 16, 2)
    assert f"recipe {recipe}" in said
    assert "stage 1: size x0.5, 2 steps" in said
    assert "stage 2: size x1, 3 steps" in said
    _, weaker, _ = make(*flags, "--distilled-lora", LORA, "0.5")
    assert np.abs(weaker["video"] - latents["video"]).max() > 1e-3
    # The sound is that of the first stage, where only hq has the LoRA.
    assert np.array_equal(weaker["audio"], latents["audio"]) == (recipe == "two_stage")


def test_a_distilled_model_takes_8_and_3_steps_without_guidance(make):
    _, latents, said = make("--num-frames=9", UPSAMPLER, model=DISTILLED)
    assert "stage 1: size x0.5, 8 steps of euler" in said
    assert said.count("no guidance") == 2
    assert latents["video"].shape == (2, 2, 2, 4)
    _, small, _ = make("--num-frames=9", UPSAMPLER, "--skip-stage-2", model=DISTILLED)
    assert small["video"].shape == (2, 1, 1, 4)


def test_prompts_of_a_file_are_clips_of_their_own_seeds(make, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    flags, last = ["--num-frames=9"], DISTILLED[2:]
    model = [DISTILLED[0], *last, f"--prompts={tmp_path / 'prompts.txt'}"]
    out, _, said = make(*flags, "--seed=5", model=model)
    assert "2 clips" in said
    assert "seeds 5, 6" in said
    names = [out.with_name(f"clip-00{i}.mp4") for i in range(2)]
    assert [json.loads(media.read_about(n))["seed"] for n in names] == [5, 6]
    together = load_file(tmp_path / "latents-001.safetensors")
    _, alone, _ = make(*flags, "--seed=6", model=[DISTILLED[0], "a cat", *last])
    np.testing.assert_array_equal(alone["video"], together["video"])


# ------------------------------------------------------------------------------------------ tasks
# Of a distilled model in one stage, which needs one pass and compiles quickly.


def test_an_image_is_the_first_frame_and_another_stands_beside(make, folder):
    image = folder / "image-00000.png"
    _, latents, said = make("--num-frames=9", "--image", image, "0", "1", "--image", image, "8",
                            "0.9", model=DISTILLED)  # fmt: skip
    assert "image-00000.png is 40x64, the clip 64x64: 38% of it is cropped, at top and" in said
    _, other, _ = make("--num-frames=9", "--image", image, "0", "1", "--image", image, "8", "0.9",
                       "--seed=11", model=DISTILLED)  # fmt: skip
    np.testing.assert_array_equal(other["video"][0], latents["video"][0])
    assert np.abs(other["video"][1] - latents["video"][1]).max() > 0.01


def test_keyframes_are_all_beside_the_clip():
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    placed = tuple(Placed(np.ones((1, 2, 2, 4)), frame, 1.0) for frame in (0, 8))
    asked = Task(9, 64, 64, FPS, keyframes=(Picture(pixels), Picture(pixels, 8)))
    clock = geometry.AUDIO_CLOCK
    shapes = stages.Shapes((2, 2, 2), 9, 4, 2, 16, (8, 32, 32), clock)
    given = stages.conditions(asked, Encoded(keyframes=placed), shapes, marked=False, rows=1).video
    assert (given.clip_tokens, given.clean.shape[1]) == (8, 16)
    np.testing.assert_array_equal(np.asarray(given.strength)[0], np.arange(16) >= 8)
    times = np.asarray(given.positions)[0, 0, 8:] * FPS
    np.testing.assert_allclose(times, [[0, 1]] * 4 + [[8, 9]] * 4, atol=1e-5)


def test_a_picture_is_made_for_a_sound_that_stays_as_it_is(make, folder):
    out, latents, _ = make(f"--audio-path={folder / 'sound.wav'}", name="clip.png", model=DISTILLED)
    given, rate = media.read_wav(folder / "sound.wav")
    kept, kept_rate = media.read_wav(out.with_suffix(".wav"))
    assert rate == kept_rate
    np.testing.assert_array_equal(kept, given)
    assert frames_of(out).shape == (FRAMES, 64, 64, 3)  # as long as the sound
    _, other, _ = make(f"--audio-path={folder / 'sound.wav'}", "--seed=11", model=DISTILLED)
    np.testing.assert_array_equal(other["audio"], latents["audio"])
    assert np.abs(other["video"] - latents["video"]).max() > 0.01


def test_a_sound_is_made_for_a_picture_that_stays_as_it_is(make, folder):
    film = f"--video-path={folder / 'short.mp4'}"
    out, latents, _ = make(film, name="clip.png", model=DISTILLED, size=[])
    np.testing.assert_array_equal(frames_of(out), media.read_clip(folder / "short.mp4").video)
    assert len(media.read_wav(out.with_suffix(".wav"))[0]) == 9000
    _, other, _ = make(film, "--seed=11", model=DISTILLED, size=[])
    np.testing.assert_array_equal(other["video"], latents["video"])
    assert np.abs(other["audio"] - latents["audio"]).max() > 0.01


def test_sound_alone_and_picture_alone_are_made_without_the_other(make):
    out, latents, _ = make("--num-frames=9", "--sound-only", name="clip.wav", model=DISTILLED)
    assert latents.keys() == {"audio"}
    assert media.read_wav(out)[0].shape == (9000, 2)
    out, latents, _ = make("--num-frames=9", "--picture-only", model=DISTILLED)
    assert latents.keys() == {"video"}
    assert media.read_clip(out).audio is None


def test_a_retaken_span_changes_and_nothing_else(make, folder):
    film = media.read_clip(folder / "film.mp4")
    out, _, _ = make(f"--video-path={folder / 'film.mp4'}", "--start-time=0.4", "--end-time=0.6",
                     name="clip.png", model=DISTILLED, size=[])  # fmt: skip
    frames, (sound, rate) = frames_of(out), media.read_wav(out.with_suffix(".wav"))
    # 0.4 to 0.6 s are frames 9.6 to 14.4: all of the last latent, frames 9 to 16.
    np.testing.assert_array_equal(frames[:9], film.video[:9])
    assert all(np.abs(frames[9:].astype(int) - film.video[9:]).max(axis=(1, 2, 3)) > 0)
    begin, end = round(0.4 * rate), round(0.6 * rate)
    given = np.round(np.clip(film.audio, -1, 1) * 32768).clip(-32768, 32767) / 32768
    changed = np.abs(sound - given).max(axis=1) > 1e-4
    assert not changed[:begin].any()
    assert not changed[end:].any()
    assert changed[begin:end].mean() > 0.9


@pytest.mark.parametrize("what", ["video", "audio"])
def test_a_retake_of_one_stream_leaves_the_other(what, make, folder):
    film = media.read_clip(folder / "film.mp4")
    out, _, _ = make(f"--video-path={folder / 'film.mp4'}", "--start-time=0", "--end-time=0.3",
                     f"--retake={what}", name="clip.png", model=DISTILLED, size=[])  # fmt: skip
    frames, (sound, _) = frames_of(out), media.read_wav(out.with_suffix(".wav"))
    same_frames = np.array_equal(frames, film.video)
    same_sound = np.abs(sound - film.audio).max() < 1e-4
    assert (same_frames, same_sound) == (what == "audio", what == "video")


@pytest.mark.parametrize(
    ("flag", "kept"), [("extend", slice(0, 9)), ("extend-before", slice(8, 17))]
)
def test_a_clip_is_extended_at_either_end(flag, kept, make, folder):
    film = media.read_clip(folder / "talk.mp4")
    argv = [f"--video-path={folder / 'talk.mp4'}", f"--{flag}=0.3"]
    out, _, _ = make(*argv, name="clip.png", model=DISTILLED, size=[])
    frames, (sound, rate) = frames_of(out), media.read_wav(out.with_suffix(".wav"))
    assert (len(frames), len(sound)) == (17, 17000)
    np.testing.assert_array_equal(frames[kept], film.video)
    heard = sound[round(kept.start / FPS * rate) :][: len(film.audio)]
    np.testing.assert_allclose(heard, film.audio, atol=1e-4)
    assert np.abs(np.delete(sound, np.s_[kept.start * 1000 : kept.stop * 1000], 0)).max() > 0


def test_an_ic_lora_reads_its_reference(make, folder):
    flags = ["--num-frames=9", "--lora", LORA, "1", "--video-conditioning"]
    _, latents, _ = make(*flags, folder / "film.mp4", "1", model=DISTILLED)
    _, other, _ = make(*flags, folder / "image-00000.png", "1", model=DISTILLED)
    assert np.abs(other["video"] - latents["video"]).max() > 1e-3


def test_a_clip_is_dubbed_from_its_picture_and_its_voice(make, folder):
    flags = [f"--reference-video={folder / 'talk.mp4'}", "--lora", LORA]
    out, latents, _ = make(*flags, model=DISTILLED, size=[])
    assert latents["video"].shape == (2, 2, 2, 4)
    assert len(media.read_clip(out).video) == 9
    _, other, _ = make(*flags, f"--voice={folder / 'sound.wav'}", model=DISTILLED, size=[])
    assert np.abs(other["audio"] - latents["audio"]).max() > 1e-3


def test_latents_that_were_saved_are_decoded_to_the_same_clip(make, tmp_path):
    out, _, _ = make("--num-frames=9", "--stage1.steps=2", name="clip.png")
    again = tmp_path / "again.png"
    argv = [MODEL[0], *MODEL[2:], f"--from-latents={tmp_path / 'latents.safetensors'}"]
    assert sample.cli([*argv, f"--output-path={again}"]) == 0
    np.testing.assert_array_equal(frames_of(again), frames_of(out))


def test_a_clip_longer_than_the_model_knows_is_made_in_parts_that_go_on(make, monkeypatch):
    monkeypatch.setattr(Maker, "_longest", lambda self, fps: 17)
    out, _, said = make("--num-frames=25", name="clip.png", model=DISTILLED)
    assert "made in 2 parts, each from the last 0.4 s of the one before" in said
    frames, (sound, _) = frames_of(out), media.read_wav(out.with_suffix(".wav"))
    assert (len(frames), len(sound)) == (25, 25000)
    jumps = np.abs(np.diff(sound, axis=0)).max(axis=1)
    seam = 17 * 1000
    assert jumps[seam - 1] <= np.quantile(jumps[seam - 500 : seam + 500], 0.9)
