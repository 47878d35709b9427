"""What a stage asks of the compiled sampler: passes, numbers, noise, and all that is given."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ltx2_jax.diffusion import conditioning, geometry, schedules, steppers
from ltx2_jax.diffusion.sampler import Given
from ltx2_jax.sampling import recipes, stages
from ltx2_jax.sampling.given import Encoded, Placed
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Pass
from ltx2_jax.sampling.recipes import Scales, Stage
from ltx2_jax.sampling.tasks import Picture, Reference, Task
from ltx2_jax.sharding import make_mesh

FPS = 24.0
# 17 frames of 64 x 64 pixels, and 18 latents of sound.
SHAPES = stages.Shapes((3, 2, 2), 18, 4, 2, 16, (8, 32, 32), geometry.AUDIO_CLOCK)
IMAGE = Picture(np.zeros((1, 64, 64, 3), np.uint8))
GUIDED = Stage(
    steps=4,
    video=Scales(3.0, 0.5, 0.75, 2.5, (1,), 2),
    audio=Scales(7.0, 2.0, 0.25, 1.5, (0, 2), 1),
    stepper="res_2s",
)


def task(**given):
    return Task(17, 64, 64, FPS, **given)


def known(encoded=Encoded(), rows=1, before=None, **given):  # noqa: B008
    return stages.conditions(task(**given), encoded, SHAPES, marked=True, rows=rows, before=before)


# ------------------------------------------------------------------------------------------ passes


def test_each_pass_has_its_strength_of_either_stream_and_skips_the_blocks_of_that_stream():
    passes, strengths, rescales, how = stages.passes(GUIDED, None)
    assert passes == (
        EMPTY_CAPTION,
        Pass(skipped=(1,), audio_skipped=(0, 2)),
        Pass(exchange=False),
    )
    assert strengths == [(2, 6), (0.5, 2), (1.5, 0.5)]  # one less than a scale; stg as it is
    assert rescales == (0.75, 0.25)
    assert how.skip_steps == (2, 1)


def test_a_scale_that_is_neutral_costs_no_pass():
    passes, strengths, rescales, _ = stages.passes(Stage(audio=Scales(cfg=2.0)), None)
    assert (passes, strengths, rescales) == ((EMPTY_CAPTION,), [(0, 1)], None)
    rescaled = Scales(rescale=0.7)  # of an estimate that nothing has moved
    assert stages.passes(Stage(video=rescaled), None)[:3] == ((), [], None)


def test_a_sound_that_is_given_is_not_guided_and_hears_the_prompt_in_all_passes():
    latents = np.zeros((1, 18, 16, 2), np.float32)
    video, audio = known(rows=1, before=[stages.Found()])
    frozen = conditioning.freeze(conditioning.of_audio(latents))
    passes, strengths, rescales, _ = stages.passes(GUIDED, Given(video, frozen))
    assert passes == (
        Pass(prompt=False, audio_prompt=True),
        Pass(skipped=(1,), audio_skipped=()),
        Pass(exchange=False),
    )
    assert strengths == [(2, 0), (0.5, 0), (1.5, 0)]
    assert rescales == (0.75, 0)
    # One stream by itself is led away from nothing but its prompt and its blocks.
    passes, strengths, _, _ = stages.passes(GUIDED, Given(None, audio))
    assert passes == (EMPTY_CAPTION, Pass(skipped=(), audio_skipped=(0, 2)))
    assert strengths == [(0, 6), (0, 2)]


# ------------------------------------------------------------------------------- what is given


def test_images_and_keyframes_are_given_with_their_own_strengths():
    placed = lambda frame, strength: Placed(np.ones((1, 2, 2, 4)), frame, strength)  # noqa: E731
    encoded = Encoded(images=(placed(0, 0.5), placed(8, 0.25)), keyframes=(placed(16, 0.75),))
    video = known(encoded, rows=2, images=(IMAGE,)).video
    want = np.repeat([0.5, 0, 0, 0.25, 0.75], 4)
    np.testing.assert_array_equal(video.strength, np.tile(want, (2, 1)))
    starts = np.asarray(video.positions)[0, 0, 12::4, 0] * FPS
    np.testing.assert_allclose(starts, [8, 16], rtol=1e-6)


def test_frames_of_a_clip_are_given_as_they_are_known_and_its_sound_is_made():
    frames = np.arange(48.0).reshape(3, 2, 2, 4)
    video, audio = known(Encoded(video=frames, video_given=np.array([True, False, True])))
    np.testing.assert_array_equal(video.strength[0], np.repeat([True, False, True], 4))
    np.testing.assert_array_equal(video.clean[0], frames.reshape(12, 4))
    assert (audio.strength, audio.frozen) == (None, False)


def test_latent_frame_0_is_marked_for_a_model_that_knows_the_mark():
    image = Encoded(images=(Placed(np.ones((1, 2, 2, 4)), 0, 1),))
    np.testing.assert_array_equal(known(image).video.marks[0], [1] * 4 + [0] * 8)
    plain = stages.conditions(task(), image, SHAPES, marked=False, rows=1)
    assert plain.video.marks is None


def test_a_reference_covers_the_clip_with_the_strengths_that_it_is_given():
    read = Reference(None, 0.9, 0.5, downscale=2, time_scale=2)
    encoded = Encoded(references=(Placed(np.ones((2, 1, 1, 4)), 0, 0.75, read),))
    video = known(encoded, references=(read,)).video
    np.testing.assert_array_equal(video.strength[0], [0] * 12 + [0.75] * 2)
    seconds, rows, columns = np.asarray(video.positions)[0, :, 12:]
    np.testing.assert_allclose(seconds * FPS, [[0, 1], [1, 17]], atol=1e-5)
    np.testing.assert_array_equal([rows, columns], [[[0, 64]] * 2] * 2)
    np.testing.assert_array_equal(video.attention[0, 0], [1] * 12 + [0.5] * 2)


def test_a_voice_ends_a_little_before_the_clip_begins():
    audio = known(Encoded(voice=np.ones((5, 16, 2)))).audio
    np.testing.assert_array_equal(audio.strength[0], np.arange(23) >= 18)
    # Five latents last 0.17 s, of which the first lasts 0.01, and 0.04 s pass until the clip.
    want = [-0.21, -0.2, -0.16, -0.12, -0.08, -0.04]
    times = np.asarray(audio.positions)[0, 0]
    np.testing.assert_allclose(times[18:], np.stack([want[:-1], want[1:]], 1), atol=1e-6)
    assert times[0, 0] == 0


def test_keyframes_that_an_earlier_stage_made_are_where_the_next_one_starts_from():
    made = np.random.default_rng(0).normal(size=(2, 2, 2, 2, 4)).astype(np.float32)
    before = [stages.Found(slots=slots) for slots in made]
    video = known(rows=2, before=before, slots=2).video
    assert video.slots == (12, 2)
    np.testing.assert_array_equal(video.start[:, 12:], made.reshape(2, 8, 4))
    np.testing.assert_array_equal(known(slots=2).video.start[:, 12:], 0)


def test_a_mesh_must_divide_what_stands_beside_the_clip_in_every_stage():
    sizes = [SimpleNamespace(video=video) for video in ((3, 2, 4), (3, 4, 8))]
    assert stages.beside(task(), sizes) == []
    assert stages.beside(task(slots=1), sizes) == [8, 32]
    assert stages.beside(task(images=(Picture(None, 8),)), sizes) == [8, 32]
    assert stages.beside(task(images=(IMAGE,)), sizes) == []  # in the place of a frame
    # References are read in the first stage alone.
    assert stages.beside(task(references=(Reference(None, downscale=2),)), sizes) == [2]


# --------------------------------------------------------------------------------------- the calls


def ran(stage, seeds, batch=2, before=None, number=0, devices=1):
    """What the sampler was asked, call by call, and the clips; it returns the seeds as latents."""
    calls, mesh = [], make_mesh(devices=jax.devices()[:devices])

    def sample(params, texts, rows, key, sigmas, strengths, rescales, given, start, noises, **how):
        fields = {"texts": texts, "rows": rows, "key": key, "sigmas": sigmas, "start": start}
        fields |= {"strengths": strengths, "rescales": rescales, "given": given, "params": params}
        calls.append(SimpleNamespace(**fields, **how, double=jax.config.jax_enable_x64))
        return np.asarray(rows)[:, None], -np.asarray(rows, np.int64)[:, None]

    program = stages.Program(sample, "graph", mesh, True)
    text = {"video_text": np.arange(len(seeds) + 1) * 10}  # the negative prompt comes last
    made = stages.run(
        stage, program, "weights", SHAPES, task(), Encoded(), text, seeds, before,
        number=number, batch=batch,
    )  # fmt: skip
    return calls, made


def test_a_batch_has_the_seeds_and_prompts_of_its_clips_and_the_negative_prompt_for_all():
    calls, made = ran(GUIDED, [7, 5, 3])
    assert [call.rows.tolist() for call in calls] == [[7, 5], [3, 3]]
    assert [call.texts[0]["video_text"].tolist() for call in calls] == [[0, 10], [20, 20]]
    assert [call.texts[1]["video_text"].tolist() for call in calls] == [[30], [30]]
    assert [(clip.video.item(), clip.audio.item()) for clip in made] == [(7, -7), (5, -5), (3, -3)]


def test_clips_and_passes_together_fill_the_devices():
    four = {"seeds": [7, 5, 3], "devices": 4}
    assert [call.rows.tolist() for call in ran(Stage(), **four)[0]] == [[7, 5, 3, 3]]
    # Four passes of a clip are enough for four devices.
    assert [call.rows.tolist() for call in ran(GUIDED, **four)[0]] == [[7, 5], [3, 3]]


def test_double_precision_is_off_while_clips_are_made():
    with jax.enable_x64(True):
        (call,), _ = ran(GUIDED, [0])
    assert not call.double


def test_the_sampler_is_told_the_schedule_steps_and_guidance_of_the_stage():
    (call,), _ = ran(GUIDED, [0])
    passes, strengths, rescales, how = stages.passes(GUIDED, None)
    assert (call.passes, call.strengths, call.rescales) == (passes, tuple(strengths), rescales)
    assert (call.guidance, call.stepper) == (how, GUIDED.step)
    assert (call.graphdef, call.params, call.given) == ("graph", "weights", None)
    assert call.request == SHAPES.request(FPS)
    np.testing.assert_array_equal(call.sigmas, schedules.ltx2_sigmas(4))
    (call,), _ = ran(Stage(steps=4, tokens=None), [0])
    np.testing.assert_array_equal(call.sigmas, schedules.ltx2_sigmas(4, math.prod(SHAPES.video)))


def test_a_later_stage_has_noise_of_its_own_and_starts_each_clip_from_its_own_latents():
    before = [
        stages.Found(np.full((3, 2, 2, 4), i, np.float32), np.full((18, 16, 2), -i, np.float32))
        for i in range(3)
    ]
    keys = [ran(GUIDED, [0], number=number)[0][0].key for number in (0, 1)]
    assert keys == [jax.random.key(0), jax.random.key(1)]
    calls, _ = ran(GUIDED, [7, 5, 3], before=before, number=1)
    starts = [[np.ravel(x)[:: x[0].size].tolist() for x in call.start] for call in calls]
    assert starts == [[[0, 1], [0, -1]], [[2, 2], [-2, -2]]]
    assert all(call.given is not None for call in calls)


# ----------------------------------------------------------------------------- numbers of a recipe


@pytest.mark.parametrize(
    ("name", "stepper"),
    [
        ("euler", steppers.Euler()),
        ("ancestral", steppers.AncestralEuler(0.25)),
        ("res_2s", steppers.Res2s(0.25)),
        ("gradient_estimation", steppers.GradientEstimation()),
        ("cfg_plus_plus", steppers.EulerCFGPlusPlus(0.25)),
    ],
)
def test_a_stage_draws_as_much_noise_as_it_says(name, stepper):
    assert Stage(stepper=name, eta=0.25).step == stepper


def test_the_schedule_is_shifted_by_the_tokens_that_are_named_or_by_those_of_the_clip():
    for stage, tokens in ((Stage(steps=4, tokens=99), 99), (Stage(steps=4, tokens=None), 512)):
        np.testing.assert_array_equal(stage.sigma_values(512), schedules.ltx2_sigmas(4, tokens))
    np.testing.assert_array_equal(Stage(steps=4).sigma_values(512), schedules.ltx2_sigmas(4, 4096))
    distilled = Stage(schedule="distilled", steps=30).sigma_values(512)
    np.testing.assert_array_equal(distilled, np.float32(schedules.DISTILLED_SIGMAS))


@pytest.mark.parametrize("name", ["one_stage", "two_stage"])
def test_a_model_of_few_layers_skips_its_last_block(name):
    chosen = recipes.choose("2.3", "dev", upsampler=True, distilled_lora=True, layers=3, name=name)
    assert [s.stg_blocks for s in (chosen.stages[0].video, chosen.stages[0].audio)] == [(2,)] * 2


def test_the_recipe_of_second_order_has_the_released_numbers():
    first, second = recipes.hq("2.3").stages
    assert (first.steps, first.tokens, first.size) == (15, None, 0.5)
    assert (first.stepper, first.eta, second.stepper, second.eta) == ("res_2s", 0.5) * 2
    scales = [(s.cfg, s.stg, s.rescale, s.modality) for s in (first.video, first.audio)]
    assert scales == [(3, 0, 0.45, 3), (7, 0, 1, 3)]
    assert not second.video.on
    assert not second.audio.on
