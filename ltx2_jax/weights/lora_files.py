"""LoRA files: read in every key style, and written as official ones.

A file holds two thin matrices for each linear map that it adapts, A [r, in] and B [out, r], and by
its style a scale alpha / r; the weight becomes W + strength (alpha / r) B A. Official files have no
alpha. Source: `ltx_core/loader/fuse_loras.py`; the LoRA loaders of diffusers, PEFT and ComfyUI
(names, and where they keep alpha).
"""

import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing
from ltx2_jax.models.transformer.config import PRESETS, TransformerConfig
from ltx2_jax.weights import hub, mapping
from ltx2_jax.weights.loading import FLOAT8, finite
from ltx2_jax.weights.mapping import Parameter, in_short
from ltx2_jax.weights.names import transformer
from ltx2_jax.weights.names.gemma import read_json
from ltx2_jax.weights.tensor_files import TensorFile, layout, write_rows

OFFICIAL = "diffusion_model."
# What trainers put before a module's name, one after the other and in any order: the kind of the
# adapter, and what the network is wrapped in.
_WRAPPER = re.compile(
    r"(lora_unet|lora_transformer|lycoris|base_model|diffusion_model|transformer|unet|model|module"
    r"|pipe|dit)[._]"
)
# What wrappers of PyTorch put anywhere into it.
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# How A and B are called behind it, of an adapter that may have a name.
_MATRIX = re.compile(
    r"(?P<module>.+?)[._](?:lora_linear_layer|lora)[._](?P<part>A|B|down|up)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
)
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b"}
_ALPHA = ".alpha"
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
# What PEFT and diffusers write into a folder: the tensors, and the scales of PEFT's.
_PEFT, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTERS = (_PEFT, "pytorch_lora_weights.safetensors")
# Adapters of connectors and text projections: the official loader passes them over.
_BESIDE = re.compile(r"embeddings_connector|text_embedding_projection|(^|[._])connectors[._]")
# Where a header may have PEFT's config as JSON, and the scale as plain text. Of several the first.
_DIFFUSERS_KEY = "lora_adapter_metadata"
_CONFIG_KEYS = ("peft_config", "lora_config", "adapter_config")
_ALPHA_KEYS = ("lora_alpha", "network_alpha", "alpha")
_ROOT_KEY = "use_rslora"
# The alpha with which trainers of kohya's family trained. They write it beside the matrices, too;
# where it is not there, a converter has put it into the matrices, and left the header as it was.
_KOHYA_ALPHA = "ss_network_alpha"

# What else a file may hold for a module, by how the names end.
_OTHER_KINDS = {
    r"hada_[wt]\d(_[ab])?": "LoHa",
    r"lokr_([wt]\d)(_[ab])?": "LoKr",
    r"dora_scale|lora_magnitude_vector(\.\w+)*": "DoRA",
    r"\.oft_\w+(\.\w+)*": "OFT",
    r"lora_mid\.weight": "LoCon",
    r"\.diff(_b)?": "a difference of whole weights",
    r"[._]bias": "biases",
    r"[wb]_norm|_norm\.weight": "norms",
}


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


def lora_file(source: str | os.PathLike) -> Path:
    """The LoRA file of a source: a path, a name on the Hugging Face Hub, or a folder with it.

    Of a folder it is what PEFT or diffusers wrote there, or the only safetensors file; the folder
    itself is returned where that tells no file.

    Raises:
      UserError: no such file or folder; see `hub.fetch`.
    """
    path = hub.fetch(source)
    if not path.is_dir():
        return path
    named = [path / name for name in ADAPTERS if (path / name).is_file()]
    found = named[:1] or list(path.glob("*.safetensors"))
    return found[0] if len(found) == 1 else path


def read_lora(source: str | os.PathLike) -> Lora:
    """Reads a LoRA of the transformer as Lightricks, diffusers, PEFT, kohya, musubi-tuner, ComfyUI,
    ai-toolkit, OneTrainer or DiffSynth-Studio write it.

    Args:
      source: a file, or a folder as `lora_file` takes it; either may be a name on the Hugging Face
        Hub.

    Raises:
      UserError: no readable file, a tensor of another kind or of no module of LTX-2 (all of them
        listed), half a pair, matrices that do not fit each other or are not finite, a module that
        is there twice, scales that are no numbers.

    Warns:
      UserWarning: parts for connectors or text projections, which are left out; an alpha of the
        header that is not used.
    """
    path = lora_file(source)
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))) or "none"
        raise UserError(f"{source}: give one LoRA file; safetensors files in this folder: {names}")
    with TensorFile(path) as file:
        found, stored = _sorted_parts(file, source)
        metadata = file.metadata
    if not found:
        raise UserError(f"{source}: holds no LoRA of the transformer")
    bare = {m: len(p["a"]) for m, p in found.items() if "alpha" not in p and "a" in p}
    scales = _scales(metadata, path, bare)
    targets = {
        module: _target(source, module, parts, scales, stored[module])
        for module, parts in found.items()
    }
    return Lora(targets, dict(metadata), str(source))


