"""The same numbers on every mesh, nothing large replicated, and the full size traced abstractly."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gemma
from flax import nnx
from jax.sharding import PartitionSpec as P

from ltx2_jax import sharding
from ltx2_jax.config import Config, DataConfig, OptimConfig, TextConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.models.transformer.config import LTX2_19B
from ltx2_jax.planning.compiled.facts import program_facts
from ltx2_jax.training import objective
from ltx2_jax.training.batch import place
from ltx2_jax.training.state import init_state
from ltx2_jax.training.step import gradients, make_train_step
from ltx2_jax.weights import mapping

# As tiny.MODEL, but wide enough that its matrices exceed 1 MB.
WIDE = dataclasses.replace(
    tiny.MODEL, head_dim=64, audio_head_dim=32, context_dim=512, audio_context_dim=256
)
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4)]


# Nothing is computed again: test_training.py asks that of 2x2x2.
CONFIG = tiny.config(model=dataclasses.replace(tiny.MODEL, remat="none"))


def loss_and_gradients(mesh, chunks=1):
    """Of one batch in so many micro-batches, with what is logged, and the program for it."""
    graphdef = ltx2.graph(CONFIG.networks)

    def loss_of(params, batch, drawn, null_text):
        with sharding.gradients_reduced_in("float32"):
            return objective.loss(nnx.merge(graphdef, params), batch, drawn, null_text, CONFIG)

    def compute(params, batch, null_text):
        drawn = objective.draw(jax.random.key(7), batch, CONFIG, tiny.STRIDES)
        (value, logged), grads = gradients(loss_of, params, batch, drawn, chunks, null_text)
        return value, grads | {"logged": logged}

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        null_text = jax.device_put(tiny.null_text(), sharding.sharding_of(mesh))
        given = tiny.params(CONFIG, mesh), place(tiny.batch(), mesh), null_text
        program = jax.jit(compute).lower(*given).compile()
        value, grads = program(*given)
        return float(value), jax.tree.map(np.asarray, grads), program


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradients(sharding.make_mesh(devices=jax.devices()[:1]))[:2]


# Of 2x2x2 test_training.py asks it, with micro-batches. The last number is that of slices.
@pytest.mark.parametrize(
    "sizes", [(4, 1, 1, 2), (2, 1, 4, 1), (1, 4, 2, 1)], ids=lambda m: "x".join(map(str, m))
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(sizes, one_device):
    wanted, wanted_grads = one_device
    value, grads, _ = loss_and_gradients(sharding.make_mesh(*sizes[:3], slices=sizes[3]))
    assert value == pytest.approx(wanted, rel=1e-5)
    for want, got in zip(jax.tree.leaves(wanted_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max() + 1e-7)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m)))
def test_no_weight_moment_or_average_is_replicated(mesh_context, mesh):
    config = dataclasses.replace(tiny.config(), model=WIDE)
    with mesh_context(*mesh):
        state = sharding.abstract_state(
            partial(init_state, config=config),
            jax.eval_shape(jax.random.key, 0),
            mesh=jax.sharding.get_mesh(),
        )
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size * 4 > 1_000_000]
    assert len(large) > 100
    assert sharding.replicated(state, limit_bytes=1_000_000) == []


def test_weights_of_a_sampler_are_whole_along_data_whatever_was_asked_for_before():
    networks, mesh = tiny.config().networks, sharding.make_mesh(2, 2, 2)
    for order in ((False, True), (True, False)):
        ltx2._init_params.clear_cache()
        for sampled in order:
            params = ltx2.abstract_params(networks, mesh, for_sampling=sampled)
            entries = {x for leaf in jax.tree.leaves(params) for x in leaf.sharding.spec if x}
            axes = {axis for x in entries for axis in ([x] if isinstance(x, str) else x)}
            assert axes == ({"model"} if sampled else {"data", "model", "sequence"})


def test_a_network_on_paper_is_that_of_the_mesh_in_context(mesh_context):
    networks = dataclasses.replace(tiny.config().networks, video_connector=ConnectorConfig())
    gemma = partial(lambda cfg: Gemma(cfg, rngs=Rngs(0)), tiny_gemma.GEMMA_4)
    found = []
    for model in (2, 4, 2):  # 4 does not divide the 30 heads
        with mesh_context(1, model, 2):
            found.append((ltx2.graph(networks), mapping.graph(gemma)))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    with mesh_context(8, 1, 1):
        assert mapping.graph(gemma) != found[0][1]


def full_size_config() -> Config:
    return Config(
        workdir="unused",
        model=LTX2_19B,
        text=TextConfig(),  # the connectors of 2.0
        data=DataConfig(batch_size=64),
        optim=OptimConfig(ema_decay=0.999),
    )


def abstract_batch(mesh, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Latents of 121 frames at 1280x704."""
    shapes = {
        "video": ((size, 16, 22, 40, 128), jnp.float32),
        "audio": ((size, 126, 16, 8), jnp.float32),
        "video_text": ((size, 1024, 3840), jnp.bfloat16),
        "text_mask": ((size, 1024), jnp.bool_),
        "fps": ((size,), jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding.sharding_of(mesh, "batch", *[None] * (len(shape) - 1))
        )
        for name, (shape, dtype) in shapes.items()
    }


