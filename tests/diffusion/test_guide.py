"""Guidance in the loop: directions, numbers by the step, and steps without the network."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import conditioning, guidance, steppers
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.guide import Guided
from ltx2_jax.diffusion.sampler import NOTHING, Given, Latents, all_passes, denoise_by
from ltx2_jax.errors import UserError

SIGMAS = jnp.asarray([1.0, 0.8, 0.5, 0.2, 0.0])
TARGETS = {"prompt": 1.0, "empty": -2.0, "other": 5.0}


def noise(seed=0, clips=2):
    drawn = np.random.default_rng(seed).normal(size=(clips, 9, 3)).astype(np.float32)
    return Latents(jnp.asarray(drawn[:, :5]), jnp.asarray(drawn[:, 5:]))


def network(condition, *_):
    """Estimates that lie between the latents and a number, the same of both streams."""

    def velocity(x, sigma, enabled=(True, True)):
        for stream, runs in zip(("video", "audio"), enabled, strict=True):
            if runs:
                jax.debug.callback(lambda s, name=stream: CALLS.append((name, float(s[0]))), sigma)
        towards = condition[:, None, None]
        return Latents(*(None if a is None else 0.5 * (a - towards) for a in x))

    return velocity


CALLS = []


def guide(names=("empty",), strengths=((2.0, 6.0),), given=NOTHING, clips=2, **kw):
    conditions = [jnp.full(clips, TARGETS[name]) for name in ("prompt", *names)]
    numbers = jax.tree.map(jnp.asarray, tuple(strengths))
    uncond = names.index("empty") if "empty" in names else None
    passes = all_passes(network, conditions, given)
    return Guided(passes, numbers, uncond=uncond, given=given, **kw)


def run(guide, stepper=steppers.Euler(), given=NOTHING, x=None, sigmas=SIGMAS):  # noqa: B008
    CALLS.clear()
    x = noise() if x is None else x
    fresh = lambda call: jax.tree.map(jnp.ones_like, x)  # noqa: E731
    out = jax.jit(lambda x: denoise_by(guide, x, sigmas, stepper, noise=fresh, given=given))(x)
    jax.effects_barrier()
    return out


def estimate(x, sigma, target):
    return x - sigma * 0.5 * (x - target)


def assert_same(found, wanted, **kw):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **({"atol": 1e-5} | kw))


# ------------------------------------------------------------------------------------- directions


def test_scale_one_is_the_prompt_alone():
    assert_same(run(guide(strengths=((0.0, 0.0),))), run(guide((), ())))
    assert_same(run(guide(strengths=((0.0, 0.0),), rescales=(0.7, 1.0))), run(guide((), ())))


@pytest.mark.parametrize("direction", guidance.DIRECTIONS)
def test_a_direction_is_of_the_pass_without_a_prompt_and_others_keep_theirs(direction):
    x, sigma = noise(), 0.8
    how = Guidance(direction=direction, apg_eta=0.5, apg_norm=2.0)
    strengths = ((3.0, 1.0), (2.0, 6.0))
    found, _ = guide(("other", "empty"), strengths, how=how).find(x, {"sigma": sigma}, {})
    for i, a in enumerate(x):
        cond, other, empty = (
            np.asarray(estimate(a, sigma, TARGETS[n]), np.float64)
            for n in ("prompt", "other", "empty")
        )
        away = cond - empty
        dot = lambda a, b: (a * b).sum((1, 2), keepdims=True)  # noqa: E731
        if direction == "star":
            away = cond - dot(cond, empty) / dot(empty, empty) * empty
        if direction == "apg":
            away = away * np.minimum(1, 2.0 / np.sqrt(dot(away, away)))
            along = dot(away, cond) / dot(cond, cond) * cond
            away = away - 0.5 * along
        want = cond + strengths[0][i] * (cond - other) + strengths[1][i] * away
        np.testing.assert_allclose(found.x0[i], want, atol=1e-4)
        np.testing.assert_allclose(found.uncond[i], empty, atol=1e-5)


def test_apg_with_all_of_both_parts_is_the_difference():
    plain, apg = guide(), guide(how=Guidance(direction="apg"))
    assert_same(run(apg), run(plain), atol=1e-4)


def test_stateful_apg_adds_what_is_left_of_the_steps_before():
    how = Guidance(direction="apg", apg_momentum=0.5)
    one = guide(how=how)
    memory = one.begin(noise())
    for sigma, weight in ((1.0, 1.0), (0.5, 1.0 + 0.5 * 2)):  # differences shrink with sigma
        found, memory = one.find(noise(), {"sigma": sigma}, memory)
        for i, a in enumerate(noise()):
            cond = estimate(a, sigma, 1.0)
            difference = weight * (cond - estimate(a, sigma, -2.0))
            np.testing.assert_allclose(
                found.x0[i], cond + (2.0, 6.0)[i] * difference, atol=1e-4
            )  # fmt: skip


@pytest.mark.parametrize(("per_sample", "axes"), [(True, (1, 2)), (False, (0, 1, 2))])
def test_each_clip_of_either_stream_is_rescaled_by_itself_or_with_its_batch(per_sample, axes):
    x, factors = noise(), (0.75, 0.25)
    x = Latents(*(a * jnp.asarray([1.0, 3.0])[:, None, None] for a in x))
    how = Guidance(
        "star", per_sample=per_sample
    )  # the difference here is a number, which no deviation sees
    found, _ = guide(rescales=factors, how=how).find(x, {"sigma": 1.0}, {})
    for a, got, strength, factor in zip(x, found.x0, (2.0, 6.0), factors, strict=True):
        cond, empty = (np.asarray(estimate(a, 1.0, TARGETS[n])) for n in ("prompt", "empty"))
        share = (cond * empty).sum((1, 2), keepdims=True) / (empty**2).sum((1, 2), keepdims=True)
        moved = cond + strength * (cond - share * empty)
        deviations = [np.std(y, axis=axes, keepdims=True, ddof=1) for y in (cond, moved)]
        ratio = deviations[0] / deviations[1]
        np.testing.assert_allclose(got, moved * (factor * ratio + 1 - factor), atol=1e-4)


def test_a_direction_without_its_pass_is_refused():
    with pytest.raises(UserError, match="guidance 'apg' needs the pass without a prompt"):
        guide(("other",), how=Guidance(direction="apg"))
    with pytest.raises(UserError, match="no guidance is called 'cfg\\+'"):
        Guidance(direction="cfg+")


# ----------------------------------------------------------------------------------- by the step


def test_numbers_may_be_those_of_their_step():
    by_level = guidance.binned({1.0: 3.0, 0.5: 0.0}, np.asarray(SIGMAS[:-1]))
    np.testing.assert_array_equal(by_level, [3, 3, 0, 0])
    found = run(guide(strengths=((by_level, by_level),), rescales=(by_level / 4, np.float32(0))))
    x = noise()
    for i, (a, b) in enumerate(pairwise(SIGMAS)):
        now = guide(strengths=((by_level[i],) * 2,), rescales=(by_level[i] / 4, np.float32(0)))
        x0 = now.find(x, {"sigma": a}, {})[0].x0
        x = Latents(*(steppers.euler(c, d, a, b) for c, d in zip(x, x0, strict=True)))
    assert_same(found, x)


def test_the_second_call_of_a_step_has_the_numbers_of_its_step():
    strengths = np.asarray([1.0, 2, 3, 4], np.float32)
    row = guide(strengths=((strengths, np.float32(0)),)).rows(*np.divmod(np.arange(9), 2))
    np.testing.assert_array_equal(row["number 0"], [1, 1, 2, 2, 3, 3, 4, 4, 4])
    assert "number 1" not in row
    with pytest.raises(UserError, match="4 numbers of guidance for 5 steps"):
        guide(strengths=((strengths, np.float32(0)),)).rows(np.arange(5), np.zeros(5, int))


# ---------------------------------------------------------------------------------- skipped steps


def skipping(video, audio, **kw):
    return guide(how=Guidance(skip_steps=(video, audio)), **kw)


def test_the_network_does_not_run_in_skipped_steps_and_its_last_estimate_serves():
    found = run(skipping(1, 1))
    assert sorted(CALLS) == sorted([(n, s) for n in ("video", "audio") for s in (1.0, 0.5)])
    x, every = noise(), guide()
    for i, (a, b) in enumerate(pairwise(SIGMAS)):
        x0 = every.find(x, {"sigma": a}, {})[0].x0 if i % 2 == 0 else x0  # noqa: F821
        x = Latents(*(steppers.euler(c, d, a, b) for c, d in zip(x, x0, strict=True)))
    assert_same(found, x)


def test_skipping_no_step_is_no_skipping():
    assert_same(run(skipping(0, 0)), run(guide()), atol=0)
    assert len(CALLS) == 8


def test_a_stream_that_is_skipped_alone_is_read_and_not_run():
    found = run(skipping(2, 0))
    steps = np.asarray(SIGMAS[:-1], np.float64)
    video = {s for name, s in CALLS if name == "video"}
    np.testing.assert_allclose(sorted(video), sorted(steps[[0, 3]]), rtol=1e-6)
    assert len({s for name, s in CALLS if name == "audio"}) == 4
    assert_same(found[1:], run(guide())[1:])
    assert_same(found[:1], run(skipping(2, 2))[:1])


@pytest.mark.parametrize("missing", [False, True])
def test_what_is_not_generated_skips_as_the_other(missing):
    c = conditioning.Conditions(noise().video, None, None, None, None, 5)
    frozen = conditioning.Conditions(noise().audio, None, None, None, None, 4, frozen=True)
    given = Given(c, None if missing else frozen)
    x = Latents(noise().video, None if missing else noise().audio)
    run(skipping(1, 0, given=given), given=given, x=x)
    assert {s for _, s in CALLS} == {1.0, 0.5}
    assert len(CALLS) == 4  # two steps, and the network is told to run both streams


def test_a_skipped_step_of_two_calls_runs_the_second():
    run(skipping(1, 1), steppers.Res2s(), sigmas=jnp.asarray([1.0, 0.5, 0.2, 0.0]))
    levels = sorted({round(s, 3) for _, s in CALLS}, reverse=True)
    assert levels == [1.0, 0.707, 0.316, 0.2, round((0.2 * 0.0011) ** 0.5, 3)]
