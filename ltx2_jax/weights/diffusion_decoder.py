"""The diffusion video decoder under its official names, and its config in released metadata.

Source: `ltx_core/model/video_vae/model_configurator.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.models.diffusion_decoder import STAGES, DiffusionDecoder, DiffusionDecoderConfig
from ltx2_jax.weights import mapping

PREFIX = "decoder."

# ---- names: ours -> official ---------------------------------------------------------------------

# Stored in the files, read by no network:
UNREAD = (
    "coarse_",  # a head for previews
    "type_emb",  # in the released file; neither the official code nor its forks know it
)


# Gates of some files, per channel, and the linear maps whose outputs they multiply.
GATES = {"gate_ctx": "context_proj", "gate_msa": "attn.proj", "gate_mlp": "mlp.w_down"}


def _inside(ours: str, official: str, rows: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{path}": f"{official}.{name}" for path, name in rows.items()}


_LINEAR = {"kernel": "weight", "bias": "bias"}
_BLOCK = {
    "attention_norm": "norm1.weight",
    **_inside("attention.qkv", "attn.qkv", _LINEAR),
    **_inside("attention_out", "attn.proj", _LINEAR),
    "attention.q_norm": "attn.q_norm.weight",
    "attention.k_norm": "attn.k_norm.weight",
    "mlp_norm": "norm2.weight",
    "mlp.gate.kernel": "mlp.w_gate.weight",
    "mlp.up.kernel": "mlp.w_up.weight",
    "mlp.down.kernel": "mlp.w_down.weight",
}
_DIFFUSION_BLOCK = {
    **_BLOCK,
    **_inside("context", "context_proj", _LINEAR),
    "table": "scale_shift_table",
}
TABLE = {
    **_inside("latents_in", "conv_in", _LINEAR),
    **_inside("stages.{}.blocks.{}", "det_stages.{}.{}", _BLOCK),
    **_inside("stages.{}.upsample.linear", "upsamples.{}.proj", _LINEAR),
    **_inside("pixels_in", "conv_in_x_t", _LINEAR),
    **_inside("timestep.linear_1", "t_embedder.mlp.0", _LINEAR),
    **_inside("timestep.linear_2", "t_embedder.mlp.2", _LINEAR),
    **_inside("modulation", "shared_adaln.proj", _LINEAR),
    **_inside("blocks.{}", "diff_blocks.{}", _DIFFUSION_BLOCK),
    "norm_out": "norm_out.weight",
    **_inside("pixels_out", "conv_out", _LINEAR),
}


def create(cfg: DiffusionDecoderConfig) -> DiffusionDecoder:
    """The decoder of a config, with weights that mean nothing."""
    return DiffusionDecoder(cfg, rngs=nnx.Rngs(0))


def from_official(tensors: Mapping[str, np.ndarray], cfg: DiffusionDecoderConfig) -> dict[str, Any]:
    """Tensors of a video VAE, `vae.` removed, -> the parameter tree of the decoder, numpy arrays.

    The encoder, the statistics of the latents and what nothing reads (`UNREAD`) are left out. Gates
    become part of the weights, rounded to their type, as upstream does it.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    read = {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if name.startswith(PREFIX) and not name.removeprefix(PREFIX).startswith(UNREAD)
    }
    return mapping.from_official(
        _fold_gates(read), partial(create, cfg), TABLE, component="diffusion video decoder"
    )


def _fold_gates(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    folded = {name: value for name, value in tensors.items() if not name.endswith(tuple(GATES))}
    for name, gate in tensors.items():
        block, _, kind = name.rpartition(".")
        for leaf in ("weight", "bias") if kind in GATES else ():
            target = f"{block}.{GATES[kind]}.{leaf}"
            if target in folded:
                value = folded[target]
                factor = gate.astype(np.float32).reshape(-1, *[1] * (value.ndim - 1))
                folded[target] = (factor * value.astype(np.float32)).astype(value.dtype)
    return folded


def to_official(params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """The parameter tree -> tensors named `decoder...`; the inverse of `from_official`.

    Of a file with gates come weights that have them inside, which is the same network.
    """
    return {f"{PREFIX}{name}": value for name, value in mapping.to_official(params, TABLE).items()}


# ---- config --------------------------------------------------------------------------------------

CLASS = "CausalDiffusionVAE"  # `_class_name` of the `vae` section

# Any other value of these means a network that this code does not compute.
ASSERTED = {"resampler_kind": "linear", "spatial_padding_mode": "zeros"}

# Official key -> our field; an absent key leaves our default, which is the official one.
CONFIG_FIELDS = {
    "in_channels": "latent_channels",
    "out_channels": "out_channels",
    "patch_size": "patch_size",
    "na_head_dim": "head_dim",
    "head_dim": "head_dim",  # read if both are given
    "stage_channels": "channels",
    "stage_depths": "depths",
    "stage5_channels": "diffusion_channels",
    "t_emb_dim": "timestep_dim",
    "timestep_scale_multiplier": "timestep_scale",
    "default_num_inference_steps": "num_steps",
}


def diffusion_decoder_config(
    metadata: Mapping[str, Any], **overrides: Any
) -> DiffusionDecoderConfig:
    """The `vae` section of a released file's config -> `DiffusionDecoderConfig`.

    The decoder's settings are in a `decoder` of its own, if there is one. `overrides` are our own
    fields (`dtype`, `num_steps`).

    Raises:
      UserError: a value that is not supported.
    """
    decoder = metadata.get("decoder", metadata)
    for key, value in ASSERTED.items():
        if decoder.get(key, value) != value:
            raise UserError(f"vae config: {key}={decoder[key]!r}, only {value!r} is supported")
    fields = {
        "latent_channels": metadata.get("latent_channels", 128),
        "prediction": metadata.get("model_output_type", "v"),
    }
    fields |= {ours: _frozen(decoder[key]) for key, ours in CONFIG_FIELDS.items() if key in decoder}
    kernels = list(DiffusionDecoderConfig.kernels)
    if "stage_kernels" in decoder:  # the fifth is not read
        kernels[: STAGES - 1] = _frozen(decoder["stage_kernels"])[: STAGES - 1]
    if "stage5_kernel" in decoder:
        kernels[-1] = _frozen(decoder["stage5_kernel"])
    fields["kernels"] = tuple(kernels)
    if "upsamples" in decoder:
        fields["strides_after"] = tuple(_frozen(stride) for stride, _ in decoder["upsamples"])
    cfg = DiffusionDecoderConfig(**(fields | overrides))
    for i, (_, reduction) in enumerate(decoder.get("upsamples", ())):
        if cfg.channels[i] // reduction != cfg.channels[i + 1]:
            raise UserError(
                f"vae config: upsamples[{i}] reduces {cfg.channels[i]} channels by {reduction}, "
                f"but stage_channels[{i + 1}] is {cfg.channels[i + 1]}"
            )
    return cfg


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
