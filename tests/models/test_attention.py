"""One attention, whatever computes it and however many devices share it; kernels run once."""

import dataclasses
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice
from test_transformer import SMALL, forward, inputs, weights

from ltx2_jax import sharding
from ltx2_jax.errors import UserError
from ltx2_jax.models import flops
from ltx2_jax.models.layers import FeedForward, Rngs
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.transformer import attention_kernels as kernels
from ltx2_jax.models.transformer.attention import attend
from ltx2_jax.models.transformer.streams import Keep
from ltx2_jax.models.transformer.transformer import LTX2Transformer

VIDEO, AUDIO, TEXT = "video_tokens", "audio_tokens", "text_tokens"
V5P, V6E, V7X = ("tpu", "TPU v5"), ("tpu", "TPU v6 lite"), ("tpu", "TPU7x")


@pytest.fixture(scope="module", params=["xla", "splash"])
def backend(request):
    if request.param == "splash":
        pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    return request.param


def arrays(queries, keys, heads, batch=2, width=4):
    """q, k, v and a gradient of the attention, [B, T, N, H]."""
    rng = np.random.default_rng(0)
    lengths = (queries, keys, keys, queries)
    return [rng.normal(size=(batch, n, heads, width)).astype(np.float32) for n in lengths]


def reference(q, k, v, bias=None):
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, precision="highest") / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(logits if bias is None else logits + bias)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v, precision="highest")


def with_gradients(function, arguments, grad):
    out, pull = jax.vjp(function, *arguments)
    return out, *pull(grad)


wanted = jax.jit(partial(with_gradients, reference))


def check_on_mesh(context, queries, keys, arguments, bias=None, backend="xla"):
    """attend() on the mesh `context` equals the plain formula, as do all gradients."""
    *qkv, grad = arguments
    qkvb = qkv if bias is None else [*qkv, bias]
    want = wanted(qkvb, grad)
    run = partial(attend, queries=queries, keys=keys, backend=backend)
    with context, jax.default_matmul_precision("highest"):
        mesh = jax.sharding.get_mesh()
        place = [
            jax.device_put(x, sharding.sharding_of(mesh, "batch", tokens, "heads", None))
            for x, tokens in zip(arguments, (queries, keys, keys, queries), strict=True)
        ]
        placed = place[:3] if bias is None else [*place[:3], bias]
        got = jax.jit(partial(with_gradients, run))(placed, place[3])
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6, rtol=1e-5)


# What computes it, (data, model, sequence), heads: either way on every way of sharing the tokens.
MESHES = [
    ("xla", (1, 1, 1), 8),
    ("xla", (1, 8, 1), 8),
    ("splash", (8, 1, 1), 8),
    ("xla", (2, 2, 2), 8),  # tokens are traded for heads
    ("xla", (1, 2, 4), 8),
    ("splash", (1, 1, 8), 8),
    ("splash", (1, 4, 2), 8),
    ("xla", (1, 1, 4), 3),  # no heads to trade: keys go round all 4
    ("splash", (1, 1, 4), 3),
    ("splash", (2, 2, 2), 2),
    ("xla", (1, 1, 8), 6),  # pairs trade heads, keys go round 4 pairs
    ("splash", (1, 1, 8), 6),
    ("xla", (1, 2, 4), 4),
]
name = lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x)  # noqa: E731


@pytest.mark.parametrize(
    ("backend", "mesh", "heads"), MESHES, ids=name, indirect=["backend"], scope="module"
)
def test_self_attention_is_the_same_on_every_mesh(mesh_context, backend, mesh, heads):
    batch = 8 if mesh[0] == 8 else 2
    check_on_mesh(mesh_context(*mesh), VIDEO, VIDEO, arrays(16, 16, heads, batch), backend=backend)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 2, 4)], ids=name)
@pytest.mark.parametrize(("queries", "keys"), [(VIDEO, AUDIO), (AUDIO, VIDEO)])
def test_cross_attention_is_the_same_on_every_mesh(mesh_context, backend, mesh, queries, keys):
    lengths = {VIDEO: 16, AUDIO: 5}
    check_on_mesh(
        mesh_context(*mesh), queries, keys, arrays(lengths[queries], lengths[keys], 8),
        backend=backend,
    )  # fmt: skip


