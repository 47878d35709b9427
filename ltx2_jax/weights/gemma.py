"""Gemma text decoders from Hugging Face folders and from the packed text encoder of LTX-2.5.

Nothing is read before every tensor's name and shape is known to fit the config; then each shard of
each parameter is filled by slices of the files, so no host holds more than the part it needs.
Source: `ltx_core/text_encoders/gemma/{gemma_assets,encoders/encoder_configurator}.py` (layouts);
Hugging Face's `Gemma3TextConfig` and `Gemma4UnifiedTextConfig` (config keys and their defaults).
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.gemma import Gemma
from ltx2_jax.models.gemma_layers import GemmaConfig, LayerKind, repeating
from ltx2_jax.sharding import abstract_state

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


def read_config(path: str | Path) -> dict[str, Any]:
    """The Hugging Face config of a folder or of a packed text encoder, as it is stored.

    Raises:
      UserError: no such folder or file, no config in it, or one that is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise UserError(f"{path}: has no config.json (a Hugging Face Gemma folder has one)")
        return _json(file, file.read_bytes())
    with contextlib.ExitStack() as stack:
        metadata = _open(path, stack).metadata() or {}
    if "gemma_config" not in metadata:
        raise UserError(f"{path}: has no gemma_config in its metadata: not a packed text encoder")
    return _json(path, metadata["gemma_config"])


def gemma_config(config: Mapping[str, Any], **overrides: Any) -> GemmaConfig:
    """A Hugging Face config, multimodal or text-only -> `GemmaConfig`.

    `overrides` are our own fields, such as dtype.

    Raises:
      UserError: not a Gemma 3 or 4, or a feature that is not implemented; all of them are listed.
    """
    model_type = str(config.get("model_type"))
    family = model_type.removesuffix("_text")
    if family not in DEFAULTS:
        raise UserError(
            f"text encoder config: model_type={model_type!r} is not one of {', '.join(DEFAULTS)}"
        )
    generation = "gemma3" if family == "gemma3" else "gemma4"
    stored = {
        # Multimodal configs have this one beside the text part.
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        **(config.get("text_config") or config),
    }
    text = DEFAULTS[family] | {key: value for key, value in stored.items() if value is not None}
    kinds, ropes = _layer_kinds(text, generation), _ropes(text, generation)
    wrong = _unsupported(text, kinds, ropes, generation)
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
        "full": _full(text, ropes["full_attention"], generation),
    }
    if generation == "gemma3":
        fields |= {"attention_scale": text["query_pre_attn_scalar"] ** -0.5}
    else:
        fields |= {"attention_scale": 1.0, "norm_offset": 0.0}
        fields |= {"value_norm": True, "layer_scalar": True}
    return GemmaConfig(**(fields | overrides))


def _unsupported(
    text: Mapping[str, Any], kinds: list[str], ropes: Mapping[str, Any], generation: str
) -> list[str]:
    """What this code does not compute, each with its key."""
    wrong = [
        f"{key}={text[key]!r} (only {' or '.join(map(repr, values)) or 'null'})"
        for key, values in ASSERTED.items()
        if key in text and text[key] not in values
    ]
    for kind, rope in ropes.items():
        known = ["default", "linear"]
        if (generation, kind) == ("gemma4", "full_attention"):
            known.append("proportional")
        if rope.get("rope_type", "default") not in known:
            wrong.append(f"rope_type={rope['rope_type']!r} of {kind} (only {' or '.join(known)})")
    wrong += [f"layer_types: {kind!r}" for kind in sorted(set(kinds) - set(_KINDS))]
    if len(kinds) != text["num_hidden_layers"]:
        wrong.append(f"{len(kinds)} layer_types for num_hidden_layers={text['num_hidden_layers']}")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        wrong.append("num_attention_heads is not a multiple of num_key_value_heads")
    return wrong


def _layer_kinds(text: Mapping[str, Any], generation: str) -> list[str]:
    kinds = text.get("layer_types")
    if kinds is None:
        period = text.get("sliding_window_pattern", 6)
        count = range(1, text["num_hidden_layers"] + 1)
        kinds = ["sliding_attention" if i % period else "full_attention" for i in count]
    if generation == "gemma4":  # upstream forces it
        kinds = [*kinds[:-1], "full_attention"]
    return kinds


