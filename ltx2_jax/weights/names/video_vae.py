"""The video VAE under its official names, and its config in released metadata.

Source: `ltx_core/model/video_vae/model_configurator.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.video_vae import Block, VideoVAE, VideoVAEConfig
from ltx2_jax.models.layers import Rngs
from ltx2_jax.weights.mapping import inside

CONV_CLASS = "CausalVideoAutoencoder"  # any other class has a decoder of another kind

# ---- names: ours -> official ---------------------------------------------------------------------


def _weights(modules: Mapping[str, str]) -> dict[str, str]:
    leaves = {"kernel": "weight", "bias": "bias"}
    return {
        f"{module}.{leaf}": f"{modules[module]}.{leaves[leaf]}"
        for module in modules
        for leaf in leaves
    }


def _timestep_mlp(official: str) -> dict[str, str]:
    rows = _weights({"linear_1": "linear_1", "linear_2": "linear_2"})
    return inside("timestep_mlp", f"{official}.timestep_embedder", rows)


_CONV = _weights({"conv": "conv"})
_RESIDUAL = {
    **inside("conv1", "conv1", _CONV),
    **inside("conv2", "conv2", _CONV),
    **_weights({"shortcut": "conv_shortcut"}),
    "shortcut_norm.scale": "norm3.weight",
    "shortcut_norm.bias": "norm3.bias",
    "noise_scale1": "per_channel_scale1",
    "noise_scale2": "per_channel_scale2",
    "table": "scale_shift_table",
}
_BLOCK = {
    **_RESIDUAL,
    **inside("layers.{}", "res_blocks.{}", _RESIDUAL),
    **_timestep_mlp("time_embedder"),
    **_CONV,  # a strided convolution
    **inside("conv", "conv", _CONV),  # that of a space-to-depth or depth-to-space
    **_weights({"qkv": "to_qkv", "out": "proj"}),
    "norm_scale": "norm.gamma",
}
_ENDS = inside("conv_in", "conv_in", _CONV) | inside("conv_out", "conv_out", _CONV)
_LAST = {
    **_timestep_mlp("last_time_embedder"),
    "timestep_scale": "timestep_scale_multiplier",
    "table": "last_scale_shift_table",
}
STATISTICS = {
    "mean": "per_channel_statistics.mean-of-means",
    "std": "per_channel_statistics.std-of-means",
}
TABLE = {
    **inside("encoder", "encoder", _ENDS | inside("blocks.{}", "down_blocks.{}", _BLOCK)),
    **inside("decoder", "decoder", _ENDS | _LAST | inside("blocks.{}", "up_blocks.{}", _BLOCK)),
    **{f"statistics.{ours}": name for ours, name in STATISTICS.items()},
}


def create(cfg: VideoVAEConfig) -> VideoVAE:
    """The VAE of a config, with weights that mean nothing."""
    return VideoVAE(cfg, rngs=Rngs(0))


# ---- config --------------------------------------------------------------------------------------

# Any other value of these means a network that this code does not compute.
ASSERTED = {"dims": 3, "norm_layer": "pixel_norm"}


def video_vae_config(metadata: Mapping[str, Any], **overrides: Any) -> VideoVAEConfig:
    """The `vae` section of a released file's config -> `VideoVAEConfig`.

    Both forms are read: the flat one, and the one that has a section `encoder` beside the section
    of a diffusion decoder; its `decoder_blocks` are None. `overrides` are our own fields
    (`dtype`, or None for the blocks of a half that is not wanted).

    Raises:
      UserError: a block, a padding mode or a value of an asserted constant that is not supported.
    """
    encoder = metadata.get("encoder", metadata)
    for section in (metadata, encoder):
        for key, value in ASSERTED.items():
            if section.get(key, value) != value:
                raise UserError(f"vae config: {key}={section[key]!r}, only {value!r} is supported")
    latents = metadata.get("latent_channels", 128)
    if "encoder" in metadata:
        latents = encoder.get("out_channels", latents)
        encoder_blocks = encoder.get("blocks", encoder.get("encoder_blocks", ()))
    else:
        encoder_blocks = metadata.get("encoder_blocks", ())
    decoder_blocks = None
    if metadata.get("_class_name", CONV_CLASS) == CONV_CLASS:
        decoder_blocks = _blocks(metadata.get("decoder_blocks", ()), _DECODER_SETTINGS)
    fields = {
        "latent_channels": latents,
        "in_channels": encoder.get("in_channels", 3),
        "out_channels": metadata.get("out_channels", 3),
        "patch_size": encoder.get("patch_size", 4),
        "encoder_blocks": _blocks(encoder_blocks, _ENCODER_SETTINGS),
        "decoder_blocks": decoder_blocks,
        "decoder_base_channels": metadata.get("decoder_base_channels", 128),
        # The decoder's mode wins over the encoder's own key; so it is upstream.
        "encoder_padding": encoder.get(
            "spatial_padding_mode", metadata.get("encoder_spatial_padding_mode", "zeros")
        ),
        "decoder_padding": metadata.get("spatial_padding_mode", "reflect"),
        "causal_decoder": metadata.get("causal_decoder", False),
        "timestep_conditioning": metadata.get("timestep_conditioning", True),
        "latent_log_var": encoder.get("latent_log_var", "uniform"),
    }
    return VideoVAEConfig(**(fields | overrides))


# What each kind of block reads of its settings, and the default where it is absent.
_ENCODER_SETTINGS = {
    "res_x": {"num_layers": 1},
    "res_x_y": {"multiplier": 2},
    "compress_time_res": {"multiplier": 2},
    "compress_space_res": {"multiplier": 2},
    "compress_all_res": {"multiplier": 2},
    "compress_all_x_y": {"multiplier": 2},
}
_DECODER_SETTINGS = {
    "res_x": {"num_layers": 1, "inject_noise": False},
    "res_x_y": {"multiplier": 2, "inject_noise": False},
    "compress_time": {"multiplier": 1},
    "compress_space": {"multiplier": 1},
    "compress_all": {"multiplier": 1, "residual": False},
}


def _blocks(entries: Iterable, settings: Mapping[str, Mapping[str, Any]]) -> tuple[Block, ...]:
    """Blocks of a list of pairs (kind, settings or number of layers)."""
    blocks = []
    for kind, given in entries:
        if isinstance(given, int):
            given = {"num_layers": given}
        read = {key: given.get(key, default) for key, default in settings.get(kind, {}).items()}
        if "num_layers" in read:
            read["layers"] = read.pop("num_layers")
        blocks.append(Block(kind, **read))
    return tuple(blocks)