def _sorted_parts(
    file: TensorFile, source: Any
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Official module -> its tensors "a", "b" and "alpha", and what the file calls it."""
    found: dict[str, dict[str, np.ndarray]] = {}
    stored: dict[str, str] = {}
    adapters: set[str] = set()
    names, unknown, beside = _modules(), [], []
    for name in file.tensors:
        alias, part, adapter = _split(name)
        module = names.get(alias)
        adapters |= {adapter} if adapter else set()
        if module is None:
            (beside if _BESIDE.search(name) else unknown).append(name)
        elif len(adapters) > 1:
            listed = ", ".join(sorted(adapters))
            raise UserError(f"{source}: holds several adapters ({listed}); save one of them alone")
        elif part in found.setdefault(module, {}):
            raise UserError(f"{source}: {module} is there twice, the second time as {name}")
        else:
            found[module][part], stored[module] = _read(file, name, part), alias
    if unknown:
        raise UserError(f"{source}: {_what_is_wrong(unknown, bool(found))}")
    if beside:
        warnings.warn(
            f"{source}: {len(beside)} tensors for the text side ({in_short(beside)[0]} ...) are "
            "left out, as the official code leaves them out",
            stacklevel=3,
        )
    return found, stored


def _read(file: TensorFile, name: str, part: str) -> np.ndarray:
    values = file.read(name)
    if values.dtype.kind in ("b" if part == "alpha" else "biu"):
        raise UserError(f"{file.path}: {name} is stored as {values.dtype}, not as a float")
    if not finite(values):
        raise UserError(f"{file.path}: NaN or infinity in {name}")
    return values


def _split(name: str) -> tuple[str, str, str]:
    """Module as the file calls it, part ("a", "b" or "alpha") and adapter of a tensor."""
    part, adapter = "alpha", ""
    if name.endswith(_ALPHA):
        module = name.removesuffix(_ALPHA)
    elif match := _MATRIX.fullmatch(name):
        module, part, adapter = match["module"], _PARTS[match["part"]], match["adapter"] or ""
    else:
        return "", "", ""
    module = _INSIDE.sub("", module)
    while module not in _modules() and (wrapper := _WRAPPER.match(module)):
        module = module[wrapper.end() :]
    return module, part, adapter


@functools.cache
def _modules() -> dict[str, str]:
    """Every name of a module that a LoRA may adapt -> its official name."""
    official = set()
    for cfg in PRESETS.values():
        for parameter in matrices(cfg):
            official.update(name.removesuffix(".weight") for name in parameter.names)
    names = {}
    for module in official:
        diffusers = module
        for pattern, new in _DIFFUSERS.items():
            diffusers = re.sub(pattern, new, diffusers)
        for alias in (module, diffusers):
            names[alias] = names[alias.replace(".", "_")] = module
    return names


@functools.cache  # the whole transformer is traced for it
def matrices(cfg: TransformerConfig) -> tuple[Parameter, ...]:
    """The weights of linear maps: what a LoRA may adapt."""
    found = mapping.parameters(functools.partial(transformer.create, cfg), transformer.TABLE)
    return tuple(parameter for parameter in found if is_matrix(parameter))


def is_matrix(parameter: Parameter) -> bool:
    return parameter.path[-1] == "weight" and len(parameter.inner_shape) == 2


# ------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scales:
    """What PEFT stores beside the tensors. Ranks are those of the tensors, whatever it says."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern, float], ...] = ()  # of module names -> another alpha
    root: bool = False  # alpha / sqrt(r), "rank-stabilised"

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        """The scale of a module by its name in the file; `alpha` is the tensor beside it."""
        if alpha is None:  # the first pattern counts, as in PEFT
            alpha = next((a for p, a in self.patterns if p.match(module)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def _scales(metadata: Mapping[str, str], path: Path, bare: Mapping[str, int]) -> _Scales:
    """From JSON in the header, else PEFT's config beside the file, else plain text in the header.

    `bare` are the modules without an alpha beside their matrices, with their ranks.
    """
    stated = _stated(metadata, path)
    if stated.alpha is not None or stated.patterns:
        return stated
    if not bare:
        return _Scales()
    for key in _ALPHA_KEYS:
        if (text := metadata.get(key, "None")) not in ("", "None"):
            alpha = _number(_parsed(text), f"{path}: {key} in its header")
            return _Scales(alpha, root=metadata.get(_ROOT_KEY, "").lower() == "true")
    alpha, ranks = _parsed(metadata.get(_KOHYA_ALPHA, "")), set(bare.values())
    if isinstance(alpha, float) and ranks != {alpha}:
        warnings.warn(
            f"{path}: its header says {_KOHYA_ALPHA}={alpha:g} at rank "
            f"{', '.join(map(str, sorted(ranks)))}, but there is no alpha beside its matrices: "
            "taken as part of them already, as converters put it there; if its effect is too "
            "strong or too weak, give the strength alpha / rank",
            stacklevel=3,
        )
    return _Scales()


def _stated(metadata: Mapping[str, str], path: Path) -> _Scales:
    """What a config of PEFT says, in the header or beside the file."""
    if _DIFFUSERS_KEY in metadata:
        where = f"{path}: {_DIFFUSERS_KEY}"
        try:
            stored = json.loads(metadata[_DIFFUSERS_KEY])
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({reason(error)})") from None
        return _scales_of_config(stored, where)
    config = path.with_name(_PEFT_CONFIG)
    if path.name == _PEFT and config.is_file():
        return _scales_of_config(read_json(config), str(config))
    for key in _CONFIG_KEYS:  # which need not be such a config
        stored = None
        with contextlib.suppress(ValueError):
            stored = json.loads(metadata.get(key, ""))
        if isinstance(stored, dict) and "lora_alpha" in stored:
            return _scales_of_config(stored, f"{path}: {key}")
    return _Scales()


def _scales_of_config(stored: Any, where: str) -> _Scales:
    if not isinstance(stored, dict):
        raise UserError(f"{where} is not a JSON object")
    # diffusers puts the name of the network in front: "transformer.lora_alpha".
    stored = {key.removeprefix("transformer."): value for key, value in stored.items()}
    alpha, patterns = stored.get("lora_alpha"), stored.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: alpha_pattern={patterns!r} is not a JSON object")
    return _Scales(
        None if alpha is None else _number(alpha, f"{where}: lora_alpha"),
        tuple(
            (_pattern(pattern, where), _number(value, f"{where}: alpha_pattern of {pattern!r}"))
            for pattern, value in patterns.items()
        ),
        stored.get(_ROOT_KEY) is True,
    )


def _parsed(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}, not a number")
    return float(value)


def _pattern(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise UserError(f"{where}: alpha_pattern {pattern!r}: {reason(error)}") from None


def _target(
    source: Any, module: str, parts: Mapping[str, np.ndarray], scales: _Scales, stored: str
) -> Target:
    """One adapted matrix; `stored` is what the file calls the module."""
    if "a" not in parts or "b" not in parts:
        raise UserError(f"{source}: {module} has only {', '.join(parts)} of its pair")
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
        raise UserError(f"{source}: {module} has A {a.shape} and B {b.shape}, which do not fit")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.size != 1:
        raise UserError(f"{source}: alpha of {module} has {alpha.shape}, not one number")
    alpha = None if alpha is None else float(alpha.astype(np.float64).item())
    return Target(a, b, scales.of(stored, len(a), alpha))


def _what_is_wrong(unknown: list[str], some: bool) -> str:
    for ending, kind in _OTHER_KINDS.items():
        if any(re.search(f"({ending})$", name) for name in unknown):
            return f"{kind} in a LoRA is not supported: {', '.join(in_short(unknown))}"
    if not some and not any("lora" in name for name in unknown):
        return f"is no LoRA file (its tensors are {', '.join(in_short(unknown)[:5])} ...)"
    return f"tensors of no module of the transformer: {', '.join(in_short(unknown))}"


# ------------------------------------------------------------------------------------------ writing


def write_lora(path: str | os.PathLike, lora: Lora, *, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Writes an official LoRA file: no alpha, its scale in B; `lora.metadata` as it is.

    `dtype` is that of all matrices; None keeps those of `lora`, with bfloat16 for float8.

    Raises:
      UserError: the file cannot be written; nothing is left then.
    """
    tensors = {}
    for module, target in lora.targets.items():
        scaled = target.b.astype(np.float32) * np.float32(target.scale)
        b = target.b if target.scale == 1 else scaled
        for letter, values, stored in (("A", target.a, target.a.dtype), ("B", b, target.b.dtype)):
            kept = ml_dtypes.bfloat16 if stored in FLOAT8 else stored
            tensors[f"{OFFICIAL}{module}.lora_{letter}.weight"] = values.astype(dtype or kept)
    # Which B now has in it.
    scales = (_DIFFUSERS_KEY, *_CONFIG_KEYS, *_ALPHA_KEYS, _ROOT_KEY, _KOHYA_ALPHA)
    metadata = {k: v for k, v in lora.metadata.items() if k not in scales}
    places = layout(
        {n: (v.dtype, v.shape) for n, v in tensors.items()}, {"format": "pt"} | metadata
    )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(places.header)
        for name, stored in places.tensors.items():
            write_rows(file.fileno(), stored, tensors[name])
