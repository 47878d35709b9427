"""The sampler of any number of passes: what one and two do, and what the others add."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from ltx2_jax.diffusion.sampler import Latents, denoise, in_passes
from ltx2_jax.models import ltx2
from ltx2_jax.sampling import programs
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Pass, Request, make_sampler, released_passes

REQUEST = Request((2, 2, 4), 5, 1, (4, 8, 8), 12.0)
CONFIG = tiny.config()
ROWS, KEY = jnp.arange(2), jax.random.key(0)
SIGMAS = jnp.asarray([1.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def texts():
    text = {name: jnp.asarray(value) for name, value in tiny.batch(3).items() if "text" in name}
    return {name: x[:2] for name, x in text.items()}, {name: x[2:] for name, x in text.items()}


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


def sampled(params, texts, passes, *strengths, config=CONFIG):
    pairs = tuple((jnp.float32(v), jnp.float32(a)) for v, a in strengths)
    return make_sampler()(
        params, texts, ROWS, KEY, SIGMAS, pairs,
        graphdef=ltx2.graph(config.networks), request=REQUEST, passes=passes,
    )  # fmt: skip


@jax.jit
def guided_by_scale(params, texts, video, audio):
    """Classifier-free guidance as published, by its scales."""
    model = nnx.merge(ltx2.graph(CONFIG.networks), params)
    text, null_text = texts
    null_text = {name: jnp.broadcast_to(x, text[name].shape) for name, x in null_text.items()}
    network = partial(programs.network, model, REQUEST)

    def combine(cond, uncond):  # spelt out: what the formula of guidance.py says
        pairs = zip(cond, uncond, (video, audio), strict=True)
        return Latents(*(u + scale * (c - u) for c, u, scale in pairs))

    predict = in_passes(network, [text, null_text], combine)
    noise = programs.noise(model, REQUEST, ROWS, KEY)
    return programs.unpatchify(denoise(predict, noise, SIGMAS), REQUEST)


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_pass_without_a_prompt_is_classifier_free_guidance(params, texts):
    assert_same(sampled(params, texts, ()), guided_by_scale(params, texts, 1.0, 1.0))
    two = sampled(params, texts, (EMPTY_CAPTION,), (2.0, 0.5))
    assert_same(two, guided_by_scale(params, texts, 3.0, 1.5))


def test_strengths_are_of_their_own_pass_and_stream(params, texts):
    passes = released_passes(CONFIG.model.num_layers)
    none = (0.0, 0.0)
    plain = sampled(params, texts, ())
    assert_same(sampled(params, texts, passes, none, none, none), plain)
    found = [plain[0]]
    for active in range(3):
        strengths = [none] * 3
        strengths[active] = (1.0, 0.0)
        found.append(sampled(params, texts, passes, *strengths)[0])
    # Each of the passes moves the picture, and each elsewhere.
    for i, a in enumerate(found):
        assert all(np.abs(a - b).max() > 1e-3 for b in found[i + 1 :])


def test_a_pass_with_nothing_to_perturb_changes_nothing(params, texts):
    """A model without exchange, whose self-attention adds nothing, under the same text twice."""
    model = dataclasses.replace(CONFIG.model, audio_video_attention=False, num_layers=1)
    config = dataclasses.replace(CONFIG, model=model)
    params = tiny.params(config)
    for name in ("video_self", "audio_self"):
        out = params["transformer"]["blocks"][name]["to_out"]
        out["weight"], out["bias"] = jnp.zeros_like(out["weight"]), jnp.zeros_like(out["bias"])
    same = {name: jnp.broadcast_to(x, (2, *x.shape[1:])) for name, x in texts[1].items()}, texts[1]
    passes = released_passes(1)
    assert passes[1:] == (Pass(skipped=(0,)), Pass(exchange=False))
    strong = sampled(params, same, passes, (2.0, 2.0), (1.0, 1.0), (2.0, 2.0), config=config)
    assert_same(strong, sampled(params, same, (), config=config))
