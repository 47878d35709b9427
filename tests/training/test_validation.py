"""What a training shows on the way: the loss on fixed samples, the best checkpoint, clips."""

import dataclasses
import itertools
import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resume_config
import tiny
from flax import nnx

from ltx2_jax import config as config_lib
from ltx2_jax import train
from ltx2_jax.config import CheckpointConfig, LoraConfig, SampleConfig, TuneConfig, ValidationConfig
from ltx2_jax.data.records import open_records
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import Events
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.media.media import Clip
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import loop, objective, trainable, validation
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.housekeeping import on_all_devices
from ltx2_jax.training.metrics import read_metrics
from ltx2_jax.training.runs import weights_of_run

changed = dataclasses.replace
EVERY_2 = ValidationConfig(every=2, samples=8, best="val_loss")


def mesh_of(devices):
    return make_mesh(devices=jax.devices()[:devices])


def training(config):
    """On one device, from weights that need no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        patch.setattr(loop, "first_state", lambda config, *_: tiny.state(config, mesh_of(1)))
        loop.train(config, lambda *_: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on 12 clips, whose loss is taken after 2, 4, and 3, where it saves."""
    folder = tmp_path_factory.mktemp("validated")
    config = changed(
        resume_config.get_config(),
        num_steps=4,
        workdir=str(folder / "data"),
        checkpoint=CheckpointConfig(every_steps=3, keep=9),
    )
    records = loop.dataset(config)
    data = changed(config.data, path=str(records.folder))
    config = changed(config, data=data, workdir=str(folder / "run"), validation=EVERY_2)
    training(config)
    return config


def rows(config):
    return {row["step"]: row for row in read_metrics(config.workdir)}


def measured(config, weights, mesh):
    """The metrics of weights, as `Validation` finds them on a mesh."""
    records = open_records(config.data.path)
    codec = loop.load_codec(records.codec_path)
    with jax.set_mesh(mesh):
        state = {"params": weights, "ema": weights}
        null_text = on_all_devices(records.empty_caption(), mesh)
        found = validation.Validation(config, records, codec, mesh, state, null_text)
        return [found.after(step, state, False) for step in (2, 3, 4)]


# ----------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_the_objective_on_the_first_records_and_one_draw(run):
    """Of the averaged weights, which sampling uses."""
    mesh, records = mesh_of(1), open_records(run.data.path)
    _, weights, _ = weights_of_run(run.workdir, mesh, step=4)
    clips = [records[i] for i in range(8)]
    fields = [name for name, value in clips[0].items() if not isinstance(value, str)]
    batch = {name: np.stack([clip[name] for clip in clips]) for name in fields if name != "id"}
    graph = ltx2.graph(run.networks)

    @jax.jit
    def direct(weights, batch, null_text):
        key = validation.fixed_key(run)
        drawn = objective.draw(key, batch, run, (2, 8, 8), clock)
        model = nnx.merge(graph, weights)
        return objective.loss(model, batch, drawn, null_text, run), drawn["video"].sigma

    clock = loop.load_codec(records.codec_path).audio.clock
    with jax.set_mesh(mesh):
        (total, sums), sigma = direct(weights, batch, records.empty_caption())
    row = rows(run)[4]
    np.testing.assert_allclose(row["val_loss"], total, rtol=1e-5)
    np.testing.assert_allclose(row["val_audio_loss"], sums["audio_loss"] / 8, rtol=1e-5)
    np.testing.assert_allclose(
        row["val_loss"], row["val_video_loss"] + row["val_audio_loss"], rtol=1e-5
    )
    counts = np.histogram(sigma, bins=[0, 0.25, 0.5, 0.75, 1])[0]
    quarters = [row[f"val_video_loss_quarters_{i}"] for i in (1, 2, 3, 4)]
    assert [value is None for value in quarters] == [count == 0 for count in counts]
    mean = sum(n * value for n, value in zip(counts, quarters, strict=True) if n) / 8
    np.testing.assert_allclose(row["val_video_loss"], mean, rtol=1e-5)
    assert set(validation.metric_names(run)) == {name for name in row if name.startswith("val_")}


def test_it_is_taken_every_few_steps_and_of_every_checkpoint_if_the_best_is_kept(run):
    taken = rows(run)
    assert [step for step, row in taken.items() if "val_loss" in row] == [2, 3, 4]
    assert [step for step, row in taken.items() if "step_time" in row] == []
    with Checkpoints(run.workdir) as checkpoints:
        assert checkpoints.steps == [3, 4]
        for step in checkpoints.steps:
            names = [name for name, value in taken[step].items() if value is not None]
            want = {name: taken[step][name] for name in names if name.startswith("val_")}
            assert checkpoints.scores(step) == want


