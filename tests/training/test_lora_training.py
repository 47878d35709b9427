"""Tuning a part of given weights: what moves, what stays, what is kept, and what is refused."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resume_config
import tiny
from safetensors.numpy import load_file, save_file

from ltx2_jax import convert
from ltx2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    OptimConfig,
    TuneConfig,
)
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.models import ltx2
from ltx2_jax.models.lora import LowRank
from ltx2_jax.planning.estimate import estimate
from ltx2_jax.planning.topology import slice_of
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import abstract_mesh, abstract_state, bytes_per_chip, make_mesh, sharding_of
from ltx2_jax.training import checks, initial, loop, trainable
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.metrics import read_metrics
from ltx2_jax.training.runs import weights_of_run
from ltx2_jax.training.state import init_state, optimizer
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights import mapping
from ltx2_jax.weights.lora import Lora, Target

changed = dataclasses.replace
RUN = resume_config.get_config()
ADAPTERS = LoraConfig(targets=("to_q", "audio_ff.net.2"), rank=3, alpha=6, dropout=0.1)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_file(tmp_path_factory.mktemp("base") / "base.safetensors", RUN)


def tuned(base, config=RUN, **tune) -> Config:
    return changed(config, init_from=str(base), tune=TuneConfig(**tune))


# ------------------------------------------------------------------------------------- whole runs


class Run:
    """A training of four steps; its last clips, and its checkpoints."""

    def __init__(self, config: Config, devices: int = 1):
        self.config, self.clips = config, None
        with pytest.MonkeyPatch.context() as patch:
            mesh = partial(make_mesh, devices=jax.devices()[:devices])
            patch.setattr(loop, "make_mesh", mesh)
            loop.train(config, lambda weights, *_: setattr(self, "clips", jax.device_get(weights)))

    def state(self, step, mesh=None):
        with Checkpoints(self.config.workdir) as checkpoints:
            stored = checkpoints._stored(step)
            home = sharding_of(one_device())
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), stored
            )
            return checkpoints.restore(step, like)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    config = changed(
        tuned(base, lora=ADAPTERS),
        num_steps=4,
        workdir=str(tmp_path_factory.mktemp("lora") / "run"),
        optim=OptimConfig(learning_rate=1e-2, ema_decay=0.5),
        checkpoint=CheckpointConfig(every_steps=2, keep=3),
    )
    return Run(config)


def from_step_2(run, folder, devices=1, **changes):
    """The run, killed after step 2 and started again."""
    shutil.copytree(run.config.workdir, folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    return Run(changed(run.config, workdir=str(folder), **changes), devices)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(run):
    state = run.state(4)
    assert set(state) == {"params", "ema", "opt", "step", "base"}
    paths = list(mapping.leaves(state["params"]))
    assert {path[-2:] for path in paths} == {("adapter", "a"), ("adapter", "b")}
    # Queries of six attentions, and one map of the audio's feed-forward.
    assert {path[2] for path in paths} == {
        "video_self", "audio_self", "video_text", "audio_text", "audio_to_video",
        "video_to_audio", "audio_mlp",
    }  # fmt: skip
    moved = [
        np.abs(x).max() for path, x in mapping.leaves(state["params"]).items() if path[-1] == "b"
    ]
    assert min(moved) > 0


def test_a_run_that_was_killed_goes_on_bit_for_bit(run, tmp_path):
    again = from_step_2(run, tmp_path / "again")
    assert_equal(again.state(4), run.state(4))
    assert_equal(again.clips, run.clips)


def test_on_another_mesh_it_learns_the_same(run, tmp_path):
    other = from_step_2(run, tmp_path / "other", devices=2)
    got, want = (x.state(4)["params"] for x in (other, run))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
    losses = [[row["loss"] for row in read_metrics(x.config.workdir)] for x in (other, run)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_adapters_and_their_moments_are_spread_over_every_axis_of_the_mesh():
    mesh = make_mesh(2, 2, 2)
    config = tuned("base", tiny.config(), lora=LoraConfig(targets=("to_q", "to_out.0"), rank=8))
    state = abstract_state(partial(init_state, config=config), jax.random.key(0), mesh=mesh)
    for path, leaf in mapping.leaves(state["params"]).items():
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 2  # all layers
        assert bytes_per_chip(leaf) <= leaf.size * 4 / 4, path  # data x sequence, at least
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state["params"]))
    assert bytes_per_chip(state["opt"]) <= 2 * whole / 4 + 100


def test_what_is_frozen_has_no_moments_and_no_gradients_in_a_plan():
    mesh, chip = abstract_mesh(4, 1, 1), slice_of("v6e:2x2").chip
    request = Request((3, 4, 4), 10, 1, (8, 32, 32), 24.0)
    whole = estimate(tiny.config(data=DataConfig(batch_size=4)), request, mesh, chip)
    config = tuned("base", tiny.config(data=DataConfig(batch_size=4)), lora=ADAPTERS)
    ours = estimate(config, request, mesh, chip)
    assert ours.gradients < whole.gradients / 4
    numbers = sum(x.size for x in jax.tree.leaves(initial.frozen_homes(config, mesh)))
    assert numbers * 4 / 4 < ours.state < whole.state / 2  # float32 here, on four chips
    assert 2 / 3 < ours.compute / whole.compute < 0.9
    assert ours.links < whole.links


def test_another_base_than_the_one_trained_on_is_refused(run, base, tmp_path):
    tensors, path = load_file(base), tmp_path / "other.safetensors"
    with open(base, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_v.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, :2] = tensors[name][0, 1::-1]  # two numbers have changed their places
    save_file(tensors, path, json.loads(header)["__metadata__"])
    shutil.copytree(run.config.workdir, tmp_path / "run")
    config = changed(run.config, workdir=str(tmp_path / "run"), init_from=str(path), num_steps=6)
    with pytest.raises(UserError, match="are not those that the checkpoint was trained on"):
        Run(config)
    # The same weights in another place are the same.
    moved = tmp_path / "moved.safetensors"
    shutil.copy(base, moved)
    config = changed(config, init_from=str(moved))
    checks.check_same_run(config, run.config, tmp_path)
    initial.tied(config, run.state(4), initial.load_frozen(config, one_device()))


def test_clips_and_samplers_are_given_base_and_adapters_as_one(run, base):
    mesh = one_device()
    config, whole, step = weights_of_run(run.config.workdir, mesh)
    assert (step, config) == (4, run.config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), whole, run.clips)
    _, sampled, _ = weights_of_run(run.config.workdir, mesh, for_sampling=True)
    homes = ltx2.abstract_params(config.networks, mesh, for_sampling=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), sampled) == jax.tree.map(
        lambda x: (x.shape, x.dtype), homes
    )
    _, spread, _ = weights_of_run(run.config.workdir, make_mesh(2, 2, 2), for_sampling=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), spread, sampled)
    # What no adapter touches is the base, bit for bit.
    given, touched = mapping.leaves(tiny.params(RUN)), 0
    for path, value in mapping.leaves(whole).items():
        here = ("transformer", *path[1:-1]) if path[-1] == "weight" else None
        adapted = here in [("transformer", *one.path) for one in trainable.adapted(config)]
        assert np.array_equal(value, given[path]) != adapted, path
        touched += adapted
    assert touched == 7


def test_a_run_of_adapters_becomes_a_lora_file_or_a_merged_model(run, base, tmp_path, capsys):
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    assert convert.cli([run.config.workdir, str(lora), "--dtype=float32"]) == 0
    assert convert.cli([run.config.workdir, str(merged), "--base", str(base)]) == 0
    assert convert.cli(["--inspect", run.config.workdir]) == 0
    assert "trained: a LoRA of rank 3; the rest is that of" in capsys.readouterr().out
    read = loras.read_lora(lora)
    assert len(read.targets) == 7
    assert read.ranks == {3}
    weights = mapping.leaves(run.clips["transformer"])
    fused, _ = loras.fuse(tiny.params(RUN)["transformer"], [(read, 1.0)], RUN.model)
    for path, value in mapping.leaves(fused).items():
        np.testing.assert_allclose(value, weights[path], atol=1e-6)
    names = {name: np.float32(value) for name, value in load_file(merged).items()}
    before, module = load_file(base), "model.diffusion_model.transformer_blocks.0.attn1"
    assert set(names) == set(before)
    want = weights[("blocks", "video_self", "to_q", "weight")][0]
    np.testing.assert_allclose(names[f"{module}.to_q.weight"], want, atol=1e-6)
    np.testing.assert_array_equal(names[f"{module}.to_k.weight"], before[f"{module}.to_k.weight"])


# ---------------------------------------------------------------------------------- what is trained


def test_what_no_gradient_reaches_stays_bit_for_bit():
    """An adapter whose b is zero has a gradient, though a has none: it decays, as officially."""
    config = tuned("base", lora=ADAPTERS)
    rng = np.random.default_rng(0)
    pair = lambda scale: {"a": rng.normal(size=(2, 3, 8)), "b": scale * rng.normal(size=(2, 8, 3))}  # noqa: E731
    blocks = {name: {"to_q": {"adapter": pair(scale)}} for name, scale in (("on", 0), ("off", 1))}
    params = jax.tree.map(jnp.float32, {"transformer": {"blocks": blocks}})
    grads = jax.tree.map(jnp.zeros_like, params)
    reached = grads["transformer"]["blocks"]["on"]["to_q"]["adapter"]
    reached["b"] = reached["b"].at[1].set(1.0)  # of the second layer alone
    transform = optimizer(changed(config, optim=OptimConfig(learning_rate=0.1, weight_decay=0.5)))
    updates, _ = transform.update(grads, transform.init(params), params)
    on, off = (updates["transformer"]["blocks"][name]["to_q"]["adapter"] for name in ("on", "off"))
    assert_equal(off, jax.tree.map(jnp.zeros_like, off))
    np.testing.assert_array_equal(on["a"][0], 0)
    before = params["transformer"]["blocks"]["on"]["to_q"]["adapter"]
    np.testing.assert_allclose(on["a"][1], -0.05 * before["a"][1], rtol=1e-5)
    np.testing.assert_allclose(on["b"][1], -0.1, rtol=1e-5)


def test_every_rule_has_its_rate_and_the_last_one_counts():
    rates = (("transformer/blocks/audio_*", 0.5), ("*/adapter/b", 4.0))
    config = tuned("base", lora=ADAPTERS, rates=rates)
    leaf = {"to_q": {"adapter": {"a": jnp.ones((1, 3, 4)), "b": jnp.ones((1, 4, 3))}}}
    params = {"transformer": {"blocks": {"audio_self": leaf, "video_self": leaf}}}
    transform = optimizer(changed(config, optim=OptimConfig(learning_rate=0.1, weight_decay=0)))
    updates, _ = transform.update(params, transform.init(params), params)
    moved = {path[2:]: float(x.max()) for path, x in mapping.leaves(updates).items()}
    want = {("audio_self", "a"): 0.5, ("audio_self", "b"): 4, ("video_self", "a"): 1,
            ("video_self", "b"): 4}  # fmt: skip
    for (name, *_, letter), value in moved.items():
        np.testing.assert_allclose(value, -0.1 * want[name, letter], rtol=1e-5)


@pytest.mark.parametrize("word", ["video", "audio"])
def test_a_stream_is_all_that_its_tokens_pass_or_are_moved_by(word):
    other = {"video": "audio", "audio": "video"}[word]
    mine = (f"{word}/", f"blocks/{word}_", f"blocks/{other}_to_")
    paths = mapping.leaves(ltx2.abstract_params(RUN.networks, one_device()))
    for path in paths:
        name = "/".join(path[1:])
        here = path[0] == "transformer" and name.startswith(mine)
        here = here and not name.startswith(f"blocks/{word}_to_")
        assert trainable.follows(path, word) == here, name


def test_one_stream_is_trained_and_every_other_weight_is_that_of_the_base(base, tmp_path):
    config, mesh = changed(tuned(base, train=("audio",)), workdir=str(tmp_path)), one_device()
    trained, frozen = initial.load(config, mesh), initial.load_frozen(config, mesh)
    given = mapping.leaves(tiny.params(RUN))
    assert set(mapping.leaves(frozen)) == {x for x in given if not trainable.follows(x, "audio")}
    assert_equal(trainable.join(trained, frozen), mapping.nested(given))
    # A checkpoint with other numbers in the trained part, read as the whole model.
    like = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
    state = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype)), like)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state | {"base": jax.device_put(initial.identity(frozen))}, config)
    _, whole, _ = weights_of_run(tmp_path, mesh)
    for path, value in mapping.leaves(whole).items():
        want = 1 if trainable.follows(path, "audio") else given[path]
        np.testing.assert_array_equal(value, want)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_learn_on_a_mesh_and_leave_zeros_alone(name):
    config = changed(RUN, optim=OptimConfig(optimizer=name, learning_rate=0.05, weight_decay=0.0))
    mesh = make_mesh(2, 2, 2)
    rng = np.random.default_rng(0)
    target = rng.normal(size=(3, 8, 16)).astype(np.float32)
    target[1] = 0
    start = {"layer": {"weight": np.zeros_like(target), "bias": np.ones(8, np.float32)}}
    homes = {"layer": {"weight": sharding_of(mesh, None, "heads", "fsdp"),
                       "bias": sharding_of(mesh, "heads")}}  # fmt: skip

    def loss(params):
        return jnp.sum((params["layer"]["weight"] - target) ** 2) + jnp.sum(
            params["layer"]["bias"] ** 2
        )

    def train(params):
        transform = optimizer(config)

        def step(carry, _):
            params, state = carry
            updates, state = transform.update(jax.grad(loss)(params), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, 60)[0][0]

    with jax.set_mesh(mesh):
        sharded = jax.jit(train)(jax.device_put(start, homes))
    assert sharded["layer"]["weight"].sharding == homes["layer"]["weight"]
    assert loss(jax.device_get(sharded)) < 0.3 * loss(start)
    np.testing.assert_array_equal(sharded["layer"]["weight"][1], 0)
    alone = jax.jit(train)(start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, sharded)


def test_dropout_leaves_out_a_share_and_keeps_the_mean():
    ones, dropout = jnp.ones((1, 4096)), (0.25, jax.random.key(0))
    mean = LowRank(ones, jnp.ones((1, 1)), (None, None), None, dropout)(
        jnp.ones((4, 4096)), (None,)
    )
    assert (mean != 4096).all()
    assert len(set(mean[:, 0].tolist())) == 4
    np.testing.assert_allclose(mean / 4096, 1, atol=0.05)


def test_a_rule_that_means_nothing_is_refused_with_the_weights(base):
    with pytest.raises(UserError, match=r"tune\.train: 'vidio' means no weight"):
        initial.check(tuned(base, train=("vidio",)))


def test_new_adapters_follow_the_seed_of_their_run():
    config, mesh = tuned("base", lora=LoraConfig(targets=("audio_ff.net.2",), rank=2)), one_device()
    first, again, other = (
        mapping.leaves(initial.load(changed(config, seed=seed), mesh)) for seed in (1, 1, 2)
    )
    (path,) = (path for path in first if path[-1] == "a")
    np.testing.assert_array_equal(first[path], again[path])
    assert (first[path] != other[path]).all()


def test_new_adapters_are_drawn_with_the_key_of_no_step():
    """Those of steps are the run's key with their number, as those of a split are."""
    config, key = tuned("base", tiny.config(), lora=ADAPTERS), jax.random.key(3)
    found = [
        x for p, x in mapping.leaves(trainable.new_adapters(key, config)).items() if p[-1] == "a"
    ]
    for step in range(len(found)):
        of_step = jax.random.fold_in(key, step)
        for a in found:
            bound = 1 / np.sqrt(a.shape[-1])
            drawn = jax.random.uniform(of_step, a.shape, jnp.float32, -bound, bound)
            assert abs(a - drawn).max() > bound / 10


