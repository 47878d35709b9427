"""Released files, in whatever layout: which networks they hold, and loading them.

    with open_release("ltx-2-19b-dev.safetensors") as release:
        config, params = release.load("transformer", make_mesh(model=4))

The single-file layout has all networks under prefixes, the split pack of 2.5 one or two in a file;
a fine-tune may be the transformer alone, without prefix and metadata. The `config` JSON in a file's
metadata has one section for each network in it.
Source: `ltx_core/model/*/model_configurator.py` (prefixes), `ltx_core/loader` (metadata).
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.weights import loading, mapping, versions
from ltx2_jax.weights.loading import FLOAT8, Source
from ltx2_jax.weights.names import gemma, text, transformer
from ltx2_jax.weights.networks import BESIDE_TEXT, NETWORKS
from ltx2_jax.weights.tensor_files import DTYPES, TensorFile

# Prefix in a file -> the network whose tensors have it; connectors are taken out of the first two.
PREFIXES = {
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "text_embedding_projection.": "text_projection",
    "vae.": "video_vae",
    "audio_vae.": "audio_vae",
    "vocoder.": "vocoder",
    "duration_head.": "duration_head",
}
_CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
_TRANSFORMER = [
    r"transformer_blocks\.\d+\..*",
    *(f"{re.escape(prefix)}.*" for prefix in _CONNECTORS),
    *(re.escape(name) for name in transformer.TABLE.values() if "{" not in name),
]
# A file none of whose names has a prefix is all of one network, which these names tell; of the
# transformer any name does, as its shards have some each.
_BARE = {
    "transformer": "|".join(_TRANSFORMER),
    "video_vae": r"(encoder|decoder)\.conv_in\..*|per_channel_statistics\..*",
    "upsampler": r"initial_conv\.weight",
}
_DIFFUSION_DECODER = "decoder.det_stages."
_SCALES = (".weight_scale", ".scale_weight")  # of float8 weights: the official name, and ComfyUI's
_FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16")) + FLOAT8


@dataclass
class Held:
    """What files hold of one network, by names without prefix."""

    file: TensorFile  # that describes it
    tensors: dict[str, Source] = field(default_factory=dict)
    scales: dict[str, Source] = field(default_factory=dict)  # of float8 tensors
    unread: dict[str, Source] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.stored.shape for name, source in self.tensors.items()}

    def scales_by_name(self) -> dict[str, Source]:
        """`scales` by their own names."""
        found = {}
        for weight, source in self.scales.items():
            module = weight.removesuffix(".weight")
            found[module + next(s for s in _SCALES if source.name.endswith(s))] = source
        return found


class Release:
    """Open files of a release, which `sources.open_release` gives; close it, or use it in a `with`.

    Attributes:
      files: all of them.
      networks: name -> what they hold of it; the names are those of `NETWORKS`.
      beside: tensors that belong to no network, by their full names: see `BESIDE_TEXT`.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        name: str,
        gemma_config: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          files: open ones.
          name: of all of them, for messages.
          gemma_config: the language model's, where the files do not have it.

        Raises:
          UserError: metadata that is not JSON, a tensor that is in two files or belongs to nothing
            known, no network at all.
        """
        self.files, self.name = list(files), name
        self.networks: dict[str, Held] = {}
        self.beside: dict[str, Source] = {}
        self._gemma_config = gemma_config
        self._metadata = {file.path: parsed_metadata(file) for file in self.files}
        for file in self.files:
            self._sort(file)
        if not self.networks:
            raise UserError(f"{self.files[0].path}: {_what_else(self.files[0])}")
        for held in self.networks.values():
            _take_scales(held)

    # ---- what is there ---------------------------------------------------------------------------

    def metadata(self, network: str) -> dict[str, Any]:
        """Metadata of the file that describes a network: its JSON parsed, the rest text."""
        return self._metadata[self._held(network).file.path]

    def version(self, network: str | None = None) -> str:
        """`model_version` of a network's file, or of the first file that has one; "" of none."""
        if network is not None:
            return self.metadata(network).get("model_version", "")
        found = (metadata.get("model_version") for metadata in self._metadata.values())
        return next(filter(None, found), "")

    def release_of(self, network: str | None = None) -> str:
        """ "2.0", "2.3" or "2.5": of the version, else of the transformer's config, else ""."""
        found = versions.release_of(self.version(network))
        if not found and "transformer" in self.networks:
            found = versions.release_of_config(self.section("transformer"))
        return found

    def section(self, network: str) -> dict[str, Any]:
        """The part of the config that describes a network.

        Raises:
          UserError: no such network, or no such part.
        """
        held, key = self._held(network), NETWORKS[network].section
        metadata = self.metadata(network)
        if network == "gemma":
            if (found := metadata.get("gemma_config", self._gemma_config)) is None:
                raise UserError(
                    f"{held.file.path}: has no config: neither gemma_config in its metadata, as a "
                    "packed text encoder, nor config.json, as a Hugging Face folder"
                )
            return found
        if key == "" and "config" in metadata:
            return metadata["config"]
        config = metadata.get("config", {})
        # A file of the split pack may leave out what another one says.
        others = (m["config"][key] for m in self._metadata.values() if key in m.get("config", {}))
        found = config[key] if key in config else next(others, None)
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{held.file.path}: {key!r} in its config is not a JSON object")
        if found is None and network == "text_projection" and "gemma" in self.networks:
            return text.guessed_section(held.shapes, self.config("gemma").width)
        if found is None and key == "transformer" and "transformer" in self.networks:
            return self._guessed_section()
        if found is None and network != "duration_head":  # its defaults are the released values
            raise UserError(f"{held.file.path}: its metadata has no {key or 'config'!r} section")
        return found or {}

    def _guessed_section(self) -> dict[str, Any]:
        held = self.networks["transformer"]
        try:
            section = transformer.guessed_section(held.shapes)
        except UserError as error:
            raise UserError(f"{held.file.path}: {error}") from None
        release = versions.release_of_config(section)
        warnings.warn(
            f"{held.file.path}: has no config; by its tensors it is taken for LTX-2 {release}",
            stacklevel=3,
        )
        # Once is enough.
        self._metadata[held.file.path].setdefault("config", {})["transformer"] = section
        return section

    def describe_by(self, base: "Release") -> None:
        """Takes the config of the transformer from `base` if these files have none."""
        held = self.networks.get("transformer")
        if held is not None and "config" not in self._metadata[held.file.path]:
            section = base.section("transformer")
            self._metadata[held.file.path]["config"] = {"transformer": section}

    def config(self, network: str, **overrides: Any) -> Any:
        """Our config of a network; `overrides` are our own fields (dtype, remat, ...).

        Raises:
          UserError: no such network, or a config that is not implemented.
        """
        held, section = self._held(network), self.section(network)
        try:
            return NETWORKS[network].config(section, held.shapes, **overrides)
        except UserError as error:
            raise UserError(f"{held.file.path}: {network.replace('_', ' ')}: {error}") from None

    def parameters(self, network: str, config: Any, where: Any = None) -> list[mapping.Parameter]:
        """Our parameters and their tensors, all of which are there.

        Raises:
          UserError: tensors missing, unknown, misshapen or not of floating point, all listed.
        """
        held = self._held(network)
        wanted = NETWORKS[network].parameters(config, where, held.shapes)
        problems = mapping.problems(wanted, held.shapes)
        problems += [
            f"{name} is stored as {source.stored.dtype}, not as a float"
            for name, source in held.tensors.items()
            if source.stored.dtype not in _FLOATS
        ]
        problems += [
            f"the scale of {name} has {source.stored.shape}"
            for name, source in held.scales.items()
            if source.stored.nbytes // source.stored.dtype.itemsize
            not in (1, *held.tensors[name].stored.shape[:1])
        ]
        mapping.refuse(problems, f"{held.file.path}: {network.replace('_', ' ')}")
        return wanted

    # ---- loading ---------------------------------------------------------------------------------

    def load(
        self,
        network: str,
        where: Any = None,
        *,
        config: Any = None,
        param_dtype: Any = None,
        progress: bool = False,
        then: Callable[[Sequence[Any], jax.Array], jax.Array] | None = None,
        **overrides: Any,
    ) -> tuple[Any, dict[Any, Any]]:
        """Config and parameter tree of a network; nothing large is read before all of it fits.

        Args:
          network: a name of `networks`.
          where: a mesh on which the network shards itself, one sharding for everything, or None
            for the default device.
          config: ours, if it is not to be that of the files.
          param_dtype: of the parameters, or a function of `Parameter` that gives it; None keeps
            what is stored (bfloat16 for float8).
          progress: show a bar.
          then: what becomes of the array at a path as soon as it is there, such as a move.
          overrides: our own fields of the config.

        Raises:
          UserError: what `config` and `parameters` raise, or a file that cannot be read any more.

        Warns:
          UserWarning: weights that are NaN or infinite, all of them named.
        """
        config = config or self.config(network, **overrides)
        wanted = self.parameters(network, config, where)
        label = network if progress else None
        found = self.stream(network, wanted, param_dtype, progress=label)
        if then is not None:
            found = ((parameter, then(parameter.path, array)) for parameter, array in found)
        return config, mapping.tree(found)

    def stream(
        self,
        network: str,
        wanted: Sequence[mapping.Parameter],
        param_dtype: Any = None,
        *,
        progress: str | None = None,
    ) -> Iterator[tuple[mapping.Parameter, jax.Array]]:
        """What `load` gives, one parameter at a time: `wanted` is what `parameters` gave."""
        held = self.networks[network]
        return loading.stream(
            wanted, held.tensors, held.scales, dtype=param_dtype, progress=progress
        )

    def module(self, network: str, where: Any = None, **settings: Any) -> nnx.Module:
        """The network with its weights; `settings` and errors are those of `load`."""
        config, params = self.load(network, where, **settings)
        return mapping.build(partial(NETWORKS[network].create, config), params, where)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> "Release":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- sorting tensors into networks -----------------------------------------------------------

    def _held(self, network: str) -> Held:
        if network not in self.networks:
            has = ", ".join(self.networks) or "none"
            raise UserError(f"{self.name}: has no {network.replace('_', ' ')}, only: {has}")
        return self.networks[network]

    def _sort(self, file: TensorFile) -> None:
        if looks_like_lora(file.tensors):
            raise UserError(f"{file.path}: is a LoRA file, not a model; {use_of_lora(file.path)}")
        unknown = []
        bare = _bare_network(file)
        for name in file.tensors:
            network, inner = _network_of(name, bare)
            if network is None and re.fullmatch(BESIDE_TEXT, name):
                self.beside[name] = Source(file, name)
            elif network is None:
                unknown.append(name)
            else:
                self._add(network, inner, Source(file, name))
        if unknown and not any(held.file is file for held in self.networks.values()):
            raise UserError(f"{file.path}: {_what_else(file)}")
        if unknown:
            names = ", ".join(mapping.in_short(unknown))
            raise UserError(f"{file.path}: tensors of no known network: {names}")

    def _add(self, network: str, name: str, source: Source) -> None:
        if (
            network == "video_vae"
            and name.startswith("decoder.")
            and _has_diffusion_decoder(source)
        ):
            network, name = "diffusion_decoder", name.removeprefix("decoder.")
        held = self.networks.setdefault(network, Held(source.file))
        part = held.tensors if NETWORKS[network].reads(name) else held.unread
        if name in part:
            raise UserError(
                f"{source.file.path}: holds a {network}, and so does {part[name].file.path}"
            )
        part[name] = source