def test_the_same_weights_have_the_same_loss_after_any_step_and_nearly_so_on_any_mesh(run):
    """In batches of another size too: what is drawn belongs to the samples."""
    _, weights, _ = weights_of_run(run.workdir, mesh_of(2), step=4)
    small = changed(run, data=changed(run.data, batch_size=2), seed=5)
    assert validation.micro_batches(run, mesh_of(1)) == 1
    assert validation.micro_batches(small, mesh_of(2)) == 4
    first, none, second = measured(small, weights, mesh_of(2))
    assert none == {}
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_allclose(first["val_loss"], rows(run)[4]["val_loss"], rtol=1e-5)


def test_micro_batches_are_no_larger_than_those_of_a_step():
    for chunks, parts in ((1, 1), (2, 2), (8, 8)):
        optim = changed(tiny.config().optim, accumulate_steps=chunks)
        config = tiny.config(optim=optim, validation=ValidationConfig(every=1, samples=8))
        assert validation.micro_batches(config, mesh_of(1)) == parts


def test_a_run_that_is_validated_learns_bit_for_bit_the_same(run, tmp_path):
    plain = changed(run, validation=ValidationConfig(), workdir=str(tmp_path))
    training(plain)
    losses = [{step: row["loss"] for step, row in rows(x).items()} for x in (run, plain)]
    assert losses[0] == losses[1]
    assert not any(name.startswith("val_") for name in rows(plain)[4])
    ours, theirs = (weights_of_run(x.workdir, mesh_of(1))[1] for x in (run, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_adapters_are_measured_without_their_dropout():
    lora = LoraConfig(targets=("to_q",), rank=2, dropout=0.5)
    config = tiny.config(tune=TuneConfig(lora=lora), init_from="base")
    assert trainable.without_dropout(config).tune.lora == changed(lora, dropout=0.0)
    assert trainable.without_dropout(tiny.config()) == tiny.config()


# ------------------------------------------------------------------------------------- what is kept


def test_the_best_checkpoint_is_kept_across_restarts_and_one_without_a_score_is_none(tmp_path):
    state, kept = {"a": jnp.ones(3)}, []
    scores = iter([{"val_loss": 3.0}, {"val_loss": 1.0}, {}, {"val_loss": 2.0}, {"val_loss": 0.5}])
    steps = itertools.count(1)
    for starts in (3, 1, 1):
        with Checkpoints(tmp_path, keep=1, best="val_loss") as checkpoints:
            for _ in range(starts):
                checkpoints.save(next(steps), state, tiny.config(), next(scores))
                checkpoints.wait()
                kept.append(checkpoints.steps)
            best = checkpoints.best
    assert kept == [[1], [2], [2, 3], [2, 4], [5]]
    assert best == (5, 0.5)


def test_a_checkpoint_keeps_what_is_finite():
    values = {"loss": 1.0, "val_loss": 2.0, "val_video_loss_quarters_1": float("nan")}
    assert validation.scores(values) == {"val_loss": 2.0}


def test_configs_of_runs_before_there_was_validation_are_read():
    stored = json.loads(to_json(tiny.config()))
    del stored["validation"]
    assert from_json(config_lib.Config, json.dumps(stored)) == tiny.config()


# ------------------------------------------------------------------------------------------ refused


def copied(run, folder, **schema):
    """Its dataset, as if made otherwise."""
    shutil.copytree(run.data.path, folder)
    index = json.loads((folder / "dataset.json").read_text())
    index["schema"] |= schema
    (folder / "dataset.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"release": "2.3"}, r"held: its latents are those of '2.3', .*data.release='linear'"),
        ({"text_release": "2.0"}, "held: text_release is '2.0', 'random' is needed"),
        ({"codec_hash": "other"}, "held: codec_hash is 'other'"),
        ({"text_encoder_hash": "other"}, "held: text_encoder_hash is 'other'"),
    ],
)
def test_held_out_clips_that_do_not_fit_are_refused(run, tmp_path, schema, message):
    path = copied(run, tmp_path / "held", **schema)
    config = changed(run, validation=changed(EVERY_2, path=path))
    with pytest.raises(UserError, match=message):
        validation.check(config, mesh_of(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": "val_los"}, r"validation.best='val_los': no metric .*did you mean val_loss"),
        ({"best": "accuracy"}, r"no metric of this run; use val_loss, val_video_loss, "),
        ({"samples": 7}, "validation.samples=7 is not a multiple of the 2 shards"),
        ({"path": "gs://held"}, "validation.path=gs://held: a dataset is read from a folder"),
        ({"path": "nowhere"}, "nowhere: no dataset here"),
        ({"samples": 14}, "validation.samples=14, but it has 12 clips"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(run, changes, message):
    config = changed(run, validation=changed(EVERY_2, **changes))
    with pytest.raises(UserError, match=message):
        validation.check(config, mesh_of(2))


def test_the_best_by_its_clips_needs_clips_of_every_checkpoint(run):
    clips = ValidationConfig(best="val_sync_lag_ms", clips_every=2)
    with pytest.raises(UserError, match=r"every 3 steps lack: make checkpoint.every_steps a mult"):
        validation.check(changed(run, validation=clips), mesh_of(1))
    validation.check(changed(run, validation=changed(clips, clips_every=3)), mesh_of(1))


def test_a_stream_that_is_not_learned_has_no_metric(run):
    video = changed(run.flow, audio=config_lib.StreamConfig("frozen"))
    config = changed(run, flow=video, validation=changed(EVERY_2, best="val_audio_loss"))
    with pytest.raises(UserError, match=r"val_audio_loss.*did you mean val_video_loss"):
        validation.check(config, mesh_of(1))


def test_too_few_clips_of_the_first_size_are_told(run):
    numbers = np.array([1, 0, 0, 1, 0])
    records = type("Records", (list,), {"folder": "set", "buckets": numbers})(
        {"id": np.int64(i), "caption": ""} for i in range(5)
    )
    config = changed(run, validation=changed(EVERY_2, samples=2))
    np.testing.assert_array_equal(
        validation.first_samples(config, records, mesh_of(1))["id"], [0, 3]
    )
    config = changed(run, validation=changed(EVERY_2, samples=4))
    with pytest.raises(UserError, match=r"validation.samples=4, but it has 2 clips of one size"):
        validation.first_samples(config, records, mesh_of(1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation.best": "val_loss"}, "best: needs every"),
        ({"validation.best": "val_sync_lag_ms"}, "best=val_sync_lag_ms: needs clips_every"),
        ({"validation.samples": "4"}, "validation.samples is not used: validation.every is 0"),
        ({"validation.every": "-1"}, "every=-1 must be at least 0"),
    ],
)
def test_flags_that_would_have_no_effect_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        config_lib.changed(tiny.config(), flags)


# -------------------------------------------------------------------------------------------- clips


def test_clips_are_due_where_either_field_says():
    config = tiny.config(
        sample=SampleConfig(preview_step=3), validation=ValidationConfig(clips_every=4)
    )
    assert [step for step in range(1, 13) if validation.clips_due(config, step)] == [3, 4, 8, 12]
    assert not any(validation.clips_due(tiny.config(), step) for step in range(1, 13))
    # After the last step they are made when all is saved, unless they tell which is the best.
    for best, due in ((None, [5]), ("val_sync_lag_ms", [5, 10])):
        config = tiny.config(validation=ValidationConfig(clips_every=5, best=best))
        assert [step for step in range(1, 11) if validation.clips_due(config, step)] == due


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("\n", "has no prompts"),
        ("a\n\nb\n", "line 2 of .* is blank"),
        ('a\n{"prompt": "b", "imgae": "b.png"}', "line 2: no argument is called"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    config = tiny.config(validation=ValidationConfig(prompts=str(path)))
    with pytest.raises(UserError, match=f"validation.prompts: .*{message}"):
        train.wishes_of(config)


def test_clips_of_the_file_are_made_on_the_way_and_at_the_end(monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog barks\na cat\n")
    config = tiny.config(
        workdir=str(tmp_path),
        sample=SampleConfig(preview_step=3),
        validation=ValidationConfig(clips_every=4, prompts=str(prompts)),
    )
    made, shown = [], []

    def training(config, make_clips, check_clips):
        check_clips([])
        shown.extend(make_clips("weights", [], step) for step in (3, 4, 8, 10))
        return 0

    class Pipeline(SimpleNamespace):
        @classmethod
        def from_assets(cls, config, *_):
            return cls(config=config)

        def __call__(self, texts):
            return [Clip(np.full((2, 16, 16, 3), len(text), np.uint8), 8.0) for text in texts]

    def written(clips, texts, folder, sheet="samples.png"):
        sizes = [int(clip.video[0, 0, 0, 0]) for clip in clips]
        made.append((str(folder.relative_to(tmp_path)), sizes, texts))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sheet).write_text(f"{folder.name}/{sheet}")
        return folder / sheet

    monkeypatch.setattr(train, "Pipeline", Pipeline)
    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(train, "local_folder", lambda path: path)
    monkeypatch.setattr(
        train,
        "contact_sheet",
        lambda path, clips, texts, title: written(clips, texts, path.parent, path.name),
    )
    monkeypatch.setattr(train, "write_clips", written)
    train.main(config)
    of_file = ["a dog barks", "a cat"]
    folders = [".", "validation/step-000004", "validation/step-000008", "."]
    assert made == [(folder, [11, 5], of_file) for folder in folders]
    # For the boards they are large enough to be looked at; without sound nothing is measured.
    sheets = [f"{tmp_path.name}/preview.png", "step-000004/samples.png", "step-000008/samples.png",
              f"{tmp_path.name}/samples.png"]  # fmt: skip
    assert [one.sheet.decode() for one in shown] == sheets
    assert {clip.video.shape for one in shown for clip in one.clips} == {(2, 256, 256, 3)}
    assert [one.metrics for one in shown] == [{}] * 4


def test_sound_alone_has_no_picture_on_the_way(tmp_path):
    config = tiny.config(workdir=str(tmp_path), sample=SampleConfig(preview_step=3))
    sound = Clip(np.zeros((0, 0, 0, 3), np.uint8), 24.0, np.zeros((80, 2), np.float32), 16000)
    assert train.on_the_way(config, [sound], ["rain"], 3) is None
    assert list(tmp_path.iterdir()) == []


def test_what_clips_are_worth_is_counted_and_their_lag_is_in_milliseconds(monkeypatch):
    monkeypatch.setattr(train, "events", lambda clips: found)
    found = Events(seen=9, heard=7, matched=5, median_lag=0.021)
    assert train.shown([], [], None).metrics == {
        "val_sync_seen": 9.0,
        "val_sync_heard": 7.0,
        "val_sync_matched": 5.0,
        "val_sync_lag_ms": pytest.approx(21.0),
    }
    found = Events(seen=9, heard=0, matched=0, median_lag=None)
    assert "val_sync_lag_ms" not in train.shown([], [], None).metrics
    found = None
    assert train.shown([], [], None).metrics == {}


@pytest.mark.parametrize(("release", "cached"), [("random", False), ("2.3", True)])
def test_a_few_clips_are_made_on_the_way_and_all_at_the_end(monkeypatch, tmp_path, release, cached):
    """Of the captions of the data. Texts of a released encoder, which is large, are kept."""
    made, captions = [], [f"clip {i}" for i in range(9)]

    def pipeline(config, weights, assets, mesh, text_cache):
        assert (weights, assets) == ("weights", tmp_path / "assets")
        assert text_cache == (tmp_path / "text_cache" if cached else None)
        return lambda texts: made.append(texts) or []

    def training(config, make_clips, check_clips):
        for step in (3, 6, 10):
            make_clips("weights", "records", step)
        return 0

    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(train, "Pipeline", SimpleNamespace(from_assets=pipeline))
    monkeypatch.setattr(train, "fresh_prompts", lambda config, records: captions)
    monkeypatch.setattr(train, "local_folder", lambda path: path)
    monkeypatch.setattr(train, "at_the_end", lambda *_: None)
    monkeypatch.setattr(train, "events", lambda clips: None)
    text = changed(tiny.TEXT, release=release)
    train.main(tiny.config(workdir=str(tmp_path), text=text, num_steps=10))
    assert made == [captions[:4], captions[:4], captions]


def test_captions_of_clips_follow_their_seed_and_datasets_take_turns():
    config = resume_config.get_config()
    seeds = [changed(config, sample=changed(config.sample, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = (train.fresh_prompts(run, None) for run in seeds)
    assert first == again != other
    assert len(first) == config.sample.num_clips


def test_prompts_are_the_same_on_all_hosts_with_what_is_in_their_files(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(train.hosts, "same_everywhere", lambda values: said.extend(values.values()))
    prompts = tmp_path / "prompts.txt"
    config = tiny.config(validation=ValidationConfig(prompts=str(prompts)))
    for text, image in (("a dog", b"1"), ("a cat", b"1"), ("a cat", b"2"), ("a cat", b"2")):
        (tmp_path / "a.png").write_bytes(image)
        prompts.write_text(json.dumps({"prompt": text, "image": str(tmp_path / "a.png")}))
        train.wishes_of(config)
    assert len(set(said)) == 3
    assert said[2] == said[3]
