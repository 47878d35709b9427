"""One step, piece by piece, with stand-ins for the model and for its loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy.special import expit
from scipy.stats import kstest

from ltx2_jax.config import FlowConfig, OptimConfig
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.sharding import make_mesh, reduces_in_float32
from ltx2_jax.training import objective, step
from ltx2_jax.training.batch import place
from ltx2_jax.training.state import all_finite, learning_rate, optimizer, state_of


def config(flow=None, **optim):
    return tiny.config(flow=flow or FlowConfig(), optim=OptimConfig(**optim))


def draws(config, batch, seed=0, **clock):
    return objective.draw(jax.random.key(seed), batch, config, tiny.STRIDES, **clock)


# ------------------------------------------------------------------------------------ what is drawn

ROWS = 2000


def many(video=(2, 1, 1, 1), audio=(2, 1, 1)):
    """So many clips that frequencies show, of latents that are all 3."""
    return {
        "video": jnp.full((ROWS, *video), 3.0),
        "audio": jnp.full((ROWS, *audio), 3.0),
        "fps": jnp.full(ROWS, 24.0),
    }


def test_tokens_are_the_latents_of_their_stream_in_order():
    batch = tiny.batch(2)
    drawn = draws(config(), batch)
    np.testing.assert_array_equal(drawn["video"].x0, batch["video"].reshape(2, 16, 8))
    np.testing.assert_array_equal(drawn["audio"].x0, batch["audio"].reshape(2, 5, 16))


def test_noise_is_standard_normal_and_of_every_clip_and_stream_its_own():
    drawn = draws(config(), many())
    noise = np.concatenate([drawn[name].noise[..., 0] for name in ("video", "audio")], axis=1)
    assert noise.shape == (ROWS, 4)
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(4), atol=0.1)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_first_frames_are_given_and_captions_dropped_as_often_as_asked_and_independently():
    flow = FlowConfig(first_frame_prob=0.5, caption_dropout=0.5)
    drawn = draws(config(flow), many())
    given, dropped = np.asarray(drawn["video"].given), np.asarray(drawn["drop_caption"])
    assert not given[:, 1].any()
    assert abs(np.corrcoef(given[:, 0], dropped)[0, 1]) < 0.1
    assert abs(np.corrcoef(given[:, 0], drawn["video"].sigma)[0, 1]) < 0.1
    assert drawn["audio"].given is None
    flow = FlowConfig(first_frame_prob=0.2, caption_dropout=0.7)
    drawn = draws(config(flow), many())
    assert np.mean(drawn["video"].given[:, 0]) == pytest.approx(0.2, abs=0.05)
    assert np.mean(drawn["drop_caption"]) == pytest.approx(0.7, abs=0.05)


def test_a_clip_of_one_latent_frame_is_never_given():
    batch = many(video=(1, 2, 1, 1))
    assert draws(config(FlowConfig(first_frame_prob=1.0)), batch)["video"].given is None
    assert draws(config(FlowConfig(first_frame_prob=0.0)), many())["video"].given is None


def test_noise_levels_have_the_spread_asked_for_and_the_shift_of_their_own_token_count():
    """Medians in closed form: those of 2048 video tokens and 2 audio tokens are far apart."""
    std = 2.0
    flow = FlowConfig(sigma_std=std, sigma_uniform_prob=0.0)

    @jax.jit
    def sigmas():
        drawn = draws(config(flow), many(video=(8, 16, 16, 1)))
        return drawn["video"].sigma, drawn["audio"].sigma  # the noise is never made

    for sigma, tokens in zip(sigmas(), (2048, 2), strict=True):
        mu = 0.95 + 1.1 * (tokens - 1024) / 3072
        low, high = expit(mu - 2.5758 * std), expit(mu + 3.0902 * std)
        median = (expit(mu) - low) / (high - low)
        assert np.mean(sigma < median) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(ROWS))


def test_noise_levels_are_those_of_the_token_count_that_the_config_names():
    few = draws(config(FlowConfig(sigma_tokens=4096)), many())
    assert few["video"].conditions.clean.shape[1] < 100
    for name in ("video", "audio"):
        levels = np.asarray(few[name].sigma)
        low, high = expit(2.05 - 2.5758), expit(2.05 + 3.0902)
        median = (expit(2.05) - low) / (high - low)  # of nine tenths; the rest is uniform
        assert np.mean(levels < median) == pytest.approx(0.45 + 0.1 * median, abs=2 / np.sqrt(ROWS))


def test_all_noise_levels_are_uniform_if_asked():
    drawn = draws(config(FlowConfig(sigma_uniform_prob=1.0)), many())
    for name in ("video", "audio"):
        assert kstest(np.asarray(drawn[name].sigma), "uniform").pvalue > 1e-3
    drawn = draws(config(FlowConfig(sigma_uniform_prob=1.0, sigma_eps=0.4)), many())
    for name in ("video", "audio"):  # from the least one on
        sigma = np.asarray(drawn[name].sigma)
        assert kstest((sigma - 0.4) / 0.6, "uniform").pvalue > 1e-3


def test_tokens_lie_where_the_frame_rate_the_strides_and_the_clock_put_them():
    batch = tiny.batch(2)  # 12.5 and 24 frames a second, latents of 2 x 2 x 4, strides 4, 8, 8
    drawn = draws(config(), batch, clock=CLOCK)
    positions = np.asarray(drawn["video"].conditions.positions)  # [B, 3, T, 2]
    for row, fps in zip(positions, (12.5, 24.0), strict=True):
        np.testing.assert_allclose(row[0, [0, 15]], [[0, 1 / fps], [1 / fps, 5 / fps]], rtol=1e-6)
        np.testing.assert_array_equal(row[1:, 15], [[8, 16], [24, 32]])
    seconds = np.asarray(drawn["audio"].conditions.positions)[0, 0]
    np.testing.assert_allclose(seconds[:2], [[0, 0.025], [0.025, 0.075]], rtol=1e-6)
    assert len(seconds) == 5


# --------------------------------------------------------------------------------------- the loss


class Model:
    """Predicts what a function of both streams says; remembers what it was given."""

    def __init__(self, velocity=None):
        self.velocity = velocity or (lambda *streams: [jnp.zeros_like(x.latent) for x in streams])

    def context(self, text):
        self.text = text
        return "video context", "audio context", "mask"

    def transformer(self, video, audio, *_, **__):
        self.video, self.audio = video, audio
        return self.velocity(video, audio)


MIXED = config(FlowConfig(first_frame_prob=0.5, caption_dropout=0.5))


@pytest.fixture(scope="module")
def mixed():
    """A batch, some clips of which have a given first frame, some another caption."""
    batch = tiny.batch()
    drawn = draws(MIXED, batch, seed=1)
    for some in (drawn["video"].given[:, 0], drawn["drop_caption"]):
        assert 0 < some.sum() < 8
    return batch, drawn


def lost(model, batch, drawn, config=MIXED, null_text=None):
    return objective.loss(model, batch, drawn, null_text or tiny.null_text(), config)


def of_clips(drawn):
    """Mean squares of the velocities of every clip, over the tokens that are not given."""
    for name in ("video", "audio"):
        stream = drawn[name]
        square = np.mean(np.square(np.asarray(stream.noise) - np.asarray(stream.x0)), axis=-1)
        learned = np.ones(square.shape) if stream.given is None else ~np.asarray(stream.given)
        yield np.average(square, axis=1, weights=learned)


def test_the_loss_weighs_its_two_streams(mixed):
    video, audio = (np.mean(x) for x in of_clips(mixed[1]))
    for weights in ((2.0, 0.5), (0.0, 1.0), (1.0, 0.0)):
        flow = dataclasses.replace(MIXED.flow, video_weight=weights[0], audio_weight=weights[1])
        value, sums = lost(Model(), *mixed, tiny.config(flow=flow))
        np.testing.assert_allclose(value, weights[0] * video + weights[1] * audio, rtol=1e-5)
        # The log shows both as they are.
        np.testing.assert_allclose(sums["video_loss"], 8 * video, rtol=1e-5)
        np.testing.assert_allclose(sums["audio_loss"], 8 * audio, rtol=1e-5)


def test_the_true_velocities_have_no_loss_whatever_is_said_of_given_tokens(mixed):
    drawn = mixed[1]
    video, audio = (drawn[name].noise - drawn[name].x0 for name in ("video", "audio"))
    wrong_where_given = video + 5.0 * drawn["video"].given[..., None]
    for given in (video, wrong_where_given):
        assert lost(Model(lambda *_, given=given: (given, audio)), *mixed)[0] == 0
    assert lost(Model(lambda *_: (video, audio + 1)), *mixed)[1]["video_loss"] == 0
    assert lost(Model(lambda *_: (video, audio + 1)), *mixed)[1]["audio_loss"] > 7
    assert lost(Model(lambda *_: (video + 1, audio)), *mixed)[1]["audio_loss"] == 0


def test_the_log_counts_each_stream_at_its_own_noise_level(mixed):
    _, sums = lost(Model(), *mixed)
    for name, clips in zip(("video", "audio"), of_clips(mixed[1]), strict=True):
        sigma = np.asarray(mixed[1][name].sigma)
        edges = [0, 0.25, 0.5, 0.75, 1.0]
        np.testing.assert_array_equal(sums[f"{name}_count"], np.histogram(sigma, edges)[0])
        want = np.histogram(sigma, edges, weights=clips)[0]
        np.testing.assert_allclose(sums[f"{name}_quarter"], want, rtol=1e-5)


def test_the_network_gets_both_noised_streams_each_with_its_own_text(mixed):
    _, drawn = mixed
    model = Model()
    lost(model, *mixed)
    for name, modality in (("video", model.video), ("audio", model.audio)):
        stream = drawn[name]
        s = np.asarray(stream.sigma)[:, None, None]
        want = (1 - s) * np.asarray(stream.x0) + s * np.asarray(stream.noise)
        if stream.given is not None:
            want = np.where(np.asarray(stream.given)[..., None], stream.x0, want)
        np.testing.assert_allclose(modality.latent, want, atol=1e-5)
        assert modality.context == f"{name} context"
        assert modality.context_mask == "mask"
        np.testing.assert_array_equal(modality.positions, stream.conditions.positions)
        np.testing.assert_array_equal(modality.sigma, stream.sigma)


def test_first_frames_are_marked_as_keyframes_to_models_that_know_them(mixed):
    batch = mixed[0]
    for known, wanted in ((True, True), (False, True), (True, False)):
        model = Model()
        run = config(FlowConfig(mark_first_frame=wanted))
        network = dataclasses.replace(tiny.MODEL, keyframe_embedding=known)
        run = dataclasses.replace(run, model=network)
        lost(model, batch, draws(run, batch), run)
        assert model.audio.keyframes_mask is None
        if known and wanted:
            want = np.tile(np.arange(16) < 8, (8, 1))
            np.testing.assert_array_equal(model.video.keyframes_mask, want)
        else:
            assert model.video.keyframes_mask is None


def test_captions_are_emptied_in_all_fields_of_the_rows_drawn_and_in_no_other(mixed):
    batch, drawn = mixed
    model, null = Model(), tiny.null_text()
    lost(model, batch, drawn, null_text=null)
    assert set(model.text) == {"video_text", "audio_text", "text_mask"}
    for name, got in model.text.items():
        for row, drop in enumerate(drawn["drop_caption"]):
            np.testing.assert_array_equal(got[row], null[name] if drop else batch[name][row])
    shared = {name: value for name, value in batch.items() if name != "audio_text"}
    lost(model, shared, drawn)
    assert set(model.text) == {"video_text", "text_mask"}


# --------------------------------------------------------------------------------- the whole step

CLOCK = AudioClock(sample_rate=8000, hop=200, downsample=2)
GRADIENT = {"layer": {"weight": jnp.array([3.0, 0.0, -4.0]), "bias": jnp.array([12.0])}}
START = {"layer": {"weight": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([4.0])}}


def zero_sums(**sums):
    names = [f"{s}_{kind}" for s in ("video", "audio") for kind in ("quarter", "count")]
    zeros = {"video_loss": jnp.zeros(()), "audio_loss": jnp.zeros(())}
    return zeros | {name: jnp.zeros(4) for name in names} | sums


def push(params):
    """A loss of which GRADIENT is the gradient; 0 at START."""
    parts = jax.tree.map(lambda p, s, g: jnp.sum((p - s) * g), params, START, GRADIENT)
    return sum(jax.tree.leaves(parts))


def pushed(params, *_, **__):
    return push(params), zero_sums()


@pytest.fixture
def trained(monkeypatch):
    """`trained(config, loss, steps)` -> (state, metrics of each step), with params for a model."""

    def run(config, loss, steps=1, state=None, **made):
        monkeypatch.setattr(step.ltx2, "graph", lambda *_: None)
        monkeypatch.setattr(step.nnx, "merge", lambda _, params: params)
        monkeypatch.setattr(step, "loss", loss)
        one = step.make_train_step(config, (4, 8, 16), CLOCK, **made)
        state = state or state_of(jax.tree.map(jnp.copy, START), config)
        metrics = []
        for _ in range(steps):
            state, values = one(state, tiny.batch(), tiny.null_text())
            metrics.append(jax.device_get(values))
        return state, metrics

    return run


def test_what_a_step_draws_is_a_function_of_the_seed_and_its_number(trained):
    def seen(params, batch, drawn, *_, **__):
        noise = (drawn[name].noise[0, 0, 0] for name in ("video", "audio"))
        sums = dict(zip(("video_loss", "audio_loss"), noise, strict=True))
        return drawn["video"].sigma[0] + 0 * push(params), zero_sums(**sums)

    names = ("loss", "video_loss", "audio_loss")
    run, other = config(), dataclasses.replace(config(), seed=1)
    _, first = trained(run, seen, 3)
    third = state_of(jax.tree.map(jnp.copy, START), run) | {"step": jnp.int32(2)}
    (again,), (elsewhere,) = trained(run, seen, state=third)[1], trained(other, seen)[1]
    for name in names:
        values = [float(metrics[name]) for metrics in (*first, elsewhere)]
        assert len(set(values)) == 4, (name, values)
        assert again[name] == first[2][name]


def test_a_step_knows_where_the_codec_puts_tokens(trained):
    def ends(params, batch, drawn, *_, **__):
        picture, sound = (
            drawn[name].conditions.positions[0, :, -1, 1] for name in ("video", "audio")
        )
        values = jnp.concatenate([picture, sound])  # seconds, rows, columns; seconds
        return push(params), zero_sums(video_quarter=values, video_count=jnp.ones(4))

    _, (metrics,) = trained(config(), ends)
    np.testing.assert_allclose(metrics["video_loss_quarters"], [5 / 12.5, 16, 64, 0.225], rtol=1e-6)


def test_every_micro_batch_of_every_step_leaves_out_features_of_its_own(trained, monkeypatch):
    """Seen by what is drawn from the key of the dropout; the log has the mean of micro-batches."""
    monkeypatch.setattr(step.trainable, "constants", lambda config, key: {"key": key})

    def seen(params, *_, **__):
        drawn = jax.random.uniform(params["key"], (4,))
        value = push({"layer": params["layer"]})
        return value, zero_sums(video_quarter=drawn, video_count=jnp.ones(4))

    def left_out(steps=1, seed=0, **optim):
        run = dataclasses.replace(config(**optim), seed=seed)
        return [x["video_loss_quarters"][0] for x in trained(run, seen, steps)[1]]

    first, second = left_out(2)
    assert left_out() == [first]
    assert first not in (second, *left_out(accumulate_steps=2), *left_out(seed=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_over_shards_in_the_type_asked_for(trained, dtype):
    asked = []

    def loss(params, *_, **__):
        asked.append(reduces_in_float32())
        return push(params), zero_sums()

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        trained(config(reduce_dtype=dtype), loss)
    assert asked == [dtype == "float32"]


def test_a_step_reports_its_loss_means_and_the_norm_before_clipping(trained):
    quarters = {"video_quarter": jnp.array([1.0, 2.0, 3.0, 0.0]),
                "video_count": jnp.array([2.0, 2.0, 1.0, 0.0]),
                "audio_quarter": jnp.array([8.0, 0.0, 0.0, 0.0]),
                "audio_count": jnp.array([4.0, 0.0, 0.0, 4.0])}  # fmt: skip

    def loss(params, batch, drawn, null_text, config, *_, **__):
        value = config.flow.video_weight * jnp.sum(null_text["video_text"])
        return value + push(params), zero_sums(video_loss=16.0, audio_loss=24.0, **quarters)

    run = config(FlowConfig(video_weight=0.5), clip_norm=1.0)
    _, (metrics,) = trained(run, loss)
    np.testing.assert_allclose(
        metrics["loss"], 0.5 * tiny.null_text()["video_text"].sum(), rtol=1e-5
    )
    assert (metrics["video_loss"], metrics["audio_loss"]) == (2.0, 3.0)  # of 8 clips
    np.testing.assert_array_equal(metrics["video_loss_quarters"], [0.5, 1.0, 3.0, np.nan])
    np.testing.assert_array_equal(metrics["audio_loss_quarters"], [2.0, np.nan, np.nan, 0.0])
    np.testing.assert_allclose(metrics["grad_norm"], 13.0, rtol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_counts_and_changes_nothing_else(trained, where):
    def loss(params, *_, **__):
        value = push(params)
        # sqrt at 0 has a finite value, and a gradient that is not.
        weight = params["layer"]["weight"].ravel()[0]
        bad = jnp.sqrt(weight - weight) if where == "gradient" else jnp.nan
        return value + bad, zero_sums()

    run = config(learning_rate=0.1, ema_decay=0.9)
    start = state_of(jax.tree.map(jnp.copy, START), run)
    before = jax.device_get(start)
    state, (metrics,) = trained(run, loss, state=start)
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    assert state["step"] == 1
    jax.tree.map(np.testing.assert_array_equal, state | {"step": 0}, before)


def test_weights_move_against_the_gradient_by_the_learning_rate_reported(trained):
    """Adam under one and the same gradient moves every weight by the learning rate."""
    run = config(learning_rate=0.1, warmup_steps=4, weight_decay=0.0)
    start = state_of(jax.tree.map(jnp.copy, START), run)
    state, metrics = trained(run, pushed, 3, start)
    assert start["params"]["layer"]["weight"].is_deleted()  # its memory is the new one's
    rates = [values["learning_rate"] for values in metrics]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075], rtol=1e-6)
    want = jax.tree.map(lambda p, g: p - 0.15 * np.sign(g), START, GRADIENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["params"], want)
    assert state["step"] == 3
    assert "ema" not in state


def test_a_step_keeps_its_state_or_has_the_checker_in_it_where_that_is_asked(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(step, "compiler_options", lambda **given: asked.append(given))
    start = state_of(jax.tree.map(jnp.copy, START), config())
    state, _ = trained(config(), pushed, state=start, donate=False)
    np.testing.assert_array_equal(start["params"]["layer"]["weight"], START["layer"]["weight"])
    trained(config(), pushed, state=state, checked=True)
    assert asked == [{"training": True, "checked": checked} for checked in (False, True)]


def test_the_average_follows_the_new_weights_as_fast_as_it_is_old(trained):
    steps = jnp.asarray([0, 3, 80, 81, 1000])
    np.testing.assert_allclose(step.ema_decay(0.9, steps), [0.1, 4 / 13, 0.9, 0.9, 0.9], rtol=1e-6)
    run = config(learning_rate=0.5, ema_decay=0.9)
    state = state_of(jax.tree.map(jnp.copy, START), run)
    state |= {"ema": jax.tree.map(lambda x: x + 10, START), "step": jnp.int32(3)}
    state, _ = trained(run, pushed, state=state)
    want = jax.tree.map(
        lambda s, p: 4 / 13 * (np.asarray(s) + 10) + 9 / 13 * np.asarray(p), START, state["params"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["ema"], want)


def test_a_fresh_state_can_be_donated_and_averages_nothing_unasked(trained):
    run = config(ema_decay=0.9)
    state = state_of(jax.tree.map(jnp.copy, START), run)
    assert state["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["ema"], START)
    jax.tree.map(np.testing.assert_array_equal, state["params"], START)
    trained(run, pushed, state=state)  # an array that is donated twice is refused
    assert set(state_of(START, config())) == {"params", "opt", "step"}


def test_every_weight_average_and_moment_must_be_finite():
    state = state_of(START, config(ema_decay=0.9))
    assert all_finite(state)
    leaves, structure = jax.tree.flatten(state)
    broken = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(broken) == 8  # a weight and a bias, their averages and two moments of each
    for i in broken:
        wrong = [leaf.at[-1].set(jnp.nan) if j == i else leaf for j, leaf in enumerate(leaves)]
        assert not all_finite(jax.tree.unflatten(structure, wrong)), i


# -------------------------------------------------------------------------------- pieces of a step


def test_the_optimizer_is_clipped_adamw_as_in_its_papers():
    run = config(
        learning_rate=0.1, warmup_steps=3, b1=0.8, b2=0.95, eps=0.3, weight_decay=0.2, clip_norm=2.0
    )
    transform = optimizer(run)
    params = {name: np.asarray(value, np.float64) for name, value in START["layer"].items()}
    ours, state = START, transform.init(START)
    update = jax.jit(transform.update)
    m, v = ({name: 0.0 for name in params} for _ in range(2))
    for t, size in enumerate((0.1, 1.0, 0.01, 5.0), start=1):  # of norms around 2
        gradient = jax.tree.map(lambda g, size=size: size * (g + 1), GRADIENT)
        updates, state = update(gradient, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient["layer"].values()))
        rate = 0.1 * min(t / 3, 1)
        for name, g in gradient["layer"].items():
            g = np.asarray(g, np.float64) * min(1.0, 2.0 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            move = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 0.3)
            decay = 0.2 * params[name] if name == "weight" else 0.0
            params[name] = params[name] - rate * (move + decay)
    for name, value in params.items():
        np.testing.assert_allclose(ours["layer"][name], value, rtol=1e-5)


@pytest.mark.parametrize("decays", ["matrices", "all"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_every_optimizer_decays_by_its_rate_what_it_is_told_to(name, decays):
    transform = optimizer(
        config(optimizer=name, decays=decays, learning_rate=0.5, warmup_steps=2, weight_decay=0.2)
    )
    params = {"layer": {"weight": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([4.0])}}
    still, state = jax.tree.map(jnp.zeros_like, params), transform.init(params)
    for rate in (0.25, 0.5):
        updates, state = transform.update(still, state, params)
        for leaf, value in params["layer"].items():
            share = 0.2 * rate if leaf == "weight" or decays == "all" else 0.0
            np.testing.assert_allclose(updates["layer"][leaf], -share * value, rtol=1e-5)


def test_muon_moves_what_is_no_matrix_as_adam_does_with_the_moments_of_the_config():
    """With Nesterov's momentum, as its matrices."""
    params = {"layer": {"weight": jnp.ones((2, 2)), "bias": jnp.array([1.0, 2.0])}}
    run = config(optimizer="muon", learning_rate=0.1, b1=0.8, b2=0.95)
    moved = []
    for transform in (optimizer(run), optax.nadam(0.1, b1=0.8, b2=0.95)):
        state = transform.init(params)
        for size in (1.0, 0.1, 0.5):
            gradient = jax.tree.map(lambda p, size=size: size * p / 9, params)  # clips nothing
            updates, state = transform.update(gradient, state, params)
        moved.append(updates["layer"]["bias"])
    np.testing.assert_allclose(*moved, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_without_warm_up_starts_at_its_peak_and_ends_at_its_fraction(schedule):
    optim = OptimConfig(learning_rate=2.0, schedule=schedule, final_fraction=0.25)
    rate = learning_rate(tiny.config(optim=optim, num_steps=40))
    values = [float(rate(step)) for step in (0, 20, 40)]
    np.testing.assert_allclose(values, [2.0, 1.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_micro_batches_average_gradients_and_add_up_what_is_logged(chunks):
    rng = np.random.default_rng(0)
    x, scale, shared = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=(1, 3))

    def loss_of(params, batch, drawn):
        rows = drawn["scale"] * jnp.sum(batch["video"] * drawn["shared"] * params, axis=1)
        return jnp.mean(rows), {"sum": jnp.sum(rows), "count": jnp.full(2, rows.shape[0])}

    batch, drawn = {"video": jnp.asarray(x)}, {"scale": jnp.asarray(scale), "shared": shared}
    (value, sums), gradient = step.gradients(loss_of, jnp.ones(3), batch, drawn, chunks)
    rows = scale * np.sum(x * shared, axis=1)
    np.testing.assert_allclose(value, rows.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["sum"], rows.sum(), rtol=1e-5)
    np.testing.assert_array_equal(sums["count"], [8, 8])
    np.testing.assert_allclose(gradient, np.mean(scale[:, None] * x * shared, axis=0), rtol=1e-5)


def test_a_micro_batch_has_rows_of_every_shard_of_the_batch():
    rows = np.asarray(step._split(jnp.arange(8), 8, 4))
    assert sorted(rows.ravel()) == list(range(8))
    for chunk in rows:
        assert sorted(chunk // 4) == [0, 1]  # two shards of four rows


def test_a_batch_is_placed_with_its_rows_over_the_data_axis_and_without_its_numbers():
    batch = tiny.batch(4) | {"id": np.arange(4)}
    placed = place(batch, make_mesh(2, 1, 2, devices=jax.devices()[:4]))
    assert set(placed) == set(tiny.batch(4))
    for name, value in placed.items():
        np.testing.assert_array_equal(value, batch[name])
        assert {shard.data.shape[0] for shard in value.addressable_shards} == {2}
