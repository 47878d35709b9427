"""LoRA files in every key style, fused into weights or kept beside them, and written officially.

    lora = read_lora("style.safetensors")
    fused, originals = fuse(params, [(lora, 0.8)], config)
    params = unfuse(fused, originals)

A file holds two thin matrices for each linear map that it adapts, A [r, in] and B [out, r], and by
its style a scale alpha / r; the weight becomes W + strength (alpha / r) B A. Official files have no
alpha. Source: `ltx_core/loader/fuse_loras.py`; the LoRA loaders of diffusers and ComfyUI (names).
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing
from ltx2_jax.models.transformer_config import PRESETS, TransformerConfig
from ltx2_jax.sharding import sharding_of
from ltx2_jax.weights import mapping, transformer, versions
from ltx2_jax.weights.mapping import Parameter, in_short
from ltx2_jax.weights.tensor_files import TensorFile, layout, write_rows

OFFICIAL = "diffusion_model."
# Longest first: what may stand before a module's name.
_PREFIXES = (
    "base_model.model.model.diffusion_model.",
    "base_model.model.diffusion_model.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
)
# How A and B are called behind it.
_PAIRS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b",
    ".lora_A.default.weight": "a", ".lora_B.default.weight": "b",
    ".lora_down.weight": "a", ".lora_up.weight": "b",
    ".lora.down.weight": "a", ".lora.up.weight": "b",
    "_lora.down.weight": "a", "_lora.up.weight": "b",
    ".alpha": "alpha",
}  # fmt: skip
# Official module -> its name in diffusers, part by part; the first two only at the start.
_DIFFUSERS = {
    r"^adaln_single\.": "time_embed.",
    r"^audio_adaln_single\.": "audio_time_embed.",
    r"patchify_proj": "proj_in",
    r"av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    r"av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    r"av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    r"av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    r"prompt_adaln_single": "prompt_adaln",
}

# Adapters of connectors and text projections: the official loader passes them over.
_BESIDE = re.compile(r"embeddings_connector|text_embedding_projection|^connectors\.")


@dataclass(frozen=True)
class Target:
    """What is added to one matrix: scale * b @ a."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float = 1.0  # alpha / r, where the file has an alpha

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Lora:
    """One adapter, by the official names of the modules that it adapts.

    `metadata` is text by text, as in the file; of it `reference_downscale_factor` (spatial) and
    `reference_temporal_scale_factor` say how an IC-LoRA reads its reference clip.
    """

    targets: dict[str, Target]  # "transformer_blocks.0.attn1.to_q"
    metadata: dict[str, str] = field(default_factory=dict)
    name: str = "LoRA"  # for messages

    @property
    def ranks(self) -> set[int]:
        return {target.rank for target in self.targets.values()}


# ------------------------------------------------------------------------------------------ reading


def read_lora(path: str | os.PathLike) -> Lora:
    """Reads a LoRA of the transformer as Lightricks, diffusers, PEFT, kohya or ComfyUI write it.

    Raises:
      UserError: no readable file, a tensor of another kind or of no module of LTX-2 (all of them
        listed), half a pair, matrices that do not fit each other.

    Warns:
      UserWarning: parts for connectors or text projections, which are left out.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    names, unknown, beside = _modules(), [], []
    with TensorFile(path) as file:
        for name in file.tensors:
            module, part = _split(name, names)
            if module is not None:
                found.setdefault(module, {})[part] = file.read(name)
            else:
                (beside if _BESIDE.search(name) else unknown).append(name)
        metadata = file.metadata
    if unknown:
        raise UserError(f"{path}: {_what_is_wrong(unknown, bool(found))}")
    if beside:
        warnings.warn(
            f"{path}: {len(beside)} tensors for the text side ({in_short(beside)[0]} ...) are left "
            "out, as the official code leaves them out",
            stacklevel=2,
        )
    scales = _metadata_scales(metadata, path)
    targets = {module: _target(path, module, parts, scales) for module, parts in found.items()}
    if not targets:
        raise UserError(f"{path}: holds no LoRA")
    return Lora(targets, dict(metadata), str(path))


def _split(name: str, names: Mapping[str, str]) -> tuple[str | None, str]:
    """Official module and part ("a", "b" or "alpha") of a tensor; None for no module."""
    ending = next((ending for ending in _PAIRS if name.endswith(ending)), None)
    if ending is None:
        return None, ""
    module = name.removesuffix(ending)
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
    return names.get(module.removeprefix(prefix)), _PAIRS[ending]


@functools.cache
def _modules() -> dict[str, str]:
    """Every name of a module that a LoRA may adapt -> its official name."""
    official = set()
    for cfg in PRESETS.values():
        for parameter in _matrices(cfg):
            official.update(name.removesuffix(".weight") for name in parameter.names)
    names = {}
    for module in official:
        diffusers = module
        for pattern, new in _DIFFUSERS.items():
            diffusers = re.sub(pattern, new, diffusers)
        for alias in (module, diffusers):
            names[alias] = names[alias.replace(".", "_")] = module
    return names


def _matrices(cfg: TransformerConfig) -> list[Parameter]:
    """The weights of linear maps."""
    found = mapping.parameters(functools.partial(transformer.create, cfg), transformer.TABLE)
    return [p for p in found if p.path[-1] == "weight" and len(p.inner_shape) == 2]


def _metadata_scales(metadata: Mapping[str, str], path: Any) -> dict[str, Any]:
    """What PEFT stores beside the tensors: {"r": .., "lora_alpha": .., "alpha_pattern": {..}}."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise UserError(f"{path}: lora_adapter_metadata is not JSON ({reason(error)})") from None
    # diffusers puts the name of the network in front: "transformer.lora_alpha".
    return {key.removeprefix("transformer."): value for key, value in stored.items()}


