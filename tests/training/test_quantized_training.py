"""Tuning beside frozen weights in eight and four bits: what is learned, kept, sampled and exported.

How weights are rounded: tests/models/test_quantized.py.
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resume_config
import tiny
from flax import nnx

from ltx2_jax import convert
from ltx2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FlowConfig,
    LoraConfig,
    OptimConfig,
    StreamConfig,
    TextConfig,
    TuneConfig,
    ValidationConfig,
)
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.models.quantized import FORMS, dequantized, quantized
from ltx2_jax.planning.estimate import estimate
from ltx2_jax.planning.topology import slice_of
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import abstract_mesh, bytes_per_chip, make_mesh
from ltx2_jax.training import initial, loop, objective, trainable
from ltx2_jax.training.batch import place
from ltx2_jax.training.housekeeping import on_all_devices
from ltx2_jax.training.metrics import read_metrics
from ltx2_jax.training.runs import weights_of_run
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights import mapping
from ltx2_jax.weights.sources import open_release

changed = dataclasses.replace
RUN = resume_config.get_config()
GOLDEN = Path(__file__).parents[1] / "golden" / "v2.3" / "checkpoint.safetensors"
ADAPTERS = LoraConfig(targets=("to_q", "ff.net.2"), rank=3, alpha=6)


def mesh_of(*sizes):
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_file(tmp_path_factory.mktemp("base") / "base.safetensors", RUN)


def tuned(base, form, config=RUN, **tune) -> Config:
    tune = {"lora": ADAPTERS} | tune
    return changed(config, init_from=str(base), tune=TuneConfig(quantize=form, **tune))


def with_what_they_mean(frozen):
    """Quantised weights as float ones."""
    leaves = mapping.leaves(frozen)
    for path in [path for path in leaves if path[-1] == "scale"]:
        weight = (*path[:-1], "weight")
        leaves[weight] = dequantized(leaves[weight], leaves.pop(path))
    return mapping.nested(leaves)


# ---------------------------------------------------------------------------------------- gradients


def batch_of(config, rows=4):
    """Latents of 2 x 2 x 4 video tokens and 5 of sound, text, and the text of no caption."""
    rng, length = np.random.default_rng(0), config.text.length

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = {
        "video": random(rows, 2, 2, 4, config.model.in_channels),
        "audio": random(rows, 5, 1, config.model.audio_in_channels),
        "video_text": random(rows, length, config.text.video_connector.width),
        "audio_text": random(rows, length, config.text.audio_connector.width),
        "text_mask": np.arange(length) >= rng.integers(0, length, (rows, 1)),
        "fps": np.full(rows, 24.0, np.float32),
    }
    return batch, {name: value[0] for name, value in batch.items() if "text" in name}


def learned(config, mesh, frozen=None):
    """Loss and gradients of adapters, as a step has them, and the frozen weights beside them."""
    frozen = initial.load_frozen(config, mesh) if frozen is None else frozen
    homes = initial.trained_homes(config, mesh)
    rng = np.random.default_rng(4)
    trained = jax.tree.map(
        lambda home: jax.device_put(
            0.3 * rng.normal(size=home.shape).astype(np.float32), home.sharding
        ),
        homes,
    )
    batch, null_text = batch_of(config)
    batch, null_text = place(batch, mesh), on_all_devices(null_text, mesh)
    graph = trainable.graph(config)

    @jax.jit
    def both(trained, frozen, batch, null_text):
        drawn = objective.draw(jax.random.key(3), batch, config, (2, 8, 8))

        def loss_of(trained):
            params = trainable.join(trained, frozen, trainable.constants(config))
            model = nnx.merge(graph, params)
            return objective.loss(model, batch, drawn, null_text, config)[0]

        return jax.value_and_grad(loss_of)(trained)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        loss, grads = both(trained, frozen, batch, null_text)
    return float(loss), jax.device_get(grads), jax.device_get(frozen)


def test_adapters_have_the_gradients_that_what_the_values_mean_would_give(base):
    """As beside float weights that were rounded before; every form: tests/models."""
    mesh, config = mesh_of(1, 1, 1), tuned(base, "int8")
    config = changed(config, model=changed(config.model, remat="attention"))
    loss, grads, frozen = learned(config, mesh)
    float_loss, wanted, _ = learned(tuned(base, None), mesh, frozen=with_what_they_mean(frozen))
    np.testing.assert_allclose(loss, float_loss, rtol=1e-5)
    for path, want in mapping.leaves(wanted).items():
        got = mapping.leaves(grads)[path]
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=str(path))


def test_every_mesh_has_the_same_numbers_spread_or_resident(base):
    one = initial.load_frozen(tuned(base, "int8"), mesh_of(1, 1, 1))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(one)}
    assert dtypes == {np.dtype("float32"), np.dtype("int8")}
    matrix = ("transformer", "blocks", "video_self", "to_q", "weight")
    for resident, parts in ((False, 8), (True, 2)):
        frozen = initial.load_frozen(tuned(base, "int8", resident=resident), mesh_of(2, 2, 2))
        jax.tree.map(np.testing.assert_array_equal, one, frozen)
        found = mapping.leaves(frozen)[matrix]
        assert bytes_per_chip(found) == found.size / parts


def test_the_loss_is_near_that_beside_the_float_base():
    """Of the golden transformer of 2.3; by how much is printed."""
    with open_release(GOLDEN) as release:
        model = release.config("transformer", dtype="float32", remat="none")
        video, audio = (changed(c, dtype="float32") for c in release.config("connectors"))
    text = TextConfig(length=128, video_connector=video, audio_connector=audio)
    config, mesh = changed(RUN, model=model, text=text), mesh_of(1, 1, 1)
    batch, null_text = batch_of(config, 8)
    graph = ltx2.graph(config.networks)

    @jax.jit
    def loss_of(params):
        drawn = objective.draw(jax.random.key(3), batch, config, (8, 32, 32))
        return objective.loss(nnx.merge(graph, params), batch, drawn, null_text, config)[0]

    params = initial.load_frozen(tuned(GOLDEN, None, config), mesh)
    small = mapping.leaves(initial.frozen_homes(tuned(GOLDEN, "int8", config), mesh))

    @partial(jax.jit, static_argnums=1)
    def rounded(params, form):
        leaves = mapping.leaves(params)
        for path in (path for path in small if path[-1] == "scale"):
            weight = (*path[:-1], "weight")
            leaves[weight] = dequantized(*quantized(leaves[weight], form))
        return mapping.nested(leaves)

    losses = {None: float(loss_of(params))}
    losses |= {form: float(loss_of(rounded(params, form))) for form in FORMS}
    for form, most in (("int8", 0.005), ("fp8", 0.03), ("int4", 0.1)):
        error = abs(losses[form] / losses[None] - 1)
        print(f"{form}: the loss {losses[None]:.4f} is off by {error:.2%}")
        assert 0 < error < most


# ------------------------------------------------------------------------------------- a whole run

STEPS = 50


class Run:
    """A training on two devices; its last clips are what it would have made them with."""

    def __init__(self, config: Config):
        self.config, self.clips = config, None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_mesh", partial(make_mesh, devices=jax.devices()[:2]))
            loop.train(config, lambda weights, *_: setattr(self, "clips", jax.device_get(weights)))

    def trained(self):
        found = weights_of_run(self.config.workdir, mesh_of(1, 1, 1), adapters=True)[1]
        return jax.device_get(found)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Of sound alone: the adapters of the video have no gradient."""
    config = changed(
        tuned(base, "int8"),
        num_steps=STEPS,
        workdir=str(tmp_path_factory.mktemp("int8") / "run"),
        flow=FlowConfig(video=StreamConfig("absent")),
        optim=OptimConfig(learning_rate=1e-2, weight_decay=0.1, decays="all"),
        checkpoint=CheckpointConfig(every_steps=STEPS // 2, keep=3),
        validation=ValidationConfig(every=STEPS // 2, samples=8),
    )
    return Run(config)


def test_after_50_steps_what_is_frozen_is_what_the_file_says_and_so_is_what_no_gradient_reached(
    run,
):
    frozen = mapping.leaves(without_adapters(run.clips))
    given = jax.device_get(mapping.leaves(tiny.params(RUN)))
    scales = [path for path in frozen if path[-1] == "scale"]
    # Six attentions of four maps and two feed-forwards of two, and those of both connectors.
    assert len(scales) == 6 * 4 + 2 * 2 + 2 * (4 + 2)
    for path, value in frozen.items():
        if value.dtype == np.int8:  # the nearest of 127 steps to the largest of its row
            largest = np.abs(given[path]).max(-1)
            step = frozen[*path[:-1], "scale"]
            np.testing.assert_allclose(127 * step, largest, rtol=1e-6)
            exact = given[path] / step[..., None]
            assert (np.abs(value - exact) <= 0.5 + 1e-4).all()
        elif path not in scales:
            np.testing.assert_array_equal(value, given[path])
    begun = mapping.leaves(initial.load(run.config, mesh_of(1, 1, 1)))
    for path, value in mapping.leaves(run.trained()).items():
        moved = not np.array_equal(value, begun[path])
        assert moved == (path[2] in ("audio_self", "audio_text", "audio_mlp")), path


def test_it_learns_and_is_measured_on_the_way(run):
    rows = read_metrics(run.config.workdir)
    measured = [row["val_audio_loss"] for row in rows if row.get("val_audio_loss") is not None]
    assert len(measured) == 2
    assert measured[1] < measured[0] < rows[0]["loss"] * 1.5


def test_a_run_that_was_killed_reads_and_rounds_the_base_again_and_goes_on_bit_for_bit(
    run, tmp_path
):
    folder = tmp_path / "again"
    shutil.copytree(run.config.workdir, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    again = Run(changed(run.config, workdir=str(folder)))
    jax.tree.map(np.testing.assert_array_equal, again.clips, run.clips)
    other = changed(run.config, tune=changed(run.config.tune, quantize="fp8"))
    with pytest.raises(UserError, match=r"tune\.quantize: 'int8' -> 'fp8'"):
        Run(changed(other, workdir=str(folder)))


def test_clips_are_those_of_the_adapters_beside_what_the_values_mean(run):
    """Read again from the workdir, and with all of it in float32 and merged."""
    pipe = Pipeline.from_workdir(run.config.workdir)
    assert pipe.params["transformer"]["blocks"]["video_self"]["to_q"]["weight"].dtype == np.int8
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(pipe.params), run.clips)
    config = changed(run.config, tune=changed(run.config.tune, quantize=None))
    frozen = with_what_they_mean(trainable.split(pipe.params, run.config)[1])
    merged = trainable.merged(run.trained(), without_adapters(frozen), config)
    plain = Pipeline(config, merged, pipe.codec, pipe.text_encoder, pipe.size)
    prompts = ["a red disc bounces"]
    for ours, theirs in zip(pipe.latents(prompts), plain.latents(prompts), strict=True):
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def without_adapters(params):
    return mapping.nested({p: x for p, x in mapping.leaves(params).items() if "adapter" not in p})


def test_what_is_exported_are_the_adapters_alone(run, base, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    assert convert.cli([run.config.workdir, str(path), "--dtype=float32"]) == 0
    assert convert.cli(["--inspect", run.config.workdir]) == 0
    assert f"a LoRA of rank 3; the rest is that of {base}, in int8" in capsys.readouterr().out
    lora, adapter = loras.read_lora(path), run.trained()["transformer"]["blocks"]["audio_self"]
    found = lora.targets["transformer_blocks.0.audio_attn1.to_q"]
    np.testing.assert_array_equal(found.a, adapter["to_q"]["adapter"]["a"][0])
    np.testing.assert_allclose(found.b * found.scale, 2 * adapter["to_q"]["adapter"]["b"][0])


# ------------------------------------------------------------------------------- parts and refusals


def test_a_part_is_trained_beside_the_others_rounded_and_the_whole_is_exported_unrounded(
    base, tmp_path
):
    mesh = mesh_of(1, 1, 1)
    config = changed(tuned(base, "int8", train=("audio",), lora=None), workdir=str(tmp_path))
    trained, frozen = initial.load(config, mesh), initial.load_frozen(config, mesh)
    scales = [path for path in mapping.leaves(frozen) if path[-1] == "scale"]
    assert not any(trainable.follows(path, "audio") for path in scales)
    assert len(scales) == 3 * 4 + 2 + 2 * (4 + 2)  # those of the video, and of both connectors
    given = tiny.params(RUN)
    whole = initial.whole(config, trained, initial.identity(frozen), mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, given)
    sampled = initial.whole(config, trained, initial.identity(frozen), mesh, for_sampling=True)
    jax.tree.map(np.testing.assert_array_equal, sampled, trainable.join(trained, frozen))
    unrounded = initial.load_frozen(tuned(base, None, train=("audio",), lora=None), mesh)
    with pytest.raises(UserError, match="not those that the checkpoint was trained on"):
        initial.whole(config, trained, initial.identity(unrounded), mesh)


def test_what_cannot_be_rounded_is_refused(base):
    for form in ("int5", "int8-products"):  # the products of which have no gradient
        with pytest.raises(UserError, match=f"^quantize='{form}' is not one of int8, fp8, int4$"):
            TuneConfig(quantize=form)
    config = tuned(base, "int8", train=("transformer", "connectors"), lora=None)
    with pytest.raises(UserError, match=r"tune.quantize='int8': tune.train=.* trains all large"):
        initial.check(config)
    # Biases alone are trained: all matrices are frozen.
    initial.check(tuned(base, "int8", train=("*/bias",), lora=None))


# ----------------------------------------------------------------------------------------- planning


def test_a_plan_counts_the_bytes_of_what_is_kept():
    """On four chips: a byte a number, and what is small as it was."""
    request, chip = Request((3, 4, 4), 10, 1, (8, 32, 32), 24.0), slice_of("v6e:2x2").chip
    base, mesh = tiny.config(data=DataConfig(batch_size=4)), abstract_mesh(4, 1, 1)
    plain, small = (tuned("base", form, base) for form in (None, "int8"))
    held = mapping.leaves(initial.frozen_homes(small, mesh))
    numbers = sum(x.size for x in held.values() if x.dtype == jnp.int8)
    scales = [x for path, x in held.items() if path[-1] == "scale"]
    a, b = (estimate(x, request, mesh, chip) for x in (plain, small))
    assert a.state - b.state == 3 * numbers / 4 - bytes_per_chip(scales)
    assert b.links < a.links
