"""Text features: the layer-by-layer sum is the projection of the normalised stack."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.features import (
    FEATURES_2_0,
    FEATURES_2_3,
    TextFeatures,
    TextFeaturesConfig,
)
from ltx2_jax.sharding import abstract_mesh, abstract_state
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.text import features_parameters, text_features_config

V1 = TextFeaturesConfig(width=8, num_states=5, video_dim=8, dtype="float32")
V2 = dataclasses.replace(V1, norm="rms", video_dim=12, audio_dim=6, bias=True)
V2_KEYS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


def create(cfg):
    return TextFeatures(cfg, rngs=Rngs(0))


def official(cfg, seed=0):
    """Random tensors under official names, in float64 for the reference."""
    rng = np.random.default_rng(seed)
    outs = {"aggregate_embed": cfg.video_dim}
    if cfg.audio_dim:
        outs = {"video_aggregate_embed": cfg.video_dim, "audio_aggregate_embed": cfg.audio_dim}
    tensors = {f"{k}.weight": rng.normal(size=(n, cfg.width * cfg.num_states))
               for k, n in outs.items()}  # fmt: skip
    if cfg.bias:
        tensors |= {f"{name}.bias": rng.normal(size=n) for name, n in outs.items()}
    return tensors


def params_of(cfg, tensors):
    """Our parameters of official tensors; of the last state alone if the config wants no more."""
    stored = dataclasses.replace(cfg, last_layer_only=False)
    params = mapping.from_official(tensors, features_parameters(stored), "text projection")
    if cfg.last_layer_only:
        for projection in params.values():
            projection["kernel"] = projection["kernel"][-1:]
    return params


def build(cfg, tensors):
    params = params_of(cfg, tensors)
    return mapping.build(
        partial(create, cfg), jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    )


def inputs(cfg, batch=2, length=6, seed=1):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(cfg.num_states, batch, length, cfg.width)) * 3 + 1
    mask = np.arange(length) >= np.asarray([4, 1] * (batch // 2))[:, None]
    return states, mask


@partial(jax.jit, static_argnames="graphdef")
def scanned(graphdef, params, states, mask):
    """As the language model calls it: inside a scan, with a traced index."""
    features = nnx.merge(graphdef, params)

    def body(carry, layer):
        return features.add(carry, layer[0], layer[1], mask), None

    layers = (states, jnp.arange(states.shape[0]))
    carry, _ = jax.lax.scan(body, features.init(*mask.shape), layers)
    return features.finish(carry)


def run(features, states, mask):
    return scanned(*nnx.split(features), jnp.asarray(states, jnp.float32), jnp.asarray(mask))


def reference(cfg, tensors, states, mask, factor=np.asarray):
    """The stack [B, S, D, L] as a whole, in float64, one sample after the other.

    `factor` rounds what is multiplied.
    """
    stack = np.moveaxis(states, 0, -1)
    normed = np.zeros_like(stack)
    for b, valid in enumerate(mask):
        x = stack[b, valid]
        if cfg.norm == "range":
            spread = x.max((0, 1)) - x.min((0, 1))
            normed[b, valid] = 8 * (x - x.mean((0, 1))) / spread
        else:
            normed[b, valid] = x / np.sqrt((x**2).mean(1, keepdims=True))
    flat = normed.reshape(*mask.shape, -1)
    outputs = []
    for name, weight in tensors.items():
        if name.endswith("weight"):
            scale = (len(weight) / cfg.width) ** 0.5 if cfg.norm == "rms" else 1
            product = factor(flat) @ factor(weight).T
            outputs.append(product * scale + tensors.get(name[:-6] + "bias", 0))
    return outputs[0], outputs[-1]


@pytest.mark.parametrize("cfg", [V1, V2], ids=["V1", "V2"])
def test_the_sum_over_layers_is_the_projection_of_the_stack(cfg):
    tensors, (states, mask) = official(cfg), inputs(cfg)
    got = run(build(cfg, tensors), states, mask)
    for have, want in zip(got, reference(cfg, tensors, states, mask), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-4, rtol=1e-4)


def test_statistics_and_sums_of_bfloat16_states_are_of_float32():
    def low(x):
        return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)

    tensors, (states, mask) = official(V1), inputs(V1)
    features = build(dataclasses.replace(V1, dtype="bfloat16"), tensors)
    (total,) = features.init(*mask.shape)
    for index, hidden in enumerate(states):
        (total,) = features.add((total,), jnp.bfloat16(hidden), index, jnp.asarray(mask))
    want, _ = reference(V1, tensors, low(states), mask, factor=low)
    np.testing.assert_allclose(total, want, atol=1e-2)  # its sums in bfloat16 would be 0.1 off


@pytest.mark.parametrize("cfg", [V1, V2], ids=["V1", "V2"])
def test_padding_changes_nothing_and_gets_the_bias(cfg):
    tensors, (states, mask) = official(cfg), inputs(cfg)
    features = build(cfg, tensors)
    video, _ = run(features, states, mask)
    other = np.where(mask[None, ..., None], states, 1e6)
    np.testing.assert_array_equal(run(features, other, mask)[0], video)
    bias = tensors["video_aggregate_embed.bias"] if cfg.bias else np.zeros(cfg.video_dim)
    padded = np.asarray(video)[~mask]
    np.testing.assert_allclose(padded, np.broadcast_to(bias, padded.shape), rtol=1e-6)


def test_the_last_layer_alone_is_the_sum_without_the_others():
    tensors, (states, mask) = official(V2), inputs(V2)
    alone = dataclasses.replace(V2, last_layer_only=True)
    got = run(build(alone, tensors), states, mask)
    without = {}
    for name, value in tensors.items():
        without[name] = value.copy()
        if name.endswith("weight"):
            without[name].reshape(len(value), V2.width, V2.num_states)[..., :-1] = 0
    for have, want in zip(got, reference(V2, without, states, mask), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("last_layer_only", [False, True])
def test_a_mesh_does_not_change_the_features(mesh_context, last_layer_only):
    cfg = dataclasses.replace(V2, last_layer_only=last_layer_only)
    tensors, (states, mask) = official(cfg), inputs(cfg)
    want = run(build(cfg, tensors), states, mask)
    params = params_of(cfg, {k: v.astype(np.float32) for k, v in tensors.items()})
    with mesh_context(2, 2, 2):
        mesh = jax.sharding.get_mesh()
        homes = abstract_state(lambda: nnx.to_pure_dict(nnx.state(create(cfg))), mesh=mesh)
        params = jax.tree.map(lambda home, a: jax.device_put(a, home.sharding), homes, params)
        got = run(mapping.build(partial(create, cfg), params), states, mask)
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(have, expected, atol=1e-5, rtol=1e-5)


def test_weights_of_a_released_size_are_split_over_all_chips():
    cfg = FEATURES_2_3
    with jax.sharding.use_abstract_mesh(abstract_mesh(8, 4, 1)):
        shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(create(cfg))))
        assert shapes["video"]["kernel"].shape == (49, 3840, 4096)
        assert shapes["video"]["kernel"].sharding.spec == jax.P(None, "data", "model")
        out = jax.eval_shape(
            lambda p, x, m: scanned(nnx.graphdef(nnx.eval_shape(partial(create, cfg))), p, x, m),
            shapes,
            jax.ShapeDtypeStruct((49, 8, 1024, 3840), jnp.bfloat16),
            jax.ShapeDtypeStruct((8, 1024), jnp.bool),
        )
    assert [x.shape for x in out] == [(8, 1024, 4096), (8, 1024, 2048)]
    assert out[0].dtype == jnp.bfloat16


def test_released_configs_select_the_features():
    assert text_features_config({}, width=3840, num_layers=48) == FEATURES_2_0
    assert text_features_config(V2_KEYS, width=3840, num_layers=48) == FEATURES_2_3
    ablated = text_features_config(V2_KEYS, width=3840, num_layers=48, last_layer_only=True)
    assert ablated == dataclasses.replace(FEATURES_2_3, last_layer_only=True)


@pytest.mark.parametrize("key", V2_KEYS)
def test_a_config_between_the_generations_is_refused_by_name(key):
    some = {k: v for k, v in V2_KEYS.items() if k != key}
    with pytest.raises(UserError, match=f"but not {key};"):
        text_features_config(some, width=8, num_layers=4)
    with pytest.raises(UserError, match=rf"{key}={not V2_KEYS[key]} \(only {V2_KEYS[key]} is"):
        text_features_config(V2_KEYS | {key: not V2_KEYS[key]}, width=8, num_layers=4)


def test_all_that_is_wrong_with_a_projection_is_listed_at_once():
    tensors = official(V2)
    tensors["video_aggregate_embed.weight"] = tensors["video_aggregate_embed.weight"][:, :-8]
    tensors["aggregate_embed.weight"] = tensors.pop("audio_aggregate_embed.weight")
    with pytest.raises(UserError) as error:
        params_of(V2, tensors)
    for part in ("missing audio_aggregate_embed.weight", "unknown aggregate_embed.weight",
                 "video_aggregate_embed.weight has (12, 32), not (12, 40)"):  # fmt: skip
        assert part in str(error.value)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=re.escape("norm='l2' is not one of")):
        TextFeaturesConfig(norm="l2")
