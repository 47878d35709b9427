"""Text features and connectors under their official names, their config, and which encoder fits.

A single-file checkpoint holds all of it. In the split pack of 2.5 the connectors are in the
transformer's file and the projections in the text encoder's.
Source: `ltx_core/text_encoders/gemma/encoders/encoder_configurator.py`,
`ltx_core/text_encoders/gemma/embeddings_connector.py` (config keys, names).
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.connectors import ConnectorConfig, Connectors
from ltx2_jax.models.text.features import TextFeatures, TextFeaturesConfig
from ltx2_jax.models.text.gemma_layers import GemmaConfig
from ltx2_jax.weights import mapping, versions
from ltx2_jax.weights.mapping import Parameter, inside
from ltx2_jax.weights.names.transformer import ATTENTION, CAPTIONS_BEFORE, FEED_FORWARD

# ---- config --------------------------------------------------------------------------------------


def text_features_config(
    transformer: Mapping[str, Any], *, width: int, num_layers: int, **overrides: Any
) -> TextFeaturesConfig:
    """The `transformer` section of a released config -> `TextFeaturesConfig`.

    None of `CAPTIONS_BEFORE`: V1 (2.0). All of it: V2 (2.3, 2.5).

    Args:
      transformer: the section.
      width: hidden size of the language model.
      num_layers: its layers.
      overrides: our own fields (`dtype`, `last_layer_only`).

    Raises:
      UserError: the section asks for features that are neither V1 nor V2.
    """
    fields: dict[str, Any] = {"width": width, "num_states": num_layers + 1, "video_dim": width}
    given = {key: transformer[key] for key in CAPTIONS_BEFORE if key in transformer}
    if not given:
        return TextFeaturesConfig(**(fields | overrides))
    missing = [key for key in CAPTIONS_BEFORE if key not in given]
    if missing:
        raise UserError(
            f"unsupported text features: the config has {', '.join(given)} but not "
            f"{', '.join(missing)}; either all four are given (2.3, 2.5) or none (2.0)"
        )
    wrong = [
        f"{key}={given[key]!r} (only {value!r} is implemented)"
        for key, value in CAPTIONS_BEFORE.items()
        if given[key] != value
    ]
    if wrong:
        raise UserError(f"unsupported text features: {', '.join(wrong)}")
    get = transformer.get
    fields |= {
        "norm": "rms",
        "bias": True,
        "video_dim": get("num_attention_heads", 32) * get("attention_head_dim", 128),
        "audio_dim": get("audio_num_attention_heads", 32) * get("audio_attention_head_dim", 64),
    }
    return TextFeaturesConfig(**(fields | overrides))


def guessed_section(shapes: Mapping[str, tuple[int, ...]], width: int) -> dict[str, Any]:
    """What `text_features_config` reads, for a text encoder that comes without its transformer.

    Args:
      shapes: official name of the projections, prefix removed -> shape.
      width: hidden size of the language model.
    """
    section: dict[str, Any] = {"caption_channels": width}
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        shape = shapes.get(f"{stream}_aggregate_embed.weight")
        if shape is not None:
            section |= CAPTIONS_BEFORE
            section |= {f"{prefix}num_attention_heads": 1, f"{prefix}attention_head_dim": shape[0]}
    return section


def connector_configs(
    transformer: Mapping[str, Any], **overrides: Any
) -> tuple[ConnectorConfig, ConnectorConfig]:
    """The `transformer` section of a released config -> the connectors of video and of audio.

    Theta and the number of registers are constants, whatever the section says, as upstream.
    `overrides` are our own fields (`dtype`, `registers`).

    Raises:
      UserError: an unknown rotary layout, or a position range that is not one number.
    """
    double = transformer.get("frequencies_precision") == "float64"
    rope_type = transformer.get("rope_type", "split")
    if rope_type not in ("split", "interleaved"):
        raise UserError(f"rope_type={rope_type!r}, only split and interleaved are supported")
    max_pos = transformer.get("connector_positional_embedding_max_pos", [1])
    if len(max_pos) != 1:
        raise UserError(
            f"connector_positional_embedding_max_pos={max_pos!r}: text has one position axis"
        )
    shared = {
        "gated_attention": transformer.get("connector_apply_gated_attention", False),
        "ff_bias": transformer.get("connector_ff_bias", True),
        "max_pos": float(max_pos[0]),
        "rope_type": rope_type,
        "rope_precision": "float64" if double else "float32",
    }
    sizes = {
        "num_layers": ("connector_num_layers", 2),
        "num_heads": ("connector_num_attention_heads", 30),
        "head_dim": ("connector_attention_head_dim", 128),
    }
    video = {field: transformer.get(key, value) for field, (key, value) in sizes.items()}
    audio = {
        field: transformer.get(f"audio_{key}", video[field]) for field, (key, _) in sizes.items()
    }
    return (
        ConnectorConfig(**(shared | video | overrides)),
        ConnectorConfig(**(shared | audio | overrides)),
    )


def section_of(video: ConnectorConfig, audio: ConnectorConfig) -> dict[str, Any]:
    """The part of the `transformer` section that describes connectors."""
    sizes = {
        f"{prefix}connector_{key}": getattr(cfg, field)
        for prefix, cfg in (("", video), ("audio_", audio))
        for key, field in (
            ("num_layers", "num_layers"),
            ("num_attention_heads", "num_heads"),
            ("attention_head_dim", "head_dim"),
        )
    }
    return sizes | {
        "connector_num_learnable_registers": video.registers,
        "connector_positional_embedding_max_pos": [video.max_pos],
        "connector_apply_gated_attention": video.gated_attention,
        "connector_ff_bias": video.ff_bias,
    }


# ---- which text encoder fits ---------------------------------------------------------------------

# From this version on a checkpoint has to name the text encoder it was trained with.
NAMES_ENCODER_SINCE = (2, 4, 0)


def check_text_encoder(
    metadata: Mapping[str, Any], gemma_config: Mapping[str, Any], name: str | os.PathLike
) -> None:
    """Refuses a text encoder of another release than the checkpoint's.

    Warns (UserWarning) where neither of the two says what it is.

    Args:
      metadata: of the checkpoint's file, with `model_version` and `gemma_source_checkpoint`.
      gemma_config: the text encoder's own config, with `model_type` and `gemma_version`.
      name: what to call the text encoder in an error.

    Raises:
      UserError: they do not belong together, or a newer checkpoint does not say what it needs.
    """
    source, version = metadata.get("gemma_source_checkpoint"), metadata.get("model_version")
    have = gemma_config.get("gemma_version")
    if source is not None:
        want = source.get("gemma_version")
        if want != have:
            raise UserError(
                f"{name}: the checkpoint was trained with the text encoder gemma_version={want!r}, "
                f"this one is {have!r}: use the one that belongs to the checkpoint"
            )
    elif versions.numbers(version) >= NAMES_ENCODER_SINCE:
        if have is not None:
            raise UserError(
                f"the checkpoint (model_version={version}) does not say which text encoder it "
                f"needs (gemma_source_checkpoint), so {name} (gemma_version={have!r}) cannot be "
                "checked against it: use the file as released"
            )
        warnings.warn(
            f"neither the checkpoint (model_version={version}) nor {name} says which text encoder "
            "it is (gemma_version): make sure that they belong together",
            stacklevel=2,
        )
    elif gemma_config.get("model_type") != "gemma3":
        raise UserError(
            f"{name}: the checkpoint (model_version={version}) needs a Gemma 3 text encoder, "
            f"this one has model_type={gemma_config.get('model_type')!r}"
        )


# ---- names: ours -> official ---------------------------------------------------------------------

_BLOCK = inside("attention", "attn1", ATTENTION) | inside("mlp", "ff", FEED_FORWARD)
_CONNECTOR = {"registers": "learnable_registers"} | inside(
    "blocks", "transformer_1d_blocks.{}", _BLOCK
)
CONNECTORS = inside("video", "video_embeddings_connector", _CONNECTOR) | inside(
    "audio", "audio_embeddings_connector", _CONNECTOR
)


def create_connectors(configs: tuple[ConnectorConfig, ConnectorConfig]) -> Connectors:
    """The connectors of video and of audio, with weights that mean nothing."""
    return Connectors(*configs, rngs=Rngs(0))


def create_features(cfg: TextFeaturesConfig) -> TextFeatures:
    """The projections of a config, with weights that mean nothing."""
    return TextFeatures(cfg, rngs=Rngs(0))


def features_parameters(cfg: TextFeaturesConfig, where: Any = None) -> list[Parameter]:
    """The projections' parameters: one official matrix for all states, one of ours for each."""
    one = cfg.audio_dim is None
    names = {"video": "aggregate_embed"} if one else {
        stream: f"{stream}_aggregate_embed" for stream in ("video", "audio")
    }  # fmt: skip
    table = {
        f"{stream}.{ours}": f"{name}.{official}"
        for stream, name in names.items()
        for ours, official in {"kernel": "weight", "bias": "bias"}.items()
    }
    found = mapping.parameters(partial(create_features, cfg), table, where)
    return [
        dataclasses.replace(p, layout=mapping.STATES) if p.path[-1] == "kernel" else p
        for p in found
    ]