def looks_like_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of an adapter, of any kind."""
    kinds = (
        r"lora_(A|B|up|down)\b|lora(_linear_layer)?\.(up|down)\.|hada_w|lokr_w|\.oft_|dora_scale"
        r"|\.diff(_b)?$"
    )
    return any(re.search(kinds, name) for name in names)


def use_of_lora(source: Any) -> str:
    """What to do with a LoRA that was given for a model."""
    return (
        "merge it into one: python -m ltx2_jax.convert MODEL.safetensors OUT.safetensors "
        f"--lora {source}"
    )


def tensors_of(file: TensorFile) -> list[tuple[str, str]]:
    """Network and name in it of every tensor of a file that belongs to one; none of a LoRA's."""
    if looks_like_lora(file.tensors):
        return []
    bare = _bare_network(file)
    found = (_network_of(name, bare) for name in file.tensors)
    return [(network, name) for network, name in found if network is not None]


def parsed_metadata(file: TensorFile) -> dict[str, Any]:
    """Metadata with what is JSON in it parsed.

    Raises:
      UserError: it should be a JSON object and is not.
    """
    metadata: dict[str, Any] = dict(file.metadata)
    for key in ("config", "gemma_source_checkpoint", "gemma_config"):
        if key not in metadata:
            continue
        try:
            metadata[key] = json.loads(metadata[key])
        except ValueError as error:
            raise UserError(
                f"{file.path}: {key} in its metadata is not JSON ({reason(error)})"
            ) from None
        if not isinstance(metadata[key], dict):
            raise UserError(f"{file.path}: {key} in its metadata is not a JSON object")
    return metadata