def _target(
    path: Any, module: str, parts: Mapping[str, np.ndarray], scales: Mapping[str, Any]
) -> Target:
    if "a" not in parts or "b" not in parts:
        raise UserError(f"{path}: {module} has only {', '.join(parts)} of its pair")
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"{path}: {module} has A {a.shape} and B {b.shape}, which do not fit")
    alpha = scales.get("lora_alpha")
    for pattern, value in (scales.get("alpha_pattern") or {}).items():
        alpha = value if re.fullmatch(rf"(.*\.)?{pattern}", module) else alpha
    if "alpha" in parts:
        alpha = parts["alpha"].astype(np.float64).item()
    return Target(a, b, 1.0 if alpha is None else float(alpha) / a.shape[0])


def _what_is_wrong(unknown: list[str], some: bool) -> str:
    kinds = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude": "DoRA"}
    kinds |= {".diff": "a difference of whole weights", "bias": "biases", "norm": "norms"}
    for part, kind in kinds.items():
        if any(part in name for name in unknown):
            return f"{kind} in a LoRA is not supported: {', '.join(in_short(unknown))}"
    if not some and not any("lora" in name for name in unknown):
        return f"is no LoRA file (its tensors are {', '.join(in_short(unknown)[:5])} ...)"
    return f"tensors of no module of the transformer: {', '.join(in_short(unknown))}"


# ------------------------------------------------------------------------------------------ fitting


def check(lora: Lora, config: TransformerConfig, generation: str = "") -> None:
    """UserError unless a LoRA is for a transformer of this config, and of this generation if given.

    All that does not fit is listed.
    """
    made_for = versions.generation(lora.metadata.get("model_version", ""))
    if made_for and generation and made_for != generation:
        raise UserError(f"{lora.name}: is for LTX-2 {made_for}, these weights are {generation}")
    shapes = {
        name.removesuffix(".weight"): parameter.official_shape
        for parameter in _matrices(config)
        for name in parameter.names
    }
    wrong = []
    for module, target in lora.targets.items():
        shape = (target.b.shape[0], target.a.shape[1])
        if module not in shapes:
            wrong.append(f"{module} is not there")
        elif shapes[module] != shape:
            wrong.append(f"{module} has {shapes[module]}, not {shape}")
    if wrong:
        raise UserError(
            f"{lora.name}: does not fit these weights (is it for another generation?): "
            f"{'; '.join(in_short(wrong))}"
        )


