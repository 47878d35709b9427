"""Gemma text decoders under their names in Hugging Face folders and packed text encoders; configs.

Source: `ltx_core/text_encoders/gemma/{gemma_assets,encoders/encoder_configurator}.py` (layouts);
Hugging Face's `Gemma3TextConfig` and `Gemma4UnifiedTextConfig` (config keys and their defaults).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.quantized import stored
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.models.text.gemma_layers import GemmaConfig, LayerKind, repeating
from ltx2_jax.weights import mapping
from ltx2_jax.weights.mapping import Parameter

# ---------------------------------------------------------------------------------------- config

# Hugging Face's defaults where its configs leave a key out, as released configs do.
_DEFAULTS = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "rms_norm_eps": 1e-6,
}
_GEMMA_3 = _DEFAULTS | {
    "vocab_size": 262_208,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GEMMA_4_UNIFIED = _DEFAULTS | {
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "sliding_window": 1024,
    "global_head_dim": 512,
}
_GEMMA_4 = _GEMMA_4_UNIFIED | {"sliding_window": 512, "hidden_size_per_layer_input": 256}
DEFAULTS = {"gemma3": _GEMMA_3, "gemma4": _GEMMA_4, "gemma4_unified": _GEMMA_4_UNIFIED}

# Key -> values, besides null, under which the network is the one that this code computes.
ASSERTED = {
    "attention_bias": (False,),
    "attn_logit_softcapping": (),
    "enable_moe_block": (False,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (0,),
    "num_kv_shared_layers": (0,),
    "per_layer_config": (),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, "vision"),  # "vision" is causal for text
}
_ROPE = {
    "gemma3": {
        "sliding_attention": {"rope_theta": 10_000.0},
        "full_attention": {"rope_theta": 1_000_000.0},
    },
    "gemma4": {
        "sliding_attention": {"rope_theta": 10_000.0},
        "full_attention": {
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
        },
    },
}
_KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def gemma_config(config: Mapping[str, Any], **overrides: Any) -> GemmaConfig:
    """A Hugging Face config, multimodal or text-only -> `GemmaConfig`.

    `overrides` are our own fields, such as dtype.

    Raises:
      UserError: not a Gemma 3 or 4, or a feature that is not implemented; all of them are listed.
    """
    model_type = str(config.get("model_type"))
    name = model_type.removesuffix("_text")
    if name not in DEFAULTS:
        raise UserError(
            f"text encoder config: model_type={model_type!r} is not one of {', '.join(DEFAULTS)}"
        )
    family = "gemma3" if name == "gemma3" else "gemma4"
    stored = {
        # Multimodal configs have this one beside the text part.
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        **(config.get("text_config") or config),
    }
    text = DEFAULTS[name] | {key: value for key, value in stored.items() if value is not None}
    kinds, ropes = _layer_kinds(text, family), _ropes(text, family)
    wrong = _unsupported(text, kinds, ropes, family)
    if wrong:
        raise UserError(f"unsupported text encoder config: {', '.join(wrong)}")
    fields = {
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "mlp": text["intermediate_size"],
        "num_heads": text["num_attention_heads"],
        "norm_eps": text["rms_norm_eps"],
        "logit_cap": text.get("final_logit_softcapping"),
        "layers": tuple(_KINDS[kind] for kind in kinds),
        "sliding": _sliding(text, ropes["sliding_attention"]),
        "full": _full(text, ropes["full_attention"], family),
    }
    if family == "gemma3":
        fields |= {"attention_scale": text["query_pre_attn_scalar"] ** -0.5}
    else:
        fields |= {"attention_scale": 1.0, "norm_offset": 0.0}
        fields |= {"value_norm": True, "layer_scalar": True}
    return GemmaConfig(**(fields | overrides))


def _unsupported(
    text: Mapping[str, Any], kinds: list[str], ropes: Mapping[str, Any], family: str
) -> list[str]:
    """What this code does not compute, each with its key."""
    wrong = [
        f"{key}={text[key]!r} (only {' or '.join(map(repr, values)) or 'null'})"
        for key, values in ASSERTED.items()
        if key in text and text[key] not in values
    ]
    for kind, rope in ropes.items():
        known = ["default", "linear"]
        if (family, kind) == ("gemma4", "full_attention"):
            known.append("proportional")
        if rope.get("rope_type", "default") not in known:
            wrong.append(f"rope_type={rope['rope_type']!r} of {kind} (only {' or '.join(known)})")
    wrong += [f"layer_types: {kind!r}" for kind in sorted(set(kinds) - set(_KINDS))]
    if len(kinds) != text["num_hidden_layers"]:
        wrong.append(f"{len(kinds)} layer_types for num_hidden_layers={text['num_hidden_layers']}")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        wrong.append("num_attention_heads is not a multiple of num_key_value_heads")
    return wrong


def _layer_kinds(text: Mapping[str, Any], family: str) -> list[str]:
    kinds = text.get("layer_types")
    if kinds is None:
        period = text.get("sliding_window_pattern", 6)
        count = range(1, text["num_hidden_layers"] + 1)
        kinds = ["sliding_attention" if i % period else "full_attention" for i in count]
    if family == "gemma4":  # upstream forces it
        kinds = [*kinds[:-1], "full_attention"]
    return kinds


def _ropes(text: Mapping[str, Any], family: str) -> dict[str, dict[str, Any]]:
    """Rotary parameters of either kind, from the newer nested keys or the older flat ones."""
    stored, default = text.get("rope_parameters") or {}, _ROPE[family]
    ropes = {
        kind: {"rope_theta": default[kind]["rope_theta"]} | stored[kind]
        if stored.get(kind)
        else dict(default[kind])
        for kind in _KINDS
    }
    if family == "gemma3":
        ropes["full_attention"] |= text.get("rope_scaling") or {}
        for kind, key in (
            ("full_attention", "rope_theta"),
            ("sliding_attention", "rope_local_base_freq"),
        ):
            if key in text and "rope_theta" not in (stored.get(kind) or {}):
                ropes[kind]["rope_theta"] = text[key]
    return ropes


def _sliding(text: Mapping[str, Any], rope: Mapping[str, Any]) -> LayerKind:
    return LayerKind(
        head_dim=text["head_dim"],
        kv_heads=text["num_key_value_heads"],
        rope_theta=float(rope["rope_theta"]),
        rope_factor=_factor(rope),
        window=text["sliding_window"],
    )


def _full(text: Mapping[str, Any], rope: Mapping[str, Any], family: str) -> LayerKind:
    shared = family == "gemma4" and bool(text.get("attention_k_eq_v"))
    # Upstream reads the separate number of heads only where keys equal values.
    separate = text.get("num_global_key_value_heads") if shared else None
    partial = rope.get("rope_type") == "proportional"
    return LayerKind(
        head_dim=text["head_dim"] if family == "gemma3" else text["global_head_dim"],
        kv_heads=separate or text["num_key_value_heads"],
        rope_theta=float(rope["rope_theta"]),
        rope_factor=_factor(rope),
        rotary_fraction=float(rope.get("partial_rotary_factor", 1.0)) if partial else 1.0,
        keys_are_values=shared,
    )


def _factor(rope: Mapping[str, Any]) -> float:
    return 1.0 if rope.get("rope_type", "default") == "default" else float(rope.get("factor", 1.0))


# ----------------------------------------------------------------------------------------- names

# Where the language model lies in a file. All else there is another part, or the output matrix,
# which is the embedding.
PREFIXES = ("language_model.model.", "model.language_model.", "model.")
HEADS = ("layers.", "embed_tokens.", "norm.", "per_layer")

OUTSIDE = {"embedding": "embed_tokens.weight", "norm.weight": "norm.weight"}
LAYER = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention_out_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp_out_norm.weight": "post_feedforward_layernorm.weight",
    "scalar": "layer_scalar",
}


def create(cfg: GemmaConfig) -> Gemma:
    """The decoder of a config, with weights that mean nothing."""
    return Gemma(cfg, rngs=Rngs(0))


def parameters(cfg: GemmaConfig, where: Any = None) -> list[Parameter]:
    """The decoder's parameters, by names without the prefix of `PREFIXES`.

    Ours are groups.<group>.layers.<place in the pattern>.<inside a layer>, stacked over the repeats
    of the pattern.
    """
    groups = repeating(cfg.layers)
    sizes = [len(pattern) * repeats for pattern, repeats in groups]
    starts = np.cumsum([0, *sizes]).tolist()
    found = []
    whole = replace(cfg, quantized=None)
    for path, leaf in mapping.abstract_params(partial(create, whole), where).items():
        if path[0] != "groups":
            found.append(Parameter(path, (OUTSIDE[".".join(map(str, path))],), leaf))
            continue
        (pattern, repeats), first = groups[path[1]], starts[path[1]] + path[3]
        inside = LAYER[".".join(map(str, path[4:]))]
        layers = range(first, first + len(pattern) * repeats, len(pattern))
        names = tuple(f"layers.{i}.{inside}" for i in layers)
        form = stored(cfg.quantized) if leaf.ndim == 3 else None
        found.append(Parameter(path, names, leaf, stacked=True, form=form))
    return found


def stored_dtype(dtype: str) -> Callable[[Parameter], str]:
    """`dtype` for matrices and float32 for vectors, as `Release.load` takes it."""
    return lambda parameter: dtype if len(parameter.inner_shape) > 1 else "float32"


# ----------------------------------------------------------------------------------------- files


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder (by its index, if it has one), or the packed file itself.

    Raises:
      UserError: none there, or one that the index or the file names announce is missing.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    files = indexed(index) if index.is_file() else numbered(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path}: has no model.safetensors, nor shards of one")
    check_shards(path, files)
    return files


def indexed(index: Path) -> list[Path]:
    """The files that an index names; UserError if it is none."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    return sorted({index.parent / str(name) for name in weight_map.values()})


def numbered(files: Iterable[Path]) -> list[Path]:
    """Files, and the rest of the shards that names such as model-00001-of-00003 announce."""
    found = set(files)
    for file in list(found):
        if match := re.fullmatch(r"(.*-)\d+(-of-(\d+)\.safetensors)", file.name):
            first, last, count = match.groups()
            names = (f"{first}{i:0{len(count)}}{last}" for i in range(1, int(count) + 1))
            found.update(file.with_name(name) for name in names)
    return sorted(found)


def check_shards(folder: Path, files: Iterable[Path]) -> None:
    """UserError with all that are not there."""
    missing = [os.path.relpath(file, folder) for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: shards are missing: {', '.join(sorted(missing))}")


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object; UserError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
