"""The audio VAE's weights under their official names, and its config in released metadata.

Source: `ltx_core/model/audio_vae/model_configurator.py` (config keys, defaults, key prefixes).
"""

from collections.abc import Mapping
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.audio_vae import AudioVAE, AudioVAEConfig
from ltx2_jax.models.codecs.mel import MelConfig
from ltx2_jax.models.layers import Rngs

_STATISTICS = {
    "mean": "per_channel_statistics.mean-of-means",
    "std": "per_channel_statistics.std-of-means",
}

# What can lie inside a module: ours -> official.
_CONV = {"kernel": "conv.weight", "bias": "conv.bias"}
_PLAIN_CONV = {"kernel": "weight", "bias": "bias"}
_BLOCK = {"conv_1": "conv1", "conv_2": "conv2", "shortcut": "nin_shortcut"}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "proj_out"}


def _rows(ours: str, official: str, inner: Mapping[str, str], leaves: Mapping[str, str]) -> dict:
    return {
        f"{ours}.{a}.{leaf}": f"{official}.{b}.{name}"
        for a, b in inner.items()
        for leaf, name in leaves.items()
    }


def _table() -> dict[str, str]:
    table = dict(_STATISTICS)
    for net, levels in (("encoder", "down"), ("decoder", "up")):
        ends = {"conv_in": "conv_in", "conv_out": "conv_out"}
        table |= _rows(net, net, ends, _CONV)
        for block in ("block_1", "block_2"):
            table |= _rows(f"{net}.middle.{block}", f"{net}.mid.{block}", _BLOCK, _CONV)
        table |= _rows(f"{net}.middle.attention", f"{net}.mid.attn_1", _ATTENTION, _PLAIN_CONV)
        ours, official = f"{net}.levels.{{}}", f"{net}.{levels}.{{}}"
        table |= _rows(f"{ours}.blocks.{{}}", f"{official}.block.{{}}", _BLOCK, _CONV)
        table |= _rows(f"{ours}.attentions.{{}}", f"{official}.attn.{{}}", _ATTENTION, _PLAIN_CONV)
    table |= _rows(
        "encoder.levels.{}", "encoder.down.{}", {"resample": "downsample.conv"}, _PLAIN_CONV
    )
    table |= _rows("decoder.levels.{}", "decoder.up.{}", {"resample": "upsample.conv"}, _CONV)
    return table


TABLE = _table()


def create(config: AudioVAEConfig) -> AudioVAE:
    """The network of a config, with weights that mean nothing."""
    return AudioVAE(config, rngs=Rngs(0))


# Official key of `model.params.ddconfig` -> our field.
CONFIG_FIELDS = {
    "ch": "channels",
    "ch_mult": "multipliers",
    "num_res_blocks": "num_blocks",
    "z_channels": "latent_channels",
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "resolution": "resolution",
    "attn_resolutions": "attention_resolutions",
    "mid_block_add_attention": "middle_attention",
}

# Any other value of these means a network that this code does not compute.
ASSERTED = {
    "norm_type": "pixel",
    "causality_axis": "height",
    "attn_type": "vanilla",
    "resamp_with_conv": True,
    "double_z": True,
}


def audio_vae_config(metadata: Mapping[str, Any], **overrides: Any) -> AudioVAEConfig:
    """The `audio_vae` section of a released file's config -> `AudioVAEConfig`.

    `overrides` are our own fields: the halves that a file has.

    Raises:
      UserError: an asserted constant has another value; all of them are listed.
    """
    params = metadata.get("model", {}).get("params", {})
    network = params.get("ddconfig", {})
    preprocessing = metadata.get("preprocessing", {})
    stft, mel = preprocessing.get("stft", {}), preprocessing.get("mel", {})
    wrong = [
        f"{key}={network[key]!r} (only {value!r} is implemented)"
        for key, value in ASSERTED.items()
        if key in network and network[key] != value
    ]
    if wrong:
        raise UserError(f"unsupported audio VAE config: {', '.join(wrong)}")
    fields = {ours: network[key] for key, ours in CONFIG_FIELDS.items() if key in network}
    for name in ("multipliers", "attention_resolutions"):
        if name in fields:
            fields[name] = tuple(fields[name])
    default = MelConfig()
    rate = params.get("sampling_rate", default.sample_rate)
    bins = (
        network.get("mel_bins")
        or mel.get("n_mel_channels")
        or metadata.get("variables", {}).get("mel_bins")
        or default.bins
    )
    front_end = MelConfig(
        sample_rate=rate,
        n_fft=stft.get("filter_length", default.n_fft),
        hop=stft.get("hop_length", default.hop),
        bins=bins,
        f_max=rate / 2,
    )
    return AudioVAEConfig(**(fields | overrides), mel=front_end)
