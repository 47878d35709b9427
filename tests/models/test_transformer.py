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
from ltx2_jax.models.layers import Rngs, layer_norm, rms_norm
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.rope import rope_tables
from ltx2_jax.models.transformer.config import LTX2_3_22B, LTX2_19B, PRESETS, TransformerConfig
from ltx2_jax.models.transformer.streams import Keep, Modality, Stem
from ltx2_jax.models.transformer.transformer import Block, LTX2Transformer

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


def test_gates_between_streams_read_the_noise_of_the_other_by_a_scale_of_their_own():
    """Twice the noise by half of the scale is the same gate, whatever the stream's own noise is."""
    half = dataclasses.replace(SMALL, cross_gate_timestep_scale=500.0)
    (video, audio), params = inputs(), weights(SMALL)["video"]

    def gate(cfg, video, audio):
        graphdef = nnx.graphdef(jax.eval_shape(lambda: Stem(cfg, "video", rngs=Rngs(0))))
        run = jax.jit(lambda *given: nnx.merge(graphdef, params)(*given, None)[1].cross_gate)
        return run(video, audio)

    want = gate(SMALL, video, audio)
    other = dataclasses.replace(video, sigma=video.sigma / 3, timesteps=video.timesteps / 3)
    noisier = dataclasses.replace(audio, sigma=2 * audio.sigma)
    np.testing.assert_allclose(gate(half, other, noisier), want, atol=1e-6)
    assert np.abs(gate(half, video, audio) - want).max() > 1e-3


@pytest.mark.parametrize(("of_video", "of_audio"), [(20.0, 40.0), (40.0, 20.0)])
def test_streams_meet_on_one_clock_which_is_the_longer_one(of_video, of_audio):
    cfg = dataclasses.replace(SMALL, max_pos=(of_video, 2048.0, 2048.0), audio_max_pos=(of_audio,))
    streams = inputs(cfg)
    for name, stream, other in zip(("video", "audio"), streams, streams[::-1], strict=True):
        graphdef = nnx.graphdef(jax.eval_shape(lambda n=name: Stem(cfg, n, rngs=Rngs(0))))
        stem = nnx.merge(graphdef, weights(SMALL)[name])
        want = rope_tables(
            stream.positions[:, :1], heads=8, width=16, max_pos=(40.0,), theta=cfg.rope_theta
        )
        for got, table in zip(stem.prepare(stream, other).cross_rope, want, strict=True):
            np.testing.assert_allclose(got, table, atol=1e-5)


def test_interleaved_pairs_are_the_split_ones_in_another_order():
    """Of four features of a head, 0 and 2 are a pair and 1 and 3, or 0 and 1 and 2 and 3."""
    rng = np.random.default_rng(3)
    angle = rng.uniform(0, 6, (2, 5, 8, 2)).astype(np.float32)
    x, rope = rng.normal(size=(2, 5, 32)).astype(np.float32), (np.cos(angle), np.sin(angle))
    split = jax.tree.map(lambda leaf: leaf[0], weights(SMALL)["blocks"]["video_self"])
    order = np.arange(32).reshape(8, 2, 2).swapaxes(1, 2).reshape(-1)
    moved = {name: jax.tree.map(lambda leaf: leaf[order], split[name])
             for name in ("to_q", "to_k", "q_norm", "k_norm")}  # fmt: skip

    def attended(rope_type, params):
        cfg = dataclasses.replace(SMALL, rope_type=rope_type)
        graphdef = nnx.graphdef(jax.eval_shape(lambda: Block(cfg, rngs=Rngs(0)).video_self))
        return jax.jit(lambda p: nnx.merge(graphdef, p)(x, rope=rope))(params)

    want = attended("split", split)
    np.testing.assert_allclose(attended("interleaved", split | moved), want, atol=1e-5)
    assert np.abs(attended("interleaved", split) - want).max() > 1e-3


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_of_bfloat16_round_once(norm):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (40, 100)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    if norm == "rms":
        scale = jnp.asarray(np.random.default_rng(1).uniform(1, 2, 100), jnp.float32)
        got = rms_norm(x, 1e-6, scale)
        want = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True)) * np.asarray(scale)
    else:
        got = layer_norm(x, 1e-6)
        want = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8 * 1.01, atol=1e-5)


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
