"""Latent upsamplers under their official names, and their config in released metadata.

Source: `ltx_core/model/upsampler/model_configurator.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.upsampler import LatentUpsampler, UpsamplerConfig
from ltx2_jax.models.layers import Rngs

_CONV = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias"}
_BLOCK = {"conv1": _CONV, "norm1": _NORM, "conv2": _CONV, "norm2": _NORM}
# Our module -> official module, and its leaves.
_MODULES = {
    "conv_in": ("initial_conv", _CONV),
    "norm_in": ("initial_norm", _NORM),
    **{f"before.{{}}.{k}": (f"res_blocks.{{}}.{k}", v) for k, v in _BLOCK.items()},
    "expand": ("upsampler.0", _CONV),
    "resampler.conv": ("upsampler.conv", _CONV),
    "resampler": ("upsampler.blur_down", {"blur_kernel": "kernel"}),
    **{f"after.{{}}.{k}": (f"post_upsample_res_blocks.{{}}.{k}", v) for k, v in _BLOCK.items()},
    "conv_out": ("final_conv", _CONV),
}
TABLE = {
    f"{ours}.{leaf}": f"{official}.{name}"
    for ours, (official, leaves) in _MODULES.items()
    for leaf, name in leaves.items()
}


def create(config: UpsamplerConfig) -> LatentUpsampler:
    """The network of a config, with weights that mean nothing."""
    return LatentUpsampler(config, rngs=Rngs(0))


def upsampler_config(metadata: Mapping[str, Any], **overrides: Any) -> UpsamplerConfig:
    """The config of an upsampler's file (all of it, no section) -> `UpsamplerConfig`.

    `overrides` are our own fields (`dtype`).

    Raises:
      UserError: the config is another network's, or a value is not supported.
    """
    kind = metadata.get("_class_name", "LatentUpsampler")
    if kind != "LatentUpsampler":
        raise UserError(f"upsampler config: _class_name={kind!r}, only 'LatentUpsampler' is known")
    names = {field.name for field in dataclasses.fields(UpsamplerConfig)} - {"dtype"}
    fields = {name: metadata[name] for name in names if name in metadata}
    return UpsamplerConfig(**(fields | overrides))