def test_frozen_weights_are_whole_on_every_chip_only_where_that_is_asked_for():
    mesh = abstract_mesh(2, 1, 1)
    path = ("transformer", "blocks", "video_self", "to_q", "weight")
    homes = {
        resident: mapping.leaves(
            initial.frozen_homes(tuned("base", lora=ADAPTERS, resident=resident), mesh)
        )[path]
        for resident in (False, True)
    }
    parts = {resident: leaf.sharding.shard_shape(leaf.shape) for resident, leaf in homes.items()}
    shape = homes[True].shape
    assert parts[True] == shape
    assert np.prod(parts[False]) == np.prod(shape) // 2


def test_every_layer_of_every_map_leaves_out_features_of_its_own():
    config = tuned("base", tiny.config(), lora=changed(ADAPTERS, dropout=0.5))
    found = []
    for key in (jax.random.key(0), jax.random.key(1)):
        leaves = mapping.leaves(trainable.constants(config, key))
        keys = [jax.random.key_data(x) for path, x in leaves.items() if path[-1] == "keys"]
        found += [tuple(one) for of_map in keys for one in np.asarray(of_map).tolist()]
    maps = len(trainable.adapted(config))
    assert maps == 7
    assert len(set(found)) == len(found) == 2 * maps * 2  # of two layers, and of two steps


