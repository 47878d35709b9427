"""Connectors: valid tokens first, registers behind them, one context for every slot."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import release_of, tensors_of

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.rope import rope_tables
from ltx2_jax.models.text import connectors
from ltx2_jax.models.text.connectors import (
    AUDIO_CONNECTOR_2_3,
    CONNECTOR_2_0,
    VIDEO_CONNECTOR_2_3,
    Connector,
    ConnectorConfig,
    Connectors,
    valid_first,
)
from ltx2_jax.sharding import abstract_mesh, abstract_state, make_mesh, replicated
from ltx2_jax.weights.names.text import connector_configs, load_connectors

CHECKPOINT = Path(__file__).parents[1] / "golden" / "v2.3" / "checkpoint.safetensors"
VIDEO = ConnectorConfig(
    num_layers=2, num_heads=2, head_dim=6, gated_attention=True, registers=4, dtype="float32"
)
AUDIO = dataclasses.replace(VIDEO, head_dim=4)
LENGTH = 8


def without_registers(cfg):
    return dataclasses.replace(cfg, registers=0)


def create(*configs):
    return Connectors(*configs, rngs=Rngs(0))


def weights(*configs, mesh=None, create=create):
    """Parameters drawn by numpy, the same for any mesh; none is zero."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    homes = abstract_state(lambda: nnx.to_pure_dict(nnx.state(create(*configs))), mesh=mesh)
    rng = np.random.default_rng(0)
    draw = lambda home: rng.normal(size=home.shape, scale=0.4).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda home: jax.device_put(draw(home), home.sharding), homes)


def without_mesh(params):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), params)


@partial(jax.jit, static_argnames="graphdef")
def apply(graphdef, params, video, audio, mask):
    return nnx.merge(graphdef, params)(video, audio, mask)


def run(configs, params, video, audio, mask):
    return apply(
        nnx.graphdef(nnx.eval_shape(partial(create, *configs))), params, video, audio, mask
    )


def features(batch=2, length=LENGTH, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, length, cfg.width)).astype(np.float32)
            for cfg in (VIDEO, AUDIO)]  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return without_mesh(weights(VIDEO, AUDIO))


LEFT = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]], bool)


