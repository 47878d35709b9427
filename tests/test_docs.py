"""README and docs say what is true of the code: their commands, Python, names and lists."""

import collections
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from test_layers import FLOORS, GROUND

from ltx2_jax import config, convert, plan, planning

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ltx2_jax"
GOLDEN = ROOT / "tests" / "golden"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in PAGES}


def blocks(text, language):
    """The fenced blocks of a language, "" for those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(text):
    """(name, arguments) of every `python -m ltx2_jax.NAME ...`, in blocks and in sentences."""
    joined = text.replace("\\\n", " ")
    inline = r"`[^`\n]*python -m ltx2_jax\.[^`\n]*`"
    spans = re.findall(inline, joined) + re.sub(inline, "", joined).splitlines()
    for span in spans:
        if match := re.search(r"python -m ltx2_jax\.(\w+)([^`|&;>]*)", span):
            yield match[1], shlex.split(match[2])


COMMANDS = sorted({(page, *c[:1], *c[1]) for page, text in TEXTS.items() for c in commands(text)})


# ---- commands ------------------------------------------------------------------------------------


@pytest.fixture
def parsed_only(monkeypatch):
    """Commands that end where their work would begin."""
    monkeypatch.chdir(ROOT)

    def check_plan(args, overrides):
        plan._check_flags(args, overrides)
        if args.config:
            config.load(args.config, overrides)
        return True

    for name in ("train", "sample", "prepare", "convert"):
        module = importlib.import_module(f"ltx2_jax.{name}")
        monkeypatch.setattr(module, "main", lambda *given: None)
    monkeypatch.setattr(importlib.import_module("ltx2_jax.train"), "status", lambda workdir: "")
    monkeypatch.setattr(plan, "main", check_plan)
    for bench, _ in planning.BENCHES.values():
        monkeypatch.setattr(bench, "run", lambda args: None)


@pytest.mark.usefixtures("parsed_only", "usual_signals")
def test_every_command_that_is_shown_is_accepted(capsys):
    refused = []
    for page, name, *argv in COMMANDS:
        try:
            code = importlib.import_module(f"ltx2_jax.{name}").cli(argv)
        except SystemExit as stop:  # of a flag that the parser does not know, or of --help
            code = stop.code
        if code:
            refused.append((page, name, argv, capsys.readouterr().err.splitlines()[-1]))
    assert refused == []


@pytest.mark.usefixtures("parsed_only", "usual_signals")
@pytest.mark.parametrize(
    "line",
    [
        "python -m ltx2_jax.train --config=configs/quickstart.py --config.optim.lr=1",
        "python -m ltx2_jax.sample --workdir=x --schedul=ltx2",
        "python -m ltx2_jax.plan --what=vae --topology=v6e:2x4 --passes=2",
    ],
)
def test_a_command_that_is_wrong_would_be_seen(line, capsys):
    ((name, argv),) = commands(f"text\n\n    {line}\n")
    with pytest.raises((SystemExit, AssertionError)) as caught:
        assert importlib.import_module(f"ltx2_jax.{name}").cli(argv) == 0
    assert caught.type is AssertionError or caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_readme_starts_with_its_two_commands():
    lines = TEXTS["README.md"].splitlines()
    assert (
        "    pip install -e . && python -m ltx2_jax.train --config=configs/quickstart.py" in lines
    )
    assert any(re.fullmatch(r" {4}pip install -e '\.\[test\]' && pytest .*", x) for x in lines)
    assert len(lines) <= 170


def test_weights_shows_what_inspect_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(TEXTS["docs/weights.md"], "")
    assert shown.rstrip() == convert.inspect("tests/golden/v2.0/checkpoint.safetensors")


# ---- Python --------------------------------------------------------------------------------------


def trained(folder):
    """What train leaves of a run, with weights of zero."""
    import jax
    import numpy as np

    from ltx2_jax.sharding import make_mesh
    from ltx2_jax.training import loop
    from ltx2_jax.training.checkpoint import Checkpoints
    from ltx2_jax.training.state import init_state

    changes = {"workdir": str(folder), "data.synthetic.num_clips": "2"}
    changes |= {f"sample.{stream}_guidance": "1" for stream in ("video", "audio")}
    run = config.load(str(Path(__file__).parent / "resume_config.py"), changes)
    loop.keep_assets(loop.dataset(run), folder / "assets")
    like = jax.eval_shape(functools.partial(init_state, config=run), jax.random.key(0))
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), like)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    workdir = folder / "workdir" / "quickstart"
    trained(workdir)
    for name, path in {
        "ltx-2-19b-dev.safetensors": GOLDEN / "v2.0" / "checkpoint.safetensors",
        "style.safetensors": GOLDEN / "v2.0" / "lora.safetensors",
        "gemma-3-12b-it": GOLDEN / "v2.0" / "gemma",
        "dog.mp4": next(workdir.rglob("*.mp4")),
        # Any codec has the same interface; released ones run in tests/codecs.
        "linear/ltx-2-19b-dev.safetensors": workdir / "assets" / "codec.safetensors",
        "linear/dog.mp4": next(workdir.rglob("*.mp4")),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    ("page", "home", "written"),
    [
        ("README.md", ".", "lamp.mp4"),
        ("docs/codecs.md", "linear", "copy.mp4"),
        ("docs/text.md", ".", None),
        ("docs/weights.md", ".", None),
    ],
)
def test_the_python_of_a_page_runs(page, home, written, folder, monkeypatch):
    monkeypatch.chdir(folder / home)
    names = {}
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block, page, "exec"), names)
    assert written is None or Path(written).stat().st_size > 0


def test_no_page_with_python_is_left_out():
    assert {page for page, text in TEXTS.items() if blocks(text, "python")} == {
        "README.md",
        "docs/codecs.md",
        "docs/text.md",
        "docs/weights.md",
    }


# ---- names and lists -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_modules_that_are_named_exist(page):
    text, home = TEXTS[page], (ROOT / page).parent
    named = re.findall(r"(?<![\w/.])(?:ltx2_jax|configs|tests|docs|\.ci|\.github)/[\w./-]*\w", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [
        path
        for path in re.findall(r"`([\w-]+/[\w/-]+\.py|[\w-]+/(?:[\w-]+/)*)`", text)
        if not any((base / path).exists() for base in (ROOT, PACKAGE)) and path != "samples/"
    ]
    links = re.findall(r"\]\(([^):#]+)\)", text)
    missing += [link for link in links if not (home / link).exists()]
    missing += [name for name in re.findall(r"\bltx2_jax(?:\.\w+)+", text) if not known(name)]
    assert missing == []


def known(name):
    """Whether `ltx2_jax.a.b` is a module, or a name in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:count])
        if base.is_dir() or base.with_suffix(".py").is_file():
            module = importlib.import_module(".".join(parts[:count]))
            return count == len(parts) or hasattr(module, parts[count])
    return False


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_the_list_of_rooms_is_that_of_the_floors(page):
    listed = TEXTS[page].partition("    ltx2_jax/        floor\n")[2].partition("    configs/")[0]
    # A room, its floor, and what it holds; where there are several, the floor is on a line below.
    rows = re.findall(r"^ {6}(\S[a-z_/ ]*?)\s+(\d+)   \S", listed, re.MULTILINE)
    floors = {name.strip("/"): int(floor) for names, floor in rows for name in names.split()}
    assert floors == FLOORS | dict.fromkeys(GROUND, 0)
    assert len(listed.splitlines()) <= 24


def test_exactness_lists_the_groups_and_cases_of_the_golden_data():
    counts = collections.defaultdict(lambda: [0, 0, 0])
    for i, release in enumerate(("v2.0", "v2.3", "v2.5")):
        cases = json.loads((GOLDEN / release / "cases.json").read_text())["cases"]
        for case in cases:
            counts[case["name"].split("/")[0]][i] += 1
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\| (\d+) \| (\d+) \| (\d+) \| (.*?) \|$",
        TEXTS["docs/exactness.md"],
        re.MULTILINE,
    )
    assert {name: list(map(int, cells)) for name, *cells, _ in rows} == counts
    assert not [name for name, *_, agrees in rows if "not" in agrees]
