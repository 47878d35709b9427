"""Sampling around the network: who gets which noise, text, scale and place, with stand-ins."""

import dataclasses
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import kstest

from ltx2_jax.config import SampleConfig
from ltx2_jax.diffusion import schedules
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.diffusion.sampler import Latents
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip
from ltx2_jax.models.transformer.streams import Keep
from ltx2_jax.sampling import output, pipeline, programs
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.cache import TextCache
from ltx2_jax.training.objective import draw

# 2 x 2 x 4 video latents and 5 audio latents of 2 bins.
REQUEST = programs.Request((2, 2, 4), 5, 2, tiny.STRIDES, 12.5)
KEY = jax.random.key(3)


class Model:
    """In the place of the networks; remembers what it was given."""

    def __init__(self, channels=(8, 16), keyframes=True):
        cfg = SimpleNamespace(
            in_channels=channels[0],
            audio_in_channels=channels[1],
            keyframe_embedding=keyframes,
            num_layers=3,
        )
        self.transformer = Transformer(cfg)

    def context(self, text):
        self.text = text
        return "video context", "audio context", "mask"


class Transformer:
    def __init__(self, cfg):
        self.cfg = cfg

    def prepare(self, video, audio):
        self.before = video, audio
        return "prepared"

    def __call__(self, video, audio, keep, prepared):
        self.video, self.audio, self.keep, self.given = video, audio, keep, prepared
        return 2 * video.latent, 3 * audio.latent


# ----------------------------------------------------------------------------------------- noise


def noise(rows, key=KEY, **sizes):
    return programs.noise(Model(**sizes), REQUEST, jnp.asarray(rows), key)


def test_every_clip_starts_from_noise_of_its_own_number_whatever_it_is_batched_with():
    batch, others = noise([0, 1, 2, 3]), noise([3, 1])
    for together, some in zip(batch, others, strict=True):
        np.testing.assert_array_equal(some, together[jnp.asarray([3, 1])])
        values = np.asarray(together).reshape(4, -1)
        assert len(np.unique(values)) == values.size
        assert kstest(values.ravel(), "norm").pvalue > 1e-3
    assert [x.shape for x in batch] == [(4, 16, 8), (4, 5, 16)]


def test_picture_and_sound_start_from_different_noise_and_other_seeds_from_other_noise():
    video, audio = noise([0], channels=(16, 16))
    assert not np.isin(np.asarray(audio), np.asarray(video)).any()
    for a, b in zip(noise([0]), noise([0], key=jax.random.key(4)), strict=True):
        assert not np.isin(np.asarray(a), np.asarray(b)).any()


# --------------------------------------------------------------------------- what the network gets


def text(rows=2):
    return {name: x[:rows] for name, x in tiny.batch().items() if "text" in name}