def test_19b_train_step_traces_on_256_chips():
    config, mesh = full_size_config(), sharding.abstract_mesh(32, 4, 2)
    key = jax.eval_shape(jax.random.key, 0)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(partial(init_state, config=config), key)
        step = make_train_step(config, (8, 32, 32))
        null = {
            "video_text": jax.ShapeDtypeStruct((1024, 3840), jnp.bfloat16),
            "text_mask": jax.ShapeDtypeStruct((1024,), jnp.bool_),
        }
        new_state, metrics = jax.eval_shape(step, state, abstract_batch(mesh, 64), null)
    assert metrics["loss"].shape == ()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert sharding.spec_of(old) == sharding.spec_of(new)
    assert sharding.replicated(state, limit_bytes=1_000_000) == []
    # float32 weights, two moments and the average: 16 bytes a parameter over 256 chips, except the
    # AdaLN MLPs, which have no heads to split, and the attention of the connectors, whose 30 heads
    # do not split: these are whole on each of the 4 model shards.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert parameters > 18.88e9
    assert sharding.bytes_per_chip(state) < 1.12 * 16 * parameters / 256


def test_self_attention_exchanges_tokens_for_heads_and_gathers_nothing(mesh_context):
    from ltx2_jax.models.transformer.attention import attend

    with mesh_context(1, 2, 4):
        where = sharding.spec("batch", "video_tokens", "heads", None)
        q = jax.random.normal(jax.random.key(0), (2, 16, 8, 4), out_sharding=where)
        attention = jax.jit(partial(attend, queries="video_tokens", keys="video_tokens"))
        program = attention.lower(q, q, q).compile().as_text()
    assert "all-to-all" in program
    assert "all-gather" not in program


def test_audio_queries_do_not_gather_video_keys(mesh_context):
    from ltx2_jax.models.transformer.attention import attend

    with mesh_context(1, 2, 4):
        where = sharding.spec("batch", "video_tokens", "heads", None)
        k = jax.random.normal(jax.random.key(0), (2, 16, 8, 4), out_sharding=where)
        audio = sharding.spec("batch", "audio_tokens", "heads", None)
        q = jax.random.normal(jax.random.key(1), (2, 5, 8, 4), out_sharding=audio)
        attention = jax.jit(partial(attend, queries="audio_tokens", keys="video_tokens"))
        program = attention.lower(q, k, k).compile().as_text()
        got = np.asarray(attention(q, k, k))
    assert "all-gather" not in program
    q, k = np.asarray(q), np.asarray(k)
    logits = np.einsum("bqnh,bknh->bnqk", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, np.einsum("bnqk,bknh->bqnh", weights, k), atol=1e-5)