def _ropes(text: Mapping[str, Any], generation: str) -> dict[str, dict[str, Any]]:
    """Rotary parameters of either kind, from the newer nested keys or the older flat ones."""
    stored, default = text.get("rope_parameters") or {}, _ROPE[generation]
    ropes = {
        kind: {"rope_theta": default[kind]["rope_theta"]} | stored[kind]
        if stored.get(kind)
        else dict(default[kind])
        for kind in _KINDS
    }
    if generation == "gemma3":
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


def _full(text: Mapping[str, Any], rope: Mapping[str, Any], generation: str) -> LayerKind:
    shared = generation == "gemma4" and bool(text.get("attention_k_eq_v"))
    # Upstream reads the separate number of heads only where keys equal values.
    separate = text.get("num_global_key_value_heads") if shared else None
    partial = rope.get("rope_type") == "proportional"
    return LayerKind(
        head_dim=text["head_dim"] if generation == "gemma3" else text["global_head_dim"],
        kv_heads=separate or text["num_key_value_heads"],
        rope_theta=float(rope["rope_theta"]),
        rope_factor=_factor(rope),
        rotary_fraction=float(rope.get("partial_rotary_factor", 1.0)) if partial else 1.0,
        keys_are_values=shared,
    )


def _factor(rope: Mapping[str, Any]) -> float:
    return 1.0 if rope.get("rope_type", "default") == "default" else float(rope.get("factor", 1.0))


