"""Which linear maps of the transformer get an adapter, by the names of the official trainer.

A target is the dotted name of a module, or the end of one: "attn1.to_q" means
"transformer_blocks.0.attn1.to_q" and that of every other block, but not "audio_attn1.to_q". The
connectors are not part of it. Source: the configs of `ltx_trainer`; PEFT, `target_modules`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ltx2_jax.errors import UserError
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.weights.lora_files import matrices

_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")


def _attention(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for module in modules for name in _PROJECTIONS)


_AUDIO = (*_attention("audio_attn1", "audio_attn2"), "audio_ff.net.0.proj", "audio_ff.net.2")
# The lists of the shipped configs.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "short": _PROJECTIONS,  # every attention of both streams, and between them
    "attn1_attn2": _attention("attn1", "attn2"),
    "attn1_attn2_ff": (*_attention("attn1", "attn2"), "ff.net.0.proj", "ff.net.2"),
    "audio": _AUDIO,
    "audio_and_video_to_audio": (*_AUDIO, *_attention("video_to_audio_attn")),
}


@dataclass(frozen=True)
class Adapted:
    """A linear map of ours, all layers of it, and the ranks of its adapters."""

    path: tuple[str, ...]  # in the transformer's tree
    modules: tuple[str, ...]  # official names, one for every layer
    ranks: tuple[int, ...]  # of every layer; 0: no adapter
    shape: tuple[int, int]  # [out, in]
    stacked: bool  # has a layer axis

    @property
    def rank(self) -> int:
        return max(self.ranks)


def matches(module: str, target: str) -> bool:
    """Whether a target means a module."""
    return module == target or module.endswith("." + target)


def adapted(
    config: TransformerConfig,
    targets: Sequence[str],
    rank: int,
    ranks: Sequence[tuple[str, int]] = (),
) -> list[Adapted]:
    """The linear maps that `targets` mean, with rank `rank`, or the last of `ranks` that fits.

    Raises:
      UserError: a target that means no module, a rank above the smaller side of a matrix.
    """
    everything = matrices(config)
    names = [n.removesuffix(".weight") for parameter in everything for n in parameter.names]
    for target in (*targets, *(target for target, _ in ranks)):
        if not any(matches(name, target) for name in names):
            raise UserError(f"lora: target {target!r} is no module of it{_closest(target, names)}")
    found = []
    for parameter in everything:
        layers = tuple(name.removesuffix(".weight") for name in parameter.names)
        of_layers = tuple(_rank(module, targets, rank, ranks) for module in layers)
        if not any(of_layers):
            continue
        side, highest = min(parameter.official_shape), max(of_layers)
        if highest > side:
            module = layers[of_layers.index(highest)]
            raise UserError(
                f"lora: rank {highest} is above the smaller side of {module}, which is "
                f"{' x '.join(map(str, parameter.official_shape))}"
            )
        path = tuple(map(str, parameter.path[:-1]))
        shape = parameter.official_shape
        found.append(Adapted(path, layers, of_layers, shape, parameter.stacked))
    for target, _ in ranks:
        if not any(matches(module, target) for module in modules(found)):
            raise UserError(f"lora: {target!r} of ranks means no module that targets mean")
    return found


def modules(found: Iterable[Adapted]) -> list[str]:
    """Official names of all modules that have an adapter."""
    return [m for f in found for m, rank in zip(f.modules, f.ranks, strict=True) if rank]


def _rank(module: str, targets: Sequence[str], rank: int, ranks: Sequence[tuple[str, int]]) -> int:
    if not any(matches(module, target) for target in targets):
        return 0
    return next((r for target, r in reversed(ranks) if matches(module, target)), rank)


def _closest(target: str, names: Sequence[str]) -> str:
    """The ends of names that are closest to a target, as the end of a message."""
    parts = target.count(".") + 1
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (parts, parts + 1)}
    close = difflib.get_close_matches(target, sorted(ends), n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
