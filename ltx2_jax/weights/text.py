"""Text features and connectors under their official names, their config, and which encoder fits.

A single-file checkpoint holds all of it. In the split pack of 2.5 the connectors are in the
transformer's file and the projections in the text encoder's.
Source: `ltx_core/text_encoders/gemma/encoders/encoder_configurator.py`,
`ltx_core/text_encoders/gemma/embeddings_connector.py` (config keys, names).
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.connectors import Connector, ConnectorBlock, ConnectorConfig, Connectors
from ltx2_jax.models.text_features import TextFeatures, TextFeaturesConfig
from ltx2_jax.sharding import abstract_state
from ltx2_jax.weights import files, mapping

# ---- config --------------------------------------------------------------------------------------

# None of these keys: V1 (2.0). All of them with these values: V2 (2.3, 2.5).
V2_KEYS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


def text_features_config(
    transformer: Mapping[str, Any], *, width: int, num_layers: int, **overrides: Any
) -> TextFeaturesConfig:
    """The `transformer` section of a released config -> `TextFeaturesConfig`.

    Args:
      transformer: the section.
      width: hidden size of the language model.
      num_layers: its layers.
      overrides: our own fields (`dtype`, `last_layer_only`).

    Raises:
      UserError: the section asks for features that are neither V1 nor V2.
    """
    fields: dict[str, Any] = {"width": width, "num_states": num_layers + 1, "video_dim": width}
    given = {key: transformer[key] for key in V2_KEYS if key in transformer}
    if not given:
        return TextFeaturesConfig(**(fields | overrides))
    missing = [key for key in V2_KEYS if key not in given]
    if missing:
        raise UserError(
            f"unsupported text features: the config has {', '.join(given)} but not "
            f"{', '.join(missing)}; either all four are given (2.3, 2.5) or none (2.0)"
        )
    wrong = [
        f"{key}={given[key]!r} (only {value!r} is implemented)"
        for key, value in V2_KEYS.items()
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


# ---- which text encoder fits ---------------------------------------------------------------------

# From this version on a checkpoint has to name the text encoder it was trained with.
NAMES_ENCODER_SINCE = (2, 4, 0)


def check_text_encoder(
    metadata: Mapping[str, Any], gemma_config: Mapping[str, Any], name: str | os.PathLike
) -> None:
    """Refuses a text encoder of another generation than the checkpoint's.

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
    elif _numbers(version) >= NAMES_ENCODER_SINCE:
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


def _numbers(version: Any) -> tuple[int, ...]:
    """The leading numbers of a version: "2.4-rc2" -> (2, 4, 0)."""
    numbers = []
    for part in str(version or "").replace("-", ".").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers + [0] * (3 - len(numbers)))


# ---- names: ours -> official ---------------------------------------------------------------------

PROJECTION = "text_embedding_projection."
CONNECTORS = {
    "video": "model.diffusion_model.video_embeddings_connector.",
    "audio": "model.diffusion_model.audio_embeddings_connector.",
}

_ATTENTION = ("to_q", "to_k", "to_v")
_BLOCK = {
    **{f"attention.{name}.kernel": f"attn1.{name}.weight" for name in _ATTENTION},
    **{f"attention.{name}.bias": f"attn1.{name}.bias" for name in _ATTENTION},
    "attention.to_out.kernel": "attn1.to_out.0.weight",
    "attention.to_out.bias": "attn1.to_out.0.bias",
    "attention.to_gate.kernel": "attn1.to_gate_logits.weight",
    "attention.to_gate.bias": "attn1.to_gate_logits.bias",
    "attention.q_norm": "attn1.q_norm.weight",
    "attention.k_norm": "attn1.k_norm.weight",
    "mlp.linear_in.kernel": "ff.net.0.proj.weight",
    "mlp.linear_in.bias": "ff.net.0.proj.bias",
    "mlp.linear_out.kernel": "ff.net.2.weight",
    "mlp.linear_out.bias": "ff.net.2.bias",
}
TABLE = {"registers": "learnable_registers"} | {
    f"blocks.{{}}.{path}": f"transformer_1d_blocks.{{}}.{name}" for path, name in _BLOCK.items()
}


