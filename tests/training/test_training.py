"""The train step: what is learned, what is drawn, and what accumulation must not change."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ltx2_jax.config import FlowConfig, OptimConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models.ltx2 import TEXT_FIELDS
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.training.batch import place
from ltx2_jax.training.objective import as_modality, draw, learned_mask
from ltx2_jax.training.state import _matrices, all_finite, learning_rate, optimizer
from ltx2_jax.training.step import make_train_step

SMALL = dataclasses.replace(tiny.MODEL, num_layers=1)
# One config for all that is asked of whole steps, because compiling one takes longest.
RUN = tiny.config(model=SMALL, num_steps=30, optim=OptimConfig(learning_rate=1e-2, ema_decay=0.5))


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def small(**changes):
    return dataclasses.replace(tiny.config(model=SMALL), **changes)


def on_mesh(batch):
    return place(batch, jax.sharding.get_mesh())


@cache
def step_of(config, mesh):
    """The jitted step of a config under `mesh`, which is that in context."""
    return make_train_step(config, tiny.STRIDES)


def run(config, steps, batch=None):
    mesh = jax.sharding.get_mesh()
    state, step, metrics = tiny.state(config, mesh), step_of(config, mesh), []
    for _ in range(steps):
        state, values = step(state, on_mesh(batch or tiny.batch()), tiny.null_text())
        metrics.append(jax.device_get(values))
    return state, metrics


def test_the_model_learns_one_batch():
    _, metrics = run(RUN, 30)
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert np.isfinite([m["grad_norm"] for m in metrics]).all()


def test_micro_batches_on_a_mesh_add_up_to_one_batch_on_one_device():
    optim = dataclasses.replace(RUN.optim, accumulate_steps=4, ema_decay=None)
    cut = dataclasses.replace(RUN, optim=optim)
    state, a = run(RUN, 1)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cut_state, b = run(cut, 1)
    for name in a[0]:
        np.testing.assert_allclose(b[0][name], a[0][name], rtol=2e-5, err_msg=name)
    # Adam's first update is the sign of the gradient: compare the moments, which are linear in it.
    for x, y in zip(jax.tree.leaves(state["opt"]), jax.tree.leaves(cut_state["opt"]), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-6)


def test_a_state_is_finite_when_all_its_numbers_are():
    mesh = make_mesh(2, 2, 2)
    state = {
        "params": jax.device_put(jnp.ones((4, 8)), sharding_of(mesh, "heads", "fsdp")),
        "opt": {"mu": jax.device_put(jnp.ones(3, jnp.bfloat16), sharding_of(mesh))},
        "step": jax.device_put(jnp.int32(7), sharding_of(mesh)),
    }
    with jax.set_mesh(mesh):
        assert all_finite(state)
        assert not all_finite(state | {"params": jnp.inf * state["params"]})
        assert not all_finite(state | {"opt": {"mu": jnp.nan * state["opt"]["mu"]}})


def test_every_step_draws_new_noise_and_the_same_step_the_same():
    config = small()
    batch = on_mesh(tiny.batch())
    draws = [
        draw(jax.random.fold_in(jax.random.key(config.seed), i), batch, config, (4, 8, 8))
        for i in (0, 0, 1)
    ]
    assert (draws[0]["video"].noise == draws[1]["video"].noise).all()
    assert not (draws[0]["video"].noise == draws[2]["video"].noise).any()
    assert not (draws[0]["video"].sigma == draws[2]["video"].sigma).any()


def test_given_first_frames_are_clean_and_not_learned():
    config = small(flow=FlowConfig(first_frame_prob=1.0))
    drawn = draw(jax.random.key(0), on_mesh(tiny.batch()), config, tiny.STRIDES)
    video = drawn["video"]
    first = np.arange(16) < 8  # two latent frames of 2 x 4 tokens
    np.testing.assert_array_equal(video.given, np.tile(first, (8, 1)))
    modality = as_modality(video, None, None)
    np.testing.assert_array_equal(modality.latent[:, :8], video.x0[:, :8])
    assert not np.array_equal(modality.latent[:, 8:], video.x0[:, 8:])
    # The network is told which they are, and one noise level of all others.
    np.testing.assert_array_equal(modality.clean, video.given)
    np.testing.assert_array_equal(modality.timesteps[:, 0], video.sigma)
    np.testing.assert_array_equal(modality.sigma, video.sigma)
    np.testing.assert_array_equal(learned_mask(video), np.tile(~first, (8, 1)))


def test_streams_share_sigma_as_often_as_configured():
    batch = on_mesh(tiny.batch(size=8))
    for share, expected in ((0.0, 0), (1.0, 8)):
        config = small(flow=FlowConfig(shared_sigma_prob=share))
        drawn = draw(jax.random.key(3), batch, config, tiny.STRIDES)
        assert (drawn["video"].sigma == drawn["audio"].sigma).sum() == expected


def test_a_dropped_caption_is_the_empty_caption():
    """Whatever stands in its place, and no other caption is."""
    batch, other = tiny.batch(), tiny.batch(seed=1)
    key = jax.random.fold_in(jax.random.key(RUN.seed), 0)
    dropped = np.asarray(draw(key, on_mesh(batch), RUN, tiny.STRIDES)["drop_caption"])
    assert 0 < dropped.sum() < 8

    def loss(rows):
        """With other captions in these rows, [8] bool."""
        mixed = dict(batch)
        for name in TEXT_FIELDS:
            mixed[name] = batch[name].copy()
            mixed[name][rows] = other[name][rows]
        return run(RUN, 1, mixed)[1][0]["loss"]

    assert loss(dropped) == loss(np.zeros(8, bool)) != loss(~dropped)


def test_weight_decay_reaches_matrices_only():
    params = tiny.params(small(), jax.sharding.get_mesh())
    mask = _matrices(params)
    decayed = {path[-1].key for path, on in jax.tree_util.tree_leaves_with_path(mask) if on}
    spared = {path[-1].key for path, on in jax.tree_util.tree_leaves_with_path(mask) if not on}
    assert decayed == {"weight"}
    assert {"bias", "q_norm", "video_table", "registers"} <= spared


@pytest.mark.parametrize(
    ("schedule", "at"),
    [("constant", {10: 1.0, 110: 1.0}), ("linear", {60: 0.55, 110: 0.1}),
     ("cosine", {60: 0.55, 110: 0.1})],
)  # fmt: skip
def test_learning_rate_warms_up_then_decays(schedule, at):
    optim = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule)
    rate = learning_rate(small(optim=optim, num_steps=110))
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.1, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(step) for step in at], list(at.values()), rtol=1e-5)


def test_average_of_weights_follows_its_decay():
    """A tenth at first, then more with every step, until it is what was asked for."""
    mesh = jax.sharding.get_mesh()
    state, batch = tiny.state(RUN, mesh), on_mesh(tiny.batch())
    for step in range(11):
        before = jax.tree.map(np.array, state["ema"])
        state, _ = step_of(RUN, mesh)(state, batch, tiny.null_text())
        decay = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda b, p, d=decay: d * b + (1 - d) * np.asarray(p), before, state["params"]
        )
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(state["ema"]), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


def test_the_first_moment_may_be_short():
    """Its type is kept by a step; weights and second moment stay float32."""
    config = small(optim=OptimConfig(first_moment_dtype="bfloat16"))
    transform = optimizer(config)
    params = {"weight": jnp.ones(3)}
    state = transform.init(params)
    updates, state = transform.update({"weight": jnp.arange(3.0)}, state, params)
    moments = optax.tree.get_all_with_path(state, "mu"), optax.tree.get_all_with_path(state, "nu")
    (first,), (second,) = ([tree["weight"].dtype for _, tree in found] for found in moments)
    assert (first, second, updates["weight"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_another_type_of_the_first_moment_is_refused():
    with pytest.raises(UserError, match="first_moment_dtype='float16': use float32 or bfloat16"):
        OptimConfig(first_moment_dtype="float16")
