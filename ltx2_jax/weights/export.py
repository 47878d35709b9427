"""Weights on their way out: what an official file will hold, from a release or from a run.

export = of_release(release)                    # or of_run(config, params, base=release)
export.write("ltx-2-mine.safetensors")          # or export.save("weights/"), our own layout
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.training import checkpoint, initial
from ltx2_jax.weights import folder, versions
from ltx2_jax.weights.loading import FLOAT8, Source
from ltx2_jax.weights.mapping import Parameter, leaves
from ltx2_jax.weights.names import text, transformer
from ltx2_jax.weights.networks import NETWORKS
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.tensor_files import DTYPES, dtype_name
from ltx2_jax.weights.writing import appearing, writing

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
QUANTIZATION = "_quantization_metadata"  # says which layers are float8: of none that was scaled up


@dataclass
class Export:
    """A file to be: its metadata, the tensors of its networks, and tensors copied from others."""

    metadata: dict[str, str]
    names: dict[str, dict[str, str]]  # network -> official name without prefix -> name in the file
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]  # name in the file -> dtype, shape
    streams: dict[str, Stream]  # network -> its parameters with their values
    copied: dict[str, Source] = field(default_factory=dict)  # name in the file -> where it is
    # Networks that an official file takes byte by byte: name in the file -> where it is.
    raw: dict[str, dict[str, Source]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            for dtype, shape in self.tensors.values()
        )

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
        config |= json.loads(self.metadata.get("config", "{}"))
        out = Export(
            below.metadata | self.metadata | {"config": json.dumps(config)},
            below.names | self.names,
            dict(below.tensors),
            {name: stream for name, stream in below.streams.items() if name not in self.names},
            dict(below.copied),
            {name: raw for name, raw in below.raw.items() if name not in self.names},
        )
        for network in self.names:
            for name in below.names.get(network, {}).values():
                out.tensors.pop(name)
        out.tensors |= self.tensors
        out.streams |= self.streams
        out.copied |= self.copied
        out.raw |= self.raw
        return out

    def save(self, path: str | os.PathLike) -> None:
        """A folder of weights in our own layout; see `folder.py`. Errors as `write`."""
        with appearing(path, self.nbytes) as temporary:
            if jax.process_index() == 0:
                temporary.mkdir()
            for network, stream in self.streams.items():
                arrays = {
                    folder.name_of(parameter): self._as_listed(network, parameter, array)
                    for parameter, array in stream()
                }
                checkpoint.save_arrays(temporary / network, arrays)
                del arrays
            if self.copied:
                tensors = {name: self.tensors[name] for name in self.copied}
                with writing(temporary / folder.REST, tensors, {}) as writer:
                    for name, source in self.copied.items():
                        writer.copy(name, source)
            if jax.process_index() == 0:
                tensors = {
                    name: [dtype_name(dtype), list(shape)]
                    for name, (dtype, shape) in self.tensors.items()
                }
                index = {"kind": folder.KIND, "metadata": self.metadata, "tensors": tensors}
                (temporary / folder.INDEX).write_text(json.dumps(index), encoding="utf-8")

    def _as_listed(self, network: str, parameter: Parameter, array: Any) -> Any:
        """An array in the dtype that `tensors` promises, the widest where its layers differ."""
        names = self.names[network]
        kinds = {
            canonicalize_dtype(self.tensors[names[name]][0])  # jax has no float64 unless asked to
            for name in parameter.names
            if name in names
        }
        return array.astype(jnp.result_type(*kinds)) if kinds else array


def of_release(
    release: Release,
    *,
    param_dtype: Any = None,
    raw: Iterable[str] = (),
    prefixed: bool = False,
) -> Export:
    """All that a release holds. Several files become one, in the single-file layout.

    Prefix and metadata that a fine-tune was saved without are added; float8 becomes bfloat16.

    Args:
      release: open as long as the export is used.
      param_dtype: of the transformer and the connectors; None keeps what is stored.
      raw: networks whose tensors `write` copies byte by byte, without passing the devices.
      prefixed: give a single file, too, the prefixes of the single-file layout.

    Raises:
      UserError: networks that cannot be one file, or do not fit their configs.
    """
    one = len(release.files) == 1
    if not one and "upsampler" in release.networks:
        raise UserError(f"{release.name}: an upsampler has a file of its own in every layout")
    export = Export(_metadata(release), {}, {}, {})
    for network, held in release.networks.items():
        keep = one and not prefixed and network not in TRAINED
        name_of = {
            name: source.name if keep else PREFIXES[network] + name
            for name, source in (held.tensors | held.unread).items()
        }
        export.names[network] = {name: name_of[name] for name in held.tensors}
        cast = param_dtype if network in TRAINED else None
        for name, source in held.tensors.items():
            export.tensors[name_of[name]] = (
                _exported_dtype(source.stored.dtype, cast), source.stored.shape
            )  # fmt: skip
        for name, source in held.unread.items():
            if not held.scales:  # else what is left of the quantization means nothing any more
                export.copied[name_of[name]] = source
        export.streams[network] = _stream(release, network, cast)
        here = not isinstance(release, folder.WeightsFolder)  # that has no official bytes
        if network in raw and here and cast is None and not held.scales:
            export.raw[network] = {name_of[n]: source for n, source in held.tensors.items()}
    export.copied |= {name: source for name, source in release.beside.items()}
    for name, source in export.copied.items():
        export.tensors[name] = (source.stored.dtype, source.stored.shape)
    return export


def of_run(
    config: Config,
    params: Mapping[str, Any],
    *,
    base: Release | None = None,
    param_dtype: Any = None,
) -> Export:
    """What was trained here: {"transformer": .., "connectors": ..}, and all else from `base`.

    Args:
      config: of the run.
      params: its weights.
      base: a release with the other networks; its transformer and connectors are replaced.
      param_dtype: of the tensors; None takes those of `base`, or keeps what is given.

    Raises:
      UserError: a config that no official network has, or another one than `base`.

    Warns:
      UserWarning: what the official code would read differently.
    """
    configs = {
        "transformer": config.model,
        "connectors": (config.text.video_connector, config.text.audio_connector),
    }
    if base is None:
        section = transformer.section_of(config.model) | text.section_of(*configs["connectors"])
        version = f"{versions.generation_of_config(section)}.0"
        metadata = {"config": json.dumps({"transformer": section}), "model_version": version}
    else:
        initial.check_same(config, base)
        metadata = {}
    metadata[initial.TEXT_GENERATION] = config.text.generation
    registers = configs["connectors"][0].registers
    if registers != 128:
        warnings.warn(
            f"the connectors have {registers} registers; official code always reads 128",
            stacklevel=2,
        )
    export = Export(metadata, {}, {}, {})
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


def _metadata(release: Release) -> dict[str, str]:
    """Of all files, the first one's where they differ; with the config of every network."""
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    for file in reversed(release.files):
        metadata |= file.metadata
    if any(held.scales for held in release.networks.values()):
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
    if generation := release.generation():
        metadata.setdefault("model_version", f"{generation}.0")
    return metadata