def _network_of(name: str, bare: str | None) -> tuple[str | None, str]:
    """The network of a tensor, and its name there."""
    network, inner = bare, name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            network, inner = PREFIXES[prefix], name.removeprefix(prefix)
            break
    else:
        for prefix in gemma.PREFIXES:
            if name.startswith(tuple(prefix + head for head in gemma.HEADS)):
                return "gemma", name.removeprefix(prefix)
    if network == "transformer" and inner.startswith(_CONNECTORS):
        network = "connectors"
    return network, inner


def _bare_network(file: TensorFile) -> str | None:
    if _is_of_diffusers(file.tensors):
        return None
    known = (*PREFIXES, *(p + head for p in gemma.PREFIXES for head in gemma.HEADS))
    if any(name.startswith(known) for name in file.tensors):
        return None
    for network, names in _BARE.items():
        if any(re.fullmatch(names, name) for name in file.tensors):
            return network
    return None


def _has_diffusion_decoder(source: Source) -> bool:
    prefix = source.name.partition("decoder.")[0]
    return any(name.startswith(prefix + _DIFFUSION_DECODER) for name in source.file.tensors)


def _take_scales(held: Held) -> None:
    """Moves the scales of float8 weights from the tensors to a place of their own."""
    for name in list(held.tensors):
        for suffix in _SCALES:
            weight = name.removesuffix(suffix) + ".weight"
            if name.endswith(suffix) and weight in held.tensors:
                if held.tensors[weight].stored.dtype in FLOAT8:
                    held.scales[weight] = held.tensors.pop(name)


def _is_of_diffusers(names: Iterable[str]) -> bool:
    return any(
        name.startswith(("time_embed.", "proj_in.", "transformer.time_embed.")) for name in names
    )


def _what_else(file: TensorFile) -> str:
    """What a file without a known network is, for an error."""
    names = list(file.tensors)
    if _is_of_diffusers(names):
        return (
            "has the layout of diffusers, which is not read; use a file as Lightricks released it"
        )
    return (
        f"holds no network of LTX-2 (its tensors are {', '.join(mapping.in_short(names)[:5])} ...)"
    )