BIASED = [
    ((1, 1, 1), 8, VIDEO, VIDEO, (2, 1, 16, 16)),
    ((2, 2, 2), 8, VIDEO, VIDEO, (2, 1, 16, 16)),
    ((1, 1, 4), 3, VIDEO, VIDEO, (1, 3, 16, 16)),
    ((1, 2, 4), 8, VIDEO, TEXT, (2, 1, 1, 5)),
    ((1, 2, 4), 8, AUDIO, VIDEO, (2, 1, 1, 16)),
]


@pytest.mark.parametrize(("mesh", "heads", "queries", "keys", "shape"), BIASED, ids=name)
def test_a_bias_and_its_gradient_are_right_on_every_mesh(
    mesh_context, mesh, heads, queries, keys, shape
):
    lengths = {VIDEO: 16, AUDIO: 5, TEXT: 5}
    bias = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    arguments = arrays(lengths[queries], lengths[keys], heads)
    # The kernel is asked for and refused: it takes no bias.
    check_on_mesh(mesh_context(*mesh), queries, keys, arguments, bias, backend="splash")


def test_masks_and_perturbations_are_the_same_on_a_mesh(mesh_context, backend):
    cfg = dataclasses.replace(SMALL, num_layers=1)
    video, audio = inputs(cfg)
    rng = np.random.default_rng(2)
    strengths = np.clip(rng.uniform(-0.5, 1.5, (2, 8, 8)), 0, 1).astype(np.float32)
    strengths[:, range(8), range(8)] = 1
    video = dataclasses.replace(video, attention_mask=strengths)
    audio = dataclasses.replace(audio, context_mask=np.arange(6)[None].repeat(2, 0) < 4)
    half = np.array([[1.0], [0.0]])  # the second sample of the batch is perturbed
    keep = Keep(video_self=half, audio_self=half, audio_to_video=half, video_to_audio=1 - half)
    want = forward(cfg, weights(cfg), video, audio, keep)
    with mesh_context(2, 2, 2):
        params = tiny.params(tiny.config(model=cfg), jax.sharding.get_mesh())["transformer"]
        cfg = dataclasses.replace(cfg, attention=backend)
        got = forward(cfg, params, video, audio, keep)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


# ----------------------------------------------------------------------------------------- kernels


