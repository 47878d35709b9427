import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from ltx2_jax.data import clips
from ltx2_jax.data.clips import ClipReader, PrepareConfig, Rates
from ltx2_jax.data.encoding import prepare_dataset
from ltx2_jax.data.inspection import describe
from ltx2_jax.data.records import open_records
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip

CONFIG = PrepareConfig(num_frames=9, height=16, width=8, text_length=24)


# ---- tables --------------------------------------------------------------------------------------


def table(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


ROWS = [("clips/a.mp4", "a ball, red"), ("/abs/b.mp4", 'says "hi"'), ("ü.mp4", "")]


TABLES = {
    "t.csv": (
        'video,caption,x\nclips/a.mp4,"a ball, red",1\n/abs/b.mp4,"says ""hi""",2\nü.mp4,,\n'
    ),
    "spreadsheet.csv": (
        "\ufeffcaption,media_path\r\n"
        '"a ball, red",clips/a.mp4\r\n'
        '"says ""hi""",/abs/b.mp4\r\n'
        ",ü.mp4"
    ),
    "t.json": json.dumps([{"video": v, "caption": c, "fps": 3} for v, c in ROWS]),
    "t.jsonl": "\n\n".join(json.dumps({"media_path": v, "caption": c}) for v, c in ROWS),
}


@pytest.mark.parametrize(("name", "text"), TABLES.items(), ids=list(TABLES))
def test_all_table_formats_read_alike(tmp_path, name, text):
    rows = read_table(table(tmp_path, name, text))
    assert [(row.name, row.caption) for row in rows] == ROWS
    assert [row.path for row in rows] == [
        tmp_path / "clips/a.mp4",
        Path("/abs/b.mp4"),
        tmp_path / "ü.mp4",
    ]


def test_a_caption_may_hold_line_breaks(tmp_path):
    (row,) = read_table(table(tmp_path, "t.csv", 'video,caption\na.mp4,"one\ntwo"\n'))
    assert row.caption == "one\ntwo"
    text = '{"video": "a.mp4", "caption": "one\u2028two"}'
    (row,) = read_table(table(tmp_path, "t.jsonl", text))
    assert row.caption == "one\u2028two"


@pytest.mark.parametrize(
    "content",
    [
        b"\r\n , \r\nVideo, Caption \r\na.mp4,one; two\r\n",
        b"sep=;\r\nvideo;caption\r\na.mp4;one; two\r\n".replace(b"one; two", b'"one; two"'),
        b'video;caption\na.mp4;"one; two"\n',
        b"caption\tvideo\none; two\ta.mp4\n",
        "video,caption\na.mp4,one; two\n".encode("utf-16"),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    (row,) = read_table(tmp_path / "t.csv")
    assert (row.name, row.caption) == ("a.mp4", "one; two")


def test_a_caption_may_be_long(tmp_path):
    (row,) = read_table(table(tmp_path, "t.csv", "video,caption\na.mp4," + "word " * 30_000))
    assert len(row.caption) == 149_999


BAD_TABLES = {
    "path,caption\na,b\n": r"1: no column 'video' \(or 'media_path'\); there: 'path', 'caption'",
    "video,text\na,b\n": r"1: no column 'caption'; there: 'video', 'text'",
    "video,caption\na.mp4,fine\nb.mp4\n": "3: column 'caption' has no text",
    "video,caption\na.mp4,one, two\n": "2: more values than columns",
    "video,caption\n,hello\n": "2: column 'video' is empty",
    'video,caption\na.mp4,"hello\n': "2: not CSV: unexpected end of data",
    "video,caption\n": " the table has no rows",
    "": " the table has no rows",
    "\nsep=;\nvideo;caption\na.mp4;one\nb.mp4;a;b\n": "5: more values than columns",
    "video,caption\na.mp4,fine\nb.mp4,no\0\n": "3: column 'caption': a NUL character at position 2",
}
BAD_JSON = {
    '[{"video": "a",\n "caption" "b"}]': "2: not JSON",
    '{"video": "a", "caption": "b"}': " must be a list of objects, not dict",
    '[{"video": "a", "caption": null}]': " entry 0: column 'caption' has no text",
    '["a.mp4"]': " entry 0 must be an object",
    "[]": " the table has no rows",
}
BAD_JSONL = {
    '{"video": "a", "caption": "b"}\n{"video": }': "2: not JSON",
    '{"video": "a", "caption": "b"}\n7': "2: must be an object",
    '{"caption": "b"}': "1: no column 'video'",
    '{"video": "a\\ud800.mp4", "caption": "b"}': "1: column 'video': half a surrogate pair at",
    '{"video": "a.mp4", "caption": "\\udfff"}': "1: column 'caption': half a surrogate pair at",
    '{"video": "\\u0000.mp4", "caption": "b"}': "1: column 'video': a NUL character at position 0",
    "[" * 100_000: "1: brackets in brackets without end",
}


FULL = {
    "t.csv": "video,caption,caption_b,weight_b,weight,start,end,ref_media_path,audio,video_mask\n"
    "a.mp4,one,two,0.5,2,1,2.5,r/b.mp4,,m.png\n,three,,,,,,,s.wav,\n",
    "t.json": json.dumps(
        [
            {"media_path": "a.mp4", "caption": "one", "caption_b": "two", "weight_b": 0.5,
             "weight": 2, "start": 1, "end": 2.5, "reference_video": "r/b.mp4",
             "video_mask": "m.png"},
            {"caption": "three", "audio": "s.wav", "start": None},
        ]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_a_row_may_say_more_than_a_film_and_a_caption(tmp_path, name):
    film, sound = read_table(table(tmp_path, name, FULL[name]))
    assert film.captions == (("one", 2.0), ("two", 0.5))
    assert (film.start, film.end) == (1.0, 2.5)
    assert film.others == {
        "reference_video": tmp_path / "r/b.mp4",
        "video_mask": tmp_path / "m.png",
    }
    assert (sound.path, sound.sound_alone) == (tmp_path / "s.wav", True)
    assert (sound.captions, sound.start, sound.others) == ((("three", 1.0),), None, {})


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("video,caption,start", "a.mp4,x,soon", "column 'start' is 'soon', not a number from 0 on"),
        ("video,caption,start", "a.mp4,x,-1", "column 'start' is '-1'"),
        ("video,caption,end", "a.mp4,x,nan", "column 'end' is 'nan'"),
        ("video,caption,start,end", "a.mp4,x,2,2", "end=2 is not after start=2"),
        ("video,caption,weight", "a.mp4,x,0", "the weights of its captions are all 0"),
        ("video,audio,caption", ",,x", "column 'audio' is empty"),
    ],
)
def test_what_a_row_says_wrong_is_named(tmp_path, header, line, message):
    with pytest.raises(UserError, match=re.escape(f"t.csv:2: {message}")):
        read_table(table(tmp_path, "t.csv", f"{header}\n{line}\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(("t.csv", text, message) for text, message in BAD_TABLES.items()),
        *(("t.json", text, message) for text, message in BAD_JSON.items()),
        *(("t.jsonl", text, message) for text, message in BAD_JSONL.items()),
        ("t.txt", "", r" a table is a \.csv, \.json, \.jsonl or"),
    ],
)
def test_a_bad_table_is_refused_by_file_and_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=f"{re.escape(name)}:{message}"):
        read_table(table(tmp_path, name, text))


def parquet(folder, rows, **columns):
    """A Parquet file of these rows, with these columns beside; None is what a row lacks."""
    made = pyarrow.Table.from_pylist(rows)
    for name, values in columns.items():
        made = made.append_column(name, values)
    pyarrow.parquet.write_table(made, folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def test_a_parquet_table_reads_as_the_same_in_json(tmp_path):
    rows = [*json.loads(FULL["t.json"]), {"media_path": "c.mp4", "caption": "ü"}]
    names = sorted({name for row in rows for name in row})
    whole = [{name: row.get(name) for name in names} for row in rows]
    films = pyarrow.array([b"of no interest"] * 3)
    kinds = pyarrow.array(["one", None, "one"]).dictionary_encode()
    read = read_table(parquet(tmp_path, whole, film=films, caption_c=kinds))
    for row in rows[0], rows[2]:
        row["caption_c"] = "one"
    assert read == read_table(table(tmp_path, "t.json", json.dumps(rows)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"film": "a", "caption": "b"}], "row 0: no column 'video' (or 'media_path'); there"),
        ([{"path": "a", "text": 3}], "row 0: no column 'video' (or 'media_path'); the"),
        ([{"video": "a", "caption": "b"}] * 3 + [{"video": "a"}], "row 3: column 'caption' has no"),
        ([{"video": "a", "caption": 3}], "row 0: column 'caption' has no text"),
        ([{"video": "a", "caption": "b", "start": -1}], "row 0: column 'start' is -1, not"),
        ([{"video": "a", "caption": "b", "end": float("nan")}], "row 0: column 'end' is nan"),
        ([{"video": "a", "caption": "b", "end": True}], "row 0: column 'end' is True"),
        ([], "the table has no rows"),
    ],
)  # fmt: skip
def test_a_bad_parquet_table_is_refused_by_file_and_row(tmp_path, rows, message):
    with pytest.raises(UserError, match=re.escape(f"t.parquet: {message}")):
        read_table(parquet(tmp_path, rows))


