"""A release of random weights, a few megabytes in the layout of the official files.

    model, gemma = write_release("tiny")

It has the wiring of the distilled 2.3, with a vocoder that lacks the bandwidth extension. What runs
with it runs with the released model; its clips are noise.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ltx2_jax import tokenizer
from ltx2_jax.weights.mapping import Parameter
from ltx2_jax.weights.names import text
from ltx2_jax.weights.networks import NETWORKS

_TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "audio_num_attention_heads": 8,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
    "caption_channels": 32,  # the width of the text encoder
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
    "cross_attention_adaln": True,
    "apply_gated_attention": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000.0,
    "connector_num_layers": 1,
    "connector_apply_gated_attention": True,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_attention_heads": 8,
    "connector_attention_head_dim": 8,
    "audio_connector_num_attention_heads": 8,
    "audio_connector_attention_head_dim": 4,
}
VIDEO_VAE = {
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
_CONFIG = {
    "transformer": _TRANSFORMER,
    "vae": VIDEO_VAE,
    "audio_vae": AUDIO_VAE,
    "vocoder": VOCODER,
}
_GEMMA = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
}
_SENTENCES = ("a red ball bounces on a wooden floor", "a dog barks twice", "rain on a tin roof")
# Networks of the checkpoint and their prefixes in it.
_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "connectors": "model.diffusion_model.",
    "text_projection": "text_embedding_projection.",
    "video_vae": "vae.",
    "audio_vae": "audio_vae.",
    "vocoder": "vocoder.",
}


def write_release(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Writes a checkpoint and a text encoder, the same every time; returns the two.

    The text encoder is a folder, as those on the Hub are; what is there already is replaced.
    """
    folder = Path(folder)
    gemma = folder / "gemma"
    gemma.mkdir(parents=True, exist_ok=True)
    tokenizer.train(_SENTENCES, gemma / "tokenizer.model", 320)
    words = tokenizer.Tokenizer(gemma).vocab_size
    gemma_config = _GEMMA | {"text_config": _GEMMA["text_config"] | {"vocab_size": words}}
    (gemma / "config.json").write_text(json.dumps(gemma_config), encoding="utf-8")
    save_file(_tensors("gemma", gemma_config, "model."), gemma / "model.safetensors")

    tensors: dict[str, np.ndarray] = {}
    for network, prefix in _PREFIXES.items():
        tensors |= _tensors(network, _CONFIG[NETWORKS[network].section], prefix)
    model = folder / "tiny-2.3-distilled.safetensors"
    save_file(tensors, model, {"model_version": "2.3.0", "config": json.dumps(_CONFIG)})
    return model, gemma


def _tensors(network: str, section: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """Random weights of a network under their names in a file."""
    row = NETWORKS[network]
    if network == "text_projection":  # whose number of layers is otherwise read from its weights
        sizes = _GEMMA["text_config"]
        config = text.text_features_config(
            section, width=sizes["hidden_size"], num_layers=sizes["num_hidden_layers"]
        )
    else:
        config = row.config(section, {})
    return {
        prefix + name: _drawn(parameter, network + name)
        for parameter in row.parameters(config, None, {})
        for name in parameter.names
    }


def _drawn(parameter: Parameter, name: str) -> np.ndarray:
    """float32, such that activations stay about as large as they are."""
    shape = parameter.official_shape
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        values /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("std-of-means", "q_norm.weight", "k_norm.weight")):
        values = 1 + 0.1 * np.abs(values)
    else:
        values *= 0.1
    return values.astype(np.float32)