def test_spec_refuses_one_mesh_axis_used_twice(mesh_context):
    with mesh_context(2, 2, 2):
        assert sharding.spec("batch", "video_tokens", "heads") == P("data", "sequence", "model")
        with pytest.raises(ValueError, match="used twice"):
            sharding.spec("fsdp", "video_tokens")
        with pytest.raises(ValueError, match="unknown logical axis"):
            sharding.spec("chanels")


def test_without_a_mesh_nothing_is_pinned():
    x = jnp.ones((4, 4))
    assert sharding.spec("batch", None) is None
    assert sharding.pin(x, "batch", None) is x


def test_weights_move_to_another_axis_when_fsdp_does_not_divide(mesh_context):
    with mesh_context(2, 2, 2):
        assert sharding.weight_spec((8, 6), ("fsdp", "heads")) == P(("data", "sequence"), "model")
        assert sharding.weight_spec((3, 8), ("fsdp", None)) == P(None, ("data", "sequence"))
        assert sharding.weight_spec((6, 3), ("fsdp", None)) == P("data", None)
        # The largest of the others, and none that is split already.
        assert sharding.weight_spec((3, 8, 16), ("fsdp", None, None)) == P(
            None, None, ("data", "sequence")
        )
        assert sharding.weight_spec((3, 16, 8), ("fsdp", "heads", None)) == P(
            None, "model", ("data", "sequence")
        )
        with pytest.raises(UserError, match="does not divide 5"):
            sharding.weight_spec((8, 5), ("fsdp", "heads"))
    with mesh_context(4, 1, 2):
        assert sharding.weight_spec((6, 3), ("fsdp", None)) == P("sequence", None)


def test_weights_are_whole_and_sums_are_exact_only_where_that_is_asked_for(mesh_context):
    def asked():
        return sharding.weight_spec((8,), ("fsdp",)), sharding.reduces_in_float32()

    with mesh_context(8, 1, 1):
        before = asked()
        assert before == (P("data"), False)
        with sharding.resident_weights(), sharding.gradients_reduced_in("float32"):
            assert asked() == (P(None), True)
            with sharding.gradients_reduced_in("bfloat16"):
                assert asked() == (P(None), False)
            assert asked() == (P(None), True)
        assert asked() == before
        with pytest.raises(ValueError, match="in vain"), sharding.resident_weights():
            with sharding.gradients_reduced_in("float32"):
                raise ValueError("in vain")
        assert asked() == before


def test_an_array_is_large_by_its_bytes():
    tree = {
        "wide": jax.ShapeDtypeStruct((300_000,), jnp.float32),
        "narrow": jax.ShapeDtypeStruct((900_000,), jnp.int8),
        "four bits": jax.ShapeDtypeStruct((1000,), jnp.int4),  # two to a byte of a device
    }
    assert sharding.replicated(tree) == ["wide"]
    assert sharding.bytes_per_chip(tree) == 4 * 300_000 + 900_000 + 500


@pytest.mark.parametrize("sizes", [(3, 1, 1), (8, 2, 1), (-1, 3, 1), (0, 1, 1)])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="does not divide the 8 devices"):
        sharding.make_mesh(*sizes)


# ------------------------------------------------------------------------------------------ slices


class Device:
    """What a mesh is made of: where a device is, and on which host."""

    platform, device_kind = "gpu", "H100"

    def __init__(self, number, process, **where):
        self.id, self.process_index = number, process
        vars(self).update(where)

    def __repr__(self):
        return f"{self.id}"