def test_a_file_that_is_no_parquet_and_a_missing_library_are_told(tmp_path, monkeypatch):
    path = parquet(tmp_path, [{"video": "a", "caption": "b"}])
    for content in (b"", b"PAR1", b"video,caption\na,b\n", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.parquet: not a readable Parquet file \("):
            read_table(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: Parquet needs pyarrow: pip install 'ltx2-j"):
        read_table(path)


def test_an_unreadable_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: no such table"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("video,caption\na,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv: not UTF-8"):
        read_table(tmp_path / "latin.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv: cannot read"):
        read_table(tmp_path / "folder.csv")


# ---- clips ---------------------------------------------------------------------------------------


class Files:
    """Stands for the disk: `read_clip` by file name, counting."""

    def __init__(self, fps=12.0):
        self.fps = fps
        self.reads = []

    def __call__(self, path, *, num_frames, height, width, fps, sample_rate, start=0.0):
        self.reads.append(path.name)
        rng = np.random.default_rng(int(path.stem[1:]))
        video = rng.integers(0, 256, (num_frames, height, width, 3), np.uint8)
        audio = rng.uniform(-1, 1, (round(num_frames / self.fps * sample_rate), 2))
        clip = Clip(video, fps or self.fps, audio.astype(np.float32), sample_rate)
        change = {
            "b": lambda: {},
            "s": lambda: {"audio": None},
            "n": lambda: {"audio": np.full_like(clip.audio, np.nan)},
            "l": lambda: {"audio": clip.audio[:100]},
            "r": lambda: {"fps": 30.0},
            "d": lambda: {"video": np.full_like(clip.video, 13)},
        }
        if path.name[0] not in change:
            raise UserError(f"{path}: not a readable video file")
        return dataclasses.replace(clip, **change[path.name[0]]())


@pytest.fixture(autouse=True)
def files(monkeypatch):
    """No test below reads a real file."""
    files = Files()
    monkeypatch.setattr(clips, "read_clip", files)
    return files


class Codec:
    """Keeps every stride-th pixel, and the loudness of every latent's samples."""

    release = "2.3"

    class video:
        strides = (4, 8, 8)
        channels = 3

        @staticmethod
        def encode(video):
            assert video.dtype == np.uint8
            latents = video[:, ::4, ::8, ::8] / np.float32(127.5) - 1
            return np.where((video == 13).all(), np.nan, latents)

    class audio:
        sample_rate = 1600
        latents_per_second = 25

        @staticmethod
        def encode(audio):
            assert audio.shape[1] % 64 == 0
            assert audio.shape[2] == 2
            power = (audio.reshape(len(audio), -1, 64, 2) ** 2).mean(axis=2)
            return power[:, :, None]

    def __init__(self, value=1.0):
        self.value = value

    def save(self, path):
        safetensors.numpy.save_file({"value": np.float32([self.value])}, path)


class Encoder:
    """One feature for each letter of a caption, padded on the left; twice that for audio."""

    release, length, shared = "2.3", 24, False

    def features(self, captions):
        codes = np.zeros((len(captions), self.length, 1), np.float32)
        mask = np.zeros(codes.shape[:2], bool)
        for row, caption in enumerate(captions):
            start = self.length - len(caption) - 1
            codes[row, start:, 0] = [1, *caption.encode()]
            mask[row, start:] = True
        return codes, 2 * codes, mask

    def save(self, path):
        safetensors.numpy.save_file({"length": np.int32([self.length])}, path)


class Other(Encoder):
    def save(self, path):
        safetensors.numpy.save_file({"length": np.int32([0])}, path)


class Shared(Encoder):
    release, shared = "2.0", True


def prepare(folder, names, config=CONFIG, **options):
    options = {"codec": Codec(), "text_encoder": Encoder()} | options
    text = "video,caption\n" + "".join(f"{name},caption {name}\n" for name in names)
    path = table(folder, "t.csv", text)
    return prepare_dataset(path, folder / "set", config, **options)


def test_captions_that_fill_the_text_length_are_counted(tmp_path, capsys):
    prepare(tmp_path, ["b0000000001.mp4", "b2.mp4", "b0000000003.mp4"])
    assert "captions that fill all 24 tokens: 2; what is longer" in capsys.readouterr().out
    prepare(tmp_path, ["b2.mp4"], overwrite=True)
    assert "tokens" not in capsys.readouterr().out


def test_the_lengths_of_captions_are_told(tmp_path):
    made = prepare(tmp_path, ["b2.mp4", "b33.mp4", "b0000000001.mp4"])
    assert "captions of 15 to 24 tokens, half of them up to 16" in describe(made)


def test_a_trigger_stands_before_every_caption_and_not_in_an_empty_one(tmp_path):
    text = "video,caption,caption_b\nb0.mp4,a cat,a\nb1.mp4,,b\n"
    path, out = table(tmp_path, "t.csv", text), tmp_path / "set"
    config = dataclasses.replace(CONFIG, trigger="ohwx")
    makers = {"codec": Codec(), "text_encoder": Encoder()}
    made = prepare_dataset(path, out, config, **makers)
    assert [text for i in (0, 1) for text, _ in made.captions(i)] == [
        "ohwx a cat", "ohwx a", "ohwx ", "ohwx b",
    ]  # fmt: skip
    read = Encoder().features(["ohwx a cat"])
    np.testing.assert_array_equal(made[0]["video_text"], read[0][0])
    # What takes the place of a dropped caption is that of a dataset without a trigger.
    plain = prepare_dataset(path, tmp_path / "plain", CONFIG, **makers)
    for name, value in plain.empty_caption().items():
        np.testing.assert_array_equal(made.empty_caption()[name], value)
    assert "trigger" not in plain.settings
    assert "every caption begins with 'ohwx'" in describe(made)
    assert len(prepare_dataset(path, out, config, **makers)) == 2
    with pytest.raises(UserError, match="a dataset with trigger 'ohwx', not 'zwx'"):
        prepare_dataset(path, out, dataclasses.replace(CONFIG, trigger="zwx"), **makers)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_records_hold_what_codec_and_text_encoder_made(tmp_path, batch_size):
    names = [f"b{i}.mp4" for i in range(7)]
    made = prepare(tmp_path, names, dataclasses.replace(CONFIG, batch_size=batch_size))
    assert len(made) == 7
    for index, record in enumerate(made):
        kw = dict(num_frames=9, height=16, width=8, fps=None, sample_rate=1600)
        clip = Files()(Path(names[index]), **kw)
        assert record["id"] == index
        assert record["source"] == names[index]
        assert record["caption"] == f"caption {names[index]}"
        assert record["fps"] == 12
        assert record["video"].shape == (3, 2, 1, 3)
        np.testing.assert_allclose(
            record["video"], clip.video[::4, ::8, ::8] / 127.5 - 1, rtol=0, atol=1e-6
        )
        assert record["audio"].shape == (19, 1, 2)  # round(9 / 12 * 25)
        power = (clip.audio[:64] ** 2).mean(axis=0)
        np.testing.assert_allclose(record["audio"][0, 0], power, rtol=1e-5)
        text = record["video_text"]
        assert text.shape == record["audio_text"].shape == (24, 1)
        assert (
            bytes(text[record["text_mask"], 0].astype(np.uint8))[1:].decode() == record["caption"]
        )
        assert not text[~record["text_mask"]].any()
        np.testing.assert_array_equal(record["audio_text"], 2 * text)
    empty = made.empty_caption()
    assert empty["text_mask"].sum() == empty["video_text"].sum() == 1
    assert (made.schema.release, made.schema.text_release) == ("2.3", "2.3")
    assert (made.schema.num_frames, made.schema.height, made.schema.width) == (9, 16, 8)
    assert made.codec_path.exists()
    assert made.text_encoder_path.exists()


def test_features_that_both_streams_share_are_stored_once(tmp_path):
    made = prepare(tmp_path, ["b0.mp4"], text_encoder=Shared())
    assert {name for name in made.schema.fields if "text" in name} == {"video_text", "text_mask"}
    assert made.empty_caption().keys() == {"video_text", "text_mask"}
    assert made.schema.text_release == "2.0"


def test_text_features_that_are_not_finite_are_refused_by_their_caption(tmp_path):
    class Overflowing(Encoder):
        def features(self, captions):
            video, audio, mask = super().features(captions)
            bad = np.array([caption.endswith("b1.mp4") for caption in captions])
            return video, np.where(bad[:, None, None], np.inf, audio), mask

    with pytest.raises(UserError, match=r"features of 'caption b1\.mp4' are not finite"):
        prepare(tmp_path, ["b0.mp4", "b1.mp4"], text_encoder=Overflowing())
    assert not (tmp_path / "set").exists()


def test_bad_clips_are_left_out_and_listed(tmp_path):
    names = [
        "x0.mp4",
        "b1.mp4",
        "s2.mp4",
        "n3.mp4",
        "b5.mp4",
        "r6.mp4",
        "d8.mp4",
    ]
    made = prepare(tmp_path, names, dataclasses.replace(CONFIG, batch_size=1))
    assert [(int(record["id"]), record["source"]) for record in made] == [
        (1, "b1.mp4"),
        (4, "b5.mp4"),
    ]
    reasons = {clip["source"]: clip["reason"] for clip in made.skipped}
    assert list(reasons) == [name for name in names if name[0] != "b"]
    assert reasons["x0.mp4"] == "not a readable video file"
    assert reasons["s2.mp4"] == "no sound"
    assert "NaN" in reasons["n3.mp4"]
    assert "30 frames per second" in reasons["r6.mp4"]
    assert "--fps" in reasons["r6.mp4"]
    assert "not finite" in reasons["d8.mp4"]


def test_one_rate_for_all_takes_clips_of_any_rate(tmp_path):
    made = prepare(tmp_path, ["b1.mp4", "b2.mp4"], dataclasses.replace(CONFIG, fps=25.0))
    assert {float(record["fps"]) for record in made} == {25.0}
    assert made.schema.fields["audio"].shape == (9, 1, 2)


def test_short_sound_ends_in_silence(tmp_path):
    (made,) = prepare(tmp_path, ["l2.mp4"])
    assert (made["audio"][0] > 0).all()
    assert (made["audio"][2:] == 0).all()


def test_a_clip_too_short_for_one_audio_latent_is_left_out(tmp_path):
    with pytest.raises(UserError, match=r"b0\.mp4: too short for one audio latent"):
        prepare(tmp_path, ["b0.mp4"], dataclasses.replace(CONFIG, num_frames=1, fps=60.0))


@pytest.mark.parametrize("names", [["x0.mp4", "s1.mp4"], ["d0.mp4"]])
def test_a_table_of_bad_clips_alone_is_refused(tmp_path, names):
    with pytest.raises(UserError, match=f"none of the {len(names)} clips"):
        prepare(tmp_path, names)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_crash_while_encoding_leaves_no_dataset(tmp_path, monkeypatch):
    def fail(audio):
        raise RuntimeError("out of memory")

    codec = Codec()
    codec.audio = type("Broken", (Codec.audio,), {"encode": staticmethod(fail)})
    with pytest.raises(RuntimeError, match="out of memory"):
        prepare(tmp_path, ["b0.mp4"], codec=codec)
    assert not (tmp_path / "set").exists()
    prepare(tmp_path, ["b0.mp4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "t.csv"]


def test_the_same_settings_reuse_the_dataset(tmp_path, capsys, files):
    prepare(tmp_path, ["b0.mp4", "b1.mp4"])
    capsys.readouterr()
    files.reads.clear()
    made = prepare(tmp_path, ["b0.mp4", "b1.mp4"])
    assert len(made) == 2
    assert not files.reads
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "2 records are there already" in out


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (["b0.mp4"], {"fps": 24.0}, r"with fps None, not 24\.0"),
        (["b0.mp4"], {"text_encoder": Other()}, "with another text_encoder"),
        (["b1.mp4"], {}, "with another table"),
        (["b0.mp4"], {"codec": Codec(2.0)}, "with another codec"),
        (["b0.mp4"], {"trigger": "ohwx"}, "with trigger None, not 'ohwx'"),
    ],
)
def test_other_settings_are_refused_until_overwrite(tmp_path, names, change, message):
    prepare(tmp_path, ["b0.mp4"])
    options = {name: value for name, value in change.items() if "codec" in name or "text" in name}
    config = dataclasses.replace(CONFIG, **change) if not options else CONFIG
    with pytest.raises(UserError, match=f"set: holds a dataset {message}; .*--overwrite"):
        prepare(tmp_path, names, config, **options)
    made = prepare(tmp_path, names, config, overwrite=True, **options)
    assert [record["source"] for record in made] == names
    assert len(open_records(tmp_path / "set")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 10}, "num_frames.*9"),
        ({"height": 12}, "height.*8"),
        ({"width": 0}, "width"),
        ({"fps": -1.0}, r"fps -1\.0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"stride": 0}, "stride 0"),
        ({"reference_slowdown": 0}, "reference_slowdown 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(tmp_path, change, message, files):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, ["b0.mp4"], dataclasses.replace(CONFIG, **change))
    assert not files.reads
    assert not (tmp_path / "set").exists()


# ---- passes over the clips -----------------------------------------------------------------------


def reader(folder, names, **options):
    rows = [Row(name, folder / name, "") for name in names]
    return ClipReader(rows, CONFIG, Rates(1600, 25, (4, 8, 8)), **options)


def test_a_second_pass_gives_the_same_clips_without_reading_again(tmp_path, files):
    names = [f"{'bx'[i % 3 == 2]}{i}.mp4" for i in range(60)]
    clips = reader(tmp_path, names)
    first = list(clips)
    assert [sample.item.row for sample in first] == [i for i in range(60) if i % 3 != 2]
    assert sorted(row for row, _ in clips.failures) == [i for i in range(60) if i % 3 == 2]
    assert sorted(files.reads) == sorted(names)
    second = list(clips)
    assert sorted(files.reads) == sorted(names)
    for a, b in zip(first, second, strict=True):
        assert a.item == b.item
        np.testing.assert_array_equal(a.video, b.video)
        np.testing.assert_array_equal(a.audio, b.audio)


def test_clips_beyond_the_memory_limit_are_read_again(tmp_path, files):
    names = [f"b{i}.mp4" for i in range(6)]
    size = 9 * 16 * 8 * 3 + 19 * 64 * 2 * 4  # bytes of pixels and of samples
    clips = reader(tmp_path, names, cache_bytes=2 * size)
    first = list(clips)
    files.reads.clear()
    second = list(clips)
    assert sorted(files.reads) == names[2:]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.video, b.video)