def test_the_work_of_a_step_counts_the_gradients_of_what_is_trained_alone():
    ranks = (("transformer_blocks.1.attn1.to_q", 5),)
    lora = LoraConfig(
        targets=("transformer_blocks.0.attn1.to_q", *dict(ranks)), rank=2, ranks=ranks
    )
    config = tuned("base", tiny.config(), lora=lora)
    matrices = sum(one.leaf.size for one in loras.matrices(config.model))
    share = (2 + 5) * (32 + 32) / matrices  # of two layers
    assert trainable.trained_share(config) == pytest.approx(share)
    whole, ours = (trainable.train_flops(x, 30, 11) for x in (tiny.config(), config))
    assert ours / whole == pytest.approx((2 + share) / 3)


# ---------------------------------------------------------------------------------------- adapters


def test_new_adapters_do_nothing_and_are_drawn_as_peft_draws_them():
    ranks = (("transformer_blocks.1.attn1.to_q", 4), ("audio_attn1.to_q", 1))
    given = changed(ADAPTERS, targets=("attn1.to_q", "audio_attn1.to_q"), rank=2, ranks=ranks)
    config = tuned("base", tiny.config(), lora=given)
    tree = trainable.new_adapters(jax.random.key(0), config)["transformer"]["blocks"]
    video, audio = (tree[name]["to_q"]["adapter"] for name in ("video_self", "audio_self"))
    assert (video["a"].shape, audio["a"].shape) == ((2, 4, 32), (2, 1, 16))
    assert not any(x["b"].any() for x in (video, audio))
    np.testing.assert_array_equal(video["a"][0, 2:], 0)  # beyond the rank of its layer
    used = np.concatenate([video["a"][0, :2].ravel(), video["a"][1].ravel()])
    assert (abs(used) <= 1 / np.sqrt(32)).all()
    np.testing.assert_allclose(used.std(), 1 / np.sqrt(3 * 32), rtol=0.2)
    # alpha / rank, layer by layer.
    scales = trainable.scales(config)
    np.testing.assert_array_equal(scales[("blocks", "video_self", "to_q")], [3, 1.5])
    np.testing.assert_array_equal(scales[("blocks", "audio_self", "to_q")], [6, 6])


