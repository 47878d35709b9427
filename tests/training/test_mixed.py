"""One run on clips of several sizes and datasets, some of them without sound or picture."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import film
import jax
import pytest
import tiny
from resume_config import get_config

from ltx2_jax import planning
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import StreamConfig, load
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.encoding import PrepareConfig, prepare_dataset
from ltx2_jax.data.records import read_schema
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import read_clip
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import load_caption_encoder
from ltx2_jax.training import checks, loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def records(folder):
    """A film with sound, one of another size without, and sound alone."""
    film.write_film(folder / "wide.mp4", film.numbered(25, 16, 32), tones=[440])
    film.write_film(folder / "silent.mp4", film.numbered(9, 32, 16))
    read_clip(folder / "wide.mp4", num_frames=9).save(folder / "hum.wav")
    (folder / "t.csv").write_text("video,audio,caption\nwide.mp4,,a\nsilent.mp4,,b\n,hum.wav,d\n")
    data, text = get_config().data, get_config().text
    sizes = PrepareConfig(
        num_frames=9, height=16, width=32, text_length=text.length, stride=8, incomplete=True,
        buckets=(Bucket(9, 16, 32), Bucket(9, 32, 16)),
    )  # fmt: skip
    makers = {"codec": data.codec, "text_encoder": text.encoder}
    return prepare_dataset(folder / "t.csv", folder / "set", sizes, **makers)


@pytest.fixture(scope="module")
def hum(folder, records):
    """The sound again, in a dataset of its own by the same codec and text encoder."""
    (folder / "u.csv").write_text("video,audio,caption\n,hum.wav,d\n")
    sizes = PrepareConfig(
        num_frames=9, height=32, width=16, text_length=get_config().text.length, incomplete=True
    )
    makers = {
        "codec": load_codec(records.codec_path),
        "text_encoder": load_caption_encoder(records.text_encoder_path),
    }
    return prepare_dataset(folder / "u.csv", folder / "hum", sizes, **makers)


def config(records, workdir):
    """Of a run on them."""
    made = get_config()
    data = dataclasses.replace(made.data, path=str(records.folder), batch_size=2)
    return dataclasses.replace(made, workdir=str(workdir), num_steps=12, data=data)


def train(config, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: mesh)
    restored = loop.first_state

    def first_state(config, checkpoints, start, *rest):
        """Fresh weights without a compiler."""
        fresh = start == 0
        return tiny.state(config, mesh) if fresh else restored(config, checkpoints, start, *rest)

    monkeypatch.setattr(loop, "first_state", first_state)
    loop.train(config, lambda *_: None)
    return [
        json.loads(line) for line in Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    ]


FILE = str(Path(__file__).parents[1] / "resume_config.py")


@pytest.fixture(scope="module")
def trained(records, hum, tmp_path_factory):
    """A run on both from a config file and flags: these, its config, rows, and what it printed."""
    flags = {
        "workdir": str(tmp_path_factory.mktemp("run")), "data.batch_size": "2",
        "data.mixture": f"('{records.folder}', 0.4), ('{hum.folder}', 0.6)",
        "data.batch_tokens": "120", "num_steps": "12", "optim.ema_decay": "None",
    }  # fmt: skip
    run, told = load(FILE, flags), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        rows = train(run, patch)
    return flags, run, rows, told.getvalue()


def test_a_stream_that_a_batch_lacks_has_no_loss_and_the_rest_is_learned(trained):
    _, _, whole, told = trained
    kinds = set()
    for row in whole:
        there = [name for name in ("video", "audio") if f"{name}_loss" in row]
        assert row["loss"] == pytest.approx(sum(row[f"{name}_loss"] for name in there))
        assert all(row[f"{name}_loss"] > 0 for name in there)
        assert math.isfinite(row["grad_norm"])
        kinds.add(tuple(there))
    assert kinds == {("video", "audio"), ("video",), ("audio",)}
    assert "compiling the train step for 3 sizes" in told


def test_rows_say_which_size_of_which_dataset_a_step_was_of(trained, records, hum):
    _, _, whole, told = trained
    assert f"60.0% of them from {hum.folder}, which has 1" in told
    assert "in batches of 2 to 12" in told
    rows = {(row["dataset"], row["bucket"]): row for row in whole}
    assert rows.keys() >= {
        (str(records.folder), "32x16x9"),
        (str(records.folder), "16x32x9-silent"),
        (str(hum.folder), f"sound-{hum[0]['audio'].shape[0]}"),
    }
    for (_, bucket), row in rows.items():
        assert ("audio_loss" in row) == ("silent" not in bucket)
        assert ("video_loss" in row) == ("sound" not in bucket)


def test_a_mixture_with_batches_by_tokens_goes_on_exactly(trained, monkeypatch):
    """From the checkpoint before, the same batches of the same sizes come again."""
    _, run, whole, _ = trained
    shutil.rmtree(Path(run.workdir, "checkpoints", "12"))
    timed = {"step_time", "tokens_per_second", "data_wait"}
    for row, other in zip(train(run, monkeypatch), whole, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_another_mixture_is_told_and_other_sizes_of_batches_are_another_run(trained, capsys):
    flags, run, _, _ = trained
    other = load(FILE, flags | {"data.mixture": flags["data.mixture"].replace("0.4", "0.401")})
    checks.check_same_run(other, run, run.workdir)
    assert "changed since the checkpoint: data.mixture: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another config \(data.batch_tokens: 120 -> 240\)"):
        checks.check_same_run(load(FILE, flags | {"data.batch_tokens": "240"}), run, run.workdir)


def test_sampling_and_planning_take_the_largest_clips_of_a_mixture(trained):
    _, run, _, _ = trained
    schema = read_schema(Path(run.workdir, "assets"))
    assert (schema.num_frames, len(schema.buckets)) == (9, 3)
    request = planning.request_of(run)
    assert (request.video_shape, request.audio_length) == ((5, 2, 4), 9)
    assert planning.for_clips(run, request).data.batch_size == 2
    small = planning.request_of(run, height=16, width=16)
    assert planning.for_clips(run, small).data.batch_size == 2 * (120 // (2 * (5 * 2 * 2 + 9)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data.mixture": "('HUM', 0.5), ('none', 0.5)"}, "none: no dataset here"),
        (
            {"data.batch_tokens": "70"},
            r"films.*: data.batch_tokens=70: data.batch_size=2 clips of "
            r"32x16x9 have 98 tokens, a batch has 70; give more tokens",
        ),
        ({"data.batch_tokens": "200", "data.batch_size": "3"}, "data.batch_size=3 is not a mult"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused_before_any_work(
    records, hum, tmp_path, flags, message
):
    shares = f"('{records.folder}', 0.4), ('HUM', 0.6)"
    given = {"workdir": str(tmp_path / "run"), "data.mixture": shares, "data.batch_size": "2"}
    given |= flags
    given["data.mixture"] = given["data.mixture"].replace("HUM", str(hum.folder))
    mesh = make_mesh(devices=jax.devices()[:2])
    with pytest.raises(UserError, match=message):
        refuse_unfit(load(FILE, given), mesh)
    assert not (tmp_path / "run").exists()


def refuse_unfit(config, mesh):
    checks.check_alone(config, mesh)
    checks.before_work(config, mesh)


def test_what_a_mode_reads_must_be_in_every_size(records, tmp_path):
    mesh = make_mesh(devices=jax.devices()[:1])
    run = config(records, tmp_path)
    frozen = dataclasses.replace(run.flow, audio=StreamConfig(role="frozen"))
    with pytest.raises(UserError, match=r"flow.audio.role=frozen: there is no audio"):
        checks.check_records(dataclasses.replace(run, flow=frozen), records, mesh)