# ---- loading -------------------------------------------------------------------------------------


def holder(release: Any, language: Any) -> Any:
    """Which of two `Release`s has the projections: a checkpoint, or a packed text encoder.

    Raises:
      UserError: neither.
    """
    for candidate in (release, language):
        if "text_projection" in candidate.networks:
            return candidate
    raise UserError(
        f"{release.name}: has no text projection (text_embedding_projection...); in a split pack "
        "it is in the packed text encoder: give that file as the text encoder"
    )


def load_features(
    release: Any,
    gemma: GemmaConfig,
    where: Any = None,
    *,
    section: Mapping[str, Any],
    **overrides: Any,
) -> TextFeatures:
    """The projections of a `Release` that has them; weights in the dtype of the file.

    Args:
      release: see `holder`.
      gemma: the language model whose states are projected.
      where: see `Release.load`.
      section: the `transformer` section of the checkpoint's config.
      overrides: our own fields of `TextFeaturesConfig`.

    Raises:
      UserError: config or tensors that do not fit.
    """
    sizes = {"width": gemma.width, "num_layers": gemma.num_layers}
    cfg = text_features_config(section, **sizes, **overrides)
    stored = dataclasses.replace(cfg, last_layer_only=False)
    _, params = release.load("text_projection", where, config=stored)
    if cfg.last_layer_only:
        for projection in params.values():
            projection["kernel"] = projection["kernel"][-1:]
    return mapping.build(partial(create_features, cfg), params, where)


def load_connectors(release: Any, where: Any = None, **overrides: Any) -> Connectors:
    """Both connectors of a `Release`, weights in the dtype of the file.

    Args:
      release: has the network "connectors".
      where: see `Release.load`.
      overrides: our own fields of `ConnectorConfig`. `registers=0` leaves them out.

    Raises:
      UserError: config or tensors that do not fit.
    """
    cfg = connector_configs(release.section("connectors"), **overrides)
    stored = tuple(dataclasses.replace(c, registers=ConnectorConfig.registers) for c in cfg)
    _, params = release.load("connectors", where, config=stored)
    for stream, config in zip(("video", "audio"), cfg, strict=True):
        if not config.registers:
            del params[stream]["registers"]
    return mapping.build(partial(create_connectors, cfg), params, where)
