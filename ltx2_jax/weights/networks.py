"""The networks of released files: how each is named, configured and built. Data; no I/O.

`NETWORKS` has one row for each. What a row's `unread` matches is in real files and read by nothing,
here or upstream; every other name has to be in the network's table.
"""

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.codecs.audio_vae import AudioVAEConfig
from ltx2_jax.models.codecs.video_vae import VideoVAEConfig
from ltx2_jax.models.text.features import TextFeaturesConfig
from ltx2_jax.weights import mapping
from ltx2_jax.weights.mapping import Parameter
from ltx2_jax.weights.names import (
    audio_vae,
    diffusion_decoder,
    duration_head,
    gemma,
    text,
    transformer,
    upsampler,
    video_vae,
    vocoder,
)

Shapes = Mapping[str, tuple[int, ...]]  # official name, without prefix -> shape

# Beside float8 weights: scales of activations and marks of other tools.
_QUANTIZATION = r".*\.(input_scale|scale_input|comfy_quant)|scaled_fp8"
_STATISTICS = r"per_channel_statistics\.(?!(mean|std)-of-means$).*"


@dataclass(frozen=True)
class Network:
    """One kind of network.

    `section` is that of the config JSON which describes it, "" being all of it. `configure` takes
    the section, the shapes of the tensors and our own fields; `parameters` takes a config, where
    the parameters go (see `mapping.abstract_params`) and the shapes.
    """

    section: str
    configure: Callable[..., Any]
    create: Callable[[Any], nnx.Module]
    parameters: Callable[[Any, Any, Shapes], list[Parameter]]
    unread: str = r"(?!)"

    def config(self, section: Mapping[str, Any], shapes: Shapes, **overrides: Any) -> Any:
        """What `configure` gives, the types of its fields checked.

        Raises:
          UserError: a config that is not implemented, or values that no such config has.
        """

        def attempt(section: Mapping[str, Any]) -> Any:
            config = self.configure(section, shapes, **overrides)
            for part in config if isinstance(config, tuple) else (config,):
                _check_types(part)
            return config

        try:
            return attempt(section)
        except ValueError as error:
            raise UserError(reason(error)) from None
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            # The key without which all is well is the one that is wrong.
            for key, value in section.items():
                try:
                    attempt({k: v for k, v in section.items() if k != key})
                except Exception:
                    continue
                raise UserError(f"{key}={value!r} cannot be read") from None
            raise UserError(f"config cannot be read ({reason(error)})") from None

    def reads(self, name: str) -> bool:
        """Whether a tensor of the network, by its name without prefix, is read."""
        return not re.fullmatch(self.unread, name)


