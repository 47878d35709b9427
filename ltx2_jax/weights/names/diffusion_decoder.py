"""The diffusion video decoder under its official names, and its config in released metadata.

Source: `ltx_core/model/video_vae/model_configurator.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.diffusion_decoder import (
    STAGES,
    DiffusionDecoder,
    DiffusionDecoderConfig,
)
from ltx2_jax.models.layers import Rngs
from ltx2_jax.sharding import sharding_of
from ltx2_jax.weights import mapping
from ltx2_jax.weights.mapping import Parameter, inside

# ---- names: ours -> official ---------------------------------------------------------------------

# Gates of some files, per channel, and the linear maps whose outputs they multiply.
GATES = {"gate_ctx": "context_proj", "gate_msa": "attn.proj", "gate_mlp": "mlp.w_down"}


_LINEAR = {"kernel": "weight", "bias": "bias"}
_BLOCK = {
    "attention_norm": "norm1.weight",
    **inside("attention.qkv", "attn.qkv", _LINEAR),
    **inside("attention_out", "attn.proj", _LINEAR),
    "attention.q_norm": "attn.q_norm.weight",
    "attention.k_norm": "attn.k_norm.weight",
    "mlp_norm": "norm2.weight",
    "mlp.gate.kernel": "mlp.w_gate.weight",
    "mlp.up.kernel": "mlp.w_up.weight",
    "mlp.down.kernel": "mlp.w_down.weight",
}
_DIFFUSION_BLOCK = {
    **_BLOCK,
    **inside("context", "context_proj", _LINEAR),
    "table": "scale_shift_table",
}
TABLE = {
    **inside("latents_in", "conv_in", _LINEAR),
    **inside("stages.{}.blocks.{}", "det_stages.{}.{}", _BLOCK),
    **inside("stages.{}.upsample.linear", "upsamples.{}.proj", _LINEAR),
    **inside("pixels_in", "conv_in_x_t", _LINEAR),
    **inside("timestep.linear_1", "t_embedder.mlp.0", _LINEAR),
    **inside("timestep.linear_2", "t_embedder.mlp.2", _LINEAR),
    **inside("modulation", "shared_adaln.proj", _LINEAR),
    **inside("blocks.{}", "diff_blocks.{}", _DIFFUSION_BLOCK),
    "norm_out": "norm_out.weight",
    **inside("pixels_out", "conv_out", _LINEAR),
}


def create(cfg: DiffusionDecoderConfig) -> DiffusionDecoder:
    """The decoder of a config, with weights that mean nothing."""
    return DiffusionDecoder(cfg, rngs=Rngs(0))


def parameters(
    cfg: DiffusionDecoderConfig, where: Any = None, shapes: Mapping[str, tuple[int, ...]] = {}
) -> list[Parameter]:
    """The decoder's parameters, and the gates among `shapes`, official name -> shape.

    Gates are not the network's: `fold_gates` takes them away.
    """
    found = mapping.parameters(partial(create, cfg), TABLE, where)
    gates = [name for name in shapes if name.rpartition(".")[2] in GATES]
    if isinstance(where, jax.sharding.Mesh):
        where = sharding_of(where)
    return found + [
        Parameter(("gates", n), (n,), jax.ShapeDtypeStruct(shapes[n], "float32", sharding=where))
        for n in gates
    ]


def fold_gates(params: Mapping[Any, Any], cfg: DiffusionDecoderConfig) -> dict[Any, Any]:
    """Gates become part of the weights, rounded to their type, as upstream does it."""
    paths = {p.names[0]: p.path for p in parameters(cfg)}
    tree = {key: value for key, value in params.items() if key != "gates"}
    values = mapping.leaves(tree)
    for name, gate in params.get("gates", {}).items():
        block, _, kind = name.rpartition(".")
        for leaf in ("weight", "bias"):
            path = paths.get(f"{block}.{GATES[kind]}.{leaf}")
            if path is not None:  # the output features are the last axis of kernel and bias
                value = values[path].astype("float32") * gate.astype("float32")
                values[path] = value.astype(values[path].dtype)
    return mapping.nested(values)


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
