"""Training modes: what is given, what is learned, and which streams there are.

Against the official trainer: tests/golden_training_objective.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import kstest

from ltx2_jax.config import Condition, Config, FlowConfig, StreamConfig
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, replaced, to_json
from ltx2_jax.training import objective
from ltx2_jax.training.batch import abstract_batch, abstract_text, place
from ltx2_jax.training.step import gradients

FROZEN, ABSENT = StreamConfig("frozen"), StreamConfig("absent")
FIRST, MASK, REFERENCE = (Condition(kind) for kind in ("first_frame", "mask", "reference"))
PREFIX, SUFFIX = Condition("prefix", length=1), Condition("suffix", length=2)
ROWS = 2000


def given(*conditions):
    return StreamConfig(conditions=conditions)


def often(condition, probability):
    return dataclasses.replace(condition, probability=probability)


def config(*streams, **changes):
    return tiny.config(flow=FlowConfig(*streams, **changes))


def draws(config, batch, seed=0, **clock):
    return objective.draw(jax.random.key(seed), batch, config, tiny.STRIDES, **clock)


def many():
    """So many clips that frequencies show: 3 video tokens, one a frame, and 4 audio tokens."""
    return {
        "video": jnp.full((ROWS, 3, 1, 1, 1), 3.0),
        "audio": jnp.full((ROWS, 4, 1, 1), 3.0),
        "fps": jnp.full(ROWS, 24.0),
    }


def full(size=8):
    """A batch with masks and with references of half the rows and columns."""
    rng, batch = np.random.default_rng(5), tiny.batch(size)
    return batch | {
        "video_mask": rng.random((size, 2, 2, 4)) > 0.7,
        "audio_mask": rng.random((size, 5)).astype(np.float32),
        "video_reference": rng.normal(size=(size, 2, 1, 2, 8)).astype(np.float32),
        "audio_reference": rng.normal(size=(size, 3, 1, 16)).astype(np.float32),
    }


class Model:
    """Predicts 0; remembers what it was given."""

    def context(self, text):
        return "video context", "audio context", None

    @property
    def transformer(self):
        return self

    cfg = tiny.MODEL

    def __call__(self, *inputs):
        self.video, self.audio, *self.keep = inputs
        return [None if x is None else jnp.zeros_like(x.latent) for x in inputs[:2]]


def lost(config, batch, drawn=None):
    model = Model()
    drawn = draws(config, batch) if drawn is None else drawn
    value, sums = objective.loss(model, batch, drawn, tiny.null_text(), config)
    return float(value), sums, model


# ---- what is given -------------------------------------------------------------------------------


def test_conditions_apply_as_often_as_asked_each_by_itself_and_a_token_is_given_by_any():
    run = config(given(often(PREFIX, 0.5), often(SUFFIX, 0.3)), given(often(PREFIX, 0.4)))
    drawn = draws(run, many())
    video, audio = (np.asarray(drawn[name].given) for name in ("video", "audio"))
    assert np.mean(video, axis=0) == pytest.approx([0.5, 0.3, 0.3], abs=0.05)
    assert np.mean(audio, axis=0) == pytest.approx([0.4, 0, 0, 0], abs=0.05)
    for a, b in ((video[:, 0], video[:, 1]), (video[:, 0], audio[:, 0])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert abs(np.corrcoef(video[:, 1], drawn["video"].sigma)[0, 1]) < 0.1


def test_the_field_of_first_frames_is_a_condition_of_the_same_numbers():
    by_field = draws(config(first_frame_prob=0.5), tiny.batch())
    listed = draws(config(given(often(FIRST, 0.5))), tiny.batch())
    jax.tree.map(np.testing.assert_array_equal, by_field, listed)
    assert 0 < by_field["video"].given[:, 0].sum() < 8


def test_masks_are_the_samples_own():
    batch = full()
    drawn = draws(config(given(MASK), given(MASK)), batch)
    np.testing.assert_array_equal(drawn["video"].given, batch["video_mask"].reshape(8, 16))
    np.testing.assert_array_equal(drawn["audio"].given, batch["audio_mask"] > 0.5)


def test_a_given_stream_as_a_whole_is_clean_at_level_zero_and_has_no_loss():
    batch = full()
    value, sums, model = lost(config(FROZEN, given(PREFIX)), batch)
    np.testing.assert_array_equal(model.video.latent, batch["video"].reshape(8, 16, 8))
    assert not np.any(model.video.sigma)
    assert not np.any(model.video.timesteps)
    assert np.all(model.audio.sigma > 0)
    assert {name.partition("_")[0] for name in sums} == {"audio"}
    assert value == pytest.approx(float(sums["audio_loss"]) / 8)
    # What its conditions would give of it is given already.
    assert model.video.clean is None
    frozen = StreamConfig("frozen", (PREFIX, MASK))
    jax.tree.map(
        np.testing.assert_array_equal,
        draws(config(FROZEN, given(PREFIX)), batch)["video"],
        draws(config(frozen, given(PREFIX)), batch)["video"],
    )


def test_a_stream_that_is_absent_is_neither_read_nor_given_to_the_model():
    batch = {name: value for name, value in full().items() if not name.startswith("audio")}
    value, sums, model = lost(config(given(PREFIX), ABSENT), batch)
    assert model.audio is None
    assert value == pytest.approx(float(sums["video_loss"]) / 8)
    assert set(objective.averages(sums, 8)) == {"video_loss", "video_loss_quarters"}
    batch = {name: value for name, value in full().items() if not name.startswith("video_m")}
    del batch["video"], batch["fps"]
    assert lost(config(ABSENT, given(MASK)), batch)[2].video is None


def test_samples_without_sound_have_no_part_in_its_loss_and_are_not_heard():
    batch = tiny.batch() | {"has_audio": np.arange(8) < 3}
    run = config()
    drawn = draws(run, batch)
    value, sums, model = lost(run, batch, drawn)
    video, audio = (
        np.mean(np.square(drawn[name].noise - drawn[name].x0), axis=(1, 2))
        for name in ("video", "audio")
    )
    assert value == pytest.approx(video.mean() + audio[:3].mean(), rel=1e-5)
    assert float(objective.averages(sums, 8)["audio_loss"]) == pytest.approx(audio[:3].mean())
    assert (sums["audio_count"].sum(), sums["video_count"].sum()) == (3, 8)
    (keep,) = model.keep
    assert keep.video_to_audio is None
    np.testing.assert_array_equal(keep.audio_to_video, np.tile(batch["has_audio"][:, None], (1, 2)))
    # However the batch is cut.
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 4] if len(x) == 8 else x, (batch, drawn))
              for i in (0, 4)]  # fmt: skip
    assert sum(lost(run, *half)[0] for half in halves) / 2 == pytest.approx(value, rel=1e-5)


# ---- references ----------------------------------------------------------------------------------


def test_a_reference_is_clean_beside_the_clip_and_stands_where_the_clip_shows_the_same():
    batch, run = full(), config(given(REFERENCE), given(REFERENCE))
    value, _, model = lost(run, batch)
    drawn = draws(run, batch)
    for name, own, size in (("video", 16, 4), ("audio", 5, 3)):
        modality = getattr(model, name)
        assert modality.latent.shape[1] == own + size
        tokens = objective.tokens_of(name, jnp.asarray(batch[f"{name}_reference"]))
        np.testing.assert_array_equal(modality.latent[:, own:], tokens)
        beside = np.tile(np.arange(own + size) >= own, (8, 1))
        np.testing.assert_array_equal(modality.clean, beside)
    rows = np.asarray(model.video.positions)  # at 12.5 frames a second, strides 4, 8, 8
    np.testing.assert_array_equal(rows[0, 1:, 16:, :], [[[0, 16]] * 4, [[0, 16], [16, 32]] * 2])
    np.testing.assert_allclose(rows[0, 0, 16:], rows[0, 0, [0, 0, 8, 8]], rtol=1e-6)
    np.testing.assert_array_equal(model.audio.positions[:, :, 5:], model.audio.positions[:, :, :3])
    np.testing.assert_array_equal(model.video.keyframes_mask[:, 16:], 0)
    clock = AudioClock(sample_rate=8000, hop=200, downsample=2)  # of another codec
    seconds = draws(run, batch, clock=clock)["audio"].conditions.positions
    np.testing.assert_allclose(seconds[0, 0, 5:8], seconds[0, 0, :3], rtol=1e-6)
    np.testing.assert_allclose(seconds[0, 0, 6], [0.025, 0.075], rtol=1e-6)
    # It has no part in the loss: that of predicting 0 is the mean square of what is to be learned.
    squares = (np.mean(np.square(s.noise - s.x0)) for s in (drawn["video"], drawn["audio"]))
    assert value == pytest.approx(sum(squares), rel=1e-5)


def test_a_reference_of_fewer_frames_ends_when_its_clip_does():
    batch = tiny.batch(2)
    rng = np.random.default_rng(0)
    batch["video"] = rng.normal(size=(2, 5, 2, 4, 8)).astype(np.float32)
    batch["video_reference"] = rng.normal(size=(2, 3, 2, 4, 8)).astype(np.float32)
    positions = np.asarray(draws(config(given(REFERENCE)), batch)["video"].conditions.positions)
    clip, reference = positions[:, 0, :40], positions[:, 0, 40:]
    np.testing.assert_allclose(reference[:, -1, 1], clip[:, -1, 1], rtol=1e-6)
    np.testing.assert_allclose(reference[:, 8, 1], clip[:, 16, 1], rtol=1e-6)
    # A single picture may say how long it stands.
    batch["video_reference"] = batch["video_reference"][:, :1]
    batch["video_reference_fps"] = np.ones(2, np.float32)
    positions = draws(config(given(REFERENCE)), batch)["video"].conditions.positions
    np.testing.assert_array_equal(positions[:, 0, 40:], np.tile([0.0, 1.0], (2, 8, 1)))


def test_one_draw_decides_for_all_references_of_a_batch():
    batch, run = full(2), config(given(often(REFERENCE, 0.3)))
    decided = jax.jit(lambda seed: draws(run, batch, seed)["video"].applied[0])
    taken = [bool(decided(seed)) for seed in range(200)]
    assert np.mean(taken) == pytest.approx(0.3, abs=0.13)
    for seed in (taken.index(True), taken.index(False)):
        drawn = draws(run, batch, seed)
        assert drawn["video"].applied.shape == (1,)
        with jax.disable_jit():
            _, _, model = lost(run, batch, drawn)
        assert model.video.latent.shape[1] == (20 if taken[seed] else 16)


def test_a_run_knows_the_factors_of_its_references():
    shapes = {name: value.shape[1:] for name, value in full().items()}
    assert objective.reference_factors(FlowConfig(given(REFERENCE)), shapes) == (2, 1)
    assert objective.reference_factors(FlowConfig(given(MASK)), shapes) == (None, None)
    assert objective.reference_factors(FlowConfig(ABSENT, given(REFERENCE)), {}) == (None, None)


# ---- noise levels --------------------------------------------------------------------------------


def test_both_public_recipes_of_noise_levels_are_values():
    official = draws(config(), many())
    assert not np.any(official["video"].sigma == official["audio"].sigma)
    shared = {"shared_sigma_prob": 1.0, "sigma": "uniform", "sigma_min": 0.001, "sigma_max": 0.999}
    reference = draws(config(**shared), many())
    np.testing.assert_array_equal(reference["video"].sigma, reference["audio"].sigma)
    sigma = np.asarray(reference["video"].sigma)
    assert kstest((sigma - 0.001) / 0.998, "uniform").pvalue > 1e-3
    assert kstest(official["video"].sigma, "uniform").pvalue < 1e-3


def test_sound_beside_a_frozen_video_has_its_own_noise_level_even_if_levels_are_shared():
    alone = draws(config(FROZEN), tiny.batch())["audio"].sigma
    shared = draws(config(FROZEN, shared_sigma_prob=1.0), tiny.batch())["audio"].sigma
    np.testing.assert_array_equal(alone, shared)


def test_latents_of_two_bytes_are_noised_in_four():
    batch = {name: jnp.asarray(value) for name, value in tiny.batch().items()}
    batch["video"] = batch["video"].astype(jnp.bfloat16)
    _, _, model = lost(config(), batch)
    assert model.video.latent.dtype == jnp.float32
    drawn = draws(config(), batch)["video"]
    s = drawn.sigma[:, None, None]
    want = (1 - s) * drawn.x0.astype(jnp.float32) + s * drawn.noise
    np.testing.assert_allclose(model.video.latent, want, atol=1e-6)


# ---- on a mesh -----------------------------------------------------------------------------------


class Mixer(Model):
    """Every token is a map of itself and of the mean of its stream; given ones take part."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, *inputs):
        return [
            (x.latent + jnp.mean(x.latent, axis=1, keepdims=True)) @ self.weights[name]
            for name, x in zip(("video", "audio"), inputs, strict=True)
        ]


