"""What is seen of a training elsewhere: numbers and clips in TensorBoard and Weights & Biases."""

import dataclasses
import io
import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
from PIL import Image

from ltx2_jax.config import MetricsConfig
from ltx2_jax.errors import UserError
from ltx2_jax.media.gif import gif
from ltx2_jax.media.media import Clip
from ltx2_jax.training import boards
from ltx2_jax.training.boards import Shown, weights_and_biases
from ltx2_jax.training.metrics import MetricsLogger, last_row, read_metrics


def png():
    file = io.BytesIO()
    Image.new("RGB", (31, 17), "red").save(file, "PNG")
    return file.getvalue()


FRAMES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((16, 24, 3), 40, np.uint8)
TONE = np.sin(np.arange(8000)[:, None] / [9.0, 7.0]).astype(np.float32) * 1.25  # above full scale
CLIP = Clip(FRAMES, 12.0, TONE, 16000)
SHOWN = Shown([CLIP], ["a dog barks"], png(), {"val_sync_lag_ms": 21.5})


# ------------------------------------------------------------------------------------- TensorBoard


def events(folder):
    """Of all event files: [length, its checksum, the event, its checksum] again and again."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_clips_are_in_the_event_file_as_moving_pictures_and_sound(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=9, bar=False) as logger:
        logger.log(3, {"loss": 2.0})
        logger.show(3, SHOWN)
    assert capsys.readouterr().out == ""  # it prints a line for every sound that is too loud
    found = {v.tag: (e.step, v) for e in events(tmp_path / "tensorboard") for v in e.summary.value}
    assert {step for step, _ in found.values()} == {3}
    value = {tag: value for tag, (_, value) in found.items()}
    assert value["val_sync_lag_ms"].simple_value == 21.5
    picture = value["clips/0/picture"]
    assert picture.metadata.summary_description == "a dog barks"
    assert (picture.image.height, picture.image.width) == (16, 24)
    with Image.open(io.BytesIO(picture.image.encoded_image_string)) as moving:
        assert (moving.format, moving.n_frames, moving.size) == ("GIF", 6, (24, 16))
        for number, frame in enumerate(FRAMES):
            moving.seek(number)
            np.testing.assert_array_equal(np.asarray(moving.convert("RGB")), frame)
    sound = value["clips/0/sound"].audio
    assert (sound.sample_rate, sound.num_channels, sound.length_frames) == (16000, 2, 8000)
    samples, rate = soundfile.read(io.BytesIO(sound.encoded_audio_string))
    assert rate == 16000
    np.testing.assert_allclose(samples, np.clip(TONE, -1, 1), atol=2**-14)
    sheet = value["clips/sheet"].image
    assert (sheet.height, sheet.width, sheet.encoded_image_string) == (17, 31, png())


def test_a_step_has_one_row_whatever_is_known_later(tmp_path):
    for start in (0, 3):
        with MetricsLogger(tmp_path, total_steps=9, start_step=start, bar=False) as logger:
            for step in range(start + 1, 5):
                logger.log(step, {"loss": float(step)})
                if step == 3:
                    logger.show(step, SHOWN)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2] == {"step": 3, "loss": 3.0, "val_sync_lag_ms": 21.5}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    with MetricsLogger(tmp_path, total_steps=9, start_step=3, bar=False):
        assert last_row(tmp_path) == rows[2]


def test_without_tensorboard_and_of_other_hosts_nothing_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for process in (0, 1):
        with MetricsLogger(tmp_path, total_steps=9, process_index=process, bar=False) as logger:
            logger.show(3, SHOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capsys.readouterr().err == ""


def test_what_cannot_be_shown_is_told_and_ends_no_training(tmp_path, capsys):
    odd = dataclasses.replace(CLIP, video=FRAMES[..., :1])
    with MetricsLogger(tmp_path, total_steps=9, bar=False) as logger:
        logger.show(3, dataclasses.replace(SHOWN, clips=[odd]))
        logger.log(4, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [3, 4]
    assert "warning: the clips of step 3 cannot be shown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fps", "frames", "shown", "seconds"), [(12, 25, 25, 2.08), (24, 24, 24, 1.0), (60, 60, 30, 1)]
)
def test_a_gif_lasts_as_long_as_the_clip_and_is_not_too_large(fps, frames, shown, seconds):
    video = np.random.default_rng(0).integers(0, 255, (frames, 20, 60, 3)).astype(np.uint8)
    file, height, width = gif(video, fps, longest=30)
    with Image.open(io.BytesIO(file)) as moving:
        assert (moving.n_frames, moving.size) == (shown, (30, 10)) == (shown, (width, height))
        times = []
        for number in range(shown):
            moving.seek(number)
            times.append(moving.info["duration"] / 1000)
        assert moving.info["loop"] == 0
    assert sum(times) == pytest.approx(seconds)
    assert max(times) - min(times) < 0.011


# ------------------------------------------------------------------------------- Weights & Biases


class Service(ModuleType):
    """A stand-in for the package wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.axes, self.ends = [], [], [], []
        self.refuses = self.fails = None
        self.Settings = lambda **settings: SimpleNamespace(**settings)
        self.Audio = lambda data, rate, caption: ("sound", len(data), rate, caption)
        self.Image = lambda picture, caption: ("image", picture.size, caption)

    def Video(self, path, caption, format):
        assert (Path(path).read_bytes()[4:8], format) == (b"ftyp", "mp4")
        return "film", caption

    def init(self, **settings):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.begun.append(settings)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        if self.fails:
            raise ConnectionError(self.fails)
        self.rows.append(row)

    def finish(self, exit_code):
        self.ends.append(exit_code)
        if self.fails:
            raise ConnectionError(self.fails)


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    return service


