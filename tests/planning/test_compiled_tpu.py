"""Facts of small programs as the TPU compiler makes them: its fusions, its asynchronous calls."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ltx2_jax.planning.compiled.facts import describe, program_facts
from ltx2_jax.planning.compiled.memory import compile_or_overflow
from ltx2_jax.planning.topology import tpu_devices
from ltx2_jax.sharding import make_mesh

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

LAYERS, WIDTH, HIDDEN, ROWS, TOKENS = 12, 512, 2048, 8, 256
FSDP = ("data", "sequence")


def array(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compile_for(mesh, function, *arguments, **options):
    with jax.set_mesh(mesh):
        return compile_or_overflow(jax.jit(function, **options).lower(*arguments))


def layer(x, w):
    first = jax.sharding.reshard(w["in"].astype(jnp.bfloat16), P(None, "model"))
    second = jax.sharding.reshard(w["out"].astype(jnp.bfloat16), P("model", None))
    hidden = jax.nn.gelu(jnp.einsum("btd,df->btf", x, first))
    out = P("data", "sequence", None)
    return x + jnp.einsum("btf,fd->btd", hidden, second, out_sharding=out), None


def train_step(params, x):
    def loss(params):
        body = jax.checkpoint(layer, prevent_cse=False)
        with jax.named_scope("layers"):
            return jnp.mean(jax.lax.scan(body, x, params)[0].astype(jnp.float32) ** 2)

    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))


def train_facts(topology, *sizes):
    """A training step of an MLP: weights in shards over data x sequence, features over model."""
    mesh = make_mesh(*sizes, devices=tpu_devices(topology))
    shapes = {"in": (LAYERS, WIDTH, HIDDEN), "out": (LAYERS, HIDDEN, WIDTH)}
    specs = {"in": (None, FSDP, "model"), "out": (None, "model", FSDP)}
    params = {n: array(mesh, shapes[n], *specs[n], dtype=jnp.float32) for n in shapes}
    x = array(mesh, (ROWS, TOKENS, WIDTH), "data", "sequence", None)
    compiled = compile_for(mesh, train_step, params, x, donate_argnums=0)
    facts = program_facts(compiled, mesh, model_flops=1e12)
    json.dumps(facts)
    return facts


def rows(facts):
    return {(r["kind"], *r["axes"]): r for r in facts["collectives"] if r["in_layers"]}


def test_a_step_on_v5p_scatters_its_gradients_in_fusions():
    facts = train_facts("v5p:2x2x2", 4, 2, 1)
    # Forward, again in the backward pass without the last product, gradients of both sides.
    product = 2 * (ROWS // 4 * TOKENS) * WIDTH * (HIDDEN // 2)
    assert facts["flops"] == facts["flops_in_layers"] == LAYERS * (2 + 1 + 4) * product
    assert [loop["trips"] for loop in facts["loops"]] == [LAYERS, LAYERS]
    found = rows(facts)
    gathered = WIDTH * (HIDDEN // 2) * 2
    gathers = found["all-gather", "data"]
    assert (gathers["times"], gathers["bytes"]) == (4 * LAYERS, 4 * LAYERS * gathered)
    assert gathers["dtype"] == "bf16"  # gathered in the dtype of the products
    # Gradients: an all-reduce of which each device keeps its fourth is a reduce-scatter, if the
    # compiler fuses the two; of matrices this small it fuses one and leaves the other.
    scatters, whole = found["reduce-scatter", "data"], found["all-reduce", "data"]
    assert (scatters["times"], scatters["bytes"]) == (LAYERS, LAYERS * gathered // 4)
    assert (whole["times"], whole["bytes"]) == (LAYERS, LAYERS * gathered)
    reduces = found["all-reduce", "model"]
    assert reduces["times"] == 2 * LAYERS
    assert reduces["bytes"] == 2 * LAYERS * (ROWS // 4) * TOKENS * WIDTH * 2
    assert facts["chip"] == "v5p"
    assert facts["roofline"]["ideal"]["step"] < facts["roofline"]["practical"]["step"]


def test_a_step_on_v7x_moves_data_beside_its_products():
    facts = train_facts("tpu7x:2x2x1", 4, 2, 1)
    product = 2 * (ROWS // 4 * TOKENS) * WIDTH * (HIDDEN // 2)
    assert facts["flops"] == LAYERS * 7 * product
    found = rows(facts)
    assert found["all-gather", "data"]["times"] == 4 * LAYERS
    assert found["reduce-scatter", "data"]["times"] == 2 * LAYERS
    assert found["all-gather", "data"]["asynchronous"]
    assert facts["devices"] == 8
    times = facts["roofline"]["practical"]
    assert 0 < times["waited"] <= times["interconnect"]


def test_what_is_offloaded_crosses_to_the_host_and_back_once():
    mesh = make_mesh(4, 1, 1, devices=tpu_devices("v5p:2x2x1"))
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block input"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def block(x, w):
        x = jax.ad_checkpoint.checkpoint_name(x, "block input")
        return jnp.tanh(x @ w), None

    def loss(ws, x):
        body = jax.checkpoint(block, policy=policy, prevent_cse=False)
        with jax.named_scope("layers"):
            return jnp.sum(jax.lax.scan(body, x, ws)[0].astype(jnp.float32))

    shapes = ((LAYERS, WIDTH, WIDTH), ()), ((4 * TOKENS, WIDTH), ("data", None))
    arguments = [array(mesh, shape, *spec) for shape, spec in shapes]
    facts = program_facts(compile_for(mesh, jax.grad(loss), *arguments), mesh)
    kept = LAYERS * TOKENS * WIDTH * 2
    assert facts["host_traffic_bytes"] == 2 * kept
    # Forward, forward again, and the gradients of both sides; the input's first is not needed. A
    # round stands outside of each loop, so that the copies run ahead.
    product = 2 * TOKENS * WIDTH**2
    assert facts["flops"] == pytest.approx(4 * LAYERS * product, rel=1 / LAYERS)
    assert facts["flops"] * (LAYERS - 2) / LAYERS < facts["flops_in_layers"] <= facts["flops"]


def double(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


def splash(q, k, v):
    heads, tokens = q.shape[1:3]
    mask = splash_attention_mask.FullMask((tokens, tokens))
    sizes = splash_attention_kernel.BlockSizes(block_q=256, block_kv=256, block_kv_compute=256)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
    )
    return jax.vmap(kernel)(q, k, v)


def test_kernels_count_what_they_claim_and_attention_what_it_multiplies():
    mesh = make_mesh(4, 1, 1, devices=tpu_devices("v5p:2x2x1"))
    heads, tokens, width, rounds = 2, 512, 128, 5
    claim = pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=10)

    def local(x):
        doubled = pl.pallas_call(
            double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=claim,
            name="double",
        )(x)  # fmt: skip
        return splash(doubled, doubled, doubled)

    def function(x):
        sharded = jax.shard_map(local, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        with jax.named_scope("layers"):
            return jax.lax.scan(lambda x, _: (sharded(x), None), x, None, length=rounds)[0]

    compiled = compile_for(mesh, function, array(mesh, (4, heads, tokens, width), "data"))
    facts = program_facts(compiled, mesh)
    kernels = {kernel["name"]: kernel for kernel in facts["kernels"]}
    assert kernels["double"]["times"] == rounds
    assert kernels["double"]["flops"] == rounds * 1000
    (attention,) = [k for name, k in kernels.items() if name.startswith("splash_mha_fwd")]
    assert attention["head_width"] == width
    assert attention["flops"] == rounds * 4 * heads * tokens**2 * width
    assert facts["kernel_flops"] == facts["flops"]
    assert all(kernel["in_layers"] for kernel in facts["kernels"])


def test_hbm_traffic_of_a_product_is_its_operands_and_its_result():
    mesh = make_mesh(4, 1, 1, devices=tpu_devices("v5p:2x2x1"))
    shapes = ((2048, 1024), ("data", None)), ((1024, 256), ())
    compiled = compile_for(mesh, jnp.matmul, *(array(mesh, s, *spec) for s, spec in shapes))
    facts = program_facts(compiled, mesh)
    rows = 2048 // 4
    assert facts["flops"] == 2 * rows * 1024 * 256
    # Copies between HBM and VMEM on the way are the reading, and do not count again.
    assert facts["hbm_read_bytes"] == 2 * (rows * 1024 + 1024 * 256)
    assert facts["hbm_written_bytes"] == 2 * rows * 256


@pytest.mark.parametrize("sizes", [(16, 1, 4), (32, 1, 2), (8, 2, 4)])
def test_weights_are_gathered_by_gathers_however_the_mesh_lies_on_the_torus(sizes):
    """Left to itself the compiler reduces zeros instead if data x sequence is no order of rings."""
    mesh = make_mesh(*sizes, devices=tpu_devices("v5p:4x4x4"))
    compiled = compile_for(
        mesh, lambda w: jax.sharding.reshard(w, P()) * 2, array(mesh, (4096, 4096), FSDP)
    )
    facts = program_facts(compiled, mesh)
    assert facts["collective_counts"] == {"all-gather": 1}
    (row,) = facts["collectives"]
    assert row["axes"] == ["data", "sequence"]
    assert row["group"] == sizes[0] * sizes[2]


def test_between_slices_gradients_cross_in_the_backward_pass_alone():
    """Whole weights on every slice: a device sends its shard's gradient, and nothing in between."""
    mesh = make_mesh(devices=tpu_devices("2xv5p:2x2x1"))
    layers, width, hidden, both = 3, 256, 512, ("slice", "data")

    def layer(x, w):
        gather = lambda name: jax.sharding.reshard(w[name].astype(jnp.bfloat16), P())  # noqa: E731
        first, second = gather("in"), gather("out")
        h = jax.nn.gelu(jnp.einsum("bd,df->bf", x, first))
        return x + jnp.einsum("bf,fd->bd", h, second, out_sharding=P(both, None)), None

    def loss(params, x):
        with jax.named_scope("layers"):
            return jnp.mean(jax.lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2)

    shapes = {"in": (layers, width, hidden), "out": (layers, hidden, width)}
    params = {n: array(mesh, s, None, "data", None, dtype=jnp.float32) for n, s in shapes.items()}
    compiled = compile_for(mesh, jax.grad(loss), params, array(mesh, (256, width), both, None))
    facts = program_facts(compiled, mesh)
    sent = facts["between_slices"]
    assert sent["bytes"] == 2 * layers * width * hidden * 2 / 4  # bfloat16, a fourth each
    assert sent["forward"] == 0 < sent["backward"] <= sent["bytes"]
    assert sent["seconds"] == pytest.approx(sent["bytes"] / (0.9 * 50e9 / 8))  # 50 Gbit/s a chip
    gathered = [row for row in facts["collectives"] if row["kind"] == "all-gather"]
    assert {tuple(row["axes"]) for row in gathered} == {("data",)}
    assert "GiB sent per device" in describe(facts, "a step")


def test_a_product_that_is_scattered_as_it_is_made_counts_every_round():
    """The compiler turns it into a loop of products and permutes, two of each in a round."""
    mesh = make_mesh(8, 1, 1, devices=tpu_devices("v5p:2x2x2"))

    def function(x, y):
        return jnp.einsum("td,tf->df", x, y, out_sharding=P("data", None))

    x = array(mesh, (8192, 4096), "data", None)
    facts = program_facts(compile_for(mesh, function, x, x), mesh)
    assert facts["flops"] == 2 * 8192 * 4096**2 / 8
    assert all(loop["trips"] for loop in facts["loops"])


def test_a_program_too_large_for_the_chip_is_told_in_numbers():
    mesh = make_mesh(4, 1, 1, devices=tpu_devices("v5e:2x2"))
    facts = compile_for(mesh, partial(jnp.add, 1.0), array(mesh, (2**17, 2**17)))
    assert facts["memory"] == "hbm"
    assert facts["needed_bytes"] == 64 * 2**30
    assert facts["available_bytes"] == 15.75 * 2**30
    assert facts["message"].startswith("does not fit: needs 64.00 of 15.75 GiB of HBM per device")
