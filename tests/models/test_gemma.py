"""The Gemma decoder beyond the golden data: grouped heads, windows, padding, scan, meshes."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
from flax import nnx
from tiny_gemma import GEMMA_3, GEMMA_4

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Linear, Rngs
from ltx2_jax.models.text.gemma import GEMMA_3_12B, GEMMA_4_12B, Gemma
from ltx2_jax.models.text.gemma_layers import (
    Attention,
    Norm,
    attention_mask,
    repeating,
    rope_tables,
)
from ltx2_jax.sharding import abstract_state, bytes_per_chip

BOTH = pytest.mark.parametrize("cfg", [GEMMA_3, GEMMA_4], ids=["gemma3", "gemma4"])


def abstract(cfg):
    return jax.eval_shape(lambda: Gemma(cfg, rngs=Rngs(0)))


def traced(cfg, tokens=8):
    """The program that sums up all hidden states, as a jaxpr."""
    graphdef, params = nnx.split(abstract(cfg))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    total = jax.ShapeDtypeStruct((1, tokens, cfg.width), jnp.dtype(cfg.dtype))

    def run(params, ids, mask, total):
        return nnx.merge(graphdef, params).fold(ids, mask, lambda sum_, x, _: sum_ + x, total)

    return jax.make_jaxpr(run)(params, ids, ids, total).jaxpr


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a jaxpr and all that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr, times * eqn.params.get("length", 1))


# ------------------------------------------------------------------------------------- one layer


def attention_by_loops(x, mask, weights, cfg, kind):
    """One row [S, D] through attention, head by head and token by token, in float64."""
    length, width = len(x), kind.head_dim
    groups = cfg.num_heads // kind.kv_heads

    def normed(vector, weight=None):
        vector = vector / np.sqrt(np.mean(vector**2) + cfg.norm_eps)
        return vector if weight is None else vector * (cfg.norm_offset + weight)

    def turned(vector, position):
        pairs, half = int(kind.rotary_fraction * width) // 2, width // 2
        out = vector.copy()
        for i in range(pairs):
            angle = position * kind.rope_theta ** (-2 * i / width) / kind.rope_factor
            a, b = vector[i], vector[half + i]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[half + i] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def head(matrix, token, h):
        return (weights[matrix] @ x[token])[h * width : (h + 1) * width]

    out = np.zeros((length, cfg.num_heads * width))
    for h in range(cfg.num_heads):
        for i in range(length):
            query = turned(normed(head("query", i, h), weights["query_norm"]), i)
            scores, values = [], []
            for j in range(i + 1):
                if not mask[j] or (kind.window is not None and i - j >= kind.window):
                    continue
                key = head("key", j, h // groups)
                value = key if kind.keys_are_values else head("value", j, h // groups)
                values.append(normed(value) if cfg.value_norm else value)
                key = turned(normed(key, weights["key_norm"]), j)
                scores.append(cfg.attention_scale * query @ key)
            if scores:
                p = np.exp(np.asarray(scores) - max(scores))
                out[i, h * width : (h + 1) * width] = (p / p.sum()) @ np.asarray(values)
    return out @ weights["out"].T


@pytest.mark.parametrize("name", ["sliding", "full"])
@BOTH
def test_attention_equals_a_computation_by_loops(cfg, name):
    kind = dataclasses.replace(cfg.kind(name), kv_heads=2)  # grouped: neither 1 nor all heads
    rng = np.random.default_rng(3)
    graphdef, params = nnx.split(
        jax.eval_shape(lambda: Attention(cfg, kind, rngs=Rngs(0))), nnx.Param
    )
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.5, params)
    tree = nnx.to_pure_dict(params)
    weights = {n: np.float64(next(iter(leaf.values()))) for n, leaf in tree.items()}
    x = rng.normal(size=(2, 7, cfg.width)).astype(np.float32)
    valid = np.arange(7)[None] >= [[0], [3]]

    @jax.jit
    def run(params):
        positions = jnp.arange(7)
        mask = attention_mask(jnp.asarray(valid), positions, kind.window)
        rope = rope_tables(kind, positions)
        return nnx.merge(graphdef, params)(jnp.asarray(x), rope, mask, None, 0)[0]

    got = np.asarray(run(params))
    for row in range(2):
        want = attention_by_loops(np.float64(x[row]), valid[row], weights, cfg, kind)
        np.testing.assert_allclose(got[row, valid[row]], want[valid[row]], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- whole decoder


@BOTH
def test_padding_changes_nothing_that_is_valid_and_gives_finite_rows(cfg):
    model = tiny_gemma.build(cfg)
    tokens, mask = tiny_gemma.prompts()
    # The three tokens of row 0 start row 1 as well, after less padding.
    mask[1], tokens[1, :2] = np.arange(8) >= 2, 0
    tokens[1, 2:5] = tokens[0, 5:]
    states = tiny_gemma.hidden_states(model, tokens, mask)
    other = tiny_gemma.hidden_states(model, np.where(mask, tokens, 9), mask)
    assert np.isfinite(states).all()
    np.testing.assert_array_equal(states[:, mask], other[:, mask])
    # Only distances between tokens count.
    np.testing.assert_allclose(states[:, 0, 5:], states[:, 1, 2:5], rtol=1e-4, atol=1e-4)


@BOTH
def test_no_token_sees_a_later_one(cfg):
    model = tiny_gemma.build(cfg)
    tokens, mask = tiny_gemma.prompts()
    changed = tokens.copy()
    changed[:, 5] = tokens[:, 5] % 20 + 3
    a, b = (tiny_gemma.hidden_states(model, t, mask) for t in (tokens, changed))
    before = mask & (np.arange(8) < 5)
    np.testing.assert_array_equal(a[:, before], b[:, before])
    assert (np.abs(a[-1, :, 5:] - b[-1, :, 5:]).max(axis=-1) > 1e-3).all()


def test_bfloat16_activations_stay_near_float32_and_round_the_embedding_factor():
    model = tiny_gemma.build(GEMMA_3)
    low = tiny_gemma.build(dataclasses.replace(GEMMA_3, dtype="bfloat16"))
    tokens, mask = tiny_gemma.prompts()
    want = tiny_gemma.hidden_states(model, tokens, mask)
    got = tiny_gemma.hidden_states(low, tokens, mask)
    assert got.dtype == jnp.bfloat16
    error = np.float32(got)[:, mask] - want[:, mask]
    assert 1e-4 < np.sqrt(np.mean(error**2) / np.mean(want[:, mask] ** 2)) < 0.03
    # sqrt(24) = 4.898979 is 4.90625 in bfloat16; the product is rounded once more.
    table = np.asarray(model.embedding[...]).astype(jnp.bfloat16)
    scaled = (np.float32(table[tokens]) * np.float32(4.90625)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got[0], scaled)


def test_norms_and_logits_of_bfloat16_are_computed_in_float32():
    model = tiny_gemma.build(dataclasses.replace(GEMMA_3, dtype="bfloat16"))
    x = np.random.default_rng(0).normal(size=(50, 24)).astype(jnp.bfloat16)
    wide, table = np.float64(x), np.float64(model.embedding[...].astype(jnp.bfloat16))
    logits = model.logits(jnp.asarray(x))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wide @ table.T, atol=1e-5)
    weight = 1 + np.float64(model.norm.weight[...])  # has more digits than bfloat16
    want = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-6) * weight
    same = np.asarray(model.norm(jnp.asarray(x))) == want.astype(jnp.bfloat16)
    assert same.mean() > 0.99  # but for those half-way between two


def test_logits_are_those_of_the_embedding_and_gemma_4_caps_them():
    x = np.random.default_rng(0).normal(size=(2, GEMMA_4.width)).astype(np.float32)
    model = tiny_gemma.build(GEMMA_4)
    plain = 30 * x @ np.asarray(model.embedding[...]).T
    assert np.abs(plain).max() > 2 * GEMMA_4.logit_cap
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model.logits(30 * x), 5 * np.tanh(plain / 5), atol=1e-4)


@BOTH
def test_a_new_norm_gives_its_input_the_size_1(cfg):
    x = np.random.default_rng(0).normal(3, 2, (4, 16)).astype(np.float32)
    y = np.asarray(Norm(16, cfg, rngs=Rngs(0))(jnp.asarray(x)))
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-4)


def test_quantised_weights_are_multiplied_by_what_is_read_as_it_is():
    """It runs once for a prompt: there is nothing to win by rounding that, too."""
    model = abstract(dataclasses.replace(GEMMA_3, quantized="int8-products"))
    maps = [x for _, x in nnx.iter_graph(model) if isinstance(x, Linear)]
    assert len(maps) == 4 * 7  # of four patterns of layers
    assert all(x.weight.dtype == jnp.int8 and not x.rounds_input for x in maps)


# ------------------------------------------------------------------------------------------ scan


def test_groups_are_the_layers_in_order():
    draw = random.Random(0)
    for _ in range(200):
        kinds = tuple(draw.choice("sf") for _ in range(draw.randint(1, 14)))
        assert sum((pattern * n for pattern, n in repeating(kinds)), ()) == kinds
    pattern = (*5 * ("sliding",), "full")
    assert repeating(8 * pattern) == ((pattern, 8),)
    # A last layer that is full out of turn adds two bodies, not a whole pattern of them.
    groups = repeating(7 * pattern + 3 * ("sliding",) + ("full",))
    assert [n for _, n in groups] == [7, 3, 1]


@BOTH
def test_hidden_states_are_the_outputs_of_the_layers_one_after_another(cfg):
    """Whatever groups they are run in."""
    model, (tokens, mask) = tiny_gemma.build(cfg), tiny_gemma.prompts()
    x, positions = model.embed(jnp.asarray(tokens)), jnp.arange(tokens.shape[1])
    want = [x]
    with jax.default_matmul_precision("highest"):
        for group in model.groups:
            graphdef, stacked = nnx.split(group)
            for i in range(jax.tree.leaves(stacked)[0].shape[0]):
                one = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
                for layer, name in zip(one.layers, one.pattern, strict=True):
                    kind = cfg.kind(name)
                    seen = attention_mask(jnp.asarray(mask), positions, kind.window)
                    x, _ = layer(x, rope_tables(kind, positions), seen)
                    want.append(x)
    want[-1] = model.norm(want[-1])
    got = tiny_gemma.hidden_states(model, tokens, mask)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-4)


def test_48_layers_compile_as_six_and_are_never_all_in_memory():
    program = list(equations(traced(GEMMA_3_12B, tokens=37)))
    products = [eqn for eqn, _ in program if eqn.primitive.name == "dot_general"]
    assert len(products) == 6 * 9  # four projections, two of attention, three of the MLP
    scores = [out for out in (eqn.outvars[0].aval for eqn in products) if out.shape.count(37) == 2]
    assert [x.dtype for x in scores] == 6 * [jnp.float32]  # of bfloat16 queries and keys
    shapes = [v.aval.shape for eqn, _ in program for v in eqn.outvars]
    largest = max(math.prod(shape) for shape in shapes if 37 in shape)
    assert largest == 37 * GEMMA_3_12B.mlp  # of the activations, not of the weights


@pytest.mark.parametrize("cfg", [GEMMA_3, GEMMA_4, GEMMA_3_12B, GEMMA_4_12B])
def test_flops_of_the_traced_program_are_those_of_its_matrices(cfg):
    """Every weight of the layers meets every token, and every query every key; no output matrix."""
    tokens, kinds = 8, [cfg.kind(name) for name in cfg.layers]
    matrices = cores = 0
    for kind in kinds:
        keys_and_values = (1 if kind.keys_are_values else 2) * kind.kv_heads
        matrices += cfg.width * kind.head_dim * (2 * cfg.num_heads + keys_and_values)
        matrices += 3 * cfg.width * cfg.mlp
        cores += 4 * tokens**2 * cfg.num_heads * kind.head_dim
    found = 0
    for eqn, times in equations(traced(cfg)):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            length = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            found += 2 * times * length * math.prod(eqn.outvars[0].aval.shape)
    assert found == 2 * tokens * matrices + cores


def test_the_12b_preset_has_the_published_size():
    leaves = jax.tree.leaves(nnx.state(abstract(GEMMA_3_12B), nnx.Param))
    assert round(sum(leaf.size for leaf in leaves) / 1e9, 2) == 11.77


# ---------------------------------------------------------------------------------------- meshes

MESHES = pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (1, 4, 2), (4, 2, 1)], ids=lambda m: "x".join(map(str, m))
)


@pytest.fixture(scope="module")
def unsharded():
    return {}  # filled by the first test of each config


@MESHES
@BOTH
def test_hidden_states_do_not_depend_on_the_mesh(mesh_context, cfg, sizes, unsharded):
    tokens, mask = tiny_gemma.prompts()
    if cfg not in unsharded:
        unsharded[cfg] = tiny_gemma.hidden_states(tiny_gemma.build(cfg), tokens, mask)
    with mesh_context(*sizes):
        model = tiny_gemma.build(cfg, jax.sharding.get_mesh())
        got = tiny_gemma.hidden_states(model, tokens, mask)
    np.testing.assert_allclose(got, unsharded[cfg], rtol=1e-4, atol=1e-4)


def test_a_batch_that_the_mesh_does_not_divide_is_computed_by_every_shard(mesh_context):
    tokens, mask = tiny_gemma.prompts((3, 8, 6), 8)
    want = tiny_gemma.hidden_states(tiny_gemma.build(GEMMA_4), tokens, mask)
    with mesh_context(2, 2, 2):
        model = tiny_gemma.build(GEMMA_4, jax.sharding.get_mesh())
        got = tiny_gemma.hidden_states(model, tokens, mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_every_chip_holds_its_share_of_12b(mesh_context):
    with mesh_context(2, 2, 2):
        params = abstract_state(
            lambda: nnx.state(Gemma(GEMMA_3_12B, rngs=Rngs(0)), nnx.Param),
            mesh=jax.sharding.get_mesh(),
        )
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    # The embedding is not split over the model axis, so that looking it up moves rows only.
    embedding = 4 * GEMMA_3_12B.vocab_size * GEMMA_3_12B.width
    share = (total - embedding) / 8 + embedding / 4
    assert share <= bytes_per_chip(params) < 1.001 * share


def test_a_mesh_that_does_not_divide_the_heads_is_refused(mesh_context):
    cfg = dataclasses.replace(GEMMA_3, num_heads=6, sliding=GEMMA_4.sliding, full=GEMMA_4.full)
    with mesh_context(1, 4, 1), pytest.raises(UserError, match="model=4 does not divide the 6"):
        abstract(cfg)