def test_lengths_that_fill_no_block_are_padded_and_masked(monkeypatch):
    pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    small = kernels.Blocks(256, 512, 128)
    monkeypatch.setattr(kernels, "TUNING", [("", kernels.Tuning(small, small))])
    monkeypatch.setattr(kernels, "DQ_BYTES", 2**16)  # heads take turns
    *qkv, grad = arrays(130, 300, heads=4)
    run = partial(attend, queries=VIDEO, keys=VIDEO, backend="splash")
    got = with_gradients(jax.jit(run), qkv, grad)
    for x, y in zip(got, wanted(qkv, grad), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("target", [V5P, V6E, V7X])
def test_whole_clips_are_cut_into_large_blocks_without_a_mask(target):
    for tokens in (6144, 14080, 32640):
        for most in (kernels._tuning(target).forward, kernels._tuning(target).backward):
            blocks = kernels.cut(tokens, tokens, most)
            assert tokens % blocks.keys == 0
            assert -tokens % blocks.queries < 0.02 * tokens
            assert min(blocks.keys, blocks.queries) >= 1024
            assert blocks.keys % blocks.piece == blocks.piece % 128 == 0
    # 53680 tokens are no multiple of the 128 lanes: filled up by 80.
    assert 53760 % kernels.cut(53680, 53680, kernels._tuning(target).forward).keys == 0
    assert kernels.cut(126, 126, kernels._tuning(target).forward) == kernels.Blocks(128, 128, 128)


@pytest.mark.parametrize("target", [V5P, V6E, V7X])
@pytest.mark.parametrize("tokens", [2600, 5000, 12345, 53680])
def test_where_keys_are_masked_blocks_leave_room_for_the_mask(target, tokens):
    for most in (kernels._tuning(target).forward, kernels._tuning(target).backward):
        blocks = kernels.cut(tokens, tokens, most)
        assert tokens % blocks.keys
        assert blocks.keys <= most.keys - 256
        assert blocks.queries <= most.queries - 128


@pytest.mark.parametrize("keys", [1280, 1408, 1536, 2500, 2688, 2816, 3072])
def test_a_forward_block_that_holds_all_keys_is_small(keys):
    tuning = kernels._tuning(V5P)
    blocks = kernels.cut(2816, keys, tuning.forward, tuning.alone)
    # 7 bytes for each logit, and 4 MiB besides, of the 16 MiB of scoped VMEM.
    assert blocks.keys < keys or 7 * blocks.queries * blocks.keys <= 12.1 * 2**20
    assert blocks.queries >= 384


def test_the_backend_is_that_of_the_target():
    h100 = ("gpu", "NVIDIA H100 80GB HBM3")
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")

    def chosen(target, wanted="auto", queries=6144, keys=126, width=64, dtype=bfloat16, bias=False):
        return kernels.choose(wanted, target, queries, keys, width, dtype, biased=bias)

    assert [chosen(t) for t in (V6E, h100, ("cpu", "cpu"))] == ["splash", "cudnn", "xla"]
    assert chosen(("gpu", "AMD Instinct MI300X")) == "xla"
    assert chosen(V6E, queries=126) == "xla"  # small: as fast, and less to compile
    assert chosen(V6E, dtype=float32) == chosen(h100, dtype=float32) == "xla"  # exact
    assert chosen(V6E, bias=True) == chosen(V6E, "splash", bias=True) == "xla"
    assert chosen(h100, width=4) == chosen(h100, keys=501) == "xla"  # cuDNN cannot
    assert (chosen(h100, width=128), chosen(h100, width=136)) == ("cudnn", "xla")
    assert chosen(("cpu", "cpu"), "splash", queries=1) == "splash"


def test_the_target_is_the_mesh_not_the_host():
    assert sharding.target() == ("cpu", "cpu")
    device = AbstractDevice("TPU v6 lite", num_cores=1, platform="tpu")
    mesh = sharding.abstract_mesh(1, 2, 4).update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.target() == V6E
        q = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.bfloat16)
        jaxpr = jax.make_jaxpr(partial(attend, queries=VIDEO, keys=VIDEO))(q, q, q).jaxpr
    assert "pallas_call" in {e.primitive.name for e in equations(jaxpr)}