def test_valid_tokens_move_to_the_front_in_their_order():
    mask = np.asarray([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    order, after = valid_first(jnp.asarray(mask))
    np.testing.assert_array_equal(order, [[2, 3, 0, 1], [0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3]])
    np.testing.assert_array_equal(after, np.sort(mask)[:, ::-1] > 0)


def test_the_side_of_the_padding_does_not_matter(params):
    video, audio = features()
    left = run((VIDEO, AUDIO), params, video, audio, LEFT)
    shift = LEFT.argmax(1)
    video, audio = (np.stack([np.roll(row, -n, 0) for row, n in zip(x, shift, strict=True)])
                    for x in (video, audio))  # fmt: skip
    right = run((VIDEO, AUDIO), params, video, audio, LEFT[:, ::-1])
    for ours, theirs in zip(left[:2], right[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_padded_slots_hold_registers_by_their_own_number(params):
    """The same as features that have the registers in those slots, all of them valid."""
    video, audio = features()
    got = run((VIDEO, AUDIO), params, video, audio, LEFT)
    assert got[2] is None  # every slot counts
    filled = []
    for name, x in (("video", video), ("audio", audio)):
        registers = np.asarray(params[name]["registers"])
        rows = [np.concatenate([row[valid], registers[np.arange(valid.sum(), LENGTH) % 4]])
                for row, valid in zip(x, LEFT, strict=True)]  # fmt: skip
        filled.append(np.stack(rows))
    want = run((VIDEO, AUDIO), params, *filled, np.ones_like(LEFT))
    for have, expected in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(have, expected, atol=1e-6)


def test_without_registers_padding_is_as_if_it_were_not_there(params):
    """The valid slots are those of the shorter sequence; the rest are zeros, and masked."""
    configs = without_registers(VIDEO), without_registers(AUDIO)
    plain = {name: {"blocks": params[name]["blocks"]} for name in ("video", "audio")}
    video, audio = features()
    got = run(configs, plain, video, audio, LEFT)
    np.testing.assert_array_equal(got[2], [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    short = run(configs, plain, video[:1, 3:], audio[:1, 3:], np.ones((1, 5), bool))
    for have, want in zip(got[:2], short[:2], strict=True):
        np.testing.assert_allclose(have[0, :5], want[0], atol=1e-6)
        assert not np.asarray(have[0, 5:]).any()
        assert not np.asarray(have[1, 1:]).any()


def test_one_connector_cannot_mask_what_the_other_fills():
    with pytest.raises(ValueError, match="either both connectors have registers or none"):
        create(VIDEO, without_registers(AUDIO))


def test_a_mesh_does_not_change_the_context(mesh_context, params):
    configs, inputs = (VIDEO, AUDIO), (*features(), LEFT)
    want = run(configs, params, *inputs)
    with mesh_context(2, 2, 1):
        mesh = jax.sharding.get_mesh()
        homes = jax.tree.map(lambda a: a.sharding, weights(*configs, mesh=mesh))
        got = run(configs, jax.device_put(params, homes), *inputs)
    for have, expected in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(have, expected, atol=2e-6)


def test_tokens_turn_as_the_config_says(monkeypatch):
    cfg = dataclasses.replace(
        VIDEO, max_pos=20.0, rope_type="interleaved", rope_precision="float32"
    )
    asked = []

    def tables(positions, **given):
        asked.append(given)
        return rope_tables(positions, **given)

    monkeypatch.setattr(connectors, "rope_tables", tables)
    x, mask = jnp.zeros((1, LENGTH, cfg.width)), jnp.ones((1, LENGTH), bool)
    connector = jax.eval_shape(lambda: Connector(cfg, rngs=Rngs(0)))
    assert connector.blocks.attention.interleaved_rope
    jax.eval_shape(lambda: Connector(cfg, rngs=Rngs(0))(x, mask))
    told = {"max_pos": (20.0,), "theta": 10000.0, "precision": "float32", "width": cfg.width}
    assert asked[0].items() >= told.items()


@pytest.mark.parametrize("registers", [128, 0])
def test_released_sizes_run_split_over_data_and_model(registers):
    presets = VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3
    configs = [dataclasses.replace(cfg, registers=registers) for cfg in presets]
    with jax.sharding.use_abstract_mesh(abstract_mesh(8, 4, 2)):
        params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(create(*configs))))
        row = [jax.ShapeDtypeStruct((16, 1024, cfg.width), jnp.bfloat16) for cfg in configs]
        mask = jax.ShapeDtypeStruct((16, 1024), jnp.bool)
        video, audio, left = jax.eval_shape(partial(run, configs), params, *row, mask)
    assert (video.shape, audio.shape) == ((16, 1024, 4096), (16, 1024, 2048))
    assert (left is None) == bool(registers)
    assert video.dtype == jnp.bfloat16
    assert video.sharding.spec == jax.P("data", None, None)
    assert not replicated(params, limit_bytes=100_000)


# ---- released files ------------------------------------------------------------------------------


def test_released_settings_give_the_presets():
    released = {
        "connector_positional_embedding_max_pos": [4096],
        "frequencies_precision": "float64",
    }
    assert connector_configs(released) == (CONNECTOR_2_0, CONNECTOR_2_0)
    newer = released | {
        "connector_num_layers": 8,
        "connector_num_attention_heads": 32,
        "connector_attention_head_dim": 128,
        "connector_apply_gated_attention": True,
        "audio_connector_attention_head_dim": 64,  # layers and heads as for video
    }
    assert connector_configs(newer) == (VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3)
    assert connector_configs({})[0].max_pos == 1
    assert connector_configs({"connector_num_learnable_registers": 7})[0].registers == 128
    assert connector_configs({"frequencies_precision": "half"})[0].rope_precision == "float32"
    with pytest.raises(UserError, match="rope_type='llama', only split and interleaved"):
        connector_configs({"rope_type": "llama"})
    with pytest.raises(UserError, match=r"max_pos=\[20, 30\]: text has one position axis"):
        connector_configs({"connector_positional_embedding_max_pos": [20, 30]})


def test_registers_are_left_out_when_they_are_not_wanted():
    connectors = load_connectors(release_of(CHECKPOINT), registers=0)
    assert connectors.video.registers is None
    name = "audio_embeddings_connector.transformer_1d_blocks.1.ff.net.2.weight"
    want = tensors_of(CHECKPOINT, "connectors")[name]
    np.testing.assert_array_equal(connectors.audio.blocks.mlp.linear_out.weight[1], want)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="dtype='float16' is not one of"):
        ConnectorConfig(dtype="float16")


def test_heads_that_the_mesh_does_not_divide_are_whole_on_every_shard(mesh_context):
    cfg = ConnectorConfig(num_layers=1, num_heads=3, head_dim=8, registers=2, dtype="float32")
    rows = np.random.default_rng(0).normal(size=(4, 6, 24)).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [1], [3], [4]])

    def one(cfg):
        return Connector(cfg, rngs=Rngs(0))

    def run(*sizes):
        with mesh_context(*sizes):
            graphdef = nnx.graphdef(nnx.eval_shape(partial(one, cfg)))
            params = weights(cfg, mesh=jax.sharding.get_mesh(), create=one)
            assert "model" not in params["blocks"]["attention"]["to_q"]["weight"].sharding.spec
            call = jax.jit(lambda params, *x: nnx.merge(graphdef, params)(*x))
            return np.asarray(call(params, rows, mask))

    np.testing.assert_allclose(run(2, 2, 2), run(1, 1, 1), atol=1e-4)
