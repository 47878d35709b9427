"""Prompts and a task to clips, with stand-ins for the networks: who gets what, and what is kept."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from ltx2_jax.diffusion.geometry import AUDIO_CLOCK
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip, read_whole_sound
from ltx2_jax.media.picture import covering
from ltx2_jax.sampling import given, making, output, stages
from ltx2_jax.sampling.given import encode
from ltx2_jax.sampling.loras import Adapter, Strength, even
from ltx2_jax.sampling.making import Maker
from ltx2_jax.sampling.output import Made
from ltx2_jax.sampling.tasks import KnownAudio, KnownVideo, Picture, Reference, Task
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights.lora_files import Lora

FPS, RATE = 24.0, 1000
SIZE = {"height": 64, "width": 64}


class Video:
    """A latent is the first pixel behind it; what is decoded is black."""

    strides, channels = (8, 32, 32), 1

    @staticmethod
    def encode(video):
        return video[:, [0, *range(1, video.shape[1], 8)], ::32, ::32, :1]

    @staticmethod
    def decode_chunks(latents):
        for frames in (1, *[8] * (latents.shape[1] - 1)):
            yield np.full((1, frames, 64, 64, 3), -1.0, np.float32)


class Audio:
    """A latent is the sample 40 ms after that of the one before; what is decoded is silence."""

    sample_rate = output_sample_rate = RATE
    bins = channels = 1
    clock = AUDIO_CLOCK

    @staticmethod
    def encode(audio):
        return audio[:, ::40, None, :1]

    @staticmethod
    def decode(latents, samples):
        return np.zeros((1, samples, 2), np.float32)


CODEC = SimpleNamespace(video=Video, audio=Audio)


def film(frames, first=0):
    """Every frame is its number, from `first` on."""
    numbers = np.arange(first, first + frames, dtype=np.uint8)
    return np.tile(numbers[:, None, None, None], (1, 64, 64, 3))


def ramp(samples):
    return np.tile(np.arange(samples, dtype=np.float32)[:, None], (1, 2))


def clip(frames=17, first=0):
    return Clip(film(frames, first), 25.0, 1000 * first + ramp(40 * frames), RATE)


def pixels(latents):
    return np.rint((latents[:, 0, 0, 0] + 1) * 127.5)


# ----------------------------------------------------------------------------------- what is given


def test_a_retake_gives_the_network_no_latent_that_touches_its_span():
    span = (0.4, 0.6)  # frames 9.6 to 14.4
    asked = Task(17, 64, 64, FPS, video=KnownVideo(film(17), 0, span),
                 audio=KnownAudio(ramp(708), RATE, 0.0, span))  # fmt: skip
    found = encode(asked, CODEC, 64, 64, 0)
    np.testing.assert_array_equal(found.video_given, [True, True, False])
    np.testing.assert_array_equal(pixels(found.video), [0, 1, 9])
    # Latent i of the sound lasts from 0.04 i - 0.03 to 0.04 i + 0.01 s.
    number = np.arange(18)
    np.testing.assert_array_equal(found.audio_given, (number < 10) | (number > 15))


def test_what_a_clip_is_extended_before_is_given_at_its_later_place():
    asked = Task(17, 64, 64, FPS, video=KnownVideo(film(9), 8),
                 audio=KnownAudio(1 + ramp(375), RATE, 8 / FPS))  # fmt: skip
    found = encode(asked, CODEC, 64, 64, 0)
    # Its first frame alone is no latent there; the eight that follow are one.
    np.testing.assert_array_equal(found.video_given, [False, False, True])
    assert pixels(found.video)[2] == 1
    np.testing.assert_array_equal(found.audio_given, np.arange(18) >= 10)  # from 0.37 s on
    np.testing.assert_array_equal(found.audio[[8, 10], 0, 0], [0, 1 + 400 - 333])


def test_an_image_goes_through_its_own_crf_or_that_of_the_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr(given, "through_h264", lambda x, crf: seen.append(crf) or x)
    images = tuple(Picture(film(1), crf=crf) for crf in (None, 7, 0))
    encode(Task(9, 64, 64, FPS, images=images[:1], keyframes=images[1:]), CODEC, 64, 64, 33)
    assert sorted(seen) == [7, 33]


def test_a_clip_as_a_keyframe_is_as_many_whole_latents_as_it_fills():
    asked = Task(17, 64, 64, FPS, keyframes=(Picture(film(11), 8),))
    (found,) = encode(asked, CODEC, 64, 64, 33).keyframes
    np.testing.assert_array_equal(pixels(found.latents), [0, 1])
    assert found.frame == 8


def test_a_reference_is_read_at_its_own_size_and_rate():
    read = Reference(film(17), 0.75, downscale=2, time_scale=2)
    (found,) = encode(Task(17, 64, 64, FPS, references=(read,)), CODEC, 64, 64, 0).references
    assert found.latents.shape == (2, 1, 1, 1)  # frames 0, and 1 3 5 7 9 11 13 15
    np.testing.assert_array_equal(pixels(found.latents), [0, 1])
    assert (found.strength, found.reference) == (0.75, read)


def test_frames_that_are_known_take_their_places_in_whatever_pieces_a_clip_is_decoded():
    asked = Task(17, 64, 64, FPS, video=KnownVideo(film(9, 1), 8))
    frames = np.concatenate([*Made(np.zeros((3, 2, 2, 1)), None, asked).frames(CODEC)])
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [0] * 8 + [*range(1, 10)])


def test_a_part_that_goes_on_hears_the_end_and_adds_what_comes_after_it():
    tail = given.last_frames(clip(17), 9)
    np.testing.assert_array_equal(tail.video, film(9, 8))
    np.testing.assert_array_equal(tail.audio, ramp(17 * 40)[320:])
    whole = given.continued(clip(17), clip(17, 100), 9)
    np.testing.assert_array_equal(whole.video, [*film(17), *film(8, 109)])
    np.testing.assert_array_equal(whole.audio, [*ramp(17 * 40), *clip(17, 100).audio[360:]])


def test_latents_in_a_file_keep_the_sizes_of_their_clip_and_what_made_it(tmp_path):
    video, audio = np.ones((2, 2, 2, 1), np.float32), np.zeros((9, 1, 1), np.float32)
    asked = Task(9, 64, 96, 12.5)
    about = {"seed": 3, "recipe": {"name": "hq"}}
    output.save_latents(tmp_path / "a", Made(video, audio, asked, "a dog", about))
    found = output.read_latents(tmp_path / "a")
    assert (found.task, found.about) == (asked, about)
    np.testing.assert_array_equal(found.video, video)
    np.testing.assert_array_equal(found.audio, audio)
    output.save_latents(tmp_path / "b", Made(video, None, asked))
    assert output.read_latents(tmp_path / "b").task == dataclasses.replace(asked, sound=False)


def test_a_film_has_the_rate_sound_quality_and_memory_that_its_clip_has(monkeypatch, tmp_path):
    films = []
    monkeypatch.setattr(
        output, "stream_mp4", lambda path, frames, **how: films.append((len([*frames]), how))
    )
    made = Made(np.zeros((2, 2, 2, 1)), np.zeros((9, 1, 1)), Task(9, 64, 64, 12.5), about={"a": 1})
    made.write(tmp_path / "a.mp4", CODEC, crf=30)
    ((pieces, how),) = films
    assert len(how.pop("audio")) == 720  # 9 / 12.5 s
    assert pieces == 2
    assert how == {"fps": 12.5, "sample_rate": RATE, "crf": 30, "about": '{"a": 1}'}
    assert made.clip(CODEC).about == '{"a": 1}'


def test_the_sound_beside_the_frames_of_a_clip_is_at_its_own_rate(tmp_path):
    known = KnownAudio(ramp(800) / 800, 2000)
    made = Made(np.zeros((2, 2, 2, 1)), None, Task(9, 64, 64, FPS, audio=known))
    *_, sound = made.write(tmp_path / "a.png", CODEC)
    samples, rate = read_whole_sound(sound)
    assert (len(samples), rate) == (800, 2000)
    silent = dataclasses.replace(made, task=dataclasses.replace(made.task, sound=False))
    assert silent.sound(CODEC) == (None, RATE)


def test_a_sound_that_is_known_but_for_a_span_is_heard_outside_it():
    known = KnownAudio(ramp(375), RATE, 0.0, (0.2, 0.3))
    made = Made(None, np.zeros((9, 1, 1)), Task(9, 64, 64, FPS, picture=False, audio=known))
    samples, _ = made.sound(CODEC)
    np.testing.assert_array_equal(samples[:200], ramp(375)[:200])
    np.testing.assert_array_equal(samples[300:], ramp(375)[300:])
    np.testing.assert_array_equal(samples[220:280], 0)


def test_a_picture_that_is_given_whole_comes_back_at_an_even_size():
    video = KnownVideo(np.ones((9, 65, 67, 3), np.uint8))
    made = Made(None, np.zeros((9, 1, 1)), Task(9, 64, 64, FPS, video=video))
    assert np.concatenate([*made.frames(CODEC)]).shape == (9, 64, 66, 3)


def test_frames_of_another_size_are_rounded_to_the_nearest():
    large = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), np.uint8)
    made = Made(np.zeros((3, 2, 2, 1)), None, Task(17, 64, 64, FPS, video=KnownVideo(large)))
    frames = np.concatenate([*made.frames(CODEC)])
    np.testing.assert_array_equal(frames[:9], np.rint(covering(large, 64, 64)))


def test_a_file_for_a_stream_that_is_not_there_is_refused(tmp_path):
    video, audio = np.zeros((2, 2, 2, 1)), np.zeros((9, 1, 1))
    with pytest.raises(UserError, match="no sound to write"):
        Made(video, None, Task(9, 64, 64, FPS, sound=False)).write(tmp_path / "a.wav", CODEC)
    with pytest.raises(UserError, match=r"no picture to write; give a name in \.wav"):
        Made(None, audio, Task(9, 64, 64, FPS, picture=False)).write(tmp_path / "a.mp4", CODEC)
    assert not [*tmp_path.iterdir()]


def test_small_clips_are_large_enough_to_be_watched_by_their_shorter_side(tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(
        Clip, "save", lambda self, path: saved.update({path.name: self.video.shape})
    )
    monkeypatch.setattr(output, "contact_sheet", lambda *_, **__: None)
    small = Clip(np.zeros((2, 32, 64, 3), np.uint8), FPS, None, RATE)
    (tmp_path / "samples").mkdir()
    output.write_clips([small], ["a dog"], tmp_path)
    assert saved == dict.fromkeys(("000.mp4", "sample.mp4"), (2, 256, 512, 3))


def test_a_file_of_something_else_is_not_read_as_latents(tmp_path):
    save_file({"video": np.zeros((1, 1, 1, 1), np.float32)}, tmp_path / "a", {"kind": "weights"})
    with pytest.raises(UserError, match="holds no latents"):
        output.read_latents(tmp_path / "a")


# ------------------------------------------------------------------------------------------- makers


class Weights:
    """Notes what it is asked for."""

    def __init__(self, **changes):
        cfg = {"num_layers": 3, "num_heads": 8, "max_pos": (20.0,), "keyframe_embedding": True}
        cfg |= {"audio_video_attention": True} | changes
        self.config = SimpleNamespace(transformer=SimpleNamespace(**cfg))
        self.used, self.moved = [], []

    def params(self, loras):
        self.used.append(loras)

    def graph(self, loras=()):
        return "graph"

    def move(self, mesh):
        self.moved.append(mesh)

    def free(self):
        pass


@pytest.fixture
def maker(monkeypatch):
    """`maker(**fields)` -> a maker of a released model, its stages and its texts, call by call."""

    def make(config=None, **fields):
        calls, asked = [], []

        def run(stage, program, params, shapes, task, encoded, text, seeds, before, **how):
            fields = {"program": program, "shapes": shapes, "task": task, "encoded": encoded}
            calls.append(SimpleNamespace(**fields, seeds=seeds, before=before, **how))
            made = how["number"] + np.zeros((*shapes.video, 1)), np.full((9, 1, 1), how["number"])
            slots = np.ones((task.slots, *shapes.video[1:], 1)) if task.slots else None
            return [stages.Found(*made, slots) for _ in seeds]

        def texts(prompts):
            asked.append(list(prompts))
            return {"video_text": np.zeros((len(prompts), 2, 1))}

        monkeypatch.setattr(stages, "run", run)
        files = SimpleNamespace(version="2.3", kind="dev", upsampler="there", named=dict)
        files.load_upsampler = lambda dtype: lambda x: 1 + x.repeat(2, axis=2).repeat(2, axis=3)
        mesh = make_mesh(devices=jax.devices()[:1])
        fields = {"mesh": mesh, "files": files, "weights": Weights(**(config or {}))} | fields
        return Maker(texts=texts, open_codec=lambda: CODEC, **fields), calls, asked

    return make


def test_a_clip_is_led_away_from_the_negative_prompt_that_is_asked_for(maker):
    made, _, asked = maker()
    size = {"num_frames": 9, **SIZE}
    (one,) = made.make(["a dog"], negative_prompt="fog", **size)
    made.make(["a dog", "a cat"], **size)
    assert asked == [["a dog", "fog"], ["a dog", "a cat", making.NEGATIVE]]
    assert one.about["negative_prompt"] == "fog"


def test_every_stage_has_its_number_size_loras_and_the_first_the_references(maker):
    style, fast = Lora({}, name="style"), Lora({}, name="fast")
    adapters = (Adapter(style, (even(1.0), Strength(0.5, 0.25, 0))),)
    made, calls, _ = maker(adapters=adapters, distilled_lora=(fast, 0.5))
    wishes = {"references": [clip(9)], "num_frames": 9, "recipe": "hq", "batch_size": 3}
    (one,) = made.make(["a dog"], **wishes, height=128, width=64)
    assert [(call.number, call.batch, call.shapes.video) for call in calls] == [
        (0, 3, (2, 2, 1)),
        (1, 3, (2, 4, 2)),
    ]
    assert [len(call.encoded.references) for call in calls] == [1, 0]
    assert made.weights.used == [
        ((style, even(1.0)), (fast, even(0.25 * 0.5))),
        ((style, Strength(0.5, 0.25, 0)), (fast, even(0.5 * 0.5))),
    ]
    assert calls[0].before is None
    assert calls[1].before[0].video.shape == (2, 4, 2, 1)
    assert (one.video.max(), one.audio.max()) == (1, 0)  # the sound is that of the first stage


def test_keyframes_of_the_first_stage_grow_with_the_clip(maker):
    made, calls, _ = maker(distilled_lora=(Lora({}), 1.0))
    made.make(["a dog"], num_generated_keyframes=2, num_frames=9, recipe="two_stage",
              height=128, width=64)  # fmt: skip
    np.testing.assert_array_equal(calls[1].before[0].slots, np.full((2, 4, 2, 1), 2))
    with pytest.raises(UserError, match=r"from x1 to x0\.5 needs the upsampler x2"):
        made.make(["a dog"], num_frames=9, recipe="two_stage", height=128, width=64,
                  changes={"stage1.size": "1", "stage2.size": "0.5"})  # fmt: skip


def test_an_adapter_is_used_in_the_stages_in_which_it_has_a_strength(maker):
    style = Lora({}, name="style")
    made, *_ = maker(adapters=(Adapter(style, (even(1.0), even(0))),))
    made.make(["a dog"], num_frames=9, recipe="distilled", height=128, width=64)
    assert made.weights.used == [((style, even(1.0)),), ()]


def test_every_clip_is_told_its_own_seed(maker):
    made, _, _ = maker()
    clips = made.make(["a dog", "a cat"], num_frames=9, seed=2**32 - 1, **SIZE)
    assert [one.about["seed"] for one in clips] == [2**32 - 1, 0]


def test_what_decoded_the_last_clips_has_left_the_memory_when_the_next_are_made(maker):
    made, _, _ = maker()
    made.open_codec = lambda: SimpleNamespace(video=Video, audio=Audio)
    decoder, seen = made.codec, []
    made.texts = lambda prompts: seen.append(made.codec) or {"video_text": np.zeros((2, 2, 1))}
    made.make(["a dog"], num_frames=9, **SIZE)
    assert seen[0] is not decoder


def test_the_work_moves_to_the_mesh_that_is_best_for_it(maker):
    best, told = make_mesh(1, 1, 2, devices=jax.devices()[:2]), []
    made, calls, _ = maker(spread=lambda **sizes: told.append(sizes) or best)
    for _ in range(2):
        made.make(["a dog", "a cat"], num_frames=17, **SIZE)
    assert told == [{"rows": [2 * 4], "tokens": [3 * 2 * 2]}] * 2  # four passes of two clips
    made.make(["a dog"], num_frames=17, keyframes=(film(1)[0], 8, 1.0, 0), **SIZE)
    assert told[2] == {"rows": [4], "tokens": [12, 2 * 2]}
    assert made.weights.moved == [best]
    assert [call.program.mesh for call in calls] == [best] * 3


def test_a_mesh_that_does_not_divide_the_tokens_is_refused_before_the_work(maker):
    made, calls, asked = maker(mesh=make_mesh(1, 1, 8))
    with pytest.raises(UserError, match="sequence=8 does not divide 12 video tokens"):
        made.make(["a dog"], num_frames=17, **SIZE)
    assert (calls, asked) == ([], [])


def test_parts_of_a_long_clip_have_seeds_of_their_own_and_end_where_the_clip_does(maker):
    # 57 frames at most, of which a part sees the last 41: so 16 more, and the last 8.
    made, calls, _ = maker({"max_pos": (57 / FPS,)})
    (long,) = made.make(["a dog"], num_frames=81, seed=5, sound=False, **SIZE)
    assert [(call.task.num_frames, call.task.sound) for call in calls] == [
        (57, False), (57, False), (49, False),
    ]  # fmt: skip
    assert [call.seeds for call in calls] == [[5], [5 + 7919], [5 + 2 * 7919]]
    assert [call.encoded.video_given.sum() for call in calls[1:]] == [6, 6]
    assert (long.about["seed"], len(long.task.video.pixels), long.task.audio) == (5, 81, None)
    assert long.about["clip"]["num_frames"] == 81
    (long,) = made.make(["a dog"], num_frames=81, **SIZE)
    assert len(long.task.audio.samples) == pytest.approx(81 / FPS * RATE, abs=1)


def test_a_length_by_the_model_is_counted_at_the_rate_of_the_clip(maker, monkeypatch):
    rates, (made, calls, _) = [], maker()
    monkeypatch.setattr(made, "_auto_frames", lambda *given: rates.append(given[-1]) or 9)
    for wish in ({"fps": 50.0}, {}):
        made.make(["a dog"], duration="auto", **wish, **SIZE)
    assert rates == [call.task.fps for call in calls] == [50.0, 24.0]


def test_a_length_by_the_model_follows_its_sound_too_and_keeps_to_the_limits(maker):
    class Connectors(nnx.Module):
        def __call__(self, video, audio, mask):
            return video, audio, mask

    class Head(nnx.Module):
        def __call__(self, video, audio):
            return video[:, 0, 0] + 10 * audio[:, 0, 0]

    made, calls, _ = maker()
    made.files.release = SimpleNamespace(networks=["duration_head"], module=lambda *_: Head())
    made.weights.connectors = lambda: nnx.split(Connectors())
    shared = {"text_mask": np.ones((2, 2), bool), "video_text": np.ones((2, 2, 1), np.float32)}
    made.texts = lambda prompts: {**shared, "audio_text": np.full((2, 2, 1), 0.2, np.float32)}
    for limits in ((1.0, 20.0), (1.0, 2.0), (4.0, 8.0), (3.1, 20.0)):
        made.make(["a dog"], auto_duration=limits, **SIZE)
    assert [call.task.num_frames for call in calls] == [65, 41, 97, 81]  # of 3, 2, 4 and 3.1 s


@pytest.mark.parametrize("keep", [False, True])
def test_text_encoder_and_weights_leave_the_memory_unless_they_may_stay(maker, keep):
    freed, (made, _, _) = [], maker(keep=keep)
    made.texts.free = lambda: freed.append("text encoder")
    made.weights.free = lambda: freed.append("weights")
    made.make(["a dog"], num_frames=9, **SIZE)
    assert freed == ([] if keep else ["text encoder", "weights"])


def test_a_clip_that_is_given_is_made_at_the_nearest_size(maker):
    made, calls, _ = maker()
    made.make(["a dog"], video=Clip(np.zeros((9, 90, 70, 3), np.uint8), FPS, None, RATE))
    assert (calls[0].task.height, calls[0].task.width) == (96, 64)


def test_a_clip_that_is_read_at_half_its_size_divides_twice_as_often(maker):
    half = Adapter(Lora({}, {"reference_downscale_factor": "2"}), (even(1.0),))
    made, calls, _ = maker(adapters=(half,))
    with pytest.raises(UserError, match="height=96 is not a multiple of 64"):
        made.make(["a dog"], references=[clip(9)], num_frames=9, height=96, width=64)
    made.make(["a dog"], references=[clip(9)], num_frames=9, height=128, width=64)
    assert calls[0].encoded.references[0].latents.shape[1:3] == (2, 1)


def test_an_adapter_that_reads_a_clip_as_large_as_ours_does_without_one(maker, capsys):
    same = Lora({}, {"reference_downscale_factor": "1"}, name="pose")
    made, _, _ = maker(adapters=(Adapter(same, (even(1.0),)),))
    made.make(["a dog"], num_frames=9, **SIZE)
    assert "pose says that it reads a reference clip; none is given" in capsys.readouterr().out


def test_without_the_second_stage_a_clip_has_the_size_of_the_first(maker):
    made, calls, _ = maker(distilled_lora=(Lora({}), 1.0))
    (one,) = made.make(["a dog"], num_frames=9, recipe="two_stage", skip_stage_2=True, height=128,
                       width=192)  # fmt: skip
    assert [call.shapes.video for call in calls] == [(2, 2, 3)]
    assert (one.task.height, one.task.width) == (64, 96)


def test_guidance_on_a_distilled_model_is_told(maker, capsys):
    made, _, _ = maker()
    for kind in ("dev", "distilled"):
        made.files.kind = kind
        made.make(["a dog"], num_frames=9, recipe="one_stage", **SIZE)
    assert capsys.readouterr().out.count("note: guidance on a distilled model") == 1


def test_sound_alone_and_a_part_of_a_clip_are_made_in_one_stage(maker):
    made, calls, _ = maker(distilled_lora=(Lora({}), 1.0))
    made.make(["a dog"], recipe="two_stage", picture=False, num_frames=9)
    made.make(["a dog"], recipe="two_stage", video=clip(9), start=0.0, end=0.2)
    assert [call.number for call in calls] == [0, 0]


def test_a_sound_that_is_longer_than_the_model_knows_is_told(maker):
    made, calls, _ = maker({"max_pos": (1.0,)})
    made.make(["a dog"], audio=(ramp(2000), RATE), **SIZE)
    assert any("2.0 s are more than the 1 s" in note for note in calls[0].task.notes)


def test_parts_of_a_slow_clip_share_a_latent_at_least_and_their_seconds_are_added(
    maker, monkeypatch
):
    ticks = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))  # a phase lasts one
    monkeypatch.setattr(making, "time", clock)
    made, calls, _ = maker({"max_pos": (28.5,)})
    made.make(["a dog"], num_frames=81, fps=2.0, **SIZE)  # two seconds are four frames
    assert [call.task.num_frames for call in calls] == [57, 9 + 24]
    assert (made.seconds["text"], made.seconds["stage 1"]) == (2, 2)


def test_only_what_follows_from_text_and_images_is_made_in_parts():
    sound = KnownAudio(ramp(100), RATE)
    assert Task(9, 64, 64, FPS, images=(Picture(film(1)),)).fresh
    for wish in ({"video": KnownVideo(film(9))}, {"audio": sound}, {"voice": sound},
                 {"references": (Reference(film(9)),)}):  # fmt: skip
        assert not Task(9, 64, 64, FPS, **wish).fresh


def test_a_span_that_ends_where_a_latent_begins_leaves_it():
    asked = Task(17, 64, 64, FPS, video=KnownVideo(film(17), 0, (1 / FPS, 9 / FPS)))
    np.testing.assert_array_equal(encode(asked, CODEC, 64, 64, 0).video_given, [True, False, True])


def test_a_silent_clip_stays_silent_only_where_a_span_of_it_is_made_anew(maker):
    made, calls, _ = maker()
    silent = dataclasses.replace(clip(9), audio=None, sample_rate=RATE)
    made.make(["a dog"], video=silent, retake="video")
    made.make(["a dog"], video=silent, retake="video", start=0.1, end=0.2)
    assert [call.task.sound for call in calls] == [True, False]


def test_a_model_without_attention_between_the_streams_makes_none_for_the_other(maker):
    made, _, _ = maker({"audio_video_attention": False})
    span = {"start": 0.0, "end": 0.2}
    for wish in ({"video": clip(9)}, {"video": clip(9), **span}, {"audio": (ramp(375), RATE)}):
        with pytest.raises(UserError, match="trained without attention between sound and picture"):
            made.check(["a dog"], **wish)
    made.check(["a dog"], num_frames=9, **SIZE)


def test_a_prompt_is_written_out_for_an_image_if_there_is_one(maker, monkeypatch):
    seen, (made, _, asked) = [], maker(config=None)

    def enhance(prompts, gemma, *, mode, seed, **_):
        seen.append((gemma, mode, seed))
        return [f"{prompt}, at dusk" for prompt in prompts]

    monkeypatch.setattr(making, "enhance", enhance)
    wishes = {"num_frames": 9, "enhance_prompt": True, "enhancer": "gemma", **SIZE}
    made.make(["a dog"], **wishes, seed=4, image=(film(1)[0], 0, 1.0, 0))
    (one,) = made.make(["a dog"], **wishes)
    assert seen == [("gemma", "image-to-video", 4), ("gemma", "text-to-video", making.SEED)]
    assert [prompts[0] for prompts in asked] == ["a dog, at dusk"] * 2
    assert one.prompt == one.about["prompt"] == "a dog, at dusk"