@pytest.mark.parametrize("width", [64, 128])
def test_bfloat16_kernels_are_as_exact_as_their_inputs(width):
    pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    q, k, v, grad = (jnp.bfloat16(x) for x in arrays(256, 256, heads=1, batch=1, width=width))
    run = partial(attend, queries=VIDEO, keys=VIDEO, backend="splash")
    got = with_gradients(jax.jit(run), (q, k, v), grad)
    exact = [x.astype(jnp.float32) for x in (q, k, v, grad)]
    for x, y in zip(got, wanted(exact[:3], exact[3]), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
        assert error < 2**-8  # of one rounding: 2^-9 at most


def test_a_missing_kernel_library_is_named(monkeypatch):
    path = "tokamax._src.ops.experimental.tpu.splash_attention"
    monkeypatch.setitem(sys.modules, path, None)
    kernels._splash.cache_clear()
    q = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(UserError, match=r"pip install 'ltx2-jax\[tpu\]'"):
        attend(q, q, q, queries=VIDEO, keys=VIDEO, backend="splash")


# ------------------------------------------------------------------------------------------ memory


def equations(jaxpr):
    """Of a program and all programs inside it, loops once; not of the inside of a kernel."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


@pytest.mark.parametrize("rows", [50, 1])
def test_large_logits_are_held_a_block_at_a_time(monkeypatch, rows):
    """Also with one row of a bias for all queries, as that of masked text is."""
    *qkv, grad = arrays(50, 40, heads=2)
    bias = np.random.default_rng(1).normal(size=(2, 1, rows, 40)).astype(np.float32)
    run = partial(with_gradients, partial(attend, queries=VIDEO, keys=VIDEO, backend="xla"))
    whole = jax.jit(run)([*qkv, bias], grad)
    monkeypatch.setattr(kernels, "XLA_LOGITS_BYTES", 4 * 2 * 2 * 50 * 40 // 7)
    blocks = jax.jit(lambda *x: run(*x))([*qkv, bias], grad)
    for x, y in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)
    jaxpr = jax.make_jaxpr(lambda *x: run(*x))([*qkv, bias], grad).jaxpr
    shapes = [v.aval.shape for e in equations(jaxpr) for v in e.outvars]
    assert (2, 2, 7, 40) in shapes  # 8 blocks of 7 queries
    assert (2, 2, 50, 40) not in shapes


def test_blocks_of_queries_are_the_same_on_a_mesh(mesh_context, monkeypatch):
    monkeypatch.setattr(kernels, "XLA_LOGITS_BYTES", 600)
    bias = np.random.default_rng(1).normal(size=(2, 1, 16, 16)).astype(np.float32)
    check_on_mesh(mesh_context(2, 2, 2), VIDEO, VIDEO, arrays(16, 16, 4), bias)


def test_xla_attention_is_differentiable_forward():
    *qkv, _ = arrays(8, 5, heads=2)
    tangents = [np.ones_like(x) * x.mean() + x**2 for x in qkv]
    run = partial(attend, queries=VIDEO, keys=AUDIO)
    got, want = (jax.jvp(f, qkv, tangents) for f in (run, reference))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("remat", "of_attention", "of_mlp"),
    [("block", 8, 8), ("attention", 7, 8), ("projections", 7, 6)],
)
def test_products_whose_results_are_kept_are_not_made_again(remat, of_attention, of_mlp):
    """Two forward and four backward, of one size; the weights of attention are never kept."""
    policy = REMAT_POLICIES[remat]
    mlp = FeedForward(8, 4, rngs=Rngs(0))
    graph, params = nnx.split(mlp)

    def count(function, *arguments):
        kept = jax.checkpoint(lambda *x: jnp.sum(jnp.sin(function(*x))), policy=policy)
        return flops.count(jax.grad(kept, tuple(range(len(arguments)))), *arguments)

    *qkv, _ = arrays(16, 16, heads=2, width=4)
    self_attention = partial(attend, queries=VIDEO, keys=VIDEO)
    assert count(self_attention, *qkv) == of_attention * 2 * (2 * 2 * 16 * 16 * 4)

    def hidden(params, x):
        return nnx.merge(graph, params)(x, ("batch",))

    assert count(hidden, params, np.ones((5, 8), np.float32)) == of_mlp * 2 * (5 * 8 * 32)


def gradient_program(cfg, audio_tokens=5):
    """Of a sum of the velocities, by the weights; its equations."""
    video, audio = inputs(cfg)
    latent, positions = audio.latent[:, :audio_tokens], audio.positions[:, :, :audio_tokens]
    audio = dataclasses.replace(audio, latent=latent, positions=positions)
    graphdef = nnx.graphdef(jax.eval_shape(lambda: LTX2Transformer(cfg, rngs=Rngs(0))))

    def loss(params):
        v, a = nnx.merge(graphdef, params)(video, audio)
        return jnp.sum(v.astype(jnp.float32) ** 2) + jnp.sum(a.astype(jnp.float32) ** 2)

    return list(equations(jax.make_jaxpr(jax.grad(loss))(weights(cfg)).jaxpr))


def kernel_calls(program):
    """Calls of (forward, backward) kernels in the body of the scan over the blocks."""
    names = [
        str(e.params["name"]) if e.primitive.name == "pallas_call" else e.primitive.name
        for e in program
    ]
    forward = sum("mha_fwd" in n or n == "dot_product_attention_fwd_wrapper" for n in names)
    backward = sum("mha_dkv" in n or n == "dot_product_attention_bwd_wrapper" for n in names)
    return forward, backward


@pytest.mark.parametrize(
    ("remat", "calls"),
    [("none", (6, 6)), ("attention", (6, 6)), ("attention_offload", (6, 6)), ("block", (12, 6))],
)
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_no_attention_kernel_runs_again_in_the_backward_pass(monkeypatch, kernel, remat, calls):
    if kernel == "splash":
        pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    else:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    cfg = dataclasses.replace(
        SMALL, remat=remat, attention=kernel, dtype="bfloat16", head_dim=8, audio_head_dim=8,
        context_dim=64, audio_context_dim=64,
    )  # fmt: skip
    assert kernel_calls(gradient_program(cfg, audio_tokens=4)) == calls


def test_gradients_of_keys_that_devices_share_are_summed_with_cudnn(mesh_context, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    run = partial(attend, queries=VIDEO, keys=AUDIO, backend="cudnn")
    with mesh_context(1, 2, 4):
        names = [("batch", tokens, "heads", None) for tokens in (VIDEO, AUDIO, AUDIO, VIDEO)]
        *qkv, grad = (
            sharding.pin(x.astype(jnp.bfloat16), *n)
            for x, n in zip(arrays(16, 6, 8, width=8), names, strict=True)
        )
        program = list(equations(jax.make_jaxpr(partial(with_gradients, run))(qkv, grad).jaxpr))
    summed = [e for e in program if e.primitive.name.startswith("psum")]
    shapes = [v.aval.shape for e in summed for v in e.outvars if "sequence" in str(e.params)]
    assert shapes == [(2, 6, 4, 8)] * 2  # of k and of v


def test_kernels_read_bfloat16():
    pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    cfg = dataclasses.replace(SMALL, attention="splash", dtype="bfloat16", remat="attention")
    for equation in gradient_program(cfg):
        if equation.primitive.name == "pallas_call":
            read = [v.aval for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            wide = [a for a in read if a.dtype != jnp.bfloat16]
            # float32 are the statistics that the backward kernel reads: two numbers a row.
            assert len(wide) == (2 if "dkv" in str(equation.params["name"]) else 0)


def test_offloading_leaves_only_statistics_on_the_device():
    pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    cfg = dataclasses.replace(SMALL, num_layers=3, attention="splash", remat="attention_offload")
    program = gradient_program(cfg)
    forward = next(e for e in program if e.primitive.name == "scan")
    saved = [v.aval for v in forward.outvars if v.aval.shape[:1] == (3,)]
    on_host = {a.shape for a in saved if "host" in str(a.memory_space).lower()}
    heads = {"video": (2, 8, 8, 4), "audio": (2, 5, 8, 2), "mixed": (2, 8, 8, 2)}
    assert {(3, 2, 8, 32), (3, 2, 5, 16)} <= on_host  # block inputs
    assert {(3, *shape) for shape in heads.values()} <= on_host
    on_device = [a for a in saved if a.shape not in on_host]
    assert on_device
    assert max(math.prod(a.shape) for a in on_device) <= 3 * 2 * 8 * 8


def collective_types(function, arguments):
    moved = {"all_to_all", "ppermute", "all_gather"}
    return [
        (e.primitive.name, v.aval)
        for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if e.primitive.name in moved
        for v in e.outvars
    ]


@pytest.mark.parametrize(("heads", "kinds"), [(8, {"all_to_all"}), (2, {"ppermute", "all_gather"})])
def test_what_is_sent_is_bfloat16(mesh_context, heads, kinds):
    pytest.importorskip("tokamax", reason="the kernels of tokamax are not installed")
    run = partial(attend, queries=VIDEO, keys=VIDEO, backend="splash")
    with mesh_context(1, 2, 4):
        *qkv, grad = (
            sharding.pin(x.astype(jnp.bfloat16), "batch", VIDEO, "heads", None)
            for x in arrays(64, 64, heads, width=64)
        )
        sent = collective_types(partial(with_gradients, run), (qkv, grad))
    assert {kind for kind, _ in sent} == kinds
    size = lambda wide: sum(  # noqa: E731
        a.size * a.dtype.itemsize for _, a in sent if (a.dtype == jnp.float32) == wide
    )
    # One number or two per row and head are float32: the statistics.
    assert size(wide=True) < 0.05 * size(wide=False)
