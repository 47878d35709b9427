"""Trainings straight from films: the batches are those of a prepared dataset, without the wait."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import film
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import DataConfig, FilmsConfig, TextConfig
from ltx2_jax.data import films as clips
from ltx2_jax.data.buckets import Bucket, parse_buckets
from ltx2_jax.data.clips import Item, PrepareConfig
from ltx2_jax.data.encoding import prepare_dataset
from ltx2_jax.data.records import open_records
from ltx2_jax.data.survey import foreseen
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.demo.tiny_release import write_release
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import FileSize
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import released_encoder
from ltx2_jax.training import examples, films, loop

BUCKETS = "64x32x9,32x64x9"


def write(path, seed, frames=9, tones=(300,)):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (frames, 4, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    film.write_film(path, images, tones=tones)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def folder(tmp_path):
    """Two films that give three clips, a silent one, and a row that cannot be used."""
    write(tmp_path / "a.mp4", 0)
    write(tmp_path / "long.mp4", 1, frames=21)
    write(tmp_path / "silent.mp4", 2, tones=())
    rows = [{"video": f"{name}.mp4", "caption": f"film {name}"} for name in ("a", "long", "silent")]
    rows[0] |= {"caption_b": "another text"}
    rows.append({"video": "gone.mp4", "caption": "nothing"})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config(release, path, workdir, **given):
    """Of a run on films; nothing of its networks is ever made."""
    run = get_config()
    channels = {"in_channels": 4, "audio_in_channels": 32}
    widths = {"context_dim": 64, "audio_context_dim": 32}
    connector = run.text.video_connector
    text = TextConfig(
        length=128,
        release="2.3",
        video_connector=dataclasses.replace(connector, head_dim=32),
        audio_connector=dataclasses.replace(connector, head_dim=16),
    )
    given = {"buckets": BUCKETS, "stride": 12, "incomplete": True} | given
    given = {"text_encoder": tuple(map(str, release))} | given
    return dataclasses.replace(
        run,
        workdir=str(workdir),
        model=dataclasses.replace(run.model, **channels, **widths),
        text=text,
        optim=dataclasses.replace(run.optim, ema_decay=None),
        data=DataConfig(path=str(path), release="2.3", batch_size=2, films=FilmsConfig(**given)),
    )


def state_at(step):
    return {"params": {"a": jnp.zeros(1)}, "step": jnp.int32(step)}


class Runs:
    """`loop.train` without weights: what its steps were given, and what was decoded for them."""

    def __init__(self, monkeypatch):
        self.batches, self.decoded, self.broken = [], [], None
        read = clips.read_item

        def noted(item, row, *rest):
            if row.path.stem == self.broken:
                raise UserError(f"{row.path}: broken at 0.2 s")
            self.decoded.append(row.path.stem)
            return read(item, row, *rest)

        monkeypatch.setattr(clips, "read_item", noted)
        mesh = make_mesh(devices=jax.devices()[:1])
        monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: mesh)
        monkeypatch.setattr(loop, "init_state", lambda key, config: state_at(0))
        monkeypatch.setattr(loop, "make_train_step", lambda *_: self.step)

    def step(self, state, batch, null_text):
        self.batches.append(jax.device_get(batch))
        metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
        return state_at(int(state["step"]) + 1), metrics

    def __call__(self, config, steps):
        """The batches of a run that goes on to so many steps."""
        self.batches, self.decoded = [], []
        loop.train(dataclasses.replace(config, num_steps=steps), lambda *_: None)
        return self.batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            assert batch[name].tobytes() == other[name].tobytes(), name


def test_batches_are_those_of_a_prepared_dataset_and_nothing_is_made_twice(
    release, folder, monkeypatch, capsys
):
    runs, table = Runs(monkeypatch), folder / "t.jsonl"
    run = config(release, table, folder / "run")
    first = runs(run, 6)
    assert sorted(runs.decoded) == ["a", "long", "long", "silent"]
    told = capsys.readouterr().out
    assert "skipped gone.mp4: no such file" in told
    assert "films    4 clips of 4 rows; encoding 5 captions" in told
    assert "films    4 of 4 clips are encoded" in told

    buckets = parse_buckets(BUCKETS)
    sizes = PrepareConfig(**buckets[0]._asdict(), buckets=buckets, stride=12, incomplete=True)
    makers = {
        "codec": load_codec(release[0], devices=jax.devices()[:1]),
        "text_encoder": released_encoder(*release, mesh=make_mesh(), length=128),
    }
    made = prepare_dataset(table, folder / "set", sizes, **makers)
    data = dataclasses.replace(run.data, path=str(made.folder), films=FilmsConfig())
    prepared = dataclasses.replace(run, data=data, workdir=str(folder / "other"))
    assert_same(first, runs(prepared, 6))
    assert runs.decoded == []
    assert_same(runs(run, 9), runs(prepared, 9))  # both go on from their checkpoints
    assert runs.decoded == []


def test_a_film_that_came_or_changed_is_made_anew_and_no_other(release, folder, monkeypatch):
    runs = Runs(monkeypatch)
    run = config(release, folder / "t.jsonl", folder / "run")

    def made(run):
        """What a start of the run decodes, and the pictures of all clips."""
        runs.decoded.clear()
        records = open_records(examples.with_data_here(run).data.path)
        return [record["video"] for record in records], runs.decoded

    before, _ = made(run)
    write(folder / "gone.mp4", 3)
    after, decoded = made(run)
    assert (len(after), decoded) == (5, ["gone"])
    write(folder / "a.mp4", 4)
    after, decoded = made(run)
    assert decoded == ["a"]
    assert [(x == y).all() for x, y in zip(before, after, strict=False)] == [
        False,
        True,
        True,
        True,
    ]
    other = FilmsConfig(**vars(run.data.films) | {"buckets": "64x32x9", "trigger": "ohwx"})
    assert made(dataclasses.replace(run, data=dataclasses.replace(run.data, films=other)))[1] == []
    for kept in (folder / "run" / "films" / "clips").iterdir():  # on a disk that is failing
        content = kept.read_bytes()
        kept.write_bytes(content[:200] + bytes(100) + content[300:])
    assert sorted(made(run)[1]) == ["a", "gone", "long", "long", "silent"]
    write(folder / "long.mp4", 5, frames=21)
    records = open_records(examples.with_data_here(run).data.path)
    write(folder / "long.mp4", 6, frames=21)  # while the run goes on
    with pytest.raises(UserError, match=r"/long\.mp4: has changed, or is gone, since the training"):
        records[1]
    runs.broken = "long"
    with pytest.raises(UserError, match=r"/long\.mp4: broken at 0.2 s; repair it or take it out"):
        made(run)


def test_a_clip_is_kept_under_a_name_of_all_that_makes_it_and_of_nothing_else(tmp_path):
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    row = Row("a.mp4", tmp_path / "a.mp4", "text", others={"audio": tmp_path / "b.mp4"})
    item, settings = Item(0, 0, Bucket(9, 32, 64), 1.0, 2.0), PrepareConfig(9, 32, 64)
    first = clips.clip_name(item, row, settings, "hash")
    changed = [
        clips.clip_name(dataclasses.replace(item, **change), row, settings, "hash")
        for change in ({"bucket": Bucket(9, 64, 32)}, {"start": 1.5}, {"seconds": 3.0})
    ]
    for change in (
        {"others": {}},
        {"others": {"reference_audio": tmp_path / "b.mp4"}},
        {"others": {"audio": tmp_path / "other.mp4"}},
        {"path": tmp_path / "other.mp4"},
        {"sound_alone": True},
    ):
        changed.append(clips.clip_name(item, dataclasses.replace(row, **change), settings, "hash"))
    faster = dataclasses.replace(settings, fps=30.0)
    changed += [clips.clip_name(item, row, faster, "hash")]
    changed += [clips.clip_name(item, row, settings, "another codec")]
    assert len({first, *changed}) == 1 + len(changed)
    moved = dataclasses.replace(item, row=3, window=1)
    told = dataclasses.replace(row, name="films/a.mp4", caption="more")
    assert clips.clip_name(moved, told, settings, "hash") == first


def test_what_stands_beside_a_clip_is_foreseen(tmp_path):
    columns = ("audio", "reference_video", "video_mask", "reference_audio", "audio_mask")
    row = Row("a.mp4", tmp_path / "a.mp4", "", others=dict.fromkeys(columns, tmp_path / "b"))
    codec = SimpleNamespace(
        video=SimpleNamespace(strides=(8, 32, 32), channels=128),
        audio=SimpleNamespace(latents_per_second=25, bins=16, channels=8),
    )
    silent, settings = FileSize(48, 32, 64, 24.0, 2.0, False), PrepareConfig(9, 32, 64)

    def shapes(start, row):
        item = Item(0, 0, Bucket(9, 32, 64), start)
        found = foreseen(item, row, silent, settings, codec).fields.items()
        return {name: field.shape for name, field in found if field.shape}

    # Of 2 s of film 9 frames at 24 a second are taken: 9.4 latents of sound, of another file.
    assert shapes(1.0, row) == {
        "video": (2, 1, 2, 128), "video_reference": (2, 1, 2, 128), "video_mask": (2, 1, 2),
        "audio": (9, 16, 8), "audio_reference": (9, 16, 8), "audio_mask": (9,),
    }  # fmt: skip
    with pytest.raises(UserError, match="has only 7 frames; the shortest bucket has 9"):
        shapes(1.7, row)
    with pytest.raises(UserError, match="no sound"):
        shapes(1.0, dataclasses.replace(row, others={}))


BAD = [
    ({"buckets": None}, r"t\.jsonl: films need data\.films\.buckets, the sizes"),
    ({"buckets": "64x32"}, r"data\.films\.buckets: bucket '64x32': not width x height x frames"),
    ({"buckets": "60x32x9"}, r"data\.films\.buckets: bucket 60x32x9: "),
    ({"buckets": "64x32x33"}, r"none of the 4 clips can be used; the first: a\.mp4: has only 9 fr"),
    ({"text_encoder": None}, r"films need data\.films\.text_encoder, the Gemma"),
    ({"text_encoder": "gemma"}, r"films need data\.films\.text_encoder, the Gemma"),
    ({"codec": "nowhere.safetensors"}, r"data\.films\.codec: nowhere\.safetensors: no such file"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_mistake_is_told_before_anything_large_is_read(release, folder, given, message):
    with pytest.raises(UserError, match=message):
        examples.with_data_here(config(release, folder / "t.jsonl", folder / "run", **given))
    assert not list(folder.glob("run/films/*/dataset.json"))


def test_all_that_is_said_of_films_reaches_their_dataset_and_the_encoder_goes_after_it(
    release, tmp_path, monkeypatch
):
    """Processes that share the disk do this one after the other."""
    write(tmp_path / "a.mp4", 0, frames=21)
    table, locks, freed = tmp_path / "t.jsonl", [], []
    table.write_text(json.dumps({"video": "a.mp4", "caption": "a dog"}))
    alone, free = films.alone, films.TextCache.free
    monkeypatch.setattr(films, "alone", lambda path: locks.append(path) or alone(path))
    monkeypatch.setattr(films.TextCache, "free", lambda self: freed.append(self) or free(self))
    given = {"buckets": "64x32x9", "fps": 12.5, "stride": 2, "incomplete": True, "trigger": "ohwx"}
    folder = films.dataset(str(table), config(release, table, tmp_path / "run", **given))
    made = json.loads((Path(folder) / "dataset.json").read_text())["settings"]
    assert {name: made[name] for name in ("fps", "stride", "incomplete", "trigger")} == {
        name: given[name] for name in ("fps", "stride", "incomplete", "trigger")
    }
    assert locks == [Path(f"{folder}.lock")]
    assert len(freed) == 1


def test_of_what_is_skipped_the_field_that_takes_it_is_named(release, tmp_path, capsys):
    write(tmp_path / "a.mp4", 0)
    matplotlib.image.imsave(tmp_path / "still.png", np.zeros((32, 64, 3), np.uint8))
    rows = [{"video": name, "caption": name} for name in ("a.mp4", "still.png")]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    given = {"incomplete": False, "buckets": "64x32x9,64x32x1"}
    films.dataset(str(table), config(release, table, tmp_path / "run", **given))
    told = capsys.readouterr().out
    assert "skipped still.png: an image; --config.data.films.incomplete=True takes it" in told


def test_what_is_said_of_films_needs_some(release, folder):
    (folder / "empty").mkdir()
    for path in (None, folder / "empty", folder / "run"):
        run = config(release, path, folder / "run")
        data = dataclasses.replace(run.data, path=None if path is None else str(path))
        with pytest.raises(UserError, match=r"data\.films: is for films, and data\.path="):
            examples.with_data_here(dataclasses.replace(run, data=data))


def test_films_that_are_held_out_alone_are_films_too(tmp_path):
    table = str(tmp_path / "t.jsonl")
    data = DataConfig(films=FilmsConfig(buckets=BUCKETS))
    run = dataclasses.replace(get_config(), data=data)
    held_out = dataclasses.replace(run.validation, path=table, every=1)
    films.check(dataclasses.replace(run, validation=held_out))
    with pytest.raises(UserError, match=r"data\.films: is for films"):
        films.check(run)


def test_a_model_of_another_release_is_refused(release, folder):
    run = config(release, folder / "t.jsonl", folder / "run")
    data = dataclasses.replace(run.data, release="2.0")
    with pytest.raises(
        UserError, match=r"data\.films\.codec: of '2\.3', and this model is for '2\.0'"
    ):
        examples.with_data_here(dataclasses.replace(run, data=data))


def test_a_folder_of_films_has_a_caption_beside_each(tmp_path):
    for name in ("b.mp4", "a.MOV", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("  a dog barks\n", "utf-8")
    with pytest.raises(UserError, match=r"b\.mp4: no caption: b\.txt is not beside it"):
        read_table(tmp_path)
    (tmp_path / "b.txt").write_text("")
    rows = read_table(tmp_path)
    assert [(row.name, row.caption) for row in rows] == [("a.MOV", "a dog barks"), ("b.mp4", "")]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: no films here \(\.mp4, "):
        read_table(tmp_path / "none")
