"""One run on clips of several sizes, of which some have no sound and some no picture."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import film
import jax
import pytest
from resume_config import get_config

from ltx2_jax.config import StreamConfig
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.encoding import PrepareConfig, prepare_dataset
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import read_clip
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checks, loop


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A film with sound, one of another size without, and sound alone."""
    folder = tmp_path_factory.mktemp("films")
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


def config(records, workdir):
    """Of a run on them."""
    made = get_config()
    data = dataclasses.replace(made.data, path=str(records.folder), batch_size=2)
    return dataclasses.replace(made, workdir=str(workdir), num_steps=12, data=data)


def train(config, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: mesh)
    loop.train(config, lambda *_: None)
    return [
        json.loads(line) for line in Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    ]


def test_a_stream_that_a_batch_lacks_has_no_loss_and_the_rest_is_learned(
    records, tmp_path, capsys, monkeypatch
):
    whole = train(config(records, tmp_path), monkeypatch)
    kinds = set()
    for row in whole:
        there = [name for name in ("video", "audio") if f"{name}_loss" in row]
        assert row["loss"] == pytest.approx(sum(row[f"{name}_loss"] for name in there))
        assert all(row[f"{name}_loss"] > 0 for name in there)
        assert math.isfinite(row["grad_norm"])
        kinds.add(tuple(there))
    assert kinds == {("video", "audio"), ("video",), ("audio",)}
    assert "compiling the train step for 3 sizes" in capsys.readouterr().out
    # From the checkpoint before, the same batches of the same sizes come again.
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    assert [row["loss"] for row in train(config(records, tmp_path), monkeypatch)] == [
        row["loss"] for row in whole
    ]


def test_what_a_mode_reads_must_be_in_every_size(records, tmp_path):
    mesh = make_mesh(devices=jax.devices()[:1])
    run = config(records, tmp_path)
    frozen = dataclasses.replace(run.flow, audio=StreamConfig(role="frozen"))
    with pytest.raises(UserError, match=r"flow.audio.role=frozen: there is no audio"):
        checks.check_records(dataclasses.replace(run, flow=frozen), records, mesh)
