import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from ltx2_jax import prepare
from ltx2_jax.data.conversion import from_precomputed, to_precomputed
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.precomputed import (
    Precomputed,
    PrecomputedWriter,
    official_entries,
    sample_name,
)
from ltx2_jax.data.records import open_records, read_schema
from ltx2_jax.data.torch_files import read_pt, write_pt
from ltx2_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden_training" / "precomputed"


class Codec:
    """The sizes of the tiny codec of release 2.3 that made the golden files."""

    release = "2.3"
    video = SimpleNamespace(strides=(8, 32, 32), channels=4)
    audio = SimpleNamespace(bins=16, channels=1)

    def save(self, path):
        Path(path).write_bytes(b"\2\0\0\0\0\0\0\0{}")


class Encoder:
    release, length, shared = "2.3", 1024, False

    def features(self, prompts):
        n = len(prompts)
        return (
            np.zeros((n, 1024, 40), ml_dtypes.bfloat16),
            np.zeros((n, 1024, 16), ml_dtypes.bfloat16),
            np.ones((n, 1024), bool),
        )

    def save(self, path):
        Path(path).write_bytes(b"\2\0\0\0\0\0\0\0{}")


MAKERS = {"codec": Codec(), "text_encoder": Encoder()}


def record(index, frames=2, **fields):
    rng = np.random.default_rng(index)
    mask = np.arange(8) > index
    return {
        "id": np.int64(index),
        "video": rng.normal(size=(frames, 2, 3, 4)).astype(ml_dtypes.bfloat16),
        "audio": rng.normal(size=(5, 16, 2)).astype(np.float32),
        "video_text": rng.normal(size=(8, 6)).astype(ml_dtypes.bfloat16),
        "audio_text": rng.normal(size=(8, 3)).astype(ml_dtypes.bfloat16),
        "text_mask": mask,
        "fps": np.float32(24),
        "caption": "",
        "source": f"{index}.pt",
    } | fields


def folder_of(path, *records):
    writer = PrecomputedWriter(path)
    for i, item in enumerate(records):
        writer.write(item, f"{i}.mp4")
    return writer.folder


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.asarray(value).dtype == np.asarray(b[name]).dtype, name
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_what_is_written_is_read_with_references_and_masks(tmp_path):
    rng = np.random.default_rng(9)
    first = record(
        0,
        video_reference=rng.normal(size=(1, 1, 3, 4)).astype(ml_dtypes.bfloat16),
        video_reference_fps=np.float32(12),
        audio_reference=rng.normal(size=(7, 16, 2)).astype(np.float32),
        video_mask=rng.integers(0, 2, (2, 2, 3)).astype(bool),
        audio_mask=rng.integers(0, 2, 5).astype(bool),
    )
    folder_of(tmp_path, first)
    folders = sorted(path.name for path in (tmp_path / ".precomputed").iterdir())
    assert_same(Precomputed(tmp_path, folders)[0], first)
    plain = Precomputed(tmp_path)[0]
    assert first.keys() - plain.keys() == {name for name in first if name[6:] in (
        "reference", "reference_fps", "mask")} - {"video"}  # fmt: skip


def test_sizes_become_buckets_largest_first_and_samples_without_a_file_are_told(tmp_path):
    samples = [record(0), record(1, frames=3), record(2), record(3, frames=3)]
    folder = folder_of(tmp_path, *samples)
    (folder / "audio_latents" / "2.pt").unlink()
    (folder / "latents" / "9.pt.tmp.71").write_bytes(b"left over")
    opened = Precomputed(tmp_path, release="2.3", text_release="2.3")
    assert [str(b) for b in opened.schema.buckets] == ["96x64x17", "96x64x9"]
    assert opened.buckets.tolist() == [1, 0, 0]
    assert opened.skipped == [{"source": "2.pt", "reason": "has no file in audio_latents"}]
    assert opened.schema.release == "2.3"
    for index, expected in enumerate((samples[0], samples[1], samples[3])):
        assert_same(opened[index], expected | {"id": index, "source": f"{expected['id']}.pt"})
    only = Precomputed(tmp_path, ["conditions", "latents"])
    assert len(only) == 4
    assert "audio" not in only[0]


