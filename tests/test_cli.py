"""The commands as they are typed: help with an example, and one clear line for every mistake."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

import ltx2_jax
from ltx2_jax import prepare, sample, train
from ltx2_jax.config import load
from ltx2_jax.data.encoding import OtherDataset
from ltx2_jax.data.records import open_records
from ltx2_jax.media.media import Clip, read_clip
from ltx2_jax.text.cache import TextCache
from ltx2_jax.training import loop
from ltx2_jax.training.checks import check_same_makers

ROOT = Path(__file__).parents[1]
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"
SMALL = Path(__file__).parent / "resume_config.py"
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "ltx2_jax").glob("*.py")
    if "\nif __name__ == " in path.read_text()
)


def entry(name):
    module = importlib.import_module(f"ltx2_jax.{name}")
    return module.cli


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with one line on stderr, and returns the line."""

    def refused(command, *argv):
        assert command([str(argument) for argument in argv]) == 2
        error = capsys.readouterr().err
        assert error.endswith("\n")
        assert error.count("\n") == 1
        assert "Traceback" not in error
        return error.rstrip()

    return refused


# ---- help ----------------------------------------------------------------------------------------


def test_these_are_the_commands():
    assert {"train", "sample", "prepare"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        entry(name)(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"example:\n +python -m ltx2_jax\.{name} ", text)


@pytest.mark.parametrize(
    ("name", "argv", "missing"),
    [
        ("train", [], "--config"),
        ("sample", ["a ball"], "--workdir"),
        ("sample", ["--workdir=x", "--mesh=1,2"], "--mesh"),
        ("sample", ["--workdir=x", "--steps=some"], "--steps"),
        ("sample", ["--workdir=x", "--seed=-1"], "--seed"),
        ("sample", ["--workdir=x", "--seed=4294967296"], "--seed"),
        ("sample", ["--workdir=x", "--video-guidance=nan"], "--video-guidance"),
        ("sample", ["--workdir=x", "--video-guidance=inf"], "--video-guidance"),
        ("train", ["--config=x", "--start-timeout=inf"], "--start-timeout"),
        ("train", ["--config=x", "--heartbeat=0"], "--heartbeat"),
        ("prepare", ["t.csv", "out", "--num-frames=0"], "--num-frames"),
    ],
)
def test_a_flag_that_is_missing_or_no_number_is_named(name, argv, missing, capsys):
    with pytest.raises(SystemExit) as caught:
        entry(name)(argv)
    assert caught.value.code == 2
    assert missing in capsys.readouterr().err.splitlines()[-1]


# ---- train ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.optim.lr=1"],
            "--config.optim.lr: no field 'lr'; valid: optimizer, learning_rate, ",
        ),
        (["--config.num_steps=many"], "--config.num_steps=many: expected int"),
        (["--confg.num_steps=3"], "unknown flag --confg.num_steps"),
        (["--config.mesh.model=3"], r"mesh \(data=-1, model=3, sequence=1\) does not divide the 8"),
        (["--config.mesh.data=2"], r"mesh \(data=2, .*must be 8"),
        (["--config.mesh.model=8"], "mesh: model=8 does not divide 4 attention heads"),
        (["--config.data.batch_size=12"], "data.batch_size=12 is not a multiple of mesh.data=8"),
        (["--config.optim.accumulate_steps=8"], "is not a multiple of .*optim.accumulate_steps=8"),
        (["--config.sample.schedule=euler"], "no schedule is called 'euler': choose from ltx2, "),
        (["--config.sample.schedule=distilled"], "the distilled schedule has 8 steps, not 30"),
        (["--config.data.path=no/where"], "no/where: no dataset here"),
        (["--config.seed=-1"], "seed=-1 is not from 0 to 4294967295"),
        (["--config.sample.seed=4294967296"], "seed=4294967296 is not from 0 to"),
        (["--config.text.encoder.seed=-1"], "seed=-1 is not from 0 to"),
        (["--config.sample.audio_guidance=1e999"], "audio_guidance=inf is not a number"),
        (["--config.text.release=2.3"], "text.release='2.3': synthetic clips have 'random'"),
        (
            ["--config.text.encoder.video_dim=64"],
            r"text.video_connector is 96 wide .*, but text.encoder.video_dim=64",
        ),
        (
            ["--config.model.audio_context_dim=32"],
            r"text.audio_connector is 64 wide .*, but model.audio_context_dim=32",
        ),
        (
            ["--config.text.length=40"],
            "length=40 is not a multiple of video_connector.registers=32",
        ),
        (["--config.text.audio_connector.registers=0"], "registers in both or in none"),
    ],
)
def test_train_refuses_before_it_makes_anything(flags, message, refused, tmp_path):
    workdir = tmp_path / "run"
    error = refused(train.cli, QUICKSTART, f"--config.workdir={workdir}", *flags)
    assert re.match("train: error: .*" + message, error)
    assert not (workdir / "data").exists()


