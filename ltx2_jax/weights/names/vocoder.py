"""The vocoder's weights under their official names, and its config in released metadata.

Source: `ltx_core/model/audio_vae/model_configurator.py` (config keys, defaults, key prefixes).
"""

from collections.abc import Mapping
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.vocoder import ExtensionConfig, GeneratorConfig, Vocoder, VocoderConfig
from ltx2_jax.models.layers import Rngs

# Ours -> official, within a generator.
_CONVS = {
    "conv_in": "conv_pre",
    "upsamples.{}": "ups.{}",
    "blocks.{}.dilated.{}": "resblocks.{}.convs1.{}",
    "blocks.{}.plain.{}": "resblocks.{}.convs2.{}",
    "conv_out": "conv_post",
}
_ACTIVATIONS = {
    "blocks.{}.before_dilated.{}": "resblocks.{}.acts1.{}",
    "blocks.{}.before_plain.{}": "resblocks.{}.acts2.{}",
    "last_activation": "act_post",
}
_CONV_LEAVES = {"kernel": "weight", "bias": "bias"}
_ACTIVATION_LEAVES = {
    "log_alpha": "act.alpha",
    "log_beta": "act.beta",
    "up_filter": "upsample.filter",
    "down_filter": "downsample.lowpass.filter",
}
_EXTENSION = {
    "extension.waves": "mel_stft.stft_fn.forward_basis",
    "extension.mel_filters": "mel_stft.mel_basis",
}


def _generator(ours: str, official: str) -> dict[str, str]:
    return {
        f"{ours}{a}.{leaf}": f"{official}{b}.{name}"
        for modules, leaves in ((_CONVS, _CONV_LEAVES), (_ACTIVATIONS, _ACTIVATION_LEAVES))
        for a, b in modules.items()
        for leaf, name in leaves.items()
    }


def table(config: VocoderConfig) -> dict[str, str]:
    """With bandwidth extension the first generator's names gain a prefix of their own."""
    if config.extension is None:
        return _generator("generator.", "")
    first = _generator("generator.", "vocoder.")
    return first | _generator("extension.generator.", "bwe_generator.") | _EXTENSION


def create(config: VocoderConfig) -> Vocoder:
    """The module for its shapes; its weights are to be replaced."""
    return Vocoder(config, rngs=Rngs(0))


def vocoder_config(metadata: Mapping[str, Any]) -> VocoderConfig:
    """The `vocoder` section of a released file's config -> `VocoderConfig`.

    Raises:
      UserError: a form of generator that is not implemented, or a missing key.
    """
    if "bwe" not in metadata:
        _check(metadata, "vocoder", {"resblock": "1", "stereo": True})
        rate = metadata.get("output_sampling_rate", VocoderConfig.sample_rate)
        return VocoderConfig(_generator_config(metadata, periodic=False), rate)
    first, second = metadata.get("vocoder", {}), metadata["bwe"]
    for name, section in (("vocoder.vocoder", first), ("vocoder.bwe", second)):
        _check(section, name, {"resblock": "AMP1", "stereo": True, "activation": "snakebeta"})
    needed = ("input_sampling_rate", "output_sampling_rate", "n_fft", "hop_length", "num_mels")
    missing = [key for key in needed if key not in second]
    if missing:
        raise UserError(f"vocoder.bwe config has no {', '.join(missing)}")
    extension = ExtensionConfig(
        _generator_config(second, periodic=True, final_activation=None, bins=second["num_mels"]),
        sample_rate=second["output_sampling_rate"],
        n_fft=second["n_fft"],
        hop=second["hop_length"],
    )
    generator = _generator_config(first, periodic=True)
    return VocoderConfig(generator, second["input_sampling_rate"], extension)


def _check(section: Mapping[str, Any], name: str, asserted: Mapping[str, Any]) -> None:
    """What official code assumes when a key is absent: HiFi-GAN blocks, snake, stereo."""
    defaults = {"resblock": "1", "stereo": True, "activation": "snake"}
    values = {key: section.get(key, defaults[key]) for key in asserted}
    wrong = [
        f"{key}={values[key]!r} (only {value!r} is implemented)"
        for key, value in asserted.items()
        if values[key] != value
    ]
    if wrong:
        raise UserError(f"unsupported {name} config: {', '.join(wrong)}")


# Official key -> our field.
CONFIG_FIELDS = {
    "upsample_initial_channel": "channels",
    "upsample_rates": "upsample_rates",
    "upsample_kernel_sizes": "upsample_kernels",
    "resblock_kernel_sizes": "block_kernels",
    "resblock_dilation_sizes": "block_dilations",
    "use_bias_at_final": "final_bias",
}


def _generator_config(section: Mapping[str, Any], **fields: Any) -> GeneratorConfig:
    read = {ours: section[key] for key, ours in CONFIG_FIELDS.items() if key in section}
    for name in ("upsample_rates", "upsample_kernels", "block_kernels"):
        if name in read:
            read[name] = tuple(read[name])
    if "block_dilations" in read:
        read["block_dilations"] = tuple(tuple(row) for row in read["block_dilations"])
    final = "tanh" if section.get("use_tanh_at_final", True) else "clip"
    return GeneratorConfig(**({"final_activation": final} | read | fields))
