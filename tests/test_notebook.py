"""The notebook runs top to bottom, and every clip in it shows itself."""

import ast
import json
from pathlib import Path

import pytest

from ltx2_jax.media.media import Clip, read_clip
from ltx2_jax.weights.sources import open_release

NOTEBOOK = json.loads(
    (Path(__file__).parents[1] / "docs" / "ltx2_jax_colab.ipynb").read_text("utf-8")
)
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(source, names):
    """Runs a cell; what its last line evaluates to, which a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All cells run in one namespace: the namespace, what they showed, and their folder."""
    folder, names = tmp_path_factory.mktemp("notebook"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shown = [run(source, names) for source in CODE]
    return names, [x for x in shown if x is not None], folder


def test_every_cell_runs_and_its_clips_show_themselves(ran):
    names, shown, folder = ran
    wanted = ("clip", "from_picture", "with_sound", "guided")
    clips = [x for x in shown if isinstance(x, Clip)]
    assert [id(clip) for clip in clips] == [id(names[name]) for name in wanted]
    for clip in clips:
        assert clip._repr_html_().startswith("<video controls")
        assert clip.video.shape == (17, 128, 128, 3)
        assert clip.audio.shape == (round(17 / 24 * 24000), 2)
    assert names["spread"].mesh.size == 8
    assert read_clip(folder / "ball.mp4").video.shape == clips[0].video.shape


def test_the_tiny_release_is_read_as_a_released_distilled_one(ran):
    names, _, folder = ran
    assert (names["pipe"].release, names["pipe"].maker.files.kind) == ("2.3", "distilled")
    with open_release(folder / names["model"]) as release:
        assert len(release.networks) == 6
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 4 * 2**20


def test_the_notebook_is_stored_without_results():
    assert (NOTEBOOK["nbformat"], len({cell["id"] for cell in NOTEBOOK["cells"]})) == (
        4,
        len(NOTEBOOK["cells"]),
    )
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