def test_train_without_a_file_of_that_name_says_so(refused):
    error = refused(train.cli, "--config=configs/quickstrat.py")
    assert error == "train: error: --config: no file configs/quickstrat.py"


def test_train_refuses_a_model_that_does_not_fit_the_codec(refused, tmp_path):
    small = [f"--config={SMALL}", f"--config.workdir={tmp_path}"]
    error = refused(train.cli, *small, "--config.data.codec.video_channels=12")
    assert "model.in_channels=8 is not data.codec.video_channels=12" in error
    assert not (tmp_path / "data").exists()


def test_train_refuses_a_dataset_of_other_text(refused, workdir, tmp_path):
    records = workdir / "data" / "records"
    flags = f"--config={SMALL}", f"--config.workdir={tmp_path}", f"--config.data.path={records}"
    error = refused(train.cli, *flags, "--config.text.release=2.3")
    assert error.endswith("records: text_release is 'random', '2.3' is needed")
    error = refused(train.cli, *flags, "--config.text.length=8")
    assert error.endswith("records: video_text is (16, 24), (8, 24) is needed")
    assert not (tmp_path / "checkpoints").exists()


def test_train_replaces_its_own_dataset_only_where_nothing_was_trained_on_it(monkeypatch, tmp_path):
    made = []

    def prepare_dataset(table, out, config, overwrite=False, **makers):
        made.append(overwrite)
        if not overwrite:
            raise OtherDataset(f"{out}: choose another folder or overwrite it (--overwrite)")
        return SimpleNamespace(skipped=[])

    monkeypatch.setattr(loop, "prepare_dataset", prepare_dataset)
    monkeypatch.setattr(loop, "open_records", lambda folder: folder)
    monkeypatch.setattr(loop.synthetic, "write_dataset", lambda folder, config: None)
    config = load(str(SMALL), {"workdir": str(tmp_path)})
    records = tmp_path / "data" / "records"
    with pytest.raises(ltx2_jax.UserError, match=f"{records}: .*: remove it, or choose another"):
        loop.dataset(config)
    assert loop.dataset(config, anew=True) == records
    assert made == [False, False, True]


def test_a_run_does_not_continue_on_features_of_another_encoder(workdir, tmp_path):
    records = open_records(workdir / "data" / "records")
    check_same_makers(records, workdir / "assets")
    index = json.loads((workdir / "assets" / "dataset.json").read_text())
    index["schema"]["text_encoder_hash"] = "0123456789abcdef"
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(ltx2_jax.UserError, match=r"text_encoder_hash is .*'0123456789abcdef' is n"):
        check_same_makers(records, tmp_path)


# ---- sample --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What train leaves of an untrained model, with a checkpoint at step 3."""
    return tiny.workdir(tmp_path_factory.mktemp("workdir"))


def test_sample_writes_clips_beside_those_of_earlier_calls(workdir, capsys):
    prompts = ["a red ball bounces once", "a blue lamp flashes twice"]
    for folder, seed in (("out-001", 1), ("out-002", 1), ("out-003", 2)):
        assert sample.cli([f"--workdir={workdir}", f"--seed={seed}", *prompts]) == 0
        assert "generated clips: median |lag|" in capsys.readouterr().out
        files = sorted(
            str(p.relative_to(workdir / folder)) for p in (workdir / folder).rglob("*.*")
        )
        clips = ["samples/000.mp4", "samples/001.mp4", "samples/captions.csv"]
        assert files == ["sample.mp4", "samples.png", *clips]
    clips = [read_clip(workdir / f"out-00{n}" / "samples" / "001.mp4") for n in (1, 2, 3)]
    assert len(clips[0].video) == 9
    np.testing.assert_array_equal(clips[0].video, clips[1].video)
    assert (clips[0].video != clips[2].video).any()


def test_a_clip_does_not_depend_on_what_it_is_batched_with(workdir):
    pipe = ltx2_jax.Pipeline.from_workdir(workdir)
    prompts = ["a red ball bounces once", "a blue lamp flashes twice", "a green ball"]
    together = pipe(prompts, sample=dataclasses.replace(pipe.config.sample, batch_size=3))
    apart = pipe(prompts, sample=dataclasses.replace(pipe.config.sample, batch_size=2))
    for a, b in zip(together, apart, strict=True):
        assert np.abs(a.video.astype(int) - b.video).max() <= 1
        np.testing.assert_allclose(a.audio, b.audio, atol=1e-2)
    assert (together[0].video != together[2].video).any()


