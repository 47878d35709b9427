"""The compiled sampler with what is given: the same clip on every mesh, and what its loop holds."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_generate import placed

from ltx2_jax.diffusion import conditioning, steppers
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.sampler import Given, Latents
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.sampling import programs
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Pass, Request, make_sampler
from ltx2_jax.sharding import make_mesh

CONFIG = tiny.config()
# 2 x 2 x 4 video tokens, 5 audio tokens, 6 text tokens: no two are as many.
REQUEST = Request((2, 2, 4), 5, 1, tiny.STRIDES, 24.0)
PLACE = {"fps": 24.0, "strides": tiny.STRIDES}
SIGMAS = np.asarray([1.0, 0.7, 0.3, 0.0], np.float32)
LATENTS = tiny.batch()


def given(clips=slice(1), **changes):
    """An image at frame 0, a keyframe beside the clip, and a sound that is frozen."""
    image = LATENTS["video"][clips, :1]
    video = conditioning.of_video(np.zeros_like(LATENTS["video"][clips]), **PLACE, marked=True)
    video = conditioning.frames(video, image)
    video = conditioning.keyframe(video, image, 3, **PLACE, attention=0.5)
    audio = conditioning.freeze(conditioning.of_audio(LATENTS["audio"][clips]))
    return Given(**({"video": video, "audio": audio} | changes))


def inputs(params, clips=slice(1)):
    text = {k: v[clips] for k, v in LATENTS.items() if "text" in k}
    null = {k: v[None] for k, v in tiny.null_text().items()}
    strengths = ((np.float32(2.0), np.float32(4.0)),)
    return params, (text, null), np.arange(8)[clips], jax.random.key(3), SIGMAS, strengths


def static(config=CONFIG, **kw):
    graph = ltx2.graph(config.networks)
    return {"graphdef": graph, "request": REQUEST, "passes": (EMPTY_CAPTION,)} | kw


@cache
def on_mesh(sizes, together):
    """The program for so many clips, and the first 8 clips, or the one."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    params, rescales = placed(CONFIG, mesh), (np.float32(0.7), np.float32(0.0))
    batches = [slice(i, i + together) for i in range(0, 8, together)]
    calls = [(*inputs(params, clips), rescales, given(clips)) for clips in batches]
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        program = make_sampler().lower(*calls[0], **static()).compile()
        made = [program(*args) for args in calls]
    return program, [np.concatenate(streams) for streams in zip(*made, strict=True)]


# ------------------------------------------------------------------------------------ on every mesh