def _check_types(config: Any) -> None:
    """TypeError for a number, a truth value or a text of a config that is something else."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if not _fits(getattr(config, name), hint):
            raise TypeError(f"{name}={getattr(config, name)!r}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint in (int, float):
        return type(value) in (int, float) and (hint is float or float(value).is_integer())
    return type(value) is hint if hint in (bool, str, types.NoneType) else True


def _of_table(create: Callable[[Any], nnx.Module], table: Any, optional: tuple[str, ...] = ()):
    def parameters(cfg: Any, where: Any, _: Shapes) -> list[Parameter]:
        rows = table(cfg) if callable(table) else table
        return mapping.parameters(partial(create, cfg), rows, where, optional=optional)

    return parameters


def _ignoring_shapes(configure: Callable[..., Any]) -> Callable[..., Any]:
    return lambda section, shapes, **overrides: configure(section, **overrides)


def _features(section: Mapping[str, Any], shapes: Shapes, **overrides: Any) -> TextFeaturesConfig:
    """The width of the language model is a key of the config; its layers follow from the shapes."""
    width = section.get("caption_channels", 3840)
    matrix = next((shape for name, shape in shapes.items() if name.endswith(".weight")), None)
    if matrix is None or len(matrix) != 2 or matrix[1] % width:
        raise UserError(
            f"text projection weights do not fit the config: {matrix} is no matrix of features of "
            f"caption_channels={width}"
        )
    layers = matrix[1] // width - 1
    return text.text_features_config(section, width=width, num_layers=layers, **overrides)


def _connectors(section: Mapping[str, Any], shapes: Shapes, **overrides: Any) -> Any:
    """Released ones have 128 registers whatever the config says; a model trained here may not."""
    registers = shapes.get("video_embeddings_connector.learnable_registers", (None,))[0]
    if registers is not None:
        overrides = {"registers": registers} | overrides
    return text.connector_configs(section, **overrides)


def _absent(shapes: Shapes) -> list[str]:
    """The half of an autoencoder that files lack which hold the other half."""
    halves = ("encoder", "decoder")
    held = {half for half in halves if any(name.startswith(f"{half}.") for name in shapes)}
    return [half for half in halves if held and half not in held]


def _video_vae(section: Mapping[str, Any], shapes: Shapes, **overrides: Any) -> VideoVAEConfig:
    absent = _absent(shapes)
    if section.get("_class_name") == diffusion_decoder.CLASS:  # whose decoder is another network
        absent = [] if any(name.startswith("encoder.") for name in shapes) else ["encoder"]
    fields = {f"{half}_blocks": None for half in absent}
    return video_vae.video_vae_config(section, **(fields | overrides))


def _audio_vae(section: Mapping[str, Any], shapes: Shapes, **overrides: Any) -> AudioVAEConfig:
    fields = {f"has_{half}": False for half in _absent(shapes)}
    return audio_vae.audio_vae_config(section, **(fields | overrides))


NETWORKS: dict[str, Network] = {
    "transformer": Network(
        "transformer",
        _ignoring_shapes(transformer.transformer_config),
        transformer.create,
        _of_table(transformer.create, transformer.TABLE, optional=(transformer.KEYFRAME,)),
        unread=_QUANTIZATION,
    ),
    "connectors": Network(
        "transformer",
        _connectors,
        text.create_connectors,
        _of_table(text.create_connectors, text.CONNECTORS),
        unread=_QUANTIZATION,
    ),
    "text_projection": Network(
        "transformer",
        _features,
        text.create_features,
        lambda cfg, where, _: text.features_parameters(cfg, where),
        unread=_QUANTIZATION,
    ),
    "gemma": Network(
        "gemma",
        _ignoring_shapes(gemma.gemma_config),
        gemma.create,
        lambda cfg, where, _: gemma.parameters(cfg, where),
        unread=_QUANTIZATION,
    ),
    "video_vae": Network(
        "vae",
        _video_vae,
        video_vae.create,
        _of_table(video_vae.create, video_vae.TABLE),
        unread=_STATISTICS,
    ),
    "diffusion_decoder": Network(
        "vae",
        _ignoring_shapes(diffusion_decoder.diffusion_decoder_config),
        diffusion_decoder.create,
        diffusion_decoder.parameters,
        # A head for previews; and a tensor that neither the official code nor its forks know.
        unread=r"coarse_.*|type_emb.*",
    ),
    "audio_vae": Network(
        "audio_vae",
        _audio_vae,
        audio_vae.create,
        _of_table(audio_vae.create, audio_vae.TABLE),
        unread=_STATISTICS,
    ),
    "vocoder": Network(
        "vocoder",
        _ignoring_shapes(vocoder.vocoder_config),
        vocoder.create,
        _of_table(vocoder.create, vocoder.table),
        # The inverse transform: only log-mels are made.
        unread=r"mel_stft\.stft_fn\.inverse_basis",
    ),
    "duration_head": Network(
        "duration_head",
        duration_head.duration_head_config,
        duration_head.create,
        _of_table(duration_head.create, duration_head.TABLE),
    ),
    "upsampler": Network(
        "",
        _ignoring_shapes(upsampler.upsampler_config),
        upsampler.create,
        _of_table(upsampler.create, upsampler.TABLE),
    ),
}

# Parts of text encoders that no network here reads: vision and audio input, an output matrix, and
# the tokenizer's files, which `ltx2_jax.tokenizer` takes from there.
BESIDE_TEXT = (
    r"(model\.)?(vision_\w+|multi_modal_projector|audio_\w+|embed_vision|embed_audio)\..*"
    r"|(language_model\.)?lm_head\..*|tokenizer_json|tokenizer_model|hf_asset__.*"
)