def test_clips_of_a_run_are_made_as_asked_and_many_are_written_one_by_one(
    tmp_path, monkeypatch, capsys
):
    config, calls = load(str(SMALL)), []

    class Run:
        clip_bytes = 300 * 2**20

        def __init__(self, *workdir, **given):
            calls.append((workdir, given))
            self.config = config

        def __call__(self, prompts, *, sample):
            calls.append((prompts, sample))
            return prompts

        def save(self, prompts, paths, *, sample):
            calls.append((prompts, paths, sample))

    monkeypatch.setattr(sample.Pipeline, "from_workdir", Run)
    monkeypatch.setattr(sample, "write_clips", lambda *_: None)
    monkeypatch.setattr(sample, "sync_report", lambda clips, kinds: f"sync of {len(clips)}")
    scripted, out = ["a red ball bounces once", "a lamp flashes twice"], tmp_path / "out"
    argv = ["--workdir=run", f"--out={out}", "--checkpoint-step=7", "--text-cache=cache"]
    argv += ["--mesh=4,2,1", "--steps=3", "--audio-guidance=2"]
    settings = dataclasses.replace(config.sample, steps=3, audio_guidance=2.0)

    assert sample.cli([*argv, *scripted]) == 0
    (workdir, given), (prompts, how) = calls
    assert dict(given.pop("mesh").shape) == {"data": 4, "model": 2, "sequence": 1}
    assert (workdir, given) == (("run",), {"step": 7, "text_cache": "cache"})
    assert (prompts, how) == (scripted, settings)
    assert "generated clips: sync of 2" in capsys.readouterr().out
    # Neither of one clip nor of other ones can their sync be told.
    for prompts in (scripted[:1], [scripted[0], "a dog"], ["a dog", "a cat"]):
        assert sample.cli([*argv, *prompts]) == 0
        assert "sync" not in capsys.readouterr().out

    assert sample.cli([*argv, *scripted, "--num-clips=4"]) == 0  # more than a GiB of them
    paths = [out / "samples" / f"00{i}.mp4" for i in range(4)]
    want = dataclasses.replace(settings, num_clips=4)
    assert calls[-1] == (2 * scripted, paths, want)
    assert f"wrote 4 clips in {out}/samples" in capsys.readouterr().out


def test_sample_without_prompts_makes_captions_up(workdir, tmp_path, capsys):
    assert sample.cli([f"--workdir={workdir}", f"--out={tmp_path}", "--num-clips=3"]) == 0
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 3


def test_prompts_take_turns_and_captions_are_fresh():
    config = load(str(SMALL))
    assert sample.all_prompts(["a", "b"], 5, config, config.sample) == ["a", "b", "a", "b", "a"]
    captions = sample.all_prompts([], None, config, config.sample)
    assert len(captions) == config.sample.num_clips
    assert captions == sample.all_prompts([], None, config, config.sample)
    other = dataclasses.replace(config.sample, seed=config.sample.seed + 1, num_clips=3)
    assert len(sample.all_prompts([], None, config, other)) == 3
    assert sample.all_prompts([], None, config, other) != captions[:3]
    with pytest.raises(ltx2_jax.UserError, match="--num-clips=1 is too few for 2 prompts"):
        sample.all_prompts(["a", "b"], 1, config, config.sample)
    real = load(str(SMALL), {"data.path": "my/clips"})
    with pytest.raises(ltx2_jax.UserError, match=r"give a prompt: .*trained on my/clips"):
        sample.all_prompts([], None, real, real.sample)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule=euler"], "no schedule is called 'euler': choose from ltx2, "),
        (["--schedule=distilled", "--steps=9"], "the distilled schedule has 8 steps, not 9"),
        (["--steps=0"], "steps=0"),
        (["--num-clips=0"], "num_clips=0"),
        (["--checkpoint-step=7"], ".*no checkpoint 7"),
        (["--mesh=3,1,1"], r"mesh \(data=3, .*must be 8"),
        (["--mesh=-1,4,1"], "mesh: model=4 does not divide 2 attention heads"),
        (["--mesh=-1,1,8"], "mesh: sequence=8 does not divide 20 video tokens"),
    ],
)
def test_sample_refuses_before_it_makes_anything(flags, message, workdir, refused, tmp_path):
    out = tmp_path / "out"
    error = refused(sample.cli, f"--workdir={workdir}", f"--out={out}", *flags)
    assert re.match("sample: error: " + message, error)
    assert not out.exists()


def test_sample_names_a_workdir_without_a_checkpoint(refused, tmp_path):
    error = refused(sample.cli, f"--workdir={tmp_path}/none", "a ball")
    assert error.startswith(f"sample: error: {tmp_path}/none: no checkpoint")
    (tmp_path / "checkpoints").mkdir()
    error = refused(sample.cli, f"--workdir={tmp_path}", "a ball")
    assert error.startswith(f"sample: error: {tmp_path}: no checkpoint")