def devices_of(*slices):
    """So many devices of every slice, two a host, in another order than that of the slices."""
    count = itertools.count()
    found = [Device(i := next(count), i // 2, slice_index=s) for s, n in slices for _ in range(n)]
    return found


def numbers(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_slices_are_the_outermost_axis_and_inside_lies_the_mesh_of_one():
    devices = devices_of((1, 4), (0, 4))
    mesh = sharding.make_mesh(model=2, devices=devices)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "model": 2, "sequence": 1}
    for i, part in enumerate((devices[4:], devices[:4])):
        one = sharding.make_mesh(model=2, devices=part)
        assert dict(one.shape) == {"data": 2, "model": 2, "sequence": 1}
        np.testing.assert_array_equal(numbers(mesh)[i], numbers(one))


def test_devices_that_know_of_no_slices_are_cut_into_blocks():
    mesh = sharding.make_mesh(slices=2)
    np.testing.assert_array_equal(numbers(mesh)[..., 0, 0], np.arange(8).reshape(2, 4))
    assert sharding.make_mesh() == jax.make_mesh((8, 1, 1), ("data", "model", "sequence"))


def test_a_batch_is_split_over_slices_and_a_weight_is_whole_on_each():
    with jax.set_mesh(sharding.make_mesh(1, 2, 2, slices=2)):
        assert sharding.spec("batch", "video_tokens", "heads") == P("slice", "sequence", "model")
        assert sharding.weight_spec((8, 6), ("fsdp", "heads")) == P("sequence", "model")
    with jax.set_mesh(mesh := sharding.make_mesh(4, slices=2)):
        assert sharding.spec("batch") == P(("slice", "data"))
        assert sharding.weight_spec((8, 6), ("fsdp", None)) == P("data", None)
        assert sharding.batch_shards(mesh) == 8


@pytest.mark.parametrize(
    ("slices", "asked", "message"),
    [
        (((0, 4), (1, 4)), {"slices": 4}, "slices=4, but the 8 devices are of 2 slices"),
        (((0, 4), (1, 4)), {"slices": 1}, "slices=1, but the 8 devices are of 2 slices"),
        (((0, 4),), {"slices": 3}, "slices=3, but the 4 devices are of 1 slice$"),
        (((0, 4),), {"slices": 0}, "slices=0, but the 4 devices are of 1 slice$"),
        (((0, 4), (1, 2)), {}, "the 2 slices are not alike: of 2 and 4 devices"),
        (((0, 4), (1, 4)), {"data": 8}, "does not divide the 4 devices of each of the 2 slices"),
        (
            ((0, 8),),
            {"data": 2},
            r"\(data=2, model=1, sequence=1\) is that of the 2 devices of one host, but the run "
            "has 4 hosts with 8 devices",
        ),
        (((0, 4), (1, 4)), {"data": 1, "model": 2}, "2 devices of one host, but the run has 4"),
    ],
)
def test_slices_that_are_not_there_are_one_line(slices, asked, message):
    with pytest.raises(UserError, match=message) as raised:
        sharding.make_mesh(**asked, devices=devices_of(*slices))
    assert "\n" not in str(raised.value)


def test_a_slice_of_tpus_is_not_cut(monkeypatch):
    monkeypatch.setattr(Device, "platform", "tpu")
    with pytest.raises(UserError, match="slices=2, but the 4 devices are of 1 slice"):
        sharding.make_mesh(slices=2, devices=devices_of((0, 4)))


@pytest.mark.parametrize("chunks", [1, 2])
def test_gradients_of_micro_batches_cross_between_slices_once(one_device, chunks):
    """Those of two slices are those of one device; what is sent between them is sent at the end."""
    wanted, wanted_grads = one_device
    mesh = sharding.make_mesh(2, slices=2, devices=jax.devices()[:4])
    value, grads, program = loss_and_gradients(mesh, chunks)
    assert value == pytest.approx(wanted, rel=2e-6)
    for want, got in zip(jax.tree.leaves(wanted_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))
    moved = [row for row in program_facts(program, mesh)["collectives"] if "slice" in row["axes"]]
    sums = [row for row in moved if row["kind"] == "all-reduce"]
    assert {row["depth"] for row in moved} == {0}
    assert all(row["axes"] == ["slice"] for row in sums)
    on_a_device = sum(x.nbytes for x in jax.tree.leaves(grads)) / 2
    assert on_a_device <= sum(row["bytes"] for row in sums) <= 1.1 * on_a_device