def _json(path: Path, text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


# ----------------------------------------------------------------------------------------- names

# Where the language model lies in a file; the first prefix with an embedding is taken.
PREFIXES = ("language_model.model.", "model.language_model.", "model.")
# What follows the prefix in a language model. All else is another part (vision, audio, tokenizer)
# or the output matrix, which is the embedding.
_HEADS = ("layers.", "embed_tokens", "norm.", "per_layer")

OUTSIDE = {"embedding": "embed_tokens.weight", "norm.weight": "norm.weight"}
LAYER = {
    "attention.query.kernel": "self_attn.q_proj.weight",
    "attention.key.kernel": "self_attn.k_proj.weight",
    "attention.value.kernel": "self_attn.v_proj.weight",
    "attention.out.kernel": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.up.kernel": "mlp.up_proj.weight",
    "mlp.down.kernel": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention_out_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp_out_norm.weight": "post_feedforward_layernorm.weight",
    "scalar": "layer_scalar",
}


@dataclass(frozen=True)
class Key:
    """One parameter of ours and the official tensors that make it up."""

    path: tuple[str | int, ...]
    names: tuple[str, ...]  # without prefix; one per stacked layer, or one in all
    stacked: bool
    leaf: jax.ShapeDtypeStruct

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    def official_shape(self) -> tuple[int, ...]:
        shape = tuple(self.leaf.shape[self.stacked :])
        return shape[::-1] if self.transposed else shape


def key_table(params: Mapping[Any, Any], cfg: GemmaConfig) -> list[Key]:
    """One `Key` for every leaf of `params`, the (abstract) parameter tree of `cfg`."""
    starts, first = [], 0
    groups = repeating(cfg.layers)
    for pattern, repeats in groups:
        starts.append(first)
        first += len(pattern) * repeats
    table = []
    for entries, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(entry.key for entry in entries)
        if path[0] != "groups":
            name = OUTSIDE[".".join(map(str, path))]
            table.append(Key(path, (name,), False, leaf))
            continue
        # groups.<group>.layers.<place in the pattern>.<inside a layer>
        (pattern, repeats), layer = groups[path[1]], starts[path[1]] + path[3]
        inside = LAYER[".".join(map(str, path[4:]))]
        layers = range(layer, layer + len(pattern) * repeats, len(pattern))
        table.append(Key(path, tuple(f"layers.{i}.{inside}" for i in layers), True, leaf))
    return table


# --------------------------------------------------------------------------------------- loading


def load_gemma(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: str = "bfloat16"
) -> Gemma:
    """The decoder of a Hugging Face folder or a packed text encoder, on its shards.

    Args:
      path: a folder with config.json and model.safetensors or its shards, or one packed file.
      mesh: where to place it (`sharding.make_mesh`); None is the default device.
      dtype: of the matrices and of the activations; vectors are float32.

    Raises:
      UserError: files missing or unreadable, tensors missing, unknown or misshapen for the config
        (all of them listed), a config that is not implemented, a mesh that does not divide it.
    """
    cfg = gemma_config(read_config(path), dtype=dtype)
    graphdef, params = _abstract(cfg, mesh)
    with contextlib.ExitStack() as stack:
        tensors = _tensors(weight_files(path), stack)
        prefix = next((p for p in PREFIXES if f"{p}{OUTSIDE['embedding']}" in tensors), None)
        if prefix is None:
            raise UserError(f"{path}: has no tensor {PREFIXES[-1]}{OUTSIDE['embedding']}")
        ours = tuple(prefix + head for head in _HEADS)
        files = {
            name.removeprefix(prefix): file.get_slice(name)
            for name, file in tensors.items()
            if name.startswith(ours)
        }
        table = key_table(params, cfg)
        _check(path, table, files)
        state: dict[Any, Any] = {}
        try:
            for key in table:
                *parents, last = key.path
                place = state
                for part in parents:
                    place = place.setdefault(part, {})
                place[last] = _place(key, files, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    return nnx.merge(graphdef, state)


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder (by its index, if it has one), or the packed file itself.

    Raises:
      UserError: none there, or one that the index or the file names announce is missing.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index, index.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map")
        files = sorted({path / str(name) for name in weight_map.values()})
    else:
        files = sorted(path.glob("model*.safetensors"))
        numbered = [re.fullmatch(r"(.*-)\d+(-of-(\d+)\.safetensors)", file.name) for file in files]
        for match in filter(None, numbered):
            first, last, count = match.groups()
            names = (f"{first}{i:0{len(count)}}{last}" for i in range(1, int(count) + 1))
            files = sorted({*files, *(path / name for name in names)})
    if not files:
        raise UserError(f"{path}: has no model.safetensors, nor shards of one")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: shards are missing: {', '.join(missing)}")
    return files


def _abstract(cfg: GemmaConfig, mesh: jax.sharding.Mesh | None) -> tuple[Any, dict[Any, Any]]:
    """Graph definition, and the parameter tree of shapes and shardings."""

    def build() -> Gemma:
        return Gemma(cfg, rngs=nnx.Rngs(0))

    def create() -> dict[Any, Any]:
        return nnx.to_pure_dict(nnx.state(build(), nnx.Param))

    if mesh is not None:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            graphdef = nnx.graphdef(jax.eval_shape(build))
        return graphdef, abstract_state(create, mesh=mesh)
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), jax.eval_shape(create)
    )
    return nnx.graphdef(jax.eval_shape(build)), params


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    try:
        return stack.enter_context(safe_open(str(path), framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({reason(error)})") from None


def _tensors(paths: list[Path], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that has it."""
    files = [_open(path, stack) for path in paths]
    return {name: file for file in files for name in file.keys()}


def _check(path: str | Path, table: list[Key], files: Mapping[str, Any]) -> None:
    problems, known = [], set()
    for key in table:
        for name in key.names:
            known.add(name)
            if name not in files:
                problems.append(f"missing {name}")
                continue
            shape, kind = tuple(files[name].get_shape()), files[name].get_dtype()
            if shape != key.official_shape():
                problems.append(f"{name} has {shape}, not {key.official_shape()}")
            if kind not in ("BF16", "F16", "F32"):
                problems.append(f"{name} is stored as {kind}, not as bfloat16 or float")
    problems += [f"unknown {name}" for name in files if name not in known]
    if problems:
        raise UserError(f"{path}: weights do not fit the config: {'; '.join(problems)}")


def _place(key: Key, files: Mapping[str, Any], dtype: str) -> jax.Array:
    """One parameter, each of its shards read from the files by slices."""
    matrix = key.leaf.ndim - key.stacked > 1
    stored = jnp.dtype(dtype if matrix else "float32")
    read: dict[str, np.ndarray] = {}  # a shard that several devices hold is read once

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if repr(index) not in read:
            read[repr(index)] = _read(key, files, index, stored)
        return read[repr(index)]

    return jax.make_array_from_callback(key.leaf.shape, key.leaf.sharding, shard)


def _read(key: Key, files: Mapping[str, Any], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part `index` of a parameter, from the same part of its official tensors."""
    inside = index[key.stacked :]
    official = inside[::-1] if key.transposed else inside
    if not key.stacked:
        return files[key.names[0]][official].astype(dtype, copy=False)
    bounds = (s.indices(n) for s, n in zip(index, key.leaf.shape, strict=True))
    stacked = np.empty([stop - start for start, stop, _ in bounds], dtype)
    for row, name in zip(stacked, key.names[index[0]], strict=True):
        part = files[name][official]
        if not key.transposed:
            row[...] = part
            continue
        # In strips: the transposed copy of a whole matrix misses the cache at every number.
        for start in range(0, len(part), 256):
            row[:, start : start + 256] = part[start : start + 256].T
    return stacked
