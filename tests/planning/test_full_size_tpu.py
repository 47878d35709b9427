"""The 19B model at full width and six blocks deep, compiled for TPU slices that are not here."""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ltx2_jax import sharding
from ltx2_jax.config import Config, DataConfig, TextConfig
from ltx2_jax.models import flops
from ltx2_jax.models.transformer import attention_kernels as kernels
from ltx2_jax.models.transformer.config import LTX2_19B
from ltx2_jax.planning import programs
from ltx2_jax.planning.compiled.facts import program_facts
from ltx2_jax.planning.topology import tpu_devices

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is missing"
    ),
]

LAYERS = 6
CONFIG = Config(
    workdir="unused",
    model=dataclasses.replace(LTX2_19B, num_layers=LAYERS),
    text=TextConfig(release="2.0"),
    data=DataConfig(path="unused", batch_size=1),
)
REQUEST = programs.request_of(CONFIG, num_frames=17, height=512, width=768)
TOKENS = 3 * 16 * 24


@pytest.fixture(autouse=True)
def quick():
    """A third of the time to compile, for a slower program: what it moves and keeps is the same."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1")
    yield
    jax.config.update("jax_optimization_level", before)


def in_layers(facts, kind, *axes):
    """(times, bytes) of the collectives of a kind over exactly these axes in the loops."""
    rows = [r for r in facts["collectives"] if r["in_layers"] and r["kind"] == kind]
    rows = [r for r in rows if tuple(r["axes"]) == axes]
    return sum(r["times"] for r in rows), sum(r["bytes"] for r in rows)


def block_parameters():
    one = dataclasses.replace(CONFIG.model, num_layers=1)
    two = dataclasses.replace(CONFIG.model, num_layers=2)
    return LAYERS * (flops.total_parameters(two) - flops.total_parameters(one))


# First: workers are dealt two tests each, and none should get both this and the sampler's.
def test_the_train_step_moves_weights_and_never_runs_a_forward_kernel_twice():
    """A step of two micro-batches, on two slices."""
    micro = 2
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, batch_size=2 * micro),
        optim=dataclasses.replace(CONFIG.optim, accumulate_steps=micro),
    )
    mesh = sharding.make_mesh(1, 2, 2, devices=tpu_devices("2xv5p:2x2x1"))
    lowered, state = programs.train_program(config, REQUEST, mesh)
    compiled = lowered.compile()
    facts = program_facts(compiled, mesh)
    assert sharding.replicated(state, 2**20) == []

    # Gradients alone go from slice to slice, once a step, when all are there: in float32, each
    # shard of a slice; of two slices, either sends as much as it holds.
    sent, shard = facts["between_slices"], sharding.bytes_per_chip(state["params"])
    assert shard <= sent["bytes"] <= 1.1 * shard
    assert sent["forward"] == sent["backward"] == 0

    # Weights in bfloat16, their features split over model, are gathered for either pass; nothing
    # else is, and never over the model axis.
    weights = 2 * block_parameters() / 2
    gathers = {tuple(r["axes"]) for r in facts["collectives"]
               if r["kind"] == "all-gather" and r["in_layers"]}  # fmt: skip
    assert gathers == {("sequence",)}
    assert in_layers(facts, "all-gather", "sequence")[1] <= 1.1 * micro * 2 * weights
    # Tokens of queries, keys, values and the result are traded for heads in three passes.
    row = 2 * TOKENS / 2 * CONFIG.model.width / 2
    assert in_layers(facts, "all-to-all", "sequence")[1] <= 1.1 * micro * LAYERS * 12 * row

    calls = {"fwd": 0, "dkv": 0}
    for kernel in facts["kernels"]:
        for kind in calls:
            calls[kind] += kernel["times"] * (f"_{kind}_" in kernel["name"])
    assert calls["fwd"] == calls["dkv"] > 0


@pytest.mark.parametrize("tokens", [1408, 2688, 2816])
def test_attention_whose_keys_are_one_block_fits_the_fast_memory(tokens):
    jax.config.update("jax_optimization_level", "O2")
    mesh = sharding.make_mesh(1, 1, 1, devices=tpu_devices("v5p:2x2x1")[:1])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((4, tokens, 128), jnp.bfloat16, sharding=where)
    with jax.set_mesh(mesh):
        run = partial(kernels.splash_forward, target=sharding.target(), residuals=True)
        jax.jit(run).lower(x, x, x).compile()


def test_the_sampler_keeps_its_weights_and_sends_little():
    """On a v7x, which would like some weights in another layout."""
    mesh = sharding.make_mesh(2, 2, 2, devices=tpu_devices("tpu7x:2x2x1"))
    lowered, params = programs.sample_program(CONFIG, REQUEST, mesh, batch=2, passes=1, steps=1)
    compiled = lowered.compile()
    facts = program_facts(compiled, mesh)
    assert not [r for r in facts["collectives"] if r["kind"] == "all-gather" and r["in_layers"]]
    # Four products of a block end in a sum over model: self-, text and audio attention of video,
    # and its feed-forward; and as many of the audio stream, whose rows are few.
    row = 2 * TOKENS / 2 * CONFIG.model.width
    times, size = in_layers(facts, "all-reduce", "model")
    assert times <= 12 * LAYERS
    assert size <= 1.2 * LAYERS * 4 * row
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes >= sharding.bytes_per_chip(params)
    assert memory.temp_size_in_bytes < 0.25 * memory.argument_size_in_bytes
    assert facts["weight_copies"] == []
