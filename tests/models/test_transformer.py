"""Behaviour of the transformer beyond the golden data: sizes, remat, perturbations, precision."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from ltx2_jax.diffusion import geometry
from ltx2_jax.diffusion.conditioning import first_frame_mask
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.transformer.config import LTX2_3_22B, LTX2_19B, PRESETS, TransformerConfig
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.models.transformer.transformer import LTX2Transformer

SMALL = dataclasses.replace(tiny.MODEL, num_layers=2)


def weights(cfg):
    return tiny.params(tiny.config(model=cfg))["transformer"]


def inputs(cfg=SMALL, seed=0):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(np.float32(rng.normal(size=shape)))  # noqa: E731
    sigma = jnp.asarray([0.3, 0.9])
    return (
        Modality(
            array(2, 8, cfg.in_channels), sigma, sigma[:, None],
            jnp.asarray(geometry.video_positions((2, 2, 2), 24.0)), array(2, 6, cfg.context_dim),
        ),
        Modality(
            array(2, 5, cfg.audio_in_channels), sigma, sigma[:, None],
            jnp.asarray(geometry.audio_positions(5)), array(2, 6, cfg.audio_context_dim),
        ),
    )  # fmt: skip


def forward(cfg, params, video, audio, keep=None):
    graphdef = nnx.graphdef(jax.eval_shape(lambda: LTX2Transformer(cfg, rngs=Rngs(0))))
    return _forward(graphdef, params, video, audio, keep)


@partial(jax.jit, static_argnames="graphdef")  # one program for all tests of one shape
def _forward(graphdef, params, video, audio, keep):
    return nnx.merge(graphdef, params)(video, audio, keep)


@pytest.mark.parametrize(("preset", "billions"), [("2.0", 18.88), ("2.3", 18.99)])
def test_presets_have_the_published_number_of_parameters(preset, billions):
    model = jax.eval_shape(lambda: LTX2Transformer(PRESETS[preset], rngs=Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model, nnx.Param)[1]))
    assert round(count / 1e9, 2) == billions


def test_keyframe_embedding_and_missing_bias_are_the_only_change_from_2_3_to_2_5():
    changed = {
        f.name
        for f in dataclasses.fields(TransformerConfig)
        if getattr(LTX2_3_22B, f.name) != getattr(PRESETS["2.5"], f.name)
    }
    assert changed == {"ff_bias", "keyframe_embedding"}


def test_remat_policies_do_not_change_gradients():
    video, _ = inputs()
    params = weights(SMALL)
    gradients = {}
    for remat in REMAT_POLICIES:
        cfg = dataclasses.replace(SMALL, remat=remat)
        graphdef = nnx.graphdef(jax.eval_shape(lambda c=cfg: LTX2Transformer(c, rngs=Rngs(0))))

        def loss(p, graphdef=graphdef):
            return jnp.sum(nnx.merge(graphdef, p)(video, None)[0] ** 2)

        gradients[remat] = jax.device_get(jax.jit(jax.grad(loss))(params))
    for remat in REMAT_POLICIES:
        for x, y in zip(
            jax.tree.leaves(gradients["none"]), jax.tree.leaves(gradients[remat]), strict=True
        ):
            np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-5 * np.abs(x).max() + 1e-8)


def test_skipping_both_exchanges_equals_streams_alone():
    video, audio = inputs()
    params = weights(SMALL)
    none = jnp.zeros((2, SMALL.num_layers))
    isolated = forward(SMALL, params, video, audio, Keep(audio_to_video=none, video_to_audio=none))
    np.testing.assert_allclose(isolated[0], forward(SMALL, params, video, None)[0], atol=1e-5)
    np.testing.assert_allclose(isolated[1], forward(SMALL, params, None, audio)[1], atol=1e-5)


def test_without_audio_video_attention_the_streams_do_not_hear_each_other():
    cfg = dataclasses.replace(SMALL, audio_video_attention=False)
    params, (video, audio) = weights(cfg), inputs(cfg)
    other = dataclasses.replace(audio, latent=audio.latent + 1, sigma=audio.sigma / 2)
    v, _ = forward(cfg, params, video, audio)
    np.testing.assert_array_equal(v, forward(cfg, params, video, other)[0])
    joint = forward(SMALL, weights(SMALL), video, audio)[0]
    changed = forward(SMALL, weights(SMALL), video, other)[0]
    assert np.abs(joint - changed).max() > 1e-3


def test_one_sigma_per_sample_equals_the_same_sigma_on_every_token():
    video, audio = inputs()
    params = weights(SMALL)
    spread = dataclasses.replace(video, timesteps=jnp.tile(video.timesteps, (1, 8)))
    for x, y in zip(
        forward(SMALL, params, video, audio), forward(SMALL, params, spread, audio), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_clean_tokens_equal_tokens_of_timestep_zero():
    """Also in their gradients: the choice of a level is what a level of each token says."""
    cfg = dataclasses.replace(SMALL, modulated_text_attention=True, prompt_adaln=True)
    video, audio = inputs(cfg)
    params = weights(cfg)
    clean = jnp.arange(8)[None] < jnp.asarray([[3], [0]])
    chosen = dataclasses.replace(video, clean=clean, timesteps=video.timesteps[:, :1])
    spread = dataclasses.replace(video, timesteps=jnp.where(clean, 0.0, video.timesteps))
    graphdef = nnx.graphdef(jax.eval_shape(lambda: LTX2Transformer(cfg, rngs=Rngs(0))))

    def loss(p, video):
        v, a = nnx.merge(graphdef, p)(video, audio)
        return jnp.sum(v**2) + jnp.sum(a**2)

    compute = jax.jit(jax.value_and_grad(loss))
    both = (jax.tree.leaves(jax.device_get(compute(params, v))) for v in (chosen, spread))
    for x, y in zip(*both, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max() + 1e-7)


def test_masked_text_is_not_read():
    video, audio = inputs()
    params = weights(SMALL)
    mask = jnp.arange(6)[None].repeat(2, 0) < 4
    changed = video.context.at[:, 4:].add(5.0)
    masked = [
        dataclasses.replace(video, context=c, context_mask=mask) for c in (video.context, changed)
    ]
    a, b = (forward(SMALL, params, v, audio)[0] for v in masked)
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("prompt_adaln", [True, False])
def test_bfloat16_activations_stay_close_to_float32(prompt_adaln):
    cfg = dataclasses.replace(SMALL, prompt_adaln=prompt_adaln)
    video, audio = inputs(cfg)
    params = weights(cfg)
    full = forward(cfg, params, video, audio)
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    half = forward(cfg, params, video, audio)
    for x, y in zip(full, half, strict=True):
        assert y.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(y, np.float32) - x) / np.linalg.norm(x)
        assert error < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "all"}, "remat"),
        ({"dtype": "float16"}, "dtype"),
        ({"rope_type": "x"}, "rope_type"),
        ({"audio_num_heads": 16}, "must equal num_heads"),
        ({"num_layers": 0}, "num_layers=0 must be above 0"),
        ({"audio_head_dim": 23}, "audio_head_dim=23 must be an even number above 0"),
    ],
)
def test_impossible_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LTX2_19B, **change)


def test_training_and_sampling_share_the_first_frame_mark():
    mask = first_frame_mask((2, 3, 2, 2))
    np.testing.assert_array_equal(mask, np.tile(np.arange(12) < 4, (2, 1)))