def test_samples_that_lack_a_stream_are_sizes_of_their_own(tmp_path):
    folder = folder_of(tmp_path, *(record(i) for i in range(4)))
    (folder / "audio_latents" / "1.pt").unlink()
    (folder / "latents" / "2.pt").unlink()
    (folder / "conditions" / "3.pt").unlink()
    opened = Precomputed(folder, incomplete=True)
    assert [("video" in r, "audio" in r) for r in opened] == [
        (True, True), (True, False), (False, True),
    ]  # fmt: skip
    assert [sorted(set(b.fields) & {"video", "audio"}) for b in opened.schema.buckets] == [
        ["audio", "video"], ["video"], ["audio"],
    ]  # fmt: skip
    assert opened.buckets.tolist() == [0, 1, 2]
    assert opened.skipped == [{"source": "3.pt", "reason": "has no file in conditions"}]
    shutil.copytree(GOLDEN / "v2", tmp_path / "v2")
    assert len(from_precomputed(tmp_path / "v2", None, **MAKERS, incomplete=True)) == 4
    again = open_records(tmp_path / "v2")
    assert ["audio" in record for record in again] == [True, True, False, False]


def test_the_folder_is_trained_on_as_it_is(tmp_path):
    folder = folder_of(tmp_path, *(record(i) for i in range(6)))
    batches = list(make_dataset(Precomputed(folder), batch_size=4, seed=0, num_steps=3, threads=0))
    assert [b["video"].shape for b in batches] == [(4, 2, 2, 3, 4)] * 3
    assert sorted(i for b in batches for i in b["id"].tolist()) == sorted(list(range(6)) * 2)
    for batch in batches:
        for row, index in enumerate(batch["id"]):
            np.testing.assert_array_equal(batch["audio"][row], record(index)["audio"])


def test_one_feature_for_both_streams_is_one_field(tmp_path):
    text = record(0)["video_text"]
    folder = folder_of(tmp_path, record(0, audio_text=text), record(1, audio_text=text + 1))
    with pytest.raises(UserError, match=r"conditions/1\.pt: has features of its own for sound"):
        Precomputed(folder)[1]
    assert "audio_text" not in Precomputed(folder)[0]
    apart = {**read_pt(folder / "conditions" / "0.pt")}
    apart["audio_prompt_embeds"] = apart["audio_prompt_embeds"].copy()
    write_pt(folder / "conditions" / "0.pt", apart)  # stored twice
    assert "audio_text" not in Precomputed(folder)[0]


def test_a_file_that_holds_something_else_is_named_with_what_it_holds(tmp_path):
    folder = folder_of(tmp_path, record(0))
    latents, text = folder / "latents" / "0.pt", folder / "conditions" / "0.pt"
    good = {latents: read_pt(latents), text: read_pt(text)}
    for path, change, reason in (
        (latents, {"latents": None}, r"no tensor 'latents'; it holds 'latents', 'num_frames'"),
        (latents, {"latents": np.zeros((4, 2, 2, 3), np.int64)}, r"'latents' is int64\[4, 2, 2, 3"),
        (latents, {"latents": np.zeros(4, np.float32)}, r"'latents' is float32\[4\]"),
        (latents, {"latents": np.zeros((11, 4), np.float32)}, r"size is given as \[2, 2, 3\]"),
        (latents, {"height": 3}, r"'latents' is \[4, 2, 2, 3\], but its size .* \[2, 3, 3\]"),
        (latents, {"height": "2"}, "its size is given as"),
        (latents, {"height": 2**40}, "its size is given as"),
        (latents, {"fps": 0.0}, "'fps' is 0.0, not a frame rate"),
        (latents, {"fps": float("nan")}, "'fps' is nan"),
        (latents, {"fps": "24"}, "'fps' is '24'"),
        (text, {"prompt_attention_mask": np.ones(7, np.int64)}, "has 8 tokens, its mask 7"),
        (text, {"video_prompt_embeds": np.ones((8, 0), np.float32)}, r"is float32\[\d, 0\]"),
    ):
        write_pt(path, good[path] | change)
        with pytest.raises(UserError, match=reason) as caught:
            Precomputed(folder)
        assert str(caught.value).startswith(f"{path}: ")
        write_pt(path, good[path])
    assert Precomputed(folder)[0]["video"].shape == (2, 2, 3, 4)