class _Numbered(nnx.Module):
    """A connector whose blocks are numbered, as officially, not stacked."""

    def __init__(self, cfg: ConnectorConfig):
        rngs = nnx.Rngs(0)
        self.registers = Connector(cfg, rngs=rngs).registers
        self.blocks = nnx.List([ConnectorBlock(cfg, rngs=rngs) for _ in range(cfg.num_layers)])


def connector_from_official(
    tensors: Mapping[str, np.ndarray], cfg: ConnectorConfig, *, component: str = "connector"
) -> dict[str, Any]:
    """Official tensors of one connector, prefix removed -> the parameter tree of `Connector(cfg)`.

    Registers that `cfg` does not want (`registers=0`) are left out.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    if not cfg.registers:
        tensors = {k: v for k, v in tensors.items() if k != TABLE["registers"]}
    tree = mapping.from_official(tensors, lambda: _Numbered(cfg), TABLE, component=component)
    blocks = [tree["blocks"][i] for i in range(cfg.num_layers)]
    return tree | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def connector_to_official(params: Mapping[str, Any], cfg: ConnectorConfig) -> dict[str, np.ndarray]:
    """The parameter tree -> official tensors, without prefix; inverse of the above."""
    stacked = jax.tree.map(np.asarray, params["blocks"])
    blocks = {i: jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(cfg.num_layers)}
    return mapping.to_official({**params, "blocks": blocks}, TABLE)


def features_from_official(
    tensors: Mapping[str, np.ndarray], cfg: TextFeaturesConfig
) -> dict[str, Any]:
    """Official tensors, `text_embedding_projection.` removed -> the tree of `TextFeatures(cfg)`.

    Officially the input feature d of state l has the index d * L + l; here states come first. With
    `last_layer_only` the part of the last state is all that is read.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    tree: dict[str, Any] = {}
    problems, known = [], set()
    for ours, (official, out) in _projections(cfg).items():
        shapes = {"weight": (out, cfg.width * cfg.num_states)} | (
            {"bias": (out,)} if cfg.bias else {}
        )
        for leaf, shape in shapes.items():
            name = f"{official}.{leaf}"
            known.add(name)
            if name not in tensors:
                problems.append(f"missing {name}")
            elif tensors[name].shape != shape:
                problems.append(f"{name} has {tuple(tensors[name].shape)}, not {shape}")
            elif leaf == "bias":
                tree.setdefault(ours, {})["bias"] = tensors[name]
            else:
                kernel = tensors[name].reshape(out, cfg.width, cfg.num_states).transpose(2, 1, 0)
                kernel = kernel[-1:] if cfg.last_layer_only else kernel
                tree.setdefault(ours, {})["kernel"] = kernel
    problems += [f"unknown {name}" for name in tensors if name not in known]
    if problems:
        raise UserError(f"text projection weights do not fit the config: {'; '.join(problems)}")
    return tree


def features_to_official(
    params: Mapping[str, Any], cfg: TextFeaturesConfig
) -> dict[str, np.ndarray]:
    """The parameter tree -> official tensors, without prefix; inverse of the above.

    Weights of a single state come out as those of a language model with one state.
    """
    tensors = {}
    for ours, (official, out) in _projections(cfg).items():
        kernel = np.asarray(params[ours]["kernel"]).transpose(2, 1, 0)
        tensors[f"{official}.weight"] = np.ascontiguousarray(kernel).reshape(out, -1)
        if cfg.bias:
            tensors[f"{official}.bias"] = np.asarray(params[ours]["bias"])
    return tensors


def _projections(cfg: TextFeaturesConfig) -> dict[str, tuple[str, int]]:
    """Our module -> its official name and its output width."""
    if cfg.audio_dim is None:
        return {"video": ("aggregate_embed", cfg.video_dim)}
    return {
        "video": ("video_aggregate_embed", cfg.video_dim),
        "audio": ("audio_aggregate_embed", cfg.audio_dim),
    }