def test_a_lora_file_of_any_scale_is_gone_on_from(base, tmp_path):
    """What it did before the first step is what it does at the first step."""
    rng, path = np.random.default_rng(0), tmp_path / "style.safetensors"
    pair = rng.normal(size=(2, 24)).astype(np.float32), rng.normal(size=(24, 2)).astype(np.float32)
    theirs = Lora({"transformer_blocks.0.attn1.to_q": Target(*pair, scale=0.25)})
    save_file(
        {f"lora_unet_transformer_blocks_0_attn1_to_q.{name}": value for name, value in
         (("lora_down.weight", pair[0]), ("lora_up.weight", pair[1]),
          ("alpha", np.full(1, 0.5, np.float32)))},
        path,
    )  # fmt: skip
    config = tuned(base, lora=changed(ADAPTERS, init_from=str(path)))
    mesh = one_device()
    initial.check(config)
    trained = initial.load(config, mesh)
    adapter = trained["transformer"]["blocks"]["video_self"]["to_q"]["adapter"]
    np.testing.assert_array_equal(adapter["a"][0, :2], pair[0])
    assert adapter["a"][0, 2].any()  # a rank more, to be learned
    assert not adapter["b"][0, :, 2].any()
    merged = trainable.merged(trained, initial.load_frozen(config, mesh), config)
    want, _ = loras.fuse(tiny.params(RUN)["transformer"], [(theirs, 1.0)], RUN.model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged["transformer"], want
    )


