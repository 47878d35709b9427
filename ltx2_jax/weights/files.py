"""Components of released safetensors files: their tensors without prefix and their config.

A file holds several components under prefixes (the single-file layout) or one with bare names (the
split pack); the `config` JSON in its metadata has one section per component either way.
Source: `ltx_core/model/*/model_configurator.py` (prefixes), `ltx_core/loader` (metadata).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ltx2_jax.errors import UserError

# Component -> its prefixes, in the order in which they are tried, and its section of the config
# ("" is the whole of it). Only a file that has no longer prefix has the bare names.
PREFIXES = {
    "video_vae": (("vae.", ""), "vae"),
    "audio_vae": (("audio_vae.",), "audio_vae"),
    "vocoder": (("vocoder.",), "vocoder"),
    "duration_head": (("duration_head.",), "duration_head"),
    "upsampler": (("",), ""),
}


def read_component(
    path: str | Path, component: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config section and the tensors, prefix removed, of one component of a file.

    Bfloat16 tensors stay bfloat16 (`ml_dtypes`).

    Raises:
      UserError: the file is missing or unreadable, has no such component, or no config for it.
    """
    path = Path(path)
    prefixes, section = PREFIXES[component]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            config = _config(path, file.metadata() or {}, section)
            for prefix in prefixes:
                names = [name for name in file.keys() if name.startswith(prefix)]
                if names:
                    break
            tensors = {name[len(prefix) :]: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if not tensors:
        raise UserError(f"{path}: has no {component} (no tensor named {prefixes[0]}...)")
    return config, tensors


def _config(path: Path, metadata: Mapping[str, str], section: str) -> dict[str, Any]:
    try:
        config = json.loads(metadata["config"])
        return config[section] if section else config
    except KeyError as error:
        raise UserError(f"{path}: its metadata has no {error.args[0]!r} section") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: the config in its metadata is not JSON: {error}") from None