def gradients_on(sizes, chunks, seeds, mesh_context):
    """Loss, sums for the log and gradients of a `Mixer`, and whether it saw a video reference."""
    run = config(
        given(often(REFERENCE, 0.5), often(MASK, 0.7), often(PREFIX, 0.5)),
        given(REFERENCE, often(Condition("suffix", length=1), 0.5)),
    )

    def loss_of(weights, batch, drawn):
        return objective.loss(Mixer(weights), batch, drawn, tiny.null_text(), run)

    @jax.jit
    def compute(key, weights, batch):
        drawn = objective.draw(key, batch, run, tiny.STRIDES)
        return gradients(loss_of, weights, batch, drawn, chunks), drawn["video"].applied

    with mesh_context(*sizes), jax.default_matmul_precision("highest"):
        rng, batch = np.random.default_rng(2), place(full(), jax.sharding.get_mesh())
        weights = {"video": rng.normal(size=(8, 8)), "audio": rng.normal(size=(16, 16))}
        weights = jax.tree.map(jnp.float32, weights)
        return [jax.device_get(compute(jax.random.key(seed), weights, batch)) for seed in seeds]


def test_masks_and_references_give_the_same_on_a_mesh_and_in_micro_batches(mesh_context):
    """With the reference of the video and without: one program holds both."""
    one = gradients_on((1, 1, 1), 1, range(3), mesh_context)
    assert {bool(applied[0]) for _, applied in one} == {True, False}
    other = gradients_on((2, 1, 2), 2, range(3), mesh_context)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "missing", "message"),
    [
        ((given(MASK),), "video_mask", r"conditions: mask: there is no field 'video_mask'"),
        ((FROZEN, given(REFERENCE)), "audio_reference", r"flow.audio.conditions: reference: there"),
        ((FROZEN, given(PREFIX)), "video", r"flow.video.role=frozen: there is no video"),
        ((ABSENT, given(PREFIX)), "audio", r"flow.audio.role=generated: there is no audio"),
        ((given(Condition("prefix", length=2)),), "", r"flow.video.* nothing to learn"),
        ((given(PREFIX, often(SUFFIX, 0.5)),), "", None),
        ((given(PREFIX, Condition("suffix", length=1)),), "", r"flow.video.* nothing to learn"),
        (
            (given(Condition("spatial_crop", region=(0, 32, 8, 64))),),
            "",
            r"no latents lie in the region \(0, 32, 8, 64\)",
        ),
    ],
)
def test_records_that_lack_what_a_mode_reads_are_refused(flow, missing, message):
    shapes = {name: value.shape[1:] for name, value in full().items() if name != missing}
    if message is None:
        objective.check_fields(FlowConfig(*flow), shapes, tiny.STRIDES)
        return
    with pytest.raises(UserError, match=message):
        objective.check_fields(FlowConfig(*flow), shapes, tiny.STRIDES)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 8, 8), "a reference of 4x8 latents for a clip of 2x4"),
        ((2, 1, 4, 8), "both sides must be the same whole multiple"),
        ((3, 2, 4, 8), "a reference of 3 latent frames for a clip of 2"),
    ],
)
def test_a_reference_that_does_not_fit_its_clip_is_refused(shape, message):
    shapes = {name: value.shape[1:] for name, value in full().items()} | {"video_reference": shape}
    with pytest.raises(UserError, match=message):
        objective.check_fields(FlowConfig(given(REFERENCE)), shapes, tiny.STRIDES)
    batch = full() | {"video_reference": np.zeros((8, *shape), np.float32)}
    with pytest.raises(UserError, match=message):
        draws(config(given(REFERENCE)), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Condition("first"), "kind='first': use first_frame, prefix"),
        (lambda: Condition("prefix"), "prefix: needs length"),
        (lambda: Condition("mask", length=2), "mask: takes no length"),
        (lambda: Condition("prefix", length=0), "length=0 must be at least 1"),
        (lambda: Condition("mask", 1.5), "probability=1.5 is not from 0 to 1"),
        (lambda: Condition("spatial_crop", region=(8, 0, 8, 8)), "is not (top, left, bottom, rig"),
        (lambda: StreamConfig("off"), "role='off': use generated, frozen, absent"),
        (lambda: StreamConfig("absent", (MASK,)), "role='absent': a stream that is not there"),
        (lambda: given(MASK, MASK), "conditions: one mask at most"),
        (lambda: FlowConfig(audio=given(FIRST)), "audio.conditions: first_frame is of video alone"),
        (lambda: FlowConfig(FROZEN, ABSENT), "one of the two must be generated"),
        (lambda: FlowConfig(sigma="normal"), "sigma='normal': use shifted_logit_normal or unif"),
        (lambda: FlowConfig(sigma_min=0.5, sigma_max=0.2), "sigma_min=0.5 is above sigma_max=0.2"),
        (lambda: FlowConfig(sigma_tokens=0), "sigma_tokens=0"),
        (lambda: FlowConfig(first_frame_prob=2), "first_frame_prob=2 is not from 0 to 1"),
    ],
)
def test_a_mode_that_cannot_be_is_refused_by_its_field(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


# ---- the config ----------------------------------------------------------------------------------


def test_modes_survive_json_and_can_be_set_by_flags():
    crop = Condition("spatial_crop", 0.5, region=(0, 0, 8, 16))
    run = tiny.config(flow=FlowConfig(given(crop, PREFIX), FROZEN))
    assert from_json(Config, to_json(run)) == run
    text = '[{"kind": "prefix", "length": 1}, {"kind": "mask", "probability": 0.5}]'
    flags = {"flow.video.conditions": text, "flow.audio.role": "absent"}
    flow = replaced(tiny.config(), flags).flow
    assert flow.video == given(PREFIX, often(MASK, 0.5))
    assert flow.streams == ("video",)


def test_a_checkpoint_from_before_there_were_modes_is_read():
    values = json.loads(to_json(tiny.config()))
    values["flow"] = {"shared_sigma_prob": 0.5, "sigma_std": 1.0, "sigma_uniform_prob": 0.1,
                      "first_frame_prob": 0.2, "caption_dropout": 0.1,
                      "video_weight": 1.0, "audio_weight": 1.0}  # fmt: skip
    run = from_json(Config, json.dumps(values))
    assert run.flow.conditions("video") == (often(FIRST, 0.2),)
    assert run.flow.generated == ("video", "audio")


@pytest.mark.parametrize(
    ("release", "audio_dim", "own"),
    [("2.0", 16, False), ("2.3", None, True), ("random", 16, True), ("random", None, False)],
)
def test_plans_have_text_for_sound_where_it_is_not_that_of_the_video(release, audio_dim, own):
    encoder = dataclasses.replace(tiny.TEXT.encoder, audio_dim=audio_dim)
    text = dataclasses.replace(tiny.TEXT, release=release, encoder=encoder)
    fields = abstract_text(tiny.config(text=text), 8)
    shapes = {"video_text": (8, 6, 32), "audio_text": (8, 6, 16), "text_mask": (8, 6)}
    if not own:
        del shapes["audio_text"]
    assert {name: x.shape for name, x in fields.items()} == shapes


def test_plans_are_made_for_what_a_mode_reads():
    def read(*streams):
        fields = abstract_batch(tiny.config(flow=FlowConfig(*streams)), (2, 2, 4), (5, 1))
        return {name: x.shape for name, x in fields.items() if "text" not in name}

    assert read(given(MASK, REFERENCE), ABSENT) == {
        "fps": (8,),
        "video": (8, 2, 2, 4, 8),
        "video_mask": (8, 2, 2, 4),
        "video_reference": (8, 2, 2, 4, 8),
    }
    assert read(ABSENT, given(MASK, REFERENCE)) == {
        "fps": (8,),
        "audio": (8, 5, 1, 16),
        "audio_mask": (8, 5),
        "audio_reference": (8, 5, 1, 16),
    }