def test_a_mask_of_another_size_than_its_clip_is_named(tmp_path):
    masks = {"video_mask": np.ones((2, 2, 3), bool), "audio_mask": np.ones(5, bool)}
    for name, other in (("video_mask", np.ones((2, 3, 2), bool)), ("audio_mask", np.ones(6, bool))):
        folder = folder_of(tmp_path / name, record(0, **masks | {name: other}))
        folders = [path.name for path in folder.iterdir()]
        with pytest.raises(UserError, match=rf"{name}s/0\.pt: a mask of \[.* for latents of \["):
            Precomputed(folder, folders)


def test_a_mask_gives_what_is_above_one_half(tmp_path):
    whole = {"video_mask": np.ones((2, 2, 3), bool), "audio_mask": np.ones(5, bool)}
    folder = folder_of(tmp_path, record(0, **whole))
    soft = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    write_pt(folder / "video_masks" / "0.pt", {"mask": soft})
    write_pt(folder / "audio_masks" / "0.pt", {"mask": np.float32([0, 0.3, 0.5, 0.6, 1])})
    (read,) = Precomputed(folder, [path.name for path in folder.iterdir()])
    assert read["video_mask"].ravel().tolist() == [False] * 6 + [True] * 6
    assert read["audio_mask"].tolist() == [False, False, False, True, True]


def test_sound_says_how_long_it_lasts_at_its_own_rate():
    entries = official_entries(record(0), latents_per_second=50)["audio_latents"]
    assert (entries["num_time_steps"], entries["duration"]) == (5, 0.1)


def test_text_of_another_length_than_the_first_is_named(tmp_path):
    short = {name: record(1)[name][1:] for name in ("video_text", "audio_text", "text_mask")}
    folder = folder_of(tmp_path, record(0), record(1, **short))
    with pytest.raises(UserError, match=r": 1\.pt: field 'audio_text' is bfloat16\[7, 3\]"):
        Precomputed(folder)[1]


def test_a_folder_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no \.precomputed of the official trainer is here"):
        Precomputed(tmp_path)
    with pytest.raises(UserError, match="no dataset here"):
        open_records(tmp_path)
    folder = folder_of(tmp_path, record(0))
    with pytest.raises(UserError, match="does not say what made it"):
        open_records(tmp_path)
    with pytest.raises(UserError, match="no folder 'latent' is known"):
        Precomputed(folder, ["latent"])
    with pytest.raises(UserError, match=r"video_masks: no such folder"):
        Precomputed(folder, ["latents", "video_masks"])
    shutil.rmtree(folder / "conditions")
    (folder / "conditions").mkdir()
    with pytest.raises(
        UserError, match=r"no sample has a file in each .*; the first: 0\.pt has no"
    ):
        Precomputed(folder)


def test_files_lie_where_the_official_scripts_put_them():
    assert sample_name("clips/a.b.mp4") == Path("clips/a.b.pt")
    assert sample_name("/data/films/a.mov") == Path("data/films/a.pt")
    assert sample_name("../other/a.mp4") == Path("other/a.pt")


def test_a_dataset_goes_from_the_official_format_and_back(tmp_path):
    source = GOLDEN / "v2" / ".precomputed"
    made = from_precomputed(source, tmp_path / "set", **MAKERS, sources=["latents", "conditions"])
    assert len(made) == 4
    assert made.schema.release == made.schema.text_release == "2.3"
    assert [str(b) for b in made.schema.buckets] == ["128x64x17", "64x64x9", "64x64x1"]
    direct = Precomputed(source, ["latents", "conditions"])
    for index in range(4):
        assert_same(made[index], direct[index])
    out = to_precomputed(made, tmp_path / "back")
    for path in sorted(out.glob("**/*.pt")):
        theirs, ours = read_pt(source / path.relative_to(out)), read_pt(path)
        assert_same(theirs | {"fps": 0}, ours | {"fps": 0})
        assert ours.get("fps", 0) == pytest.approx(theirs.get("fps", 0), rel=1e-6)
    assert len(list(out.glob("**/*.pt"))) == 8
    with pytest.raises(UserError, match="holds files"):
        to_precomputed(made, tmp_path / "back")
    assert to_precomputed(made, tmp_path / "back", overwrite=True) == out
    assert len(list(out.glob("**/*.pt"))) == 8