def _stacked(
    parameter: Parameter, loras: Sequence[tuple[Lora, float]]
) -> tuple[np.ndarray, np.ndarray] | None:
    """a [L, r, in] and b [L, out, r] of all LoRAs, strengths and scales in b, float32; or None.

    Without the layer axis for a parameter that is not stacked. Layers that have less rank than
    others, or none, end with zeros.
    """
    modules = [name.removesuffix(".weight") for name in parameter.names]
    if not any(module in lora.targets for module in modules for lora, _ in loras):
        return None
    rows, columns = parameter.official_shape
    layers = []
    for module in modules:
        found = [(lora.targets[module], s) for lora, s in loras if module in lora.targets]
        a = [t.a.astype(np.float32) for t, _ in found] or [np.zeros((0, columns), np.float32)]
        b = [t.b.astype(np.float32) * np.float32(s * t.scale) for t, s in found]
        b = b or [np.zeros((rows, 0), np.float32)]
        layers.append((np.concatenate(a), np.concatenate(b, axis=1)))
    rank = max(a.shape[0] for a, _ in layers)
    a = np.stack([np.pad(a, ((0, rank - a.shape[0]), (0, 0))) for a, _ in layers])
    b = np.stack([np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for _, b in layers])
    return (a, b) if parameter.stacked else (a[0], b[0])


# ------------------------------------------------------------------------------------------ fusing