@pytest.fixture
def config(tmp_path):
    return tiny.config(workdir=str(tmp_path), metrics=MetricsConfig(wandb="team/films"))


def logged(config, board, *steps):
    start = steps[0] - 1
    settings = {"total_steps": 9, "start_step": start, "wandb": board, "bar": False}
    with MetricsLogger(config.workdir, **settings) as logger:
        for step in steps:
            logger.log(step, {"loss": 1.0 / step})
        logger.show(steps[-1], SHOWN)


def test_a_run_is_sent_with_its_steps_and_its_clips(service, config):
    with weights_and_biases(config) as board:
        logged(config, board, 1, 2)
    (begun,) = service.begun
    assert (begun["entity"], begun["project"]) == ("team", "films")
    assert begun["config"]["num_steps"] == config.num_steps
    assert begun["dir"] == config.workdir
    # By the run's own count of steps: those taken again after a restart come a second time.
    assert service.axes == [("step", None), ("*", "step")]
    assert service.rows[:3] == [
        {"loss": 1.0, "step": 1},
        {"loss": 0.5, "step": 2},
        {"val_sync_lag_ms": 21.5, "step": 2},
    ]
    assert service.rows[3] == {
        "clips": [("film", "step 2: a dog barks")],
        "sheet": ("image", (31, 17), "step 2"),
        "step": 2,
    }
    assert service.ends == [0]


def test_sound_alone_is_sent_as_sound(service, config):
    alone = Clip(np.zeros((0, 0, 0, 3), np.uint8), 24.0, TONE, 24000)
    with weights_and_biases(config) as board:
        board.show(4, Shown([alone], ["rain"]))
    assert service.rows == [{"sounds": [("sound", 8000, 24000, "step 4: rain")], "step": 4}]


def test_clips_that_cannot_be_sent_are_told_and_numbers_go_on(service, config, capsys):
    odd = dataclasses.replace(CLIP, video=FRAMES[:, :15])
    settings = {"total_steps": 9, "bar": False}
    with weights_and_biases(config) as board:
        with MetricsLogger(config.workdir, wandb=board, **settings) as logger:
            logger.show(3, Shown([odd], ["rain"]))
            logger.log(4, {"loss": 1.0})
    assert service.rows == [{"loss": 1.0, "step": 4}]
    assert "warning: the clips of step 3 cannot be shown" in capsys.readouterr().err


def test_a_run_that_is_started_again_goes_on_with_its_own(service, config):
    for _ in range(2):
        with weights_and_biases(config):
            pass
    other = dataclasses.replace(config, metrics=MetricsConfig(wandb="other"))
    with weights_and_biases(other):
        pass
    first, again, third = (begun["id"] for begun in service.begun)
    assert first == again != third
    assert {begun["resume"] for begun in service.begun} == {"allow"}
    kept = json.loads((Path(config.workdir) / "wandb.json").read_text())
    assert kept == {"team/films": first, "other": third}
    assert (service.begun[2]["entity"], service.begun[2]["project"]) == (None, "other")


def test_a_missing_package_and_a_failed_login_are_one_line_and_leave_nothing(
    service, config, monkeypatch
):
    service.refuses = "api_key not configured (no-tty).\nCall wandb.login"
    with pytest.raises(UserError, match=r"wandb=team/films: no run can .*tty\). Call.*`wandb log"):
        with weights_and_biases(config):
            pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"metrics.wandb=team/films: .*'ltx2_jax\[wandb\]'"):
        with weights_and_biases(config):
            pass
    assert list(Path(config.workdir).iterdir()) == []


def test_a_start_that_cannot_reach_the_run_of_an_earlier_one_trains_without(
    service, config, capsys
):
    with weights_and_biases(config):
        pass
    service.refuses = "no route to host"
    with weights_and_biases(config) as board:
        assert board is None
    assert "(no route to host); this start trains without it" in capsys.readouterr().err


def test_a_network_that_fails_later_is_told_once_and_ends_nothing(service, config, capsys):
    with weights_and_biases(config) as board:
        service.fails = "broken pipe"
        logged(config, board, 1, 2, 3)
    assert [row["step"] for row in read_metrics(config.workdir)] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("Weights & Biases gets no more of this run (broken pipe)") == 1
    assert "may lack the end of this run (broken pipe)" in said


def test_a_run_that_fails_ends_as_failed(service, config):
    with pytest.raises(RuntimeError, match="diverged"), weights_and_biases(config):
        raise RuntimeError("diverged")
    assert service.ends == [1]


def test_process_0_alone_sends(service, config, monkeypatch):
    monkeypatch.setattr(boards.hosts, "index", lambda: 1)
    with weights_and_biases(config) as board:
        assert board is None
    assert not service.begun


@pytest.mark.parametrize("project", ["", "a/b/c", "/b", "a/"])
def test_a_project_is_a_name_or_one_below_an_entity(project):
    with pytest.raises(UserError, match="is not PROJECT or ENTITY/PROJECT"):
        MetricsConfig(wandb=project)