def test_what_made_a_precomputed_is_told_once_and_it_is_a_dataset(tmp_path):
    source = tmp_path / "official"
    shutil.copytree(GOLDEN / "v2", source)
    with pytest.raises(UserError, match="does not say what made it; tell it once: python -m"):
        open_records(source)
    direct = Precomputed(source, ["latents", "conditions"])
    for _ in range(2):  # again, after samples have been added for one
        made = from_precomputed(source, None, **MAKERS, sources=["latents", "conditions"])
    assert not list((source / ".precomputed").glob(".making*"))
    for folder in (source, source / ".precomputed"):
        again = open_records(folder)
        assert again.schema == made.schema == read_schema(folder)
        assert again.schema.release == "2.3"
        assert again.codec_path == source / ".precomputed" / "codec.safetensors"
        assert again.empty_caption().keys() == {"video_text", "audio_text", "text_mask"}
        assert again.buckets.tolist() == direct.buckets.tolist()
        for index in range(4):
            assert_same(again[index], direct[index])
    shutil.move(source, tmp_path / "elsewhere")
    assert len(open_records(tmp_path / "elsewhere")) == 4
    # To the official trainer nothing has changed.
    assert Precomputed(tmp_path / "elsewhere", ["latents", "conditions"]).names == direct.names


@pytest.mark.parametrize("copied", [True, False])
def test_samples_that_lack_a_file_are_told_by_the_dataset_that_is_made(tmp_path, copied):
    shutil.copytree(GOLDEN / "v2", tmp_path / "v2")
    lacking = Precomputed(tmp_path / "v2").skipped
    made = from_precomputed(tmp_path / "v2", tmp_path / "set" if copied else None, **MAKERS)
    assert made.skipped == lacking
    assert [clip["reason"] for clip in lacking] == ["has no file in audio_latents"] * 2


def test_makers_of_other_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"video_text is \[1024, 32\], but --text-encoder makes"):
        from_precomputed(GOLDEN / "v1", tmp_path / "set", sources=["conditions"], **MAKERS)
    with pytest.raises(UserError, match=r"audio is \[18, 16, 2\], but --codec makes \[18, 16, 1\]"):
        from_precomputed(GOLDEN / "v1", tmp_path / "set", **MAKERS)
    assert not (tmp_path / "set").exists()


def test_the_command_converts_both_ways_and_says_what_is_missing(tmp_path, capsys):
    source = str(GOLDEN / "v2" / ".precomputed")
    out = str(tmp_path / "set")
    for flags, message in (
        ([], "--codec: give it; a .precomputed does not say what made it"),
        (["--folders", "latents"], "--codec: give it"),
    ):
        assert prepare.cli(["--from-precomputed", source, out, *flags]) == 2
        assert message in capsys.readouterr().err
    assert prepare.cli([source, out, "--folders", "latents"]) == 2
    assert "--folders: only with --from-precomputed" in capsys.readouterr().err
    assert prepare.cli(["--inspect", source]) == 2
    assert "prepare --from-precomputed" in capsys.readouterr().err
    from_precomputed(source, out, **MAKERS, sources=["latents", "conditions"])
    assert prepare.cli(["--to-precomputed", out, str(tmp_path / "back")]) == 0
    assert f"in {tmp_path / 'back' / '.precomputed'}" in capsys.readouterr().out
    assert prepare.cli(["--verify", out]) == 0
    told = capsys.readouterr().out
    assert "2 x 128x64x17, without sound" in told
    assert "4 records read, 0 faults" in told
    assert prepare.cli(["--inspect", out, "x"]) == 2
