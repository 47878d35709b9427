"""Facts of programs compiled for 8 CPU devices against sums done by hand and XLA's own counts."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ltx2_jax.chips import CHIPS
from ltx2_jax.models import flops
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.transformer.config import LTX2_19B
from ltx2_jax.models.transformer.streams import Modality
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.planning.compiled import hlo, traffic
from ltx2_jax.planning.compiled.facts import describe, module_facts, program_facts
from ltx2_jax.sharding import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(2, 2, 2)


def arguments(mesh, *arrays):
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arrays
    ]


def facts_of(function, mesh, *arrays, **options):
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments(mesh, *arrays)).compile()
    return program_facts(compiled, mesh, **options)


def alone(function, *shapes):
    """Facts of a program on one device, and what XLA counts: FLOPs, bytes."""
    compiled = jax.jit(function).lower(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ).compile()  # fmt: skip
    counted = compiled.cost_analysis()
    return module_facts(hlo.parse(compiled.as_text())), counted["flops"], counted["bytes accessed"]


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (jnp.matmul, [(96, 64), (64, 32)]),
        (partial(jnp.einsum, "bqnh,bknh->bnqk"), [(2, 24, 4, 16), (2, 40, 4, 16)]),
        (conv, [(2, 9, 10, 8), (3, 3, 8, 16)]),
        (partial(conv, strides=(2, 1), padding="VALID"), [(2, 9, 10, 8), (3, 2, 8, 16)]),
        (partial(conv, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)), [(2, 5, 6, 8),
                                                                       (4, 4, 8, 16)]),
        (partial(conv, rhs_dilation=(2, 1)), [(2, 9, 10, 8), (3, 3, 8, 16)]),
        (partial(conv, feature_group_count=4), [(2, 9, 10, 8), (3, 3, 2, 16)]),
    ],
)  # fmt: skip
def test_flops_and_bytes_of_one_product_are_those_that_xla_counts(function, shapes):
    facts, counted, moved = alone(function, *shapes)
    assert facts["flops"] == counted
    assert facts["hbm_read_bytes"] + facts["hbm_written_bytes"] == moved


def test_loops_multiply():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)

    def function(x, ws):
        return jax.lax.scan(outer, x, ws)[0] @ x.T

    facts, counted, _ = alone(function, (16, 16), (5, 3, 16, 16))
    product = 2 * 16**3
    assert facts["flops"] == 16 * product
    assert counted < 3 * product  # XLA counts the bodies once
    assert [(loop["times"], loop["trips"], loop["depth"]) for loop in facts["loops"]] == [
        (1, 5, 0),
        (5, 3, 1),
    ]


def test_a_stacked_operand_is_read_a_slice_at_a_time():
    def function(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, x), x, ws)

    facts, _, _ = alone(function, (64, 64), (10, 64, 64))
    matrix = 64 * 64 * 4
    read, written = facts["hbm_read_bytes"], facts["hbm_written_bytes"]
    # Each round reads the slice and the carry, writes the product and one row of the results, and
    # may copy each of them; it never touches the whole stack.
    assert 2 * 10 * matrix <= read < 7 * 10 * matrix
    assert 2 * 10 * matrix <= written < 7 * 10 * matrix


SLICED, STACK, ROW = "f32[3,128]{1,0}", "f32[8,128]{1,0}", "f32[1,128]{1,0}"  # 512 bytes a row
UPDATE = f"%p = {STACK} parameter(0)\n  %u = {ROW} parameter(1)\n  %z = s32[] constant(0)"


@pytest.mark.parametrize(
    ("fused", "result", "read", "written"),
    [
        # Two overlapping slices of four rows are no more than the four.
        (
            f"%p = f32[4,128]{{1,0}} parameter(0)\n  %x = {SLICED} slice(%p), slice={{[0:3]}}\n"
            f"  %y = {SLICED} slice(%p), slice={{[1:4]}}\n  ROOT %s = {SLICED} add(%x, %y)",
            SLICED, 4, 3,
        ),
        # In place: what is put in is read, what it is put into is not.
        (f"{UPDATE}\n  ROOT %d = {STACK} dynamic-update-slice(%p, %u, %z, %z)", STACK, 1, 1),
    ],
)  # fmt: skip
def test_a_fusion_moves_the_rows_that_it_touches(fused, result, read, written):
    given = [line.strip() for line in fused.split("\n") if "parameter" in line]
    names = ", ".join(line.split()[0] for line in given)
    module = hlo.parse(
        f"%inner (p: f32[4,128]) -> f32[3,128] {{\n  {fused}\n}}\n\n"
        "ENTRY %main (p: f32[4,128]) -> f32[3,128] {\n  "
        + "\n  ".join(given)
        + f"\n  ROOT %f = {result} fusion({names}), kind=kLoop, calls=%inner\n}}\n"
    )
    moved = traffic.hbm_bytes(module, module.entry, module.entry.root)
    assert moved == (512 * read, 512 * written)


@pytest.mark.parametrize(("layout", "written"), [("{1,0}", 512), ("{1,0:S(1)}", 0)])
def test_what_is_updated_on_the_chip_is_not_written_to_memory(layout, written):
    stack = STACK.replace("{1,0}", layout)
    body = UPDATE.replace(STACK, stack)
    module = hlo.parse(
        f"ENTRY %main (p: f32[8,128], u: f32[1,128]) -> f32[8,128] {{\n  {body}\n"
        f"  ROOT %d = {stack} dynamic-update-slice(%p, %u, %z, %z)\n}}\n"
    )
    assert traffic.hbm_bytes(module, module.entry, module.entry.root) == (512, written)


def test_a_conditional_counts_its_dearest_branch():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x @ x, x)

    facts, _, _ = alone(function, (16, 16))
    assert facts["flops"] == 2 * 2 * 16**3


def gather(x):
    return jax.sharding.reshard(x, P("data", None)) * 2.0


def reduce(x, w):
    return jnp.einsum("ab,bc->ac", x, w, out_sharding=P("data", None))


def exchange(x):
    local = partial(
        jax.lax.all_to_all, axis_name="sequence", split_axis=1, concat_axis=0, tiled=True
    )
    return jax.shard_map(local, in_specs=P("sequence", None), out_specs=P(None, "sequence"))(x)


def shift(x):
    pairs = [(0, 1), (1, 0)]
    local = partial(jax.lax.ppermute, axis_name="model", perm=pairs)
    return jax.shard_map(local, in_specs=P("model"), out_specs=P("model"))(x)


def scatter(x):
    local = partial(jax.lax.psum_scatter, axis_name="data", scatter_dimension=0, tiled=True)
    return jax.shard_map(local, in_specs=P(None, "data"), out_specs=P("data"))(x)


@pytest.mark.parametrize(
    ("function", "arrays", "kind", "axes", "size"),
    [
        (gather, [((8, 16), P("data", ("model", "sequence")))], "all-gather",
         ["model", "sequence"], 4 * 16 * 4),
        (reduce, [((8, 16), P("data", "model")), ((16, 32), P("model", None))], "all-reduce",
         ["model"], 4 * 32 * 4),
        (exchange, [((8, 16), P("sequence", None))], "all-to-all", ["sequence"], 8 * 8 * 4),
        (shift, [((8, 16), P("model", None))], "collective-permute", ["model"], 4 * 16 * 4),
        (scatter, [((8, 16), P(None, "data"))], "reduce-scatter", ["data"], 4 * 8 * 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_every_collective_is_found_with_its_axes_and_bytes(
    function, arrays, kind, axes, size, mesh
):
    facts = facts_of(function, mesh, *arrays)
    assert facts["collective_counts"] == {kind: 1}
    (row,) = facts["collectives"]
    assert (row["kind"], row["axes"], row["dtype"]) == (kind, axes, "f32")
    assert (row["times"], row["bytes"], row["group"]) == (1, size, 2 ** len(axes))
    assert (row["asynchronous"], row["depth"], row["in_layers"]) == (False, 0, False)


def layers(x, ws):
    """An MLP whose weights are stored in shards over data x sequence, split over model."""

    def layer(x, w):
        first = jax.sharding.reshard(w[0], P(None, "model"))
        second = jax.sharding.reshard(w[1], P("model", None))
        hidden = jnp.tanh(jnp.einsum("td,df->tf", x, first))
        return jnp.einsum("tf,fd->td", hidden, second, out_sharding=P("data", None)), None

    with jax.named_scope("layers"):
        return jax.lax.scan(layer, x, ws)[0]


def layers_facts(mesh, **options):
    weights = (
        ((6, 16, 64), P(None, ("data", "sequence"), "model")),
        ((6, 64, 16), P(None, "model", ("data", "sequence"))),
    )
    function = lambda x, *ws: layers(x, ws)  # noqa: E731
    return facts_of(function, mesh, ((8, 16), P("data", None)), *weights, **options)


def test_collectives_of_a_loop_run_every_round(mesh):
    facts = layers_facts(mesh)
    rows = {(row["kind"], *row["axes"]): row for row in facts["collectives"]}
    assert set(rows) == {("all-gather", "data", "sequence"), ("all-reduce", "model")}
    gathers, reduces = rows.values()
    assert all(row["in_layers"] and row["depth"] == 1 for row in rows.values())
    assert all("while/body" in name for row in rows.values() for name in row["op_names"])
    assert (gathers["times"], gathers["bytes"]) == (12, 12 * 16 * 32 * 4)
    assert (reduces["times"], reduces["bytes"]) == (6, 6 * 4 * 16 * 4)
    # Half of the rows, half of the features; replicated over sequence.
    assert facts["flops"] == facts["flops_in_layers"] == 6 * 2 * 2 * 4 * 16 * 32
    json.dumps(facts)


def test_facts_are_told_in_lines(mesh):
    facts = layers_facts(mesh, model_flops=1e6, chip=CHIPS["v5p"])
    text = describe(facts, "a step")
    assert "100.0% in the layers" in text
    assert "data x sequence (4), all-gather: f32, in the layers" in text
    assert "MFU" in text
    assert facts["roofline"]["ideal"]["bound"] == "waited"
    json.dumps(facts)
    assert " a step, " in text
    unknown = describe(facts | {"loops": [{"name": "search", "trips": None}]}, "a step")
    assert "unknown loop   search" in unknown


def test_kernels_are_named_with_their_flops_and_widths():
    splash = """ENTRY %main (q: bf16[4,256,64]) -> bf16[4,256,64] {
  %q = bf16[4,256,64]{2,1,0} parameter(0)
  %m = s8[1,4,2]{2,1,0} parameter(1)
  %k = bf16[4,512,64]{2,1,0} parameter(2)
  %splash_mha_fwd_residuals.1 = (bf16[4,256,64]{2,1,0}, f32[4,256,128]{2,1,0}) \
custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"
  %o = bf16[4,256,64]{2,1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=0
  %mine.7 = bf16[4,256,64]{2,1,0} custom-call(%o, %k, %k), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"77","bytes_accessed":"1"}}}
  ROOT %odd = bf16[4,256,64]{2,1,0} custom-call(%mine.7), custom_call_target="other"
}
"""
    facts = module_facts(hlo.parse(splash))
    forward = 2 * 2 * 4 * 256 * 512 * 64
    assert [(k["name"], k["head_width"], k["flops"]) for k in facts["kernels"]] == [
        ("splash_mha_fwd_residuals", 64, forward),
        ("mine", 64, 77),
        ("odd", None, 0),
    ]
    assert facts["kernel_flops"] == facts["flops"] == forward + 77


@pytest.mark.parametrize(
    ("name", "notes", "products"),
    [("fwd", "", 2), ("dq", "", 3), ("dkv", "", 4), ("dkv", "use_fused_bwd_kernel: true", 5)],
)
def test_a_backward_kernel_of_attention_computes_scores_again(name, notes, products):
    text = f"""ENTRY %main (q: bf16[4,256,64]) -> bf16[4,512,64] {{
  %q = bf16[4,256,64]{{2,1,0}} parameter(0)
  %k = bf16[4,512,64]{{2,1,0}} parameter(1)
  ROOT %splash_mha_{name}.1 = bf16[4,512,64]{{2,1,0}} custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", metadata={{op_name="{notes}"}}
}}
"""
    assert module_facts(hlo.parse(text))["flops"] == products * 2 * 4 * 256 * 512 * 64


def test_a_weight_that_is_copied_for_the_whole_loop_is_named():
    text = """%relayout (i: bf16[48,1024,4096]) -> bf16[48,1024,4096] {
  %i = bf16[48,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %c = bf16[48,1024,4096]{2,1,0:T(16,128)(2,1)} copy(%i)
}

ENTRY %main (w: bf16[48,1024,4096], v: f32[48,1024,4096]) -> bf16[48,1024,4096] {
  %w = bf16[48,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params['w']"}
  %v = f32[48,1024,4096]{2,1,0:T(8,128)} parameter(1), metadata={op_name="params['v']"}
  %s = ((bf16[48,1024,4096]{2,1,0}), bf16[48,1024,4096]{2,1,0}) call-start(%w), to_apply=%relayout
  %d = bf16[48,1024,4096]{2,1,0:T(16,128)(2,1)} call-done(%s)
  %fast = bf16[48,1024,4096]{2,1,0:T(8,128)(2,1)S(1)} copy(%w)
  ROOT %cast = bf16[48,1024,4096]{2,1,0:T(8,128)(2,1)} convert(%v)
}
"""
    size = 48 * 1024 * 4096 * 2
    assert module_facts(hlo.parse(text))["weight_copies"] == [
        {"parameter": "params['w']", "kind": "layout", "bytes": size},
        {"parameter": "params['v']", "kind": "to bf16", "bytes": size},
    ]


def test_a_forward_pass_has_the_flops_of_its_analytic_count():
    config = dataclasses.replace(
        LTX2_19B,
        **{name: getattr(tiny.MODEL, name) for name in ("context_dim", "audio_context_dim")},
        num_layers=3,
        num_heads=4,
        head_dim=8,
        audio_num_heads=4,
        audio_head_dim=4,
        caption_channels=24,
        remat="none",
    )
    abstract = nnx.eval_shape(lambda: LTX2Transformer(config, rngs=Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)

    def modality(tokens, channels, axes):
        f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        return Modality(
            latent=f32((2, tokens, channels)),
            sigma=f32((2,)),
            timesteps=f32((2, 1)),
            positions=f32((1, axes, tokens, 2)),
            context=f32((2, 16, 24)),
        )

    video, audio = modality(96, config.in_channels, 3), modality(10, config.audio_in_channels, 1)
    forward = jax.jit(lambda params, *streams: nnx.merge(graphdef, params)(*streams))
    compiled = forward.lower(params, video, audio).compile()
    facts = module_facts(hlo.parse(compiled.as_text()))
    analytic = 2 * sum(flops.forward_flops(config, 96, 10, 16).values())
    assert facts["flops"] == pytest.approx(analytic, rel=0.01)
    assert 0.5 * facts["flops"] < facts["flops_in_layers"] < facts["flops"]
