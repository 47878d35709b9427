"""A released codec of the real geometry and tiny networks, as files in the official layout."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ltx2_jax.demo.tiny_release import AUDIO_VAE, VIDEO_VAE, VOCODER
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import audio_vae, video_vae, vocoder


def tensors() -> dict[str, dict[str, np.ndarray]]:
    """Network -> random tensors under official names, without prefix."""
    made = {
        "vae": (video_vae, video_vae.video_vae_config(VIDEO_VAE)),
        "audio_vae": (audio_vae, audio_vae.audio_vae_config(AUDIO_VAE)),
        "vocoder": (vocoder, vocoder.vocoder_config(VOCODER)),
    }
    rng = np.random.default_rng(0)
    result = {}
    for name, (weights, config) in made.items():
        params: dict = {}
        for path, leaf in mapping.abstract_params(partial(weights.create, config)).items():
            gain = np.sqrt(leaf.size / leaf.shape[-1]) if len(leaf.shape) > 1 else 10
            value = rng.normal(size=leaf.shape).astype(np.float32) / gain
            mapping.insert(params, path, np.abs(value) + 0.5 if path[-1] == "std" else value)
        table = weights.table(config) if weights is vocoder else weights.TABLE
        parameters = mapping.parameters(partial(weights.create, config), table)
        result[name] = mapping.to_official(params, parameters)
    return result


def write(folder: Path, *, split: bool = False, version: str = "2.0.0", **sections) -> list[Path]:
    """The codec in one file, or with the video VIDEO_VAE under bare names in a file of its own.

    sections: replace sections of the config.
    """
    config = {"vae": VIDEO_VAE, "audio_vae": AUDIO_VAE, "vocoder": VOCODER} | sections
    networks = tensors()
    files = [("all.safetensors", ("vae", "audio_vae", "vocoder"))]
    if split:
        files = [("video.safetensors", ("vae",)), ("audio.safetensors", ("audio_vae", "vocoder"))]
    paths = []
    for file, names in files:
        prefix = {name: "" if split and name == "vae" else f"{name}." for name in names}
        metadata = {
            "model_version": version,
            "config": json.dumps({name: config[name] for name in names}),
        }
        values = {prefix[n] + key: v for n in names for key, v in networks[n].items()}
        save_file(values, folder / file, metadata)
        paths.append(folder / file)
    return paths