def fuse(
    params: Mapping[Any, Any],
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
    *,
    offload: bool = False,
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Weights with LoRAs in them, and the weights that they replace.

    W + sum of strength * scale * B A: products and sum in float32, rounded once to the dtype of W.
    (The official default adds up in bfloat16.)

    Args:
      params: of the transformer; untouched arrays are shared with the result.
      loras: each with its strength.
      config: of the transformer.
      offload: move what is replaced to the memory of the host, to keep room on the devices.

    Returns:
      The parameter tree, and path -> array for `unfuse`.

    Raises:
      UserError: a LoRA that does not fit; see `check`.
    """
    leaves = mapping.leaves(params)
    stream = [(p, leaves[p.path]) for p in _matrices(config)]
    originals = {}
    for parameter, fused in fuse_stream(stream, loras, config):
        before = leaves[parameter.path]
        if fused is not before:
            originals[parameter.path] = _on_host(before) if offload else before
            leaves[parameter.path] = fused
    return mapping.nested(leaves), originals


def fuse_stream(
    stream: Iterable[tuple[Parameter, jax.Array]],
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
) -> Iterator[tuple[Parameter, jax.Array]]:
    """`fuse`, one parameter at a time; those that no LoRA adapts come as they are."""
    for lora, _ in loras:
        check(lora, config)
    for parameter, weight in stream:
        if (pair := _stacked(parameter, loras)) is not None:
            weight = _fuse(parameter.stacked)(weight, *pair)
        yield parameter, weight


def unfuse(params: Mapping[Any, Any], originals: Mapping[Any, Any]) -> dict[Any, Any]:
    """The weights from before `fuse`, bit for bit."""
    leaves = mapping.leaves(params)
    back = {path: jax.device_put(value, leaves[path].sharding) for path, value in originals.items()}
    return mapping.nested(leaves | back)


@functools.cache
def _fuse(stacked: bool) -> Any:
    def one(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        where = jax.typeof(weight).sharding
        where = None if where.mesh.empty else where
        delta = jnp.einsum("or,ri->oi", b, a, precision="highest", out_sharding=where)
        return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

    def layers(*stacks: jax.Array) -> jax.Array:
        # Layer by layer: the float32 sum of a whole stack would be twice its size.
        return jax.lax.scan(lambda _, layer: (None, one(*layer)), None, stacks)[1]

    return jax.jit(layers if stacked else one)


def _on_host(array: jax.Array) -> jax.Array:
    kinds = {memory.kind for memory in next(iter(array.devices())).addressable_memories()}
    if "pinned_host" not in kinds:
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def adapters(
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
    where: Any = None,
    *,
    dtype: Any = "bfloat16",
) -> dict[Any, Any]:
    """LoRAs as adapters beside the weights, for `models.lora.attach`; strengths are in b.

    Args:
      loras: each with its strength; together they are one adapter of the sum of their ranks.
      config: of the transformer.
      where: mesh, sharding or None, as for the weights; the adapters are replicated.
      dtype: of the adapters.

    Raises:
      UserError: a LoRA that does not fit; see `check`.
    """
    for lora, _ in loras:
        check(lora, config)
    home = sharding_of(where) if isinstance(where, jax.sharding.Mesh) else where
    tree: dict[Any, Any] = {}
    for parameter in _matrices(config):
        for name, value in zip("ab", _stacked(parameter, loras) or (), strict=False):
            value = jax.device_put(value.astype(dtype), home)
            mapping.insert(tree, (*parameter.path[:-1], name), value)
    return tree


# ------------------------------------------------------------------------------------------ writing


def from_adapters(
    tree: Mapping[Any, Any], config: TransformerConfig, *, scale: float = 1.0, **metadata: str
) -> Lora:
    """A LoRA of what was trained as adapters: {"a": [.., r, in], "b": [.., out, r]} by path.

    `scale` is alpha / r of the training. Layers of a stack that are all zero are left out.
    """
    values = mapping.leaves(tree)
    targets = {}
    for parameter in _matrices(config):
        path = parameter.path[:-1]
        if (*path, "a") not in values:
            continue
        a, b = (np.asarray(values[(*path, name)]) for name in "ab")
        if not parameter.stacked:
            a, b = a[None], b[None]
        for name, a_layer, b_layer in zip(parameter.names, a, b, strict=True):
            if a_layer.any() or b_layer.any():
                targets[name.removesuffix(".weight")] = Target(a_layer, b_layer, scale)
    return Lora(targets, metadata)


def write_lora(path: str | os.PathLike, lora: Lora, *, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Writes an official LoRA file: no alpha, its scale in B; `lora.metadata` as it is.

    Raises:
      UserError: the file cannot be written; nothing is left then.
    """
    tensors = {}
    for module, target in lora.targets.items():
        scaled = target.b.astype(np.float32) * np.float32(target.scale)
        b = target.b if target.scale == 1 else scaled
        tensors[f"{OFFICIAL}{module}.lora_A.weight"] = target.a.astype(dtype)
        tensors[f"{OFFICIAL}{module}.lora_B.weight"] = b.astype(dtype)
    metadata = {k: v for k, v in lora.metadata.items() if k != "lora_adapter_metadata"}
    places = layout(
        {n: (v.dtype, v.shape) for n, v in tensors.items()}, {"format": "pt"} | metadata
    )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(places.header)
        for name, stored in places.tensors.items():
            write_rows(file.fileno(), stored, tensors[name])


# --------------------------------------------------------------------------------------- extracting


def extract(
    base: Mapping[Any, Any],
    tuned: Mapping[Any, Any],
    config: TransformerConfig,
    rank: int,
    *,
    progress: bool = False,
) -> tuple[Lora, float]:
    """The LoRA of rank `rank` that comes closest to the difference of two transformers.

    Matrices that are equal get none. By a randomised singular value decomposition (Halko et al.,
    arXiv 0909.4061): a few products with thin matrices, on the devices that hold the weights.

    Returns:
      The LoRA, and the share of the squared difference of all matrices that it misses.
    """
    before, after = mapping.leaves(base), mapping.leaves(tuned)
    targets, missed, total = {}, 0.0, 0.0
    found = _matrices(config)
    for parameter in tqdm(found, desc="extracting", disable=None if progress else True):
        old, new = before[parameter.path], after[parameter.path]
        for i, name in enumerate(parameter.names):
            pair = (old[i], new[i]) if parameter.stacked else (old, new)
            a, b, part, whole = map(np.asarray, _decompose(*pair, rank))
            if whole == 0:
                continue
            missed, total = missed + float(part), total + float(whole)
            targets[name.removesuffix(".weight")] = Target(a, b)
    return Lora(targets), missed / total if total else 0.0


@functools.partial(jax.jit, static_argnames="rank")
def _decompose(
    old: jax.Array, new: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """a [r, in], b [out, r], the squared norm that b @ a misses of new - old, and that of all."""
    delta = new.astype(jnp.float32) - old.astype(jnp.float32)
    rank = min(rank, *delta.shape)
    with jax.default_matmul_precision("highest"):
        width = min(rank + 8, *delta.shape)
        sketch = jax.random.normal(jax.random.key(0), (delta.shape[1], width))
        q = jnp.linalg.qr(delta @ sketch)[0]
        for _ in range(3):  # power iterations: the spectrum of a difference falls slowly
            q = jnp.linalg.qr(delta.T @ q)[0]
            q = jnp.linalg.qr(delta @ q)[0]
        u, s, vt = jnp.linalg.svd(q.T @ delta, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = root[:, None] * vt[:rank], (q @ u[:, :rank]) * root
        return a, b, jnp.sum((delta - b @ a) ** 2), jnp.sum(delta**2)
