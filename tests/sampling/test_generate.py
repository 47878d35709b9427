"""The sampling program: the same clip on every mesh, from weights that stay where they are."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from ltx2_jax.models import ltx2
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.planning.compiled.collectives import collectives
from ltx2_jax.planning.compiled.hlo import parse
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Request, make_sampler
from ltx2_jax.sharding import make_mesh, resident_weights, weight_spec
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.objective import as_modality, draw
from ltx2_jax.training.runs import weights_of_run

CONFIG = tiny.config()
REQUEST = Request((2, 2, 4), 5, 1, tiny.STRIDES, 24.0)


def placed(config, mesh):
    """`tiny.params` where and as a sampler keeps them."""
    where = ltx2.abstract_params(config.networks, mesh, for_sampling=True)
    return jax.tree.map(
        lambda x, a: jax.device_put(np.asarray(x).astype(a.dtype), a.sharding),
        tiny.params(config),
        where,
    )


def inputs(params, rows=1):
    text = {k: v[:rows] for k, v in tiny.batch().items() if "text" in k}
    null = {k: v[None] for k, v in tiny.null_text().items()}
    strengths = ((jnp.float32(2.0), jnp.float32(4.0)),)
    sigmas = jnp.linspace(1.0, 0, 4)
    return params, (text, null), np.arange(rows), jax.random.key(3), sigmas, strengths


def compiled(config, mesh, given):
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        static = {"graphdef": ltx2.graph(config.networks), "passes": (EMPTY_CAPTION,)}
        lowered = make_sampler().lower(*given, request=REQUEST, **static)
        return lowered.compile()


@cache
def on_mesh(*sizes):
    """Program, inputs and latents of one clip on a mesh of `sizes`."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    given = inputs(placed(CONFIG, mesh))
    program = compiled(CONFIG, mesh, given)
    return program, given, program(*given)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 2, 2)], ids=str)
def test_one_clip_is_the_same_on_every_mesh(sizes):
    """Also where its two passes are all that the data axis has."""
    for a, b in zip(on_mesh(*sizes)[2], on_mesh(1, 1, 1)[2], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_the_passes_of_one_clip_share_the_work_of_the_data_axis():
    one, two = (on_mesh(n, 1, 1)[0].cost_analysis()["flops"] for n in (1, 2))
    assert two < 0.6 * one


def test_no_weight_is_gathered():
    program, (params, *_), _ = on_mesh(2, 2, 2)
    found = collectives(parse(program.as_text()), {"data": 2, "model": 2, "sequence": 2})
    weight = params["transformer"]["blocks"]["video_mlp"]["linear_in"]["weight"]
    assert weight.sharding.spec == P(None, "model", None)
    assert max(c.bytes for c in found if c.kind == "all-gather") < weight[0].nbytes


def test_weights_in_the_dtype_of_their_use_give_the_same_clip():
    config = tiny.config(model=dataclasses.replace(tiny.MODEL, dtype="bfloat16"))
    mesh = make_mesh(devices=jax.devices()[:1])
    half, full = inputs(placed(config, mesh)), inputs(tiny.params(config))
    assert half[0]["transformer"]["blocks"]["video_self"]["to_q"]["weight"].dtype == jnp.bfloat16
    pairs = (compiled(config, mesh, given)(*given) for given in (half, full))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_weights_of_a_run_are_restored_so(tmp_path):
    bfloat16 = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
    config, mesh = tiny.config(workdir=str(tmp_path), model=bfloat16), make_mesh(2, 2, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tiny.state(config, mesh), config)
    _, got, _ = weights_of_run(tmp_path, mesh, for_sampling=True)
    want = placed(config, mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def test_weights_are_resident_only_where_asked(mesh_context):
    with mesh_context(2, 2, 2):
        with resident_weights():
            assert weight_spec((64, 64), ("heads", "fsdp")) == P("model", None)
        assert weight_spec((64, 64), ("heads", "fsdp")) == P("model", ("data", "sequence"))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prompt_adaln": False},
        {"prompt_adaln": False, "modulated_text_attention": False, "gated_attention": False},
    ],
    ids=["2.3", "text modulated by tables", "2.0"],
)
def test_what_is_computed_before_the_loop_changes_no_velocity(change):
    """Velocities with what was prepared without noise levels and latents are those without it."""
    cfg = dataclasses.replace(tiny.MODEL, **change)
    config = tiny.config(model=cfg)
    params = tiny.params(config)["transformer"]
    graphdef = nnx.graphdef(jax.eval_shape(lambda: LTX2Transformer(cfg, rngs=Rngs(0))))
    drawn = draw(jax.random.key(1), tiny.batch(2), config, tiny.STRIDES)
    text = tiny.batch(2)
    streams = [
        as_modality(drawn["video"], text["video_text"], None),
        as_modality(drawn["audio"], text["audio_text"], None),
    ]

    @jax.jit
    def both(params, video, audio):
        model = nnx.merge(graphdef, params)
        bare = [dataclasses.replace(x, latent=None, sigma=None, timesteps=None)
                for x in (video, audio)]  # fmt: skip
        prepared = model.prepare(*bare)
        assert (prepared[0].keys_values is None) == (cfg.prompt_adaln)
        return model(video, audio), model(video, audio, prepared=prepared)

    with jax.default_matmul_precision("highest"):
        want, got = both(params, *streams)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