# ---- files ---------------------------------------------------------------------------------------


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint: `config` and `gemma_source_checkpoint` parsed, the rest text.

    Raises:
      UserError: no readable file, or one of the two is not a JSON object.
    """
    metadata: dict[str, Any] = dict(files.metadata(path))
    for key in ("config", "gemma_source_checkpoint"):
        if key not in metadata:
            continue
        try:
            metadata[key] = json.loads(metadata[key])
        except ValueError as error:
            raise UserError(
                f"{path}: {key} in its metadata is not JSON ({reason(error)})"
            ) from None
        if not isinstance(metadata[key], dict):
            raise UserError(f"{path}: {key} in its metadata is not a JSON object")
    return metadata


def transformer_section(path: str | os.PathLike) -> dict[str, Any]:
    """The `transformer` section of a checkpoint's config, where features and connectors are set.

    Raises:
      UserError: no readable file, or no such section.
    """
    section = read_metadata(path).get("config", {}).get("transformer")
    if section is None:
        raise UserError(f"{path}: its metadata has no config of a transformer")
    return section


def load_features(
    checkpoint: str | os.PathLike,
    text_encoder: str | os.PathLike | None = None,
    *,
    width: int,
    num_layers: int,
    mesh: jax.sharding.Mesh | None = None,
    **overrides: Any,
) -> TextFeatures:
    """The features of a checkpoint, weights in the dtype of the file, on `mesh` if one is given.

    Args:
      checkpoint: single-file checkpoint, or the transformer of a split pack.
      text_encoder: packed text encoder, read where the checkpoint has no projection.
      width, num_layers: of the language model.
      mesh: where to put the weights.
      overrides: our own fields of `TextFeaturesConfig`.

    Raises:
      UserError: files, config or tensors that do not fit.
    """
    section = transformer_section(checkpoint)
    cfg = text_features_config(section, width=width, num_layers=num_layers, **overrides)
    tensors = _read(checkpoint, (PROJECTION,))
    if not tensors and text_encoder is not None and Path(text_encoder).is_file():
        tensors = _read(text_encoder, (PROJECTION,))
    if not tensors:
        raise UserError(
            f"{checkpoint}: has no text projection ({PROJECTION}...); in a split pack it is in the "
            "packed text encoder: give that file as the text encoder"
        )
    params = features_from_official(_without(PROJECTION, tensors), cfg)
    return _place(lambda: TextFeatures(cfg, rngs=nnx.Rngs(0)), params, mesh)


def load_connectors(
    checkpoint: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, **overrides: Any
) -> Connectors:
    """Both connectors of a checkpoint, weights in the dtype of the file, on `mesh` if given.

    Args:
      checkpoint: single-file checkpoint, or the transformer of a split pack.
      mesh: where to put the weights.
      overrides: our own fields of `ConnectorConfig`.

    Raises:
      UserError: file, config or tensors that do not fit.
    """
    configs = connector_configs(transformer_section(checkpoint), **overrides)
    tensors = _read(checkpoint, tuple(CONNECTORS.values()))
    params = {
        stream: connector_from_official(
            _without(prefix, tensors), cfg, component=f"{checkpoint}: {stream} connector"
        )
        for (stream, prefix), cfg in zip(CONNECTORS.items(), configs, strict=True)
    }
    return _place(lambda: Connectors(*configs, rngs=nnx.Rngs(0)), params, mesh)


def _read(path: str | os.PathLike, prefixes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tensors of a file whose names start with one of `prefixes`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({reason(error)})") from None


def _without(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _place(create: Callable[[], nnx.Module], params: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """The module that `create` builds, with `params` on the device or sharded over `mesh`."""
    if mesh is None:
        return mapping.build(create, jax.tree.map(jnp.asarray, params))
    homes = abstract_state(lambda: nnx.to_pure_dict(nnx.state(create(), nnx.Param)), mesh=mesh)
    placed = jax.tree.map(lambda home, value: jax.device_put(value, home.sharding), homes, params)
    return mapping.build(create, placed)
