"""Cases of the golden data and the checkpoints beside them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ltx2_jax.weights import files


@dataclass(frozen=True)
class Case:
    folder: Path
    spec: dict

    @property
    def name(self) -> str:
        return self.spec["name"]

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


@cache
def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


# The files of the split layout; those of the single-file layout are all in one.
SPLIT = {
    "video_vae": "video_vae_conv",
    "video_vae_diffusion": "video_vae_diffusion",
    "audio_vae": "audio_vae",
    "vocoder": "audio_vae",
    "duration_head": "duration_head",
}


@cache
def component(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Config section and tensors of a component, in the single-file or in the split layout."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        path = folder / "split" / f"{SPLIT[name]}.safetensors"
    return component_of(path, "video_vae" if name == "video_vae_diffusion" else name)


@cache
def component_of(path: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The same of one file."""
    return files.read_config(path, name), files.read_tensors(path, name)
