"""The house: rooms stand on floors, and a room imports from floors below its own alone."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ltx2_jax"

COMMANDS = {"train", "sample", "prepare", "convert", "plan", "bench"}
FLOORS = {
    **dict.fromkeys(COMMANDS, 10),
    "planning": 9,
    "sampling": 8,
    "training": 7,
    "evaluation": 7,
    "data": 6,
    "config": 6,
    "text": 5,
    "codecs": 5,
    "demo": 4,
    "weights": 3,
    "diffusion": 2,
    "media": 2,
    "tokenizer": 2,
    "models": 1,
}
# On the ground; they may import each other, as one room does.
GROUND = {
    "blobs", "chips", "command", "errors", "fields", "files", "hosts", "rounding", "sharding",
    "stop_signals", "units",
}  # fmt: skip
# Libraries that one module alone knows; of PyAV, one knows how to read and one how to write.
ALONE = {
    "orbax": ["training/checkpoint.py"],
    "grain": ["data/loader.py"],
    "av": ["media/reading.py", "media/writing.py"],
    "sentencepiece": ["tokenizer.py"],
}


def room(module: str) -> str:
    """ "ltx2_jax.models.text.gemma" -> "models"."""
    return module.split(".")[1]


def imports(source: str) -> set[str]:
    """Names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def faults(path: str, source: str) -> list[str]:
    """What a file of the package, at `path` below it, may not import."""
    ours = path.removesuffix(".py").split("/")[0]
    if ours == "__init__":
        return []
    found = []
    for name in sorted(imports(source)):
        if name.split(".")[0] != "ltx2_jax" or name == "ltx2_jax.__version__":
            continue
        theirs = room(name)
        same = theirs == ours or (ours in GROUND and theirs in GROUND)
        if not same and FLOORS.get(theirs, 0) >= FLOORS.get(ours, 0):
            found.append(f"{path} imports {name}")
    return found


FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def test_no_room_imports_from_its_own_floor_or_from_above():
    assert [line for path in FILES for line in faults(path, (PACKAGE / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("models/layers.py", "from ltx2_jax.weights import mapping"),
        ("text/encoder.py", "from ltx2_jax.codecs.codec import load_codec"),
        ("files.py", "import ltx2_jax.models.layers"),
        ("training/loop.py", "def f():\n    from ltx2_jax.sampling import pipeline"),
        ("sample.py", "from ltx2_jax import train"),
    ],
)
def test_an_import_to_the_side_or_upwards_is_a_fault(path, line):
    assert len(faults(path, line)) == 1


def test_every_module_has_a_floor():
    rooms = {path.removesuffix(".py").split("/")[0] for path in FILES} - {"__init__"}
    assert rooms == FLOORS.keys() | GROUND


def test_libraries_that_may_change_are_known_where_they_are_at_home():
    for library, homes in ALONE.items():
        users = [
            path
            for path in FILES
            if library in {name.split(".")[0] for name in imports((PACKAGE / path).read_text())}
        ]
        assert users == homes
