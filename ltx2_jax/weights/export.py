"""Weights on their way out: what an official file will hold, from a release or from trained arrays.

export = of_release(release)                    # or of_params(configs, params, base=release)
export.write("ltx-2-mine.safetensors")
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.weights import versions
from ltx2_jax.weights.loading import FLOAT8, Source
from ltx2_jax.weights.mapping import Parameter, leaves
from ltx2_jax.weights.names import text, transformer
from ltx2_jax.weights.networks import NETWORKS
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.tensor_files import DTYPES
from ltx2_jax.weights.writing import writing

Stream = Callable[[], Iterable[tuple[Parameter, Any]]]

# Where the networks of several files lie in one.
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "connectors": "model.diffusion_model.",
    "text_projection": "text_embedding_projection.",
    "gemma": "model.",
    "video_vae": "vae.",
    "diffusion_decoder": "vae.decoder.",
    "audio_vae": "audio_vae.",
    "vocoder": "vocoder.",
    "duration_head": "duration_head.",
    "upsampler": "",
}
TRAINED = ("transformer", "connectors")
QUANTIZATION = "_quantization_metadata"  # which layers are float8: of none that was scaled up


@dataclass
class Export:
    """A file to be: its metadata, the tensors of its networks, and tensors copied from others."""

    metadata: dict[str, str]
    names: dict[str, dict[str, str]]  # network -> official name without prefix -> name in the file
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]  # name in the file -> dtype, shape
    streams: dict[str, Stream]  # network -> its parameters with their values
    copied: dict[str, Source] = field(default_factory=dict)  # name in the file -> where it is
    # Networks that are taken byte by byte, with all that is beside their weights: name in the file
    # -> where it is.
    raw: dict[str, dict[str, Source]] = field(default_factory=dict)

    def write(self, path: str | os.PathLike, *, progress: bool = False) -> None:
        """The official file; errors as `writing`."""
        path = Path(path)
        with writing(
            path, self.tensors, self.metadata, progress=path.name if progress else None
        ) as writer:
            for network, stream in self.streams.items():
                for name, source in self.raw.get(network, {}).items():
                    writer.copy(name, source)
                for parameter, array in stream() if network not in self.raw else ():
                    writer.put(parameter, array, self.names[network])
            for name, source in self.copied.items():
                writer.copy(name, source)

    def over(self, base: Release) -> "Export":
        """This, and from `base` the networks that it lacks, byte by byte, with their metadata."""
        below = of_release(base, raw=base.networks, prefixed=True)
        config = json.loads(below.metadata.get("config", "{}"))
        # A fine-tune may have kept the sections of networks that it does not hold.
        held = {NETWORKS[network].section for network in self.names}
        own = json.loads(self.metadata.get("config", "{}")).items()
        config |= {key: value for key, value in own if key in held or key not in config}
        out = Export(
            below.metadata | self.metadata | {"config": json.dumps(config)},
            below.names | self.names,
            dict(below.tensors),
            {name: stream for name, stream in below.streams.items() if name not in self.names},
            dict(below.copied),
            {name: raw for name, raw in below.raw.items() if name not in self.names},
        )
        for network in self.names:
            replaced = below.raw.get(network, {})
            for name in replaced:
                out.tensors.pop(name)
            was_float8 = any(source.stored.dtype in FLOAT8 for source in replaced.values())
            if was_float8 and QUANTIZATION not in self.metadata:
                out.metadata.pop(QUANTIZATION, None)
        out.tensors |= self.tensors
        out.streams |= self.streams
        out.copied |= self.copied
        out.raw |= self.raw
        return out


def of_release(
    release: Release,
    *,
    param_dtype: Any = None,
    raw: Iterable[str] = (),
    prefixed: bool = False,
) -> Export:
    """All that a release holds. Several files become one, in the single-file layout.

    Prefix and metadata that a fine-tune was saved without are added. What passes the devices loses
    its float8: it is scaled up and becomes bfloat16.

    Args:
      release: open as long as the export is used.
      param_dtype: of the transformer and the connectors; None keeps what is stored.
      raw: networks that `write` copies byte by byte, float8 with its scales, without passing the
        devices; not those whose dtype `param_dtype` changes.
      prefixed: give a single file, too, the prefixes of the single-file layout.

    Raises:
      UserError: networks that cannot be one file, or do not fit their configs.
    """
    one = len(release.files) == 1
    if not one and "upsampler" in release.networks:
        raise UserError(f"{release.name}: an upsampler has a file of its own in every layout")
    copied = {n for n in raw if param_dtype is None or n not in TRAINED}
    export = Export(_metadata(release, copied), {}, {}, {})
    for network, held in release.networks.items():
        keep = one and not prefixed and network not in TRAINED
        prefix = None if keep else PREFIXES[network]
        names = export.names[network] = _names(held.tensors, prefix)
        cast = param_dtype if network in TRAINED else None
        export.streams[network] = _stream(release, network, cast)
        if network in copied:
            sources = held.tensors | held.unread | held.scales_by_name()
            renamed = _names(sources, prefix)
            export.raw[network] = {renamed[name]: source for name, source in sources.items()}
            continue
        for name, source in held.tensors.items():
            dtype = _exported_dtype(source.stored.dtype, cast)
            export.tensors[names[name]] = (dtype, source.stored.shape)
        if not held.scales:  # else what is left of the quantization means nothing any more
            renamed = _names(held.unread, prefix)
            export.copied |= {renamed[name]: source for name, source in held.unread.items()}
    export.copied |= {name: source for name, source in release.beside.items()}
    for copies in (export.copied, *export.raw.values()):
        export.tensors |= {n: (s.stored.dtype, s.stored.shape) for n, s in copies.items()}
    return export


def of_params(
    configs: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    base: Release | None = None,
    param_dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> Export:
    """Trained networks, and all else from `base`.

    Args:
      configs: {"transformer": its config, "connectors": those of video and audio}.
      params: the parameter trees of the same networks.
      base: a release with the other networks, whose own of these are replaced; its configs are
        taken for those of `configs`.
      param_dtype: of the tensors; None takes those of `base`, or keeps what is given.
      metadata: to be added to that of the file.

    Raises:
      UserError: a config that no official network has.

    Warns:
      UserWarning: what the official code would read differently.
    """
    found = dict(metadata or {})
    if base is None:
        section = transformer.section_of(configs["transformer"])
        section |= text.section_of(*configs["connectors"])
        found["config"] = json.dumps({"transformer": section})
        found["model_version"] = f"{versions.release_of_config(section)}.0"
    registers = configs["connectors"][0].registers
    if registers != 128:
        warnings.warn(
            f"the connectors have {registers} registers; official code always reads 128",
            stacklevel=2,
        )
    export = Export(found, {}, {}, {})
    for network, cfg in configs.items():
        stored = base.networks[network].tensors if base and network in base.networks else {}
        wanted = NETWORKS[network].parameters(cfg, None, {})
        _add(export, network, wanted, leaves(params[network]), stored, param_dtype)
    return export if base is None else export.over(base)


def _add(
    export: Export,
    network: str,
    wanted: list[Parameter],
    values: Mapping[tuple[str | int, ...], Any],
    stored: Mapping[str, Source],
    param_dtype: Any,
) -> None:
    """Puts a network of ours into an export, in the dtypes of the tensors `stored` in another."""
    names = export.names[network] = {}
    for parameter in wanted:
        for name in parameter.names:
            names[name] = PREFIXES[network] + name
            dtype = values[parameter.path].dtype
            if name in stored:
                dtype = _exported_dtype(stored[name].stored.dtype, None)
            export.tensors[names[name]] = (
                np.dtype(param_dtype or dtype),
                parameter.official_shape,
            )
    export.streams[network] = lambda: ((p, values[p.path]) for p in wanted)


def _stream(release: Release, network: str, cast: Any) -> Stream:
    def stream() -> Iterator[tuple[Parameter, Any]]:
        wanted = release.parameters(network, release.config(network))
        return release.stream(network, wanted, cast)

    # What does not fit is said before anything is written.
    release.parameters(network, release.config(network))
    return stream


def _exported_dtype(stored: np.dtype, cast: Any) -> np.dtype:
    if cast is not None:
        return np.dtype(cast)
    return DTYPES["BF16"] if stored in FLOAT8 else stored


def _names(sources: Mapping[str, Source], prefix: str | None) -> dict[str, str]:
    """Name without prefix -> name in the file to be; without `prefix` the one of the source."""
    return {n: source.name if prefix is None else prefix + n for n, source in sources.items()}


def _metadata(release: Release, copied: Iterable[str]) -> dict[str, str]:
    """Of all files, the first one's where they differ; with the config of every network."""
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    for file in reversed(release.files):
        metadata |= file.metadata
    if any(held.scales for name, held in release.networks.items() if name not in copied):
        metadata.pop(QUANTIZATION, None)
    for network in release.networks:
        key = NETWORKS[network].section
        if network == "gemma":
            metadata.setdefault("gemma_config", json.dumps(release.section(network)))
        elif network != "text_projection" and (section := release.section(network)):
            config |= {key: section} if key else section
    if len(release.files) == 1 and "config" in metadata:
        return metadata
    if config:
        metadata["config"] = json.dumps(config)
    if name := release.release_of():
        metadata.setdefault("model_version", f"{name}.0")
    return metadata
