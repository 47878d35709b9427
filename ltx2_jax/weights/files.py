"""Components of released safetensors files: their tensors without prefix and their config.

A file holds several components under prefixes (the single-file layout) or one with bare names (the
split pack); the `config` JSON in its metadata has one section per component either way.
Source: `ltx_core/model/*/model_configurator.py` (prefixes), `ltx_core/loader` (metadata).
"""

import contextlib
import json
from collections.abc import Iterator
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


# What the bare names of the split pack's video VAE start with.
_BARE_VIDEO_VAE = ("encoder.", "decoder.", "per_channel_statistics.")


def components(path: str | Path) -> set[str]:
    """The components of a file, of those in `PREFIXES`; empty for a file of something else.

    Raises:
      UserError: the file is missing or unreadable.
    """
    with _opened(path) as file:
        names = list(file.keys())
    found = {
        component
        for component, (prefixes, _) in PREFIXES.items()
        if prefixes[0] and any(name.startswith(prefixes[0]) for name in names)
    }
    return found or ({"video_vae"} if any(n.startswith(_BARE_VIDEO_VAE) for n in names) else set())


def metadata(path: str | Path) -> dict[str, str]:
    """A file's metadata; `model_version` ("2.3.0") and `config` (JSON) in released ones.

    Raises:
      UserError: the file is missing or unreadable.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def read_config(path: str | Path, component: str) -> dict[str, Any]:
    """The section of a file's config that describes `component`.

    Raises:
      UserError: the file is missing or unreadable, or has no such section.
    """
    section = PREFIXES[component][1]
    try:
        config = json.loads(metadata(path)["config"])
        if component == "duration_head":  # its defaults are the released values
            return config.get(section, {})
        return config[section] if section else config
    except KeyError as error:
        raise UserError(f"{path}: its metadata has no {error.args[0]!r} section") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: the config in its metadata is not JSON: {error}") from None


def read_tensors(path: str | Path, component: str) -> dict[str, np.ndarray]:
    """The tensors of one component of a file, prefix removed; bfloat16 ones stay bfloat16.

    Raises:
      UserError: the file is missing or unreadable, or has no such component.
    """
    prefixes, _ = PREFIXES[component]
    with _opened(path) as file:
        for prefix in prefixes:
            starts = _BARE_VIDEO_VAE if (component, prefix) == ("video_vae", "") else (prefix,)
            names = [name for name in file.keys() if name.startswith(starts)]
            if names:
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    raise UserError(f"{path}: has no {component} (no tensor named {prefixes[0]}...)")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