def test_clips_spread_over_eight_devices_are_those_that_one_makes_bit_by_bit():
    """A device has one clip in either case: larger products may be summed in another order."""
    for a, b in zip(on_mesh((8, 1, 1), 8)[1], on_mesh((1, 1, 1), 1)[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_clip_with_a_keyframe_beside_it_is_the_same_on_every_mesh():
    for a, b in zip(on_mesh((1, 4, 2), 1)[1], on_mesh((1, 1, 1), 1)[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_what_is_given_comes_back_bit_by_bit():
    for sizes in ((1, 1, 1), (1, 4, 2)):
        video, audio = on_mesh(sizes, 1)[1]
        np.testing.assert_array_equal(video[:, 0], LATENTS["video"][:, 0])
        np.testing.assert_array_equal(audio, LATENTS["audio"])
        assert np.abs(video[:, 1] - LATENTS["video"][:, 1]).max() > 0.1


def test_a_mesh_that_does_not_divide_what_is_appended_is_refused(mesh_context):
    small = np.zeros((1, 1, 1, 1, 8), np.float32)
    video = conditioning.reference_video(given().video, small, **PLACE)
    known = Given(video, None)
    message = (
        "sequence=8 does not divide 25 video tokens, 16 of the clip and 9 of keyframes and "
        "references; sizes that do: 1, 5"
    )
    with mesh_context(1, 1, 8), pytest.raises(UserError, match=message):
        programs._placed(known, None)


# ------------------------------------------------------------------------------------- the program


def eqns(jaxpr):
    """All equations of a jaxpr, with the number of loops around each."""
    for eqn in jaxpr.eqns:
        yield 0, eqn
        inner = eqn.primitive.name in ("scan", "while")
        for sub in subs(eqn):
            for depth, other in eqns(sub):
                yield depth + inner, other


def subs(eqn):
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x


def traced(prompt_adaln, sizes=(1, 1, 1), clips=1, changes=None, **kw):
    model = dataclasses.replace(tiny.MODEL, prompt_adaln=prompt_adaln)
    config = tiny.config(model=model)
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    params = ltx2.abstract_params(config.networks, mesh, for_sampling=True)
    args = inputs(params, slice(clips))
    known, options = given(slice(clips), **(changes or {})), static(config, **kw)
    run = lambda *args: programs.sample(*args, None, known, **options)  # noqa: E731
    with jax.set_mesh(mesh):
        return list(eqns(jax.make_jaxpr(run)(*args).jaxpr))


def text_products(found):
    """By the loops around them: matrix products whose result has a row per text token."""
    return {
        depth
        for depth, eqn in found
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[1:2] == (6,)
        and eqn.outvars[0].aval.ndim == 3
    }  # fmt: skip


def loops(found):
    return [depth for depth, eqn in found if eqn.primitive.name in ("scan", "while")]


@pytest.mark.parametrize("stepper", [steppers.Euler(), steppers.Res2s()], ids=["euler", "res_2s"])
def test_the_steps_are_one_loop_with_one_loop_over_blocks_and_constant_text_is_outside(stepper):
    found = traced(False, stepper=stepper)
    # Before it: the layers of the connectors, and the text keys and values of the blocks.
    assert loops(found).count(1) == 1
    assert max(loops(found)) == 1
    assert text_products(found) == {1}
    names = {eqn.primitive.name for _, eqn in found}
    assert not {name for name in names if "callback" in name or "feed" in name}


def test_text_that_sigma_modulates_is_read_again_in_every_step():
    assert 2 in text_products(traced(True))


STATEFUL = Guidance(direction="apg", apg_norm=1.0, apg_momentum=0.5, skip_steps=(1, 0))


@pytest.mark.parametrize(
    ("stepper", "how"),
    [
        (steppers.Res2s(by_token=True), STATEFUL),
        (steppers.EulerCFGPlusPlus(), Guidance(direction="star")),
        (steppers.GradientEstimation(), dataclasses.replace(STATEFUL, skip_steps=(1, 1))),
    ],
    ids=["res_2s", "cfg++", "gradient estimation"],
)
def test_every_kind_of_step_and_guidance_runs_on_a_mesh(stepper, how):
    """Arrays there have their shardings in their types: what does not fit cannot be traced."""
    audio = conditioning.of_audio(LATENTS["audio"][:2])
    found = traced(True, (2, 2, 2), 2, {"audio": audio}, stepper=stepper, guidance=how)
    # One copy of the network for each combination of streams that run.
    assert loops(found).count(1) == (2 if how.skip_steps == (1, 0) else 1)


def test_the_compiled_program_sends_nothing_to_the_host():
    text = on_mesh((1, 1, 1), 1)[0].as_text()
    assert not any(word in text for word in ("outfeed", "infeed", "callback", " send(", " recv("))


# --------------------------------------------------------------------------------- with stand-ins


class Model:
    """In the place of the networks: velocities of one half, whatever it is given."""

    class transformer:
        cfg = tiny.MODEL

        @staticmethod
        def prepare(*streams):
            return None

        @staticmethod
        def __call__(video, audio, keep, prepared):
            return tuple(None if s is None else 0.5 + 0 * s.latent for s in (video, audio))

    transformer = transformer()

    @staticmethod
    def context(text):
        return text["video_text"], text["audio_text"], text["text_mask"]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(programs.nnx, "merge", lambda *_: Model)

    def run(known, start=None, sigmas=SIGMAS, noises=(None, None), **kw):
        args = inputs(None, slice(2))
        args = (*args[:4], jnp.asarray(sigmas), ())
        options = {"graphdef": None, "request": REQUEST, "passes": ()} | kw
        return programs.sample(*args, None, known, start, noises, **options)

    return run


def bare(clips=2):
    video = conditioning.of_video(np.zeros_like(LATENTS["video"][:clips]), **PLACE, marked=True)
    return Given(video, conditioning.of_audio(np.zeros_like(LATENTS["audio"][:clips])))


def test_a_later_stage_starts_from_latents_at_its_first_noise_level(stand_in):
    start = LATENTS["video"][:2], LATENTS["audio"][:2]
    known = bare()
    video, audio = stand_in(known, start, sigmas=[0.6, 0.0])
    drawn = programs.noise(Model, REQUEST, np.arange(2), jax.random.key(3))
    for got, latents, noise in zip((video, audio), start, drawn, strict=True):
        want = 0.4 * latents + 0.6 * np.asarray(noise).reshape(latents.shape) - 0.6 * 0.5
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
def test_the_latents_that_a_stage_starts_from_are_donated():
    start = jnp.asarray(LATENTS["video"][:2]), jnp.asarray(LATENTS["audio"][:2])
    args = *inputs(None, slice(2))[:-1], ()
    make_sampler()(*args, None, bare(), start, graphdef=None, request=REQUEST, passes=())
    assert all(a.is_deleted() for a in start)


def test_what_is_appended_does_not_change_the_noise_of_the_clip(stand_in):
    plain, more = bare(), given(slice(2), audio=bare().audio)
    drawn = [
        programs.noise(Model, REQUEST, np.arange(2), jax.random.key(3), g) for g in (plain, more)
    ]
    alone = programs.noise(Model, REQUEST, np.arange(2), jax.random.key(3))
    assert drawn[1].video.shape == (2, 24, 8)
    np.testing.assert_array_equal(drawn[1].video[:, :16], alone.video)
    assert not np.isin(drawn[1].video[:, 16:], alone.video).any()
    for got in (*drawn[0], drawn[1].audio):
        assert any(got.shape == a.shape and (got == a).all() for a in alone)


def test_the_noise_of_a_step_is_of_its_clip_and_call_alone():
    x = Latents(jnp.zeros((3, 16, 8)), jnp.zeros((3, 5, 16)))

    def of(rows, call, **kw):
        some = jax.tree.map(lambda a: a[: len(rows)], x)
        return programs.step_noise(some, jnp.asarray(rows), jax.random.key(3), call, **kw)

    together, alone = of([0, 1, 2], 4), of([2], 4)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[2:], b)
    assert not np.isin(of([2], 5).video, alone.video).any()
    assert not np.isin(alone.audio, alone.video).any()
    start = programs.noise(Model, REQUEST, jnp.asarray([2]), jax.random.key(3))
    assert not np.isin(start.video, alone.video).any()
    for a in of([0, 1], 4, normalized=True):
        np.testing.assert_allclose(np.mean(a, (1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(np.std(a, (1, 2), ddof=1), 1, rtol=1e-5)


class Noise(steppers.Euler):
    """Leads to the noise of its last call."""

    draws = normalized = True

    def step(self, row, x, found, memory, noise, given):
        return noise, memory


def test_a_stepper_gets_noise_of_no_mean_and_deviation_one_where_it_asks_for_that(stand_in):
    for latents in stand_in(None, stepper=Noise()):
        axes = tuple(range(1, latents.ndim))
        np.testing.assert_allclose(np.mean(latents, axes), 0, atol=1e-6)
        np.testing.assert_allclose(np.std(latents, axes, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_a_clip_may_have_one_stream(stand_in, missing):
    known = bare()._replace(**{missing: None})
    got = dict(zip(("video", "audio"), stand_in(known), strict=True))
    assert got.pop(missing) is None
    (latents,) = got.values()
    assert np.isfinite(latents).all()


def test_keyframes_that_were_generated_are_a_third_result(stand_in):
    known = bare()
    video = conditioning.keyframe_slots(known.video, [2, 4], **PLACE)
    *_, keyframes = stand_in(known._replace(video=video))
    assert keyframes.shape == (2, 2, 2, 4, 8)


@pytest.mark.parametrize(
    ("passes", "how"),
    [
        ((), Guidance()),
        ((Pass(skipped=(0,)),), Guidance()),
        ((EMPTY_CAPTION,), Guidance(skip_steps=(1, 1))),
    ],
    ids=["no pass", "another", "skipped"],
)
def test_cfg_plus_plus_without_its_pass_is_refused(stand_in, passes, how):
    with pytest.raises(UserError, match="needs the pass without a prompt in every step"):
        stand_in(bare(), passes=passes, guidance=how, stepper=steppers.EulerCFGPlusPlus())


def test_the_sound_of_a_pass_may_have_the_prompt_where_its_picture_has_none(monkeypatch):
    seen = {}

    def prepare(video, audio):
        seen.update(video=video.context, audio=audio.context)
        seen.update(video_mask=video.context_mask, audio_mask=audio.context_mask)

    monkeypatch.setattr(Model.transformer, "prepare", prepare, raising=False)
    text, null = ({k: np.full((1, 2, 1), v) for k in ltx2.TEXT_FIELDS} for v in (1.0, 0.0))
    guide = programs._guide(
        Model, (text, null), np.arange(1), (), None, REQUEST,
        (Pass(prompt=False, audio_prompt=True),), Guidance(), bare(1),
    )  # fmt: skip
    assert guide.uncond == 0
    np.testing.assert_array_equal(seen["video"][:, 0, 0], [1, 0])
    np.testing.assert_array_equal(seen["audio"][:, 0, 0], [1, 1])
    np.testing.assert_array_equal(seen["video_mask"][:, 0, 0], [1, 0])
    np.testing.assert_array_equal(seen["audio_mask"][:, 0, 0], [1, 1])


def test_the_network_is_told_of_a_given_clip_where_its_tokens_are_and_how_much_they_attend():
    known = given()
    text = {name: np.full((1, 2, 1), n) for n, name in enumerate(ltx2.TEXT_FIELDS)}
    video, audio = programs.modalities(Model, REQUEST, text, known)
    attention = np.ones((24, 24))
    attention[:16, 16:] = attention[16:, :16] = 0.5  # between the clip and its keyframe
    np.testing.assert_array_equal(video.attention_mask, attention[None])
    assert audio.attention_mask is None
    for stream, c in ((video, known.video), (audio, known.audio)):
        np.testing.assert_array_equal(stream.positions, c.positions)


def test_the_pass_without_a_prompt_is_found_behind_others():
    text, null = ({k: np.full((1, 2, 1), v) for k in ltx2.TEXT_FIELDS} for v in (1.0, 0.0))
    passes = (Pass(exchange=False), EMPTY_CAPTION)
    args = Model, (text, null), np.arange(1), (), None, REQUEST
    assert programs._guide(*args, passes, Guidance(), bare(1)).uncond == 1
    assert programs._guide(*args, passes[:1], Guidance(), bare(1)).uncond is None


def test_a_pass_skips_blocks_of_either_stream():
    keep = programs._keep(Pass(skipped=(0,), audio_skipped=(1, 2)), 1, 3)
    np.testing.assert_array_equal(keep.video_self, [[False, True, True]])
    np.testing.assert_array_equal(keep.audio_self, [[True, False, False]])


def test_a_pass_that_skips_blocks_of_the_sound_alone_is_told_so(monkeypatch):
    seen = []
    monkeypatch.setattr(
        programs, "network", lambda model, request, text, keep, *_: seen.append(keep)
    )
    texts = ({name: np.ones((1, 2, 1)) for name in ltx2.TEXT_FIELDS},) * 2
    passes = (Pass(audio_skipped=(1,)),)
    programs._guide(
        Model, texts, np.arange(1), ((0.0, 1.0),), None, REQUEST, passes, Guidance(), bare(1)
    )
    np.testing.assert_array_equal(seen[0].audio_self, [[True, True], [True, False]])
    assert seen[0].video_self.all()
