import os
import shutil
import subprocess
import sys
from pathlib import Path

import film
import matplotlib.image
import numpy as np
import pytest

from ltx2_jax import prepare
from ltx2_jax.blobs import content_hash
from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.clips import PrepareConfig
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.records import open_records
from ltx2_jax.demo.config import LinearCodecConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.media.media import Clip, read_clip
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import caption_features, load_caption_encoder

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = ["--num-frames", "9", "--height", "16", "--width", "16", "--text-length", "48"]
CHANNELS = ["--video-channels", "6", "--audio-channels", "5"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of smooth noise with sound, one without, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = ["video,caption"]
    for index in range(4):
        coarse = rng.integers(0, 256, (9, 4, 4, 3), np.uint8)
        video = coarse.repeat(4, axis=1).repeat(4, axis=2)
        audio = rng.normal(0, 0.1, (12000, 2)).astype(np.float32) if index < 3 else None
        Clip(video, 12.0, audio, 16000).save(folder / f"{index}.mp4")
        rows.append(f"{index}.mp4,noise number {index}")
    (folder / "text.mp4").write_text("not a video")
    rows.append("text.mp4,nothing")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def dataset(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "nested" / "set"
    assert prepare.cli([str(clips / "captions.csv"), str(out), *SIZE, *CHANNELS]) == 0
    return out


def test_sizes_to_choose_from_are_those_of_the_codec_that_is_given(clips, dataset, tmp_path):
    """Also if it is one that another dataset was fitted with, whose strides are its own."""
    out = tmp_path / "set"
    given = [f"--codec={dataset / 'codec.safetensors'}", "--buckets=16x8x9,24x24x9"]
    assert prepare.cli([str(clips / "captions.csv"), str(out), *given]) == 0
    records = open_records(out)
    assert {record["video"].shape for record in records} == {(3, 3, 3, 6)}
    same = out / "codec.safetensors", dataset / "codec.safetensors"
    assert content_hash(same[0]) == content_hash(same[1])


def test_the_records_are_what_the_stored_codec_makes_of_the_clips(clips, dataset):
    records = open_records(dataset)
    assert [record["source"] for record in records] == ["0.mp4", "1.mp4", "2.mp4"]
    records.require(release="linear", text_release="random")
    records.require(video=(3, 2, 2, 6), audio=(19, 1, 5), video_text=(48, 96), audio_text=(48, 64))
    codec = LinearCodec.load(records.codec_path)
    encoder = load_caption_encoder(records.text_encoder_path)
    for record in records:
        path = clips / record["source"]
        clip = read_clip(path, num_frames=9, height=16, width=16, sample_rate=16000)
        pixels = clip.video[None].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(record["video"], codec.video.encode(pixels)[0], atol=1e-5)
        sound = np.pad(clip.audio, ((0, 19 * 640 - len(clip.audio)), (0, 0)))
        np.testing.assert_allclose(record["audio"], codec.audio.encode(sound[None])[0], atol=1e-4)
        for name, value in caption_features(encoder, [record["caption"]]).items():
            np.testing.assert_allclose(record[name], value[0], atol=1e-5, err_msg=name)
    for name, value in caption_features(encoder, [""]).items():
        np.testing.assert_array_equal(records.empty_caption()[name], value[0])


def test_preparing_again_gives_the_same_dataset(clips, dataset, tmp_path):
    assert prepare.cli([str(clips / "captions.csv"), str(tmp_path / "set"), *SIZE, *CHANNELS]) == 0
    assert open_records(tmp_path / "set").schema == open_records(dataset).schema
    shard = "data-00000-of-00001.arrayrecord"
    assert (tmp_path / "set" / shard).read_bytes() == (dataset / shard).read_bytes()


def test_a_second_run_reports_the_dataset_and_what_was_skipped(clips, dataset, capsys):
    assert prepare.cli([str(clips / "captions.csv"), str(dataset), *SIZE, *CHANNELS]) == 0
    out = capsys.readouterr().out
    assert "3 records are there already" in out
    assert "float32[3, 2, 2, 6]" in out
    assert "float32[19, 1, 5]" in out
    assert "% of the audio variance" in out
    assert "skipped 3.mp4: no sound" in out
    assert "skipped text.mp4: not a readable video file" in out
    assert out.endswith(f"in {dataset}\n")


def test_clips_that_changed_since_are_not_passed_over(clips, tmp_path, capsys):
    """Those that were missing are added, other films refused; those that are gone do not matter."""
    (tmp_path / "c.csv").write_text("video,caption\na.mp4,one\nb.mp4,two\n")
    command = [str(tmp_path / "c.csv"), str(tmp_path / "set"), *SIZE, *CHANNELS]
    shutil.copy(clips / "0.mp4", tmp_path / "a.mp4")
    assert prepare.cli(command) == 0
    assert "skipped b.mp4: no such file" in capsys.readouterr().out
    assert prepare.cli(command) == 0
    shutil.copy(clips / "1.mp4", tmp_path / "b.mp4")
    assert prepare.cli(command) == 0  # it is there by now
    assert "2 records" in capsys.readouterr().out
    os.utime(tmp_path / "b.mp4", (0, 0))
    assert prepare.cli(command) == 0
    shutil.copy(clips / "2.mp4", tmp_path / "b.mp4")
    assert prepare.cli(command) == 2
    assert "b.mp4 was another file when" in capsys.readouterr().err
    (tmp_path / "b.mp4").unlink()
    assert prepare.cli(command) == 0
    (tmp_path / "set" / "clips.json").unlink()  # as in a dataset of an earlier version
    shutil.copy(clips / "2.mp4", tmp_path / "b.mp4")
    assert prepare.cli(command) == 0


def test_what_reading_did_to_clips_is_told_each_time(clips, tmp_path, capsys):
    wide = {"color_primaries": 9, "color_trc": 1, "colorspace": 9}
    film.write_film(tmp_path / "a.mp4", film.numbered(), tones=[440], silent=True)
    film.write_film(tmp_path / "b.mp4", film.numbered(), tones=[440], silent=True, tags=wide)
    film.write_film(tmp_path / "c.mp4", film.numbered(), tags=wide)
    film.write_film(tmp_path / "d.mp4", film.numbered(), tones=[440])
    rows = "".join(f"{name}.mp4,caption {name}\n" for name in "abcd")
    (tmp_path / "c.csv").write_text(f"video,caption\n{rows}")
    command = [str(tmp_path / "c.csv"), str(tmp_path / "set"), *SIZE, *CHANNELS]
    for _ in range(2):
        assert prepare.cli(command) == 0
        out = capsys.readouterr().out
        assert "2 clips with a sound track that is silent\n" in out
        assert "1 clip converted from other primaries (such as BT.2020 or P3) to BT.709\n" in out
        assert "skipped c.mp4: no sound" in out


def test_other_settings_need_overwrite(clips, tmp_path, capsys):
    command = [str(clips / "captions.csv"), str(tmp_path / "set"), *SIZE, *CHANNELS]
    assert prepare.cli(command) == 0
    other = [*command, "--audio-channels", "4"]
    assert prepare.cli(other) == 2
    assert "codec.audio_channels 5, not 4" in capsys.readouterr().err
    assert prepare.cli([*other, "--overwrite"]) == 0
    assert open_records(tmp_path / "set").schema.fields["audio"].shape == (19, 1, 4)


def test_the_text_encoder_of_another_dataset_is_used_as_it_is(clips, dataset, tmp_path, capsys):
    file = str(dataset / "text_encoder.safetensors")
    size = [*SIZE[: SIZE.index("--text-length")], *CHANNELS, "--text-encoder", file]
    (tmp_path / "two.csv").write_text(f"video,caption\n{clips}/0.mp4,noise number 2\n")
    assert prepare.cli([str(tmp_path / "two.csv"), str(tmp_path / "set"), *size]) == 0
    made, first = open_records(tmp_path / "set"), open_records(dataset)
    assert made.schema.text_encoder_hash == first.schema.text_encoder_hash
    np.testing.assert_allclose(made[0]["video_text"], first[2]["video_text"], atol=1e-5)
    command = [str(clips / "captions.csv"), str(tmp_path / "other"), *size]
    assert prepare.cli([*command, "--vocab-size", "300"]) == 2
    assert f"--vocab-size: --text-encoder {file} decides that" in capsys.readouterr().err


def test_a_released_text_encoder_makes_its_features(clips, tmp_path):
    release = GOLDEN / "v2.0" / "checkpoint.safetensors", GOLDEN / "v2.0" / "gemma"
    flags = ["--text-encoder", *map(str, release)]
    out = tmp_path / "set"
    assert prepare.cli([str(clips / "captions.csv"), str(out), *SIZE, *CHANNELS, *flags]) == 0
    records = open_records(out)
    records.require(text_release="2.0", video_text=(48, 32), text_mask=(48,))
    assert "audio_text" not in records.schema.fields
    # On the same devices, in the same batches: the order of bfloat16 sums depends on both.
    encoder = load_caption_encoder(records.text_encoder_path, make_mesh())
    captions = [*(f"noise number {i}" for i in range(4)), *["nothing"] * 12]
    found = caption_features(encoder, captions)["video_text"]
    np.testing.assert_array_equal([record["video_text"] for record in records], found[:3])


def test_films_of_all_sorts_become_one_dataset(tmp_path, capsys):
    """Two sizes, windows of a long film, a silent one, an image and sound alone; then a look."""
    film.write_film(tmp_path / "wide.mp4", film.numbered(25, 32, 64), tones=[440])
    film.write_film(tmp_path / "tall.mp4", film.numbered(10, 64, 32), tones=[440])
    film.write_film(tmp_path / "silent.mp4", film.numbered(9, 64, 32))
    matplotlib.image.imsave(tmp_path / "still.png", film.plain((9, 200, 30), 1)[0])
    read_clip(tmp_path / "wide.mp4").save(tmp_path / "hum.wav")
    (tmp_path / "t.csv").write_text(
        "video,audio,caption\nwide.mp4,,a\ntall.mp4,,b\nsilent.mp4,,b\nstill.png,,c\n,hum.wav,d\n"
    )
    out = tmp_path / "set"
    sizes = ["--buckets", "32x16x9;16x32x9;16x16x1", "--stride", "8", "--incomplete"]
    command = [str(tmp_path / "t.csv"), str(out), *sizes, *CHANNELS, "--text-length", "8"]
    assert prepare.cli([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 clips of 32x16x9" in told
    assert "7 clips of 5 rows" in told
    assert not out.exists()
    assert prepare.cli(command) == 0
    capsys.readouterr()
    records = open_records(out)
    assert [(r["source"], r.get("video", np.zeros(())).shape[:3]) for r in records] == [
        *[("wide.mp4", (3, 2, 4))] * 3,
        *[(name, (3, 4, 2)) for name in ("tall.mp4", "silent.mp4")],
        ("still.png", (1, 2, 2)),
        ("hum.wav", ()),
    ]
    assert ["audio" in record for record in records] == [*[True] * 4, False, False, True]
    # The windows of a film are its parts: frame 8 k is where window k begins.
    codec = LinearCodec.load(records.codec_path)
    for window in range(3):
        image = np.asarray(codec.video.decode(records[window]["video"][None]))[0, 0]
        assert round(((image.mean() + 1) * 127.5 - 40) / 8) == 8 * window
    batches = list(make_dataset(out, batch_size=2, seed=0, num_steps=20, threads=0))
    assert {b["video"].shape[1:4] for b in batches if "video" in b} == {
        (3, 2, 4), (3, 4, 2), (1, 2, 2),
    }  # fmt: skip
    assert prepare.cli(["--verify", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    told = capsys.readouterr().out
    assert "7 records read, 0 faults" in told
    assert "2 records without audio" in told
    assert "1 records without video" in told
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-frames", "10"], "num_frames"),
        (["--buckets", "16x16x9"], "--num-frames, --height, --width: --buckets says the sizes"),
        (["--height", "20"], "height"),
        (["--height", "9", "--video-strides", "4,9,8"], "needs even sizes; height 9 x width 16"),
        (["--num-frames", "81"], "none of the 5 clips can be used; the first: 0.mp4: 81 frames"),
        (["--video-channels", "4000"], "video_channels"),
        (["--vocab-size", "200"], "vocab_size"),
        (["--fps", "-3"], "fps"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(clips, tmp_path, capsys, change, message):
    out = tmp_path / "set"
    command = [str(clips / "captions.csv"), str(out), *SIZE, *CHANNELS, *change]
    assert prepare.cli(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        ["--height", "x"],
        ["--video-strides", "4,8"],
        ["--text-widths", "4"],
        ["--bogus"],
        ["--trigger", " "],
    ],
)
def test_a_bad_flag_is_refused_by_name(clips, tmp_path, capsys, change):
    command = [str(clips / "captions.csv"), str(tmp_path / "set"), *SIZE, *change]
    with pytest.raises(SystemExit) as stop:
        prepare.cli(command)
    assert stop.value.code == 2
    assert change[0] in capsys.readouterr().err


def test_every_flag_gets_where_it_belongs():
    def parsed(flags):
        return prepare._parser().parse_args(["t.csv", "out", *flags.split()])

    args = parsed(
        "--buckets 16x8x9,32x16x17 --fps 12.5 --stride 7 --scenes --incomplete --text-length 9 "
        "--reference-downscale 2 --reference-slowdown 4 --trigger ohwx"
    )
    assert prepare._config(args, LinearCodecConfig()) == PrepareConfig(
        17, 16, 32, fps=12.5, text_length=9, buckets=(Bucket(9, 8, 16), Bucket(17, 16, 32)),
        stride=7, scenes=True, incomplete=True, reference_downscale=2, reference_slowdown=4,
        trigger="ohwx",
    )  # fmt: skip
    encoder = prepare._text_encoder(parsed("--vocab-size 300 --text-widths 9,5"))
    assert (encoder.gemma.vocab_size, encoder.video_dim, encoder.audio_dim) == (300, 9, 5)
    codec = prepare._codec(parsed("--video-strides 4,8,16 --video-channels 3 --audio-channels 5"))
    assert codec == LinearCodecConfig((4, 8, 16), 3, 5)


def test_a_part_of_the_work_is_told_by_its_number(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(prepare, "prepare_dataset", lambda *_, **options: given.append(options))
    assert prepare.cli(["t.csv", "out", *SIZE, "--part", "1/3", "--overwrite"]) == 0
    (options,) = given
    assert (options["process"], options["processes"], options["overwrite"]) == (1, 3, True)
    for part in ("3/3", "1", "-1/3", "a/b"):
        with pytest.raises(SystemExit):
            prepare.cli(["t.csv", "out", *SIZE, f"--part={part}"])
        assert f"'{part}'" in capsys.readouterr().err


def test_a_dataset_with_a_fault_makes_verify_fail(dataset, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    path = damaged / "data-00000-of-00001.arrayrecord"
    data = bytearray(path.read_bytes())
    used = len(bytes(data[: len(data) // 2]).rstrip(b"\0"))  # behind it the file is padded
    data[used // 2] ^= 255
    path.write_bytes(data)
    assert prepare.cli(["--verify", str(damaged)]) == 2
    told = capsys.readouterr().out
    assert "fault: " in told
    assert "3 records read, 0 faults" not in told
    assert prepare.cli(["--verify", str(dataset)]) == 0


def test_of_many_clips_left_out_all_are_in_the_report_and_some_are_shown(
    dataset, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "SHOWN", 1)
    prepare._report(open_records(dataset))
    told, kept = capsys.readouterr().out, (dataset / "report.txt").read_text()
    skipped = ["skipped 3.mp4: no sound\n", "skipped text.mp4: not a readable video file"]
    assert [line in told for line in skipped] == [True, False]
    assert f"and 1 more, listed in {dataset / 'report.txt'}\n" in told
    assert all(line in kept for line in skipped)


def test_what_is_to_be_made_must_be_said(clips, tmp_path, capsys):
    table = str(clips / "captions.csv")
    for flags, message in (
        ([table, "out"], "--num-frames: give the size of the clips, or --buckets"),
        ([table, "out", *SIZE[:4]], "--width: give the size"),
        ([table, *SIZE], "OUT: give the folder to make"),
        ([table, "out", *SIZE, "--sheet", "a.png"], "--sheet: only with --inspect or --verify"),
        ([table, "--inspect", "--trigger", "ohwx"], "--trigger: only with a TABLE of captions"),
        ([table, "out", "--buckets", "16x16"], "bucket '16x16': not width x height x frames"),
    ):
        assert prepare.cli(flags) == 2
        assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.cli(["--help"])
    assert stop.value.code == 0
    assert "python -m ltx2_jax.prepare clips/captions.csv" in capsys.readouterr().out


def test_the_command_exits_with_2_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ltx2_jax.prepare", "none.csv", str(tmp_path / "set"), *SIZE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "prepare: error: none.csv: no such table\n"
