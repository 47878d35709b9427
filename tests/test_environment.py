"""What stands in the environment of other people's machines changes no result."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from ltx2_jax import command
from ltx2_jax.config import FlowConfig
from ltx2_jax.diffusion import flow
from ltx2_jax.errors import UserError
from ltx2_jax.sampling import programs
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training.objective import draw


def one_device():
    return jax.set_mesh(make_mesh(devices=jax.devices()[:1]))


def of_training():
    key = jax.random.key(3)
    config = tiny.config(flow=FlowConfig(first_frame_prob=0.5, caption_dropout=0.5))
    with one_device():
        drawn = draw(key, tiny.batch(8), config, tiny.STRIDES)
    video, audio = drawn["video"], drawn["audio"]
    return video.noise, audio.noise, video.sigma, audio.sigma, video.given, drawn["drop_caption"]


def of_sampling():
    class Model:
        class transformer:
            cfg = tiny.config().model

    request = programs.Request((2, 2, 4), 5, 1, tiny.STRIDES, 24.0)
    with one_device():
        noise = programs.noise(Model, request, np.arange(3), jax.random.key(3))
    return tuple(noise)


def of_sigmas():
    key = jax.random.key(3)
    return flow.sample_sigmas(key, (64,), 1000), flow.uniform_sigmas(key, (64,))


@pytest.mark.parametrize("draws", [of_training, of_sampling, of_sigmas])
def test_double_precision_changes_no_draw(draws):
    usual = draws()
    with jax.enable_x64(True):
        double = draws()
    for a, b in zip(usual, double, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_commands_compute_in_single_precision_whatever_the_environment(monkeypatch):
    with jax.enable_x64(True):
        monkeypatch.setattr(jax.config, "update", lambda name, value: seen.append((name, value)))
        seen = []
        assert command.run("name", lambda: None) == 0
    assert ("jax_enable_x64", False) in seen


def test_a_backend_of_an_older_matplotlib_ends_no_command():
    env = os.environ | {"MPLBACKEND": "Qt4Agg"}
    code = (
        "import numpy as np; from ltx2_jax.media.media import Clip; "
        "from ltx2_jax.evaluation.contact_sheet import contact_sheet; "
        "contact_sheet('/dev/null/no', [Clip(np.zeros((2, 8, 8, 3), np.uint8), 2, None, 1)], ['a'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "UserError: /dev/null/no: cannot be written" in done.stderr


def test_what_a_terminal_cannot_show_is_escaped():
    code = (
        "import sys; from ltx2_jax import command; "
        "sys.exit(command.run('name', lambda: print('skipped \\u00fc.mp4')))"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"skipped \\xfc.mp4\n")


def test_commands_end_with_a_line_and_a_code(capsys):
    def mistake():
        raise UserError("--flag: wrong")

    def interrupted():
        raise KeyboardInterrupt

    assert command.run("name", lambda: 1) == 1
    assert command.run("name", mistake) == 2
    assert command.run("name", interrupted, interrupted="nothing was written") == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["name: error: --flag: wrong", "name: interrupted; nothing was written"]


def test_a_command_whose_reader_went_away_ends_without_a_word(capfd):
    def printing_into_head():
        raise BrokenPipeError

    assert command.run("name", printing_into_head) == 141
    assert capfd.readouterr().err == ""


def test_a_flag_is_written_in_full():
    """What only begins like one is left over, and refused with all that nobody knows."""
    parser = command.parser("name", "what it does", "example")
    parser.add_argument("--topology")
    known, rest = parser.parse_known_args(["--topology=a", "--topo=b"])
    assert (known.topology, rest) == ("a", ["--topo=b"])