def test_sample_names_what_a_copied_workdir_lacks(workdir, refused, tmp_path):
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    error = refused(sample.cli, f"--workdir={tmp_path}", "a ball")
    assert error.startswith(f"sample: error: {tmp_path}/assets: no such folder; train writes it")


def test_sample_never_writes_over_clips(refused, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "file").write_text("")
    error = refused(sample.cli, "--workdir=x", f"--out={tmp_path}")
    assert error == f"sample: error: --out: {tmp_path} holds clips already; choose another folder"
    error = refused(sample.cli, "--workdir=x", f"--out={tmp_path}/file")
    assert error == f"sample: error: --out: {tmp_path}/file is a file"


# ---- prepare -------------------------------------------------------------------------------------

SIZE = ("--num-frames=9", "--height=16", "--width=16")


def test_prepare_names_a_table_that_is_not_there(refused, tmp_path):
    error = refused(prepare.cli, tmp_path / "clips.csv", tmp_path / "out", *SIZE)
    assert error == f"prepare: error: {tmp_path}/clips.csv: no such table"


def test_prepare_names_a_column_that_is_missing(refused, tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text("video,text\na.mp4,a ball\n")
    error = refused(prepare.cli, table, tmp_path / "out", *SIZE)
    assert error == f"prepare: error: {table}:1: no column 'caption'; there: 'video', 'text'"
    table = tmp_path / "clips.jsonl"
    table.write_text(json.dumps({"caption": "a ball"}))
    error = refused(prepare.cli, table, tmp_path / "out", *SIZE)
    assert f"{table}:1: no column 'video' (or 'media_path')" in error


def test_prepare_with_bad_clips_only_names_the_first(refused, tmp_path):
    silent = Clip(np.zeros((9, 16, 16, 3), np.uint8), 12.0)
    silent.save(tmp_path / "silent.mp4")
    table = tmp_path / "clips.csv"
    table.write_text("video,caption\nsilent.mp4,a ball\nnone.mp4,a lamp\n")
    error = refused(prepare.cli, table, tmp_path / "out", *SIZE)
    assert "none of the 2 clips can be used; the first: silent.mp4: no sound" in error
    assert not (tmp_path / "out").exists()


def test_a_text_cache_needs_a_released_text_encoder(refused, workdir, tmp_path):
    flags = ("clips.csv", tmp_path / "out", *SIZE, f"--text-cache={tmp_path}/features")
    assert "--text-cache: for a released text encoder only" in refused(prepare.cli, *flags)
    file = workdir / "data" / "records" / "text_encoder.safetensors"
    error = refused(prepare.cli, *flags, f"--text-encoder={file}")
    assert f"--text-cache: {file} holds a random text encoder" in error


def test_a_dataset_that_names_a_released_text_encoder_is_read_through_the_cache(monkeypatch):
    caches = {"features": object.__new__(TextCache)}
    monkeypatch.setattr(prepare, "load_caption_encoder", lambda path, mesh, folder: caches[folder])
    flags = ["t.csv", "out", *SIZE, "--text-encoder=text.safetensors", "--text-cache=features"]
    assert prepare._text_encoder(prepare._parser().parse_args(flags)) is caches["features"]


@pytest.mark.parametrize(("module", "name"), [(prepare, "prepare"), (sample, "sample")])
@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_a_command_in_one_line(module, name, number, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "main", lambda *_: signal.raise_signal(number))
    saved = name == "prepare" and number == signal.SIGTERM  # what is done is kept
    argv = ["--workdir=x"] if name == "sample" else ["t.csv", "out", *SIZE]
    assert entry(name)(argv) == (143 if saved else 130)
    assert capsys.readouterr().err.startswith(f"{name}: interrupted")
    assert signal.getsignal(signal.SIGTERM) == before


# ---- the package ---------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_jax():
    code = (
        "import sys, ltx2_jax; assert 'Pipeline' in dir(ltx2_jax);"
        "print([name for name in ('jax', 'numpy', 'av') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


def test_public_names_are_those_of_their_modules():
    from ltx2_jax.models.transformer import config as transformer_config
    from ltx2_jax.sampling.pipeline import Pipeline

    assert ltx2_jax.Pipeline is Pipeline
    assert ltx2_jax.PRESETS is transformer_config.PRESETS
    for name in ltx2_jax.__all__:
        assert getattr(ltx2_jax, name) is not None
        assert name in dir(ltx2_jax)
    with pytest.raises(AttributeError, match="no attribute 'pipline'"):
        _ = ltx2_jax.pipline
