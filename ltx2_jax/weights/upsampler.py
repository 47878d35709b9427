"""Latent upsamplers under their official names, and their config in released metadata.

Source: `ltx_core/model/upsampler/model_configurator.py`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.models.upsampler import LatentUpsampler, UpsamplerConfig
from ltx2_jax.weights import mapping

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
    return LatentUpsampler(config, rngs=nnx.Rngs(0))


def from_official(tensors: Mapping[str, np.ndarray], config: UpsamplerConfig) -> dict[str, Any]:
    """All tensors of an upsampler's file -> the parameter tree of `LatentUpsampler(config)`.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    create_it = partial(create, config)
    return mapping.from_official(tensors, create_it, TABLE, component="upsampler")


def to_official(params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """The parameter tree -> official tensors; the inverse of `from_official`."""
    return mapping.to_official(params, TABLE)


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
