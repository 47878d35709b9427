"""Cases of the golden data and the checkpoints beside them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release


@dataclass(frozen=True)
class Case:
    folder: Path
    spec: dict
    checkpoints: Path | None = None  # of training cases: the folder of the golden data they name

    @property
    def name(self) -> str:
        return self.spec["name"]

    @property
    def id(self) -> str:
        """Its name, and the file that some groups have a case for."""
        return "/".join(filter(None, (self.name, self.args.get("file"))))

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def args(self) -> dict:
        return self.spec.get("args", {})

    @property
    def data(self):
        return self.spec["data"]

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: self._fetch(key) for name, key in self.spec["inputs"].items()}

    def expected(self) -> dict[str, np.ndarray]:
        return {name: self._fetch(key) for name, key in self.spec["outputs"].items()}

    def _fetch(self, key):
        io = read_tensors(self.folder / "io.safetensors")
        return [io[k] for k in key] if isinstance(key, list) else io[key]


def load_cases(golden_dir: Path) -> list[Case]:
    files = sorted(golden_dir.glob("*/cases.json"))
    if not files:
        raise pytest.UsageError(f"--golden-dir={golden_dir}: no */cases.json there")
    return [
        Case(file.parent, spec) for file in files for spec in json.loads(file.read_text())["cases"]
    ]


def load_set(folder: Path, checkpoints: Path) -> list[Case]:
    """The cases of golden training data, which is one set."""
    file = folder / "cases.json"
    if not file.is_file():
        raise pytest.UsageError(f"--golden-training-dir={folder}: no cases.json there")
    return [Case(folder, spec, checkpoints) for spec in json.loads(file.read_text())["cases"]]


@cache
def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


# The files of the split layout; those of the single-file layout are all in one.
SPLIT = {
    "transformer": "transformer",
    "connectors": "transformer",
    "video_vae": "video_vae_conv",
    "diffusion_decoder": "video_vae_diffusion",
    "audio_vae": "audio_vae",
    "vocoder": "audio_vae",
    "duration_head": "duration_head",
}


def file_of(folder: Path, network: str) -> Path:
    """The file that holds a network, in the single-file or in the split layout."""
    path = folder / "checkpoint.safetensors"
    return path if path.exists() else folder / "split" / f"{SPLIT[network]}.safetensors"


@cache
def release_of(path: Path) -> Release:
    return open_release(path)


def load(path: Path, network: str, **overrides) -> Any:
    """The float32 network of a file; `overrides` are fields of its config."""
    return release_of(path).module(network, param_dtype="float32", **overrides)


def tensors_of(path: Path, network: str) -> dict[str, np.ndarray]:
    """Official tensors of a network, by their names without prefix."""
    held = release_of(path).networks[network]
    return {name: file.read(full) for name, (file, full) in held.tensors.items()}
