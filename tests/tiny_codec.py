"""A released codec of the real geometry and tiny networks, as files in the official layout."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import audio_vae, video_vae, vocoder

VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "latent_channels": 4,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 2}],
        ["compress_time_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 1}],
        ["compress_all_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [["compress_all", {}], ["compress_all", {}], ["compress_all", {}]],
    "decoder_base_channels": 8,
    "spatial_padding_mode": "zeros",
    "timestep_conditioning": False,
}
AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "ch": 4,
                "ch_mult": [1, 1, 1],
                "num_res_blocks": 1,
                "z_channels": 2,
                "attn_resolutions": [],
                "mid_block_add_attention": False,
            }
        }
    }
}
VOCODER = {
    "upsample_initial_channel": 4,
    "upsample_rates": [16, 15],
    "upsample_kernel_sizes": [16, 15],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1]],
    "output_sampling_rate": 24000,
}


def tensors() -> dict[str, dict[str, np.ndarray]]:
    """Network -> random tensors under official names, without prefix."""
    made = {
        "vae": (video_vae, video_vae.video_vae_config(VAE)),
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
    """The codec in one file, or with the video VAE under bare names in a file of its own.

    sections: replace sections of the config.
    """
    config = {"vae": VAE, "audio_vae": AUDIO_VAE, "vocoder": VOCODER} | sections
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
