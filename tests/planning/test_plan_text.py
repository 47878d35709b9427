"""The plan of a text encoder is that of the program which runs, on the mesh it would run on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_gemma
from flax import nnx
from jax.extend.core import jaxprs_in_params

from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.models.text.features import TextFeaturesConfig
from ltx2_jax.planning import text as module
from ltx2_jax.planning.reports import describe
from ltx2_jax.planning.text import (
    TEXT_ENCODERS,
    TextConfig,
    forward_flops,
    plan_text,
    text_mesh,
)
from ltx2_jax.sharding import make_mesh

VIDEO = ConnectorConfig(num_layers=3, num_heads=4, head_dim=8, registers=16)
GEMMA_3 = TextConfig(
    tiny_gemma.GEMMA_3,
    TextFeaturesConfig(24, 8, norm="rms", video_dim=32, audio_dim=16, bias=True),
    dataclasses.replace(VIDEO, gated_attention=True),
    dataclasses.replace(VIDEO, gated_attention=True, head_dim=4),
)
GEMMA_4 = TextConfig(tiny_gemma.GEMMA_4, TextFeaturesConfig(24, 5, video_dim=32), VIDEO, VIDEO)


def matmul_flops(jaxpr):
    """FLOPs of every matrix product of a program, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        times = equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            total += times * matmul_flops(inner)
    return total


@pytest.mark.parametrize("config", [GEMMA_3, GEMMA_4], ids=["gemma3", "gemma4"])
def test_flops_are_those_of_the_program(config):
    model = nnx.eval_shape(lambda: module._create(config))
    graphdef, params = nnx.split(model)
    tokens, mask = (jax.ShapeDtypeStruct((2, 32), dtype) for dtype in (jnp.int32, jnp.bool))
    program = jax.make_jaxpr(lambda p, *x: nnx.merge(graphdef, p)(*x))(params, tokens, mask)
    assert matmul_flops(program.jaxpr) == 2 * forward_flops(config, 32)


def test_norms_stay_float32_and_matrices_are_bfloat16_as_they_are_loaded():
    _, params = module._abstract(GEMMA_3, make_mesh(devices=jax.devices()[:1]), True)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params["gemma"])[0]:
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name


def test_one_chip_shares_nothing_and_features_need_no_connectors(monkeypatch):
    monkeypatch.setattr(module, "tpu_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(module, "compile_facts", lambda *_: {})
    monkeypatch.setattr(module, "WHOLE", 0)
    facts = plan_text(GEMMA_4, 1, "v5p:2x2x2", length=8)
    assert facts["whole_on_every_chip"] == []
    alone = plan_text(GEMMA_4, 1, "v5p:2x2x2", length=8, connect=False)
    for name in ("parameters", "flops_of_batch"):
        assert 0 < alone[name] < facts[name]


def test_a_plan_says_what_a_chip_holds_and_sends_and_whether_it_fits(monkeypatch):
    monkeypatch.setattr(module, "tpu_devices", lambda topology: jax.devices())
    monkeypatch.setattr("ltx2_jax.chips.hbm_bytes", lambda kind: 2**10)
    monkeypatch.setattr(module, "WHOLE", 2**7)
    facts = plan_text(GEMMA_4, 3, "v5p:2x2x2", length=32)
    assert facts["split"] == {"data": 2, "model": 4}
    assert (facts["rows"], facts["devices"]) == (4, 8)
    # Two bfloat16 contexts of 32 numbers, two rows a chip; and a few bytes of bookkeeping.
    assert 0 <= facts["output_bytes_per_device"] - 2 * 2 * 32 * 32 * 2 < 64
    whole, split = 2 * facts["parameters"], facts["argument_bytes_per_device"]
    assert whole / 8 < split < whole / 3
    assert {name.split("/")[-1] for name in facts["whole_on_every_chip"]} == {"weight"}  # of norms
    assert facts["flops_of_batch"] == 4 * forward_flops(GEMMA_4, 32)
    assert 1 <= 8 * facts["flops"] / facts["flops_of_batch"] < 1.1  # some rows on every chip
    # Four layers are a loop of two, twice; three in a connector a loop of one.
    assert {loop["trips"] for loop in facts["loops"]} == {2, 3}
    reduced = [row for row in facts["collectives"] if row["kind"] == "all-reduce"]
    assert {tuple(row["axes"]) for row in reduced} == {("model",)}
    json.dumps(facts)
    text = describe(facts)
    assert text.startswith("encode 3 prompts of 32 tokens on v5p:2x2x2 (8 x cpu)\n")
    assert not facts["fits"]
    assert "of 0.00 GiB per device: does not fit: 0.00 GiB too much\n" in text
    assert "of 1.00 GiB per device: fits\n" in describe(
        facts | {"fits": True, "hbm_bytes_per_device": 2**30}
    )


@pytest.mark.parametrize(
    ("version", "count", "model"),
    # 2.0 has connectors of 30 heads.
    [("2.0", 8, 2), ("2.3", 4, 4), ("2.3", 8, 8), ("2.5", 8, 8), ("2.3", 1, 1), ("2.3", 6, 2)],
)
def test_the_model_axis_is_as_large_as_the_heads_allow(version, count, model):
    mesh = text_mesh(TEXT_ENCODERS[version], jax.devices()[:count])
    assert dict(mesh.shape) == {"data": count // model, "model": model, "sequence": 1}


@pytest.mark.parametrize(
    ("part", "size"), [("gemma", "mlp"), ("video", "num_heads"), ("audio", "num_heads")]
)
def test_the_model_axis_divides_all_that_it_splits(part, size):
    config = TEXT_ENCODERS["2.3"]
    narrow = {part: dataclasses.replace(getattr(config, part), **{size: 6})}
    mesh = text_mesh(dataclasses.replace(config, **narrow), jax.devices()[:4])
    assert mesh.shape["model"] == 2


@pytest.mark.parametrize("version", ["2.3", "2.5"])
def test_features_take_every_state_of_the_decoder(version):
    encoder = TEXT_ENCODERS[version]
    assert encoder.features.num_states == encoder.gemma.num_layers + 1