def test_the_network_gets_each_stream_with_its_latents_text_and_places():
    model, given = Model(), text()
    request = dataclasses.replace(
        REQUEST, audio_clock=AudioClock(sample_rate=8000, hop=200, downsample=2)
    )
    x, sigma = noise([0, 1]), jnp.asarray([0.5, 0.25])
    velocity = programs.network(model, request, given)(x, sigma)
    np.testing.assert_array_equal(velocity.video, 2 * x.video)
    np.testing.assert_array_equal(velocity.audio, 3 * x.audio)
    network = model.transformer
    for got, latent, name in (
        (network.video, x.video, "video"),
        (network.audio, x.audio, "audio"),
    ):
        np.testing.assert_array_equal(got.latent, latent)
        np.testing.assert_array_equal(got.sigma, sigma)
        np.testing.assert_array_equal(got.timesteps, sigma[:, None])
        assert (got.context, got.context_mask) == (f"{name} context", "mask")
    jax.tree.map(np.testing.assert_array_equal, model.text, given)
    assert network.given == "prepared"
    assert network.keep is None
    assert all(stream.latent is None for stream in network.before)
    # Where training puts them: see `test_tokens_lie_where_...`.
    seconds, *pixels = np.asarray(network.video.positions)[0]
    np.testing.assert_allclose(seconds[[0, 15]], [[0, 0.08], [0.08, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal([axis[15] for axis in pixels], [[8, 16], [24, 32]])
    np.testing.assert_allclose(network.audio.positions[0, 0, -1], [0.175, 0.225], rtol=1e-6)
    np.testing.assert_array_equal(network.video.keyframes_mask, np.tile(np.arange(16) < 8, (2, 1)))
    assert network.audio.keyframes_mask is None


def test_a_stream_that_is_only_read_is_not_run_by_the_network():
    model, sigma = Model(), jnp.asarray([0.5, 0.25])
    velocity = programs.network(model, REQUEST, text())
    for enabled in ((True, True), (False, True), (True, False)):
        velocity(noise([0, 1]), sigma, enabled)
        assert (model.transformer.video.enabled, model.transformer.audio.enabled) == enabled


def test_sampling_and_training_put_tokens_in_the_same_places():
    batch = {k: v[:1] for k, v in tiny.batch().items()}  # at 12.5 frames a second
    drawn = draw(KEY, batch, tiny.config(), tiny.STRIDES)
    for modality, name in zip(
        programs.modalities(Model(), REQUEST, text(1)), ("video", "audio"), strict=True
    ):
        np.testing.assert_array_equal(modality.positions, drawn[name].conditions.positions)


def test_models_without_the_embedding_get_no_keyframes():
    video, audio = programs.modalities(Model(keyframes=False), REQUEST, text())
    assert video.keyframes_mask is audio.keyframes_mask is None


def test_what_a_pass_keeps_is_told_layer_by_layer():
    keep = programs._keep(programs.Pass(skipped=(1,)), 2, 3)
    for mask in (keep.video_self, keep.audio_self):
        np.testing.assert_array_equal(mask, [[True, False, True]] * 2)
    for mask in (keep.audio_to_video, keep.video_to_audio):
        assert mask.all()
    alone = programs._keep(programs.Pass(exchange=False), 2, 3)
    assert not alone.audio_to_video.any()
    assert not alone.video_to_audio.any()
    assert alone.video_self.all()
    assert alone.audio_self.all()
    rows = {name: jnp.asarray([[True, False], [True, True], [False, True]]) for name in vars(keep)}
    model = Model()
    programs.network(model, REQUEST, text(3), Keep(**rows))(noise([0, 1, 2]), jnp.ones(3))
    for mask in jax.tree.leaves(model.transformer.keep):
        np.testing.assert_array_equal(mask, rows["video_self"])


def test_the_released_passes_are_of_no_prompt_of_block_28_and_of_streams_apart():
    empty, skipped, apart = programs.released_passes(48)
    assert (empty.prompt, empty.skipped, empty.exchange) == (False, (), True)
    assert (skipped.prompt, skipped.skipped, skipped.exchange) == (True, (28,), True)
    assert (apart.prompt, apart.skipped, apart.exchange) == (True, (), False)
    assert programs.released_passes(2)[1].skipped == (1,)


# ------------------------------------------------------------------------------ the whole program


@pytest.fixture
def steady(monkeypatch):
    """Velocities that are the numbers in the text: a step from 1 to 0 takes them from the noise."""
    model = Model()
    monkeypatch.setattr(programs.nnx, "merge", lambda *_: model)

    def network(model, request, text, *others):
        video, audio = (text[name][:, :1, None] for name in ("video_text", "audio_text"))
        return lambda x, sigma: Latents(video + 0 * x.video, audio + 0 * x.audio)

    monkeypatch.setattr(programs, "network", network)
    return model


PROMPTS = {"video_text": jnp.asarray([[1.0], [2.0]]), "audio_text": jnp.asarray([[3.0], [4.0]])}
EMPTY = {"video_text": jnp.asarray([[10.0]]), "audio_text": jnp.asarray([[20.0]])}


def taken(clean, rows):
    """What was taken from the noise of both streams, one number a clip."""
    for tokens, start in zip(clean, noise(rows), strict=True):
        if tokens.ndim == 5:
            got = tokens.reshape(start.shape)
        else:
            got = jnp.swapaxes(tokens, 2, 3).reshape(start.shape)  # channels, then bins
        difference = np.asarray(start - got)
        yield difference.mean(axis=(1, 2))
        np.testing.assert_allclose(difference, difference[:, :1, :1] + 0 * difference, atol=1e-4)


def generated(*strengths, passes=(programs.EMPTY_CAPTION,), rows=(5, 2)):
    clean = programs.sample(
        None, (PROMPTS, EMPTY), jnp.asarray(rows), KEY, jnp.asarray([1.0, 0.0]),
        strengths, graphdef=None, request=REQUEST, passes=passes,
    )  # fmt: skip
    assert [x.shape for x in clean] == [(2, 2, 2, 4, 8), (2, 5, 2, 8)]
    return list(taken(clean, rows))


def test_picture_and_sound_are_guided_away_from_no_prompt_each_by_its_scale(steady):
    video, audio = generated((2.0, 6.0))
    np.testing.assert_allclose(video, [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)], atol=1e-4)
    np.testing.assert_allclose(audio, [20 + 7 * (3 - 20), 20 + 7 * (4 - 20)], atol=1e-4)


def test_without_guidance_there_is_the_prompt_alone(steady):
    video, audio = generated(passes=())
    np.testing.assert_allclose(video, [1, 2], atol=1e-4)
    np.testing.assert_allclose(audio, [3, 4], atol=1e-4)


@pytest.mark.usefixtures("steady")
def test_other_passes_add_what_they_differ_by_each_with_its_strengths():
    passes = (programs.Pass(skipped=(0,)), programs.EMPTY_CAPTION)
    video, audio = generated(
        (9.0, 9.0), (2.0, 6.0), passes=passes
    )  # the first sees the prompt as well
    np.testing.assert_allclose(video, [1 + 2 * (1 - 10), 2 + 2 * (2 - 10)], atol=1e-4)
    np.testing.assert_allclose(audio, [3 + 6 * (3 - 20), 4 + 6 * (4 - 20)], atol=1e-4)


# -------------------------------------------------------------------------------------- pipelines


class Encoder:
    """The length of a prompt, twice that for the sound."""

    shared, full, asked = False, False, ()

    def features(self, prompts):
        self.asked = (*self.asked, prompts)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.float32)[:, None, None]
        lengths = np.repeat(lengths, 2, axis=1)
        mask = np.ones((len(prompts), 2), bool)
        mask[:, 0] = self.full
        return lengths, 2 * lengths, mask


class Cached(Encoder, TextCache):
    def __init__(self):
        self.released = 0

    def free(self):
        self.released += 1


@pytest.fixture
def piped(monkeypatch):
    """`piped(encoder, mesh, sample)` -> a pipeline, and what it gave its program call by call."""

    def make(encoder=None, mesh=None, sample=None):
        calls = []

        def program(params, texts, rows, key, sigmas, strengths, *, graphdef, request, passes):
            text, null_text = texts
            fields = dict(text=text, null=null_text, rows=rows, key=key, sigmas=sigmas)
            fields |= {"strengths": strengths, "passes": passes}
            calls.append(SimpleNamespace(**fields, request=request, params=params))
            return text["video_text"][:, 0, 0], np.asarray(rows)

        codec = MagicMock()
        codec.video.strides, codec.audio.bins = tiny.STRIDES, 2
        codec.audio.latents_per_second = 20
        monkeypatch.setattr(pipeline.trainable, "sampled_graph", lambda config: "graph")
        monkeypatch.setattr(pipeline, "make_sampler", lambda: program)
        config = tiny.config(sample=sample or SampleConfig(batch_size=2))
        size = pipeline.ClipSize(5, 16, 32, 12.5)  # 2 x 2 x 4 latents
        pipe = pipeline.Pipeline(config, "weights", codec, encoder or Encoder(), size, mesh)
        return pipe, calls

    return make


PROMPT_TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def test_clips_come_in_the_order_of_their_prompts_from_batches_of_one_size(piped):
    pipe, calls = piped()
    latents = list(pipe.latents(PROMPT_TEXTS))
    assert pipe.text_encoder.asked == ([*PROMPT_TEXTS, ""],)  # before any clip is made
    assert [float(video) for video, _ in latents] == [1, 2, 3, 4, 5]
    assert [int(row) for _, row in latents] == [0, 1, 2, 3, 4]
    assert [call.rows.tolist() for call in calls] == [[0, 1], [2, 3], [4, 5]]
    assert [call.text["audio_text"][:, 0, 0].tolist() for call in calls] == [
        [2, 4], [6, 8], [10, 10],
    ]  # fmt: skip
    for call in calls:
        assert call.params == "weights"
        assert {name: x.shape[0] for name, x in call.null.items()} == dict.fromkeys(call.text, 1)
        assert not call.null["video_text"].any()  # the prompt without a letter
        assert not call.null["audio_text"].any()


def test_a_few_prompts_are_a_batch_of_their_own(piped):
    pipe, calls = piped(sample=SampleConfig(batch_size=16))
    assert len(list(pipe.latents(PROMPT_TEXTS[:3]))) == 3
    assert [call.rows.tolist() for call in calls] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("sizes", "guidance", "rows"),
    [
        ((4, 1, 1), (3.0, 7.0), [[0, 1], [2, 3], [4, 5]]),  # two passes of two clips fill it
        ((4, 1, 1), (1.0, 1.0), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 2, 2), (1.0, 1.0), [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_a_batch_fills_the_data_axis_of_the_mesh(piped, sizes, guidance, rows):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    video, audio = guidance
    sample = SampleConfig(batch_size=1, video_guidance=video, audio_guidance=audio)
    if sizes == (2, 2, 2):
        sample = dataclasses.replace(sample, batch_size=2)
    pipe, calls = piped(mesh=mesh, sample=sample)
    assert len(list(pipe.latents(PROMPT_TEXTS))) == 5
    assert [call.rows.tolist() for call in calls] == rows


def test_settings_reach_the_program_and_may_be_replaced_for_a_call(piped):
    pipe, calls = piped(sample=SampleConfig(steps=4, seed=7, video_guidance=2.0))
    other = SampleConfig(steps=8, schedule="distilled", seed=8, audio_guidance=5.0)
    list(pipe.latents(["a"])), list(pipe.latents(["a"], sample=other))
    ours, theirs = calls
    assert (ours.key, theirs.key) == (jax.random.key(7), jax.random.key(8))
    assert ours.strengths == ((1.0, 6.0),)  # one below the scales of video and audio
    assert theirs.strengths == ((2.0, 4.0),)
    np.testing.assert_array_equal(ours.sigmas, schedules.ltx2_sigmas(4, tokens=16))
    np.testing.assert_array_equal(theirs.sigmas, np.float32(schedules.DISTILLED_SIGMAS))


def test_the_program_is_made_for_the_size_of_the_clips_and_their_codec(piped):
    pipe, calls = piped()
    list(pipe.latents(["a"]))
    request = calls[0].request
    assert request.video_shape == (2, 2, 4)
    assert request.audio_length == 8  # 5 frames at 12.5 a second, 20 latents a second
    assert request.audio_bins == 2
    assert (request.strides, request.fps) == (tiny.STRIDES, 12.5)
    assert request.audio_clock is pipe.codec.audio.clock
    assert pipe.clip_bytes == 5 * 16 * 32 * 3


@pytest.mark.parametrize(
    ("guidance", "guided"), [((1.0, 1.0), False), ((1.0, 7.0), True), ((3.0, 1.0), True)]
)
def test_a_second_pass_is_made_unless_both_scales_are_one(piped, guidance, guided):
    pipe, calls = piped()
    sample = SampleConfig(video_guidance=guidance[0], audio_guidance=guidance[1])
    list(pipe.latents(["a"], sample=sample))
    assert calls[0].passes == ((programs.EMPTY_CAPTION,) if guided else ())


def test_a_text_encoder_behind_a_cache_is_freed_before_the_clips_are_made(piped):
    pipe, calls = piped(encoder := Cached())
    latents = pipe.latents(["a", "bb", "ccc"])
    next(latents)
    assert (encoder.released, len(calls)) == (1, 1)
    assert len(list(latents)) == 2
    assert encoder.released == 1


def test_prompts_that_are_cut_are_counted_and_the_empty_one_is_none_of_them(piped, capsys):
    encoder = Encoder()
    encoder.full = True
    pipe, _ = piped(encoder)
    list(pipe.latents(["a", "bb"]))
    assert capsys.readouterr().out.startswith("prompts that fill all 2 tokens: 2")


def test_clips_are_decoded_at_their_frame_rate_into_their_files(piped, monkeypatch):
    pipe, _ = piped()
    monkeypatch.setattr(pipeline, "decode_clip", lambda *args: args)
    codec, fps = pipe.codec, 12.5
    assert pipe("ccc") == (codec, 3.0, 0, fps)
    assert pipe(["a", "bb"]) == [(codec, 1.0, 0, fps), (codec, 2.0, 1, fps)]
    written = []
    monkeypatch.setattr(pipeline, "write_clip", lambda *args: written.append(args))
    pipe.save(["a", "bb"], ["one.mp4", "two.mp4"])
    assert written == [("one.mp4", codec, 1.0, 0, fps), ("two.mp4", codec, 2.0, 1, fps)]


def test_a_mesh_that_does_not_divide_the_tokens_of_a_clip_is_refused(piped):
    pipe, _ = piped()
    size, mesh = pipeline.ClipSize(5, 16, 24, 12.5), make_mesh(1, 1, 8)
    with pytest.raises(UserError, match="sequence=8 does not divide 12 video tokens"):
        pipeline.Pipeline(pipe.config, "weights", pipe.codec, Encoder(), size, mesh)


def test_a_workdir_gives_its_weights_as_a_sampler_keeps_them_and_its_assets(
    monkeypatch, tmp_path, piped
):
    piped()  # the program is a stand-in
    (tmp_path / "assets").mkdir()
    asked = {}
    schema = SimpleNamespace(
        num_frames=5, height=16, width=32, fps=12.5, codec="codec", text_encoder="text"
    )
    codec = MagicMock()
    codec.video.strides, codec.audio.latents_per_second = tiny.STRIDES, 20

    def note(name, result):
        return lambda *args, **kw: asked.update({name: (args, kw)}) or result

    monkeypatch.setattr(pipeline, "weights_of_run", note("run", (tiny.config(), "weights", 4)))
    monkeypatch.setattr(pipeline, "read_schema", note("schema", schema))
    monkeypatch.setattr(pipeline, "load_codec", note("codec", codec))
    monkeypatch.setattr(pipeline, "load_caption_encoder", note("text", "encoder"))
    mesh = make_mesh(2, 2, 2)
    pipe = pipeline.Pipeline.from_workdir(tmp_path, step=4, mesh=mesh, text_cache="cache")
    assert asked["run"] == ((tmp_path, mesh), {"step": 4, "for_sampling": True})
    assert asked["schema"][0] == (tmp_path / "assets",)
    codec_file = (tmp_path / "assets" / "codec",)
    assert asked["codec"] == (codec_file, {"devices": list(mesh.devices.flat)})
    assert asked["text"][0] == (tmp_path / "assets" / "text", mesh, "cache")
    assert (pipe.params, pipe.codec, pipe.text_encoder) == ("weights", codec, "encoder")
    assert pipe.size == pipeline.ClipSize(num_frames=5, height=16, width=32, fps=12.5)
    assert pipe.mesh == mesh


# ---------------------------------------------------------------------------- for a person to see


def test_clips_are_written_with_their_prompts_and_the_first_are_shown(monkeypatch, tmp_path):
    saved, shown = {}, {}
    monkeypatch.setattr(Clip, "save", lambda clip, path: saved.update({path: clip}))

    def sheet(path, clips, prompts, title):
        shown.update(path=path, clips=list(clips), prompts=list(prompts))

    monkeypatch.setattr(output, "contact_sheet", sheet)
    clips = [Clip(np.full((1, 2, 300, 3), i, np.uint8), 8.0) for i in range(5)]
    prompts = ["one, two", "b", "c", "d", 'say "e"']
    output.write_clips(clips, prompts, tmp_path)
    table = (tmp_path / "samples" / "captions.csv").read_text()
    assert table.splitlines()[:2] == ["video,caption", '000.mp4,"one, two"']
    assert table.splitlines()[-1] == '004.mp4,"say ""e"""'
    for i in range(5):
        assert saved[tmp_path / "samples" / f"{i:03d}.mp4"].video[0, 0, 0, 0] == i
    assert saved[tmp_path / "sample.mp4"].video[0, 0, 0, 0] == 0
    assert [clip.video[0, 0, 0, 0] for clip in shown["clips"]] == [0, 1, 2, 3]
    assert (shown["path"], shown["prompts"]) == (tmp_path / "samples.png", prompts[:4])


def test_small_clips_are_enlarged_pixel_by_pixel_and_large_ones_are_not():
    video = np.arange(2 * 100 * 120 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 100, 120, 3)
    clip = Clip(video, 8.0, np.zeros((4, 2), np.float32), 16000)
    large = output.enlarged(clip)
    assert large.video.shape == (2, 200, 240, 3)
    for row in (0, 1):
        for column in (0, 1):
            np.testing.assert_array_equal(large.video[:, row::2, column::2], video)
    assert (large.fps, large.sample_rate) == (8.0, 16000)
    np.testing.assert_array_equal(output.enlarged(clip, shortest=90).video, video)