@pytest.mark.parametrize(
    ("targets", "rank", "metadata", "message"),
    [
        (("attn1.to_k",), 1, {}, "adapts what lora.targets do not mean: .*attn1.to_k"),
        (("attn1.to_q",), 4, {}, "attn1.to_q has rank 4, above that of lora.rank, 3"),
        (("attn1.to_q",), 1, {"model_version": "2.0.0"}, "is for LTX-2 2.0, these weights are 2.3"),
        (("attn1.to_x",), 1, {}, "attn1.to_x"),
    ],
)
def test_a_lora_that_cannot_be_gone_on_from_is_refused(
    base, tmp_path, targets, rank, metadata, message
):
    a, b = np.ones((rank, 24), np.float32), np.ones((24, rank), np.float32)
    path = tmp_path / "theirs.safetensors"
    modules = {f"transformer_blocks.0.{name}": Target(a, b) for name in targets}
    loras.write_lora(path, Lora(modules, metadata))
    with pytest.raises(UserError, match=message):
        initial.check(tuned(base, lora=changed(ADAPTERS, init_from=str(path))))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"train": ("transformer/block/audio_self",)},
         r"tune.train: 'transformer/block/audio_self' means no weight "
         r"\(did you mean transformer/blocks/audio_self"),
        ({"train": ("vidio",)}, r"'vidio' means no weight \(did you mean video"),
        ({"rates": (("connectors", 0.1),)}, "tune.rates: 'connectors' means no trained weight"),
        ({"lora": LoraConfig(targets=("atn1.to_q",))},
         r"'atn1.to_q' is no module of it \(did you mean attn1.to_q"),
        ({"lora": LoraConfig(targets=("to_q",), rank=17)},
         "rank 17 is above the smaller side of .*16"),
        ({"lora": LoraConfig(targets=("to_q",), rank=2, ranks=(("attn1.to_k", 1),))},
         "'attn1.to_k' of ranks means no module that targets mean"),
    ],
)  # fmt: skip
def test_a_rule_that_means_nothing_is_refused_with_the_closest_names(tune, message):
    with pytest.raises(UserError, match=message):
        trainable.check(tuned("base", **tune))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TuneConfig(train=("video",), lora=ADAPTERS), "with lora, the adapters alone"),
        (lambda: changed(RUN, tune=TuneConfig()), "tune: needs init_from"),
        (lambda: LoraConfig(rank=0), "rank=0 must be at least 1"),
        (lambda: LoraConfig(targets=()), "name at least one module"),
        (lambda: LoraConfig(dropout=1.0), "dropout=1.0 is not from 0 to below 1"),
        (lambda: LoraConfig(alpha=0.0), "alpha=0.0 must be above 0"),
        (lambda: TuneConfig(rates=(("video", -1.0),)), "-1.0 of 'video' must be at least 0"),
        (lambda: OptimConfig(optimizer="sgd"), "optimizer='sgd': use adamw, adafactor or muon"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_is_tuned_is_kept_with_the_checkpoint_and_cannot_change(base, tmp_path, capsys):
    config = tuned(base, lora=ADAPTERS, rates=(("video", 0.5),))
    assert from_json(Config, to_json(config)) == config
    other = changed(config, tune=TuneConfig(lora=changed(ADAPTERS, rank=4)))
    with pytest.raises(UserError, match=r"tune\.lora\.rank: 3 -> 4"):
        checks.check_same_run(other, config, tmp_path)
    for free, value in (("rates", ()), ("resident", True)):
        other = changed(config, tune=changed(config.tune, **{free: value}))
        checks.check_same_run(other, config, tmp_path)
        assert f"changed since the checkpoint: tune.{free}" in capsys.readouterr().out


def test_the_identity_of_weights_is_that_of_their_numbers_and_places():
    rng = np.random.default_rng(0)
    params = {"a": {"weight": rng.normal(size=(2, 8, 16)).astype(np.float32)}, "b": np.ones(8)}
    mesh = make_mesh(2, 2, 2)
    homes = {"a": {"weight": sharding_of(mesh, None, "heads", "fsdp")}, "b": sharding_of(mesh)}

    def of(tree, homes):
        return initial.identity(jax.device_put(jax.tree.map(jnp.float32, tree), homes)).tolist()

    here = sharding_of(one_device())
    want = of(params, here)
    assert of(params, homes) == want
    short = jax.device_put(jax.tree.map(jnp.bfloat16, params), here)
    assert initial.identity(short).tolist() == want  # whatever they are kept in
    for place in ((0, 0, 0), (1, 7, 15)):
        other = params["a"]["weight"].copy()
        other[place] += 0.1
        assert of(params | {"a": {"weight": other}}, here) != want
    for axis in range(3):
        flipped = np.flip(params["a"]["weight"], axis)
        assert of(params | {"a": {"weight": flipped}}, here) != want
