"""What makes a clip, each part loaded when it is needed: a release, its text encoder, its helpers.

A 22B model, its text encoder and its decoder together need several times the memory of each. So
they follow one another: what comes next is loaded after what came before is freed, unless all of
them fit.
"""

import gc
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax import chips
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.models.codecs.upsampler import upsample_latents
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.ltx2 import LTX2Config
from ltx2_jax.models.quantized import FORMS, quantize, stored
from ltx2_jax.models.streamed import place
from ltx2_jax.models.text.connectors import Connectors
from ltx2_jax.sampling import meshes
from ltx2_jax.sampling.loras import Used, parts, same
from ltx2_jax.sampling.meshes import SHARE
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import FeatureEncoder, caption_features, released_encoder, tell_cut
from ltx2_jax.training.trainable import ADAPTER
from ltx2_jax.weights import hub, mapping
from ltx2_jax.weights.lora import Lora, adapters, check, fuse, read_lora, unfuse
from ltx2_jax.weights.names import text as text_weights
from ltx2_jax.weights.references import fingerprint
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release

GIB = 2**30
CODEC = ("video_vae", "diffusion_decoder", "audio_vae", "vocoder")


class Weights:
    """Connectors and transformer on a mesh, in memory from the first use until `free`.

    LoRAs are fused into weights that are whole and on the devices. Beside others they stand as
    adapters: rounding would swallow what is less than half a step, and what waits in the host's
    memory is read only. Either way other LoRAs take their place without a weight read anew.
    """

    def __init__(
        self,
        release: Release,
        config: LTX2Config,
        mesh: jax.sharding.Mesh,
        *,
        offload: bool = False,
    ):
        """`offload` keeps the blocks of the transformer in the host's memory: `models.streamed`."""
        self.config, self.mesh = config, mesh
        self._release, self._offload = release, offload
        self._beside = offload or config.quantized is not None
        self._params: dict[str, Any] | None = None
        self._used: Used = ()
        self._originals: dict[Any, Any] = {}

    def params(self, loras: Used = ()) -> dict[str, Any]:
        """{"connectors": .., "transformer": ..} with these LoRAs in the transformer, or beside it.

        Where they are fused, the weights that they replace are kept in the memory of the host.
        """
        if self._params is None:
            self._params = self._load()
        if not same(loras, self._used):
            if self._beside:
                transformer = self._with_adapters(loras)
            else:
                transformer = unfuse(self._params["transformer"], self._originals)
                transformer, self._originals = fuse(
                    transformer, parts(loras), self.config.transformer, offload=True
                )
            self._params, self._used = {**self._params, "transformer": transformer}, loras
        return self._params

    def graph(self, loras: Used = ()) -> Any:
        """`ltx2.graph` of the model whose weights `params` gives."""
        if not (self._beside and loras):
            return self._graph
        beside = _adapters_in(self.params(loras)["transformer"])
        with jax.set_mesh(self.mesh):
            return ltx2.graph(self.config, beside)

    def _with_adapters(self, loras: Used) -> dict[Any, Any]:
        """The transformer with these LoRAs beside its weights, in the place of others."""
        cfg = self.config.transformer
        leaves = mapping.leaves(self._params["transformer"])
        leaves = {path: leaf for path, leaf in leaves.items() if ADAPTER not in path}
        then = partial(place, offload=self._offload)
        found = adapters(parts(loras), cfg, self.mesh, dtype=cfg.dtype, then=then)
        for path, leaf in mapping.leaves(found).items():
            leaves[(*path[:-1], ADAPTER, path[-1])] = leaf
        return mapping.nested(leaves)

    def connectors(self) -> tuple[Any, Any]:
        """Graph and weights of the connectors alone, which are small."""
        config = (self.config.video_connector, self.config.audio_connector)
        form = stored(self.config.quantized)
        graph = nnx.graphdef(
            jax.eval_shape(lambda: quantize(Connectors(*config, rngs=Rngs(0)), form))
        )
        if self._params is not None:
            return graph, self._params["connectors"]
        return graph, self._network("connectors", config)

    def free(self) -> None:
        self._params, self._used, self._originals = None, (), {}
        gc.collect()

    def move(self, mesh: jax.sharding.Mesh) -> None:
        """To another mesh: what is loaded, from device to device.

        On several hosts, with LoRAs in it, quantised or offloaded, it is read again when it is used
        next.
        """
        self.mesh = mesh
        for cached in ("_homes", "_graph"):
            vars(self).pop(cached, None)
        if self._used or self._beside or jax.process_count() > 1:
            self.free()
        if self._params is not None:
            self._params = jax.tree.map(
                lambda x, home: jax.device_put(x, home.sharding, donate=True),
                self._params,
                self._homes,
            )

    def _load(self) -> dict[str, Any]:
        config = self.config
        return {
            "connectors": self._network(
                "connectors", (config.video_connector, config.audio_connector)
            ),
            "transformer": self._network("transformer", config.transformer),
        }

    def _network(self, name: str, config: Any) -> dict[Any, Any]:
        """Weights as a sampler keeps them: resident, in the dtype of their use, or quantised."""
        homes, form = mapping.leaves(self._homes[name]), stored(self.config.quantized)
        wanted = [p.at(homes, form) for p in self._release.parameters(name, config)]
        label = name if sum(p.leaf.size for p in wanted) > 2**24 else None
        found = self._release.stream(name, wanted, lambda p: p.leaf.dtype, progress=label)
        if name == "transformer":
            found = ((p, place(p.path, array, offload=self._offload)) for p, array in found)
        return mapping.tree(found)

    @cached_property
    def _graph(self) -> Any:
        with jax.set_mesh(self.mesh):
            return ltx2.graph(self.config)

    @cached_property
    def _homes(self) -> dict[str, Any]:
        return ltx2.abstract_params(self.config, self.mesh, for_sampling=True)


def _adapters_in(transformer: dict[Any, Any]) -> dict[Any, Any]:
    """The adapters beside its weights, by the paths of its linear maps."""
    found = mapping.leaves(transformer).items()
    return mapping.nested({(*p[:-2], p[-1]): leaf for p, leaf in found if ADAPTER in p})


class RunWeights:
    """Weights that somebody else holds: those of a training run."""

    def __init__(self, params: Any, config: LTX2Config, mesh: jax.sharding.Mesh, graph: Any):
        self.config, self.mesh, self._graph, self._params = config, mesh, graph, params

    def params(self, loras: Used = ()) -> Any:
        if loras:
            raise UserError("LoRAs: for released models; convert merges one into a run's")
        return self._params

    def graph(self, loras: Used = ()) -> Any:
        """What `params` are the weights of."""
        return self._graph

    def free(self) -> None:
        """They stay."""


class Texts:
    """Features of prompts; the encoder is loaded for new ones, and freed by `free`."""

    def __init__(self, load: Any):
        """load: () -> FeatureEncoder."""
        self._load = load
        self._encoder: FeatureEncoder | None = None
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Text fields [n, S, ...] of n prompts."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self._known]:
            self._encoder = self._encoder or self._load()
            found = caption_features(self._encoder, new)
            tell_cut(found["text_mask"], "prompts", "the length of the text encoder")
            for i, prompt in enumerate(new):
                self._known[prompt] = {name: value[i] for name, value in found.items()}
        rows = [self._known[prompt] for prompt in prompts]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def free(self) -> None:
        self._encoder = None
        gc.collect()


@dataclass
class Files:
    """The files of a released model: everything that is small is read, and fits."""

    release: Release
    text_encoder: Path
    upsampler: Release | None
    kind: str  # "dev" or "distilled"

    @classmethod
    def open(
        cls,
        sources: Sequence[str | os.PathLike],
        text_encoder: str | os.PathLike | None,
        upsampler: str | os.PathLike | None,
        kind: str | None,
    ) -> "Files":
        """Raises UserError for what is missing, damaged or does not belong together."""
        release = open_release(*sources)
        for network in ("transformer", "connectors", "video_vae", "audio_vae"):
            if network not in release.networks:
                raise UserError(
                    f"{release.name}: has no {network.replace('_', ' ')}, only "
                    f"{', '.join(release.networks)}; give the other files of the model, too"
                )
        if text_encoder is None:
            if "gemma" not in release.networks:
                raise UserError(
                    f"{release.name}: has no text encoder: give --text-encoder-path or --gemma-root"
                    " (text_encoder=), a Gemma folder or the packed file of the release"
                )
            text_encoder = release.networks["gemma"].file.path
        files = cls(
            release,
            hub.fetch(text_encoder),
            None if upsampler is None else open_release(upsampler),
            kind or kind_of(release),
        )
        files._check()
        return files

    @property
    def version(self) -> str:
        """ "2.0", "2.3" or "2.5"."""
        return self.release.release_of("transformer") or "2.0"

    def _check(self) -> None:
        release = self.release
        transformer, vae = release.config("transformer"), release.config("video_vae")
        if transformer.in_channels != vae.latent_channels:
            raise UserError(
                f"{release.networks['video_vae'].file.path}: its latents have "
                f"{vae.latent_channels} channels, the transformer takes {transformer.in_channels}"
            )
        ours, theirs = self.version, release.release_of("video_vae")
        if theirs and (ours == "2.0") != (theirs == "2.0"):  # 2.5 kept the latents of 2.3
            raise UserError(
                f"{release.networks['video_vae'].file.path}: is the video VAE of LTX-2 {theirs}, "
                f"the transformer is of {ours}"
            )
        with open_release(self.text_encoder) as language:
            metadata = release.metadata("connectors")
            text_weights.check_text_encoder(metadata, language.section("gemma"), self.text_encoder)
            text_weights.holder(release, language)
        if self.upsampler is not None:
            config = self.upsampler.config("upsampler")
            if config.in_channels != vae.latent_channels:
                raise UserError(
                    f"{self.upsampler.name}: upsamples latents of {config.in_channels} channels, "
                    f"those of {release.name} have {vae.latent_channels}"
                )
            if config.scale != (1.0, 2.0, 2.0):
                raise UserError(
                    f"{self.upsampler.name}: makes frames {config.scale[0]:g} times as many and "
                    f"sizes {config.scale[1]:g} times as large; the second stage needs the spatial "
                    "upsampler x2"
                )

    def networks(self, dtype: str) -> LTX2Config:
        """Configs of what the sampler runs."""
        connectors = self.release.config("connectors", dtype=dtype)
        return LTX2Config(self.release.config("transformer", dtype=dtype), *connectors)

    def codec(self, mesh: jax.sharding.Mesh, dtype: str) -> Codec:
        """A codec whose weights are read when they are first used, and go when it goes."""
        held = self.release.networks
        paths = dict.fromkeys(held[name].file.path for name in CODEC if name in held)
        return load_codec(*paths, devices=_here(mesh), dtype=dtype)

    def texts(
        self,
        mesh: jax.sharding.Mesh,
        dtype: str,
        cache: Any,
        form: str | None = None,
        offload: bool = False,
    ) -> Texts:
        checkpoint, here = self.release.networks["connectors"].file.path, _here(mesh)
        mesh = mesh if len(here) == mesh.size else make_mesh(devices=here[:1])
        how = {"mesh": mesh, "dtype": dtype, "quantize": stored(form), "offload": offload}
        return Texts(lambda: released_encoder(checkpoint, self.text_encoder, cache=cache, **how))

    def load_upsampler(self, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
        """What makes [B, F', 2 H', 2 W', C] of normalised video latents [B, F', H', W', C]."""
        graph, params = nnx.split(self.upsampler.module("upsampler", dtype=dtype))
        mean, std = self.statistics

        def upsample(latents: np.ndarray) -> np.ndarray:
            rows = (upsampled(params, row[None], mean, std, graph=graph) for row in latents)
            return np.concatenate(list(map(np.asarray, rows)))

        return upsample

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the video latents, [C] each."""
        wanted = self.release.parameters("video_vae", self.release.config("video_vae"))
        wanted = [p for p in wanted if p.path[0] == "statistics"]
        found = {p.path[-1]: np.asarray(x) for p, x in self.release.stream("video_vae", wanted)}
        return found["mean"], found["std"]

    def named(self) -> dict[str, str]:
        """The files, and what tells each from others."""
        files = [file.path for file in self.release.files] + [self.text_encoder]
        files += [file.path for file in self.upsampler.files] if self.upsampler else []
        return {str(Path(path).resolve()): fingerprint(path) for path in dict.fromkeys(files)}

    def lora(self, source: str | os.PathLike, config: LTX2Config) -> Lora:
        """A LoRA that fits this model."""
        lora = read_lora(source)
        check(lora, config.transformer, self.version)
        return lora


@partial(jax.jit, static_argnames="graph")
def upsampled(params: Any, latents: jax.Array, mean: Any, std: Any, *, graph: Any) -> jax.Array:
    """`upsample_latents` by a network's graph and weights."""
    return upsample_latents(nnx.merge(graph, params), latents, mean, std)


def _here(mesh: jax.sharding.Mesh) -> list[jax.Device]:
    """The devices of this process: text and pictures are worked on by every host for itself."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def kind_of(release: Release) -> str:
    """ "distilled" or "dev": by the name of the transformer's file, as no metadata says it."""
    name = release.networks["transformer"].file.path.name.lower()
    return "distilled" if "distilled" in name else "dev"


# ------------------------------------------------------------------------------------------ memory


def device_bytes() -> int | None:
    """Memory of a device, or of this machine if its devices are CPU cores; None: unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or chips.hbm_bytes(device.device_kind)


def weight_bytes(
    release: Release, *networks: str, form: str | None = None, blocks: int | None = None
) -> int:
    """Of networks in bfloat16, the matrices of their blocks quantised if a form is given.

    Of the transformer's blocks only the first so many are counted, if `blocks` says how many.
    """

    def bits(network: str, name: str, shape: tuple[int, ...]) -> float:
        of_block = re.search(r"(?:blocks|layers)\.(\d+)\..*weight$", name)
        matrix = len(shape) == 2 and of_block
        if (
            matrix
            and network == "transformer"
            and blocks is not None
            and int(of_block[1]) >= blocks
        ):
            return 0
        return FORMS[stored(form)][2] if form and matrix else 16

    return sum(
        int(np.prod(shape) * bits(network, name, shape) / 8)
        for network in networks
        if network in release.networks
        for name, shape in release.networks[network].shapes.items()
    )


def fitting_mesh(
    release: Release,
    heads: int,
    free: int | None = None,
    *,
    form: str | None = None,
    offload: bool = False,
    adapters: int = 0,
    rows: Sequence[int] = (),
    tokens: Sequence[int] = (),
) -> jax.sharding.Mesh:
    """The mesh of all devices for what `meshes.choose` is told.

    Args:
      release: the model.
      heads: of its transformer, which are split.
      free: bytes of a device; None asks.
      form: in which the weights are quantised.
      offload: whether the transformer's blocks wait in the host's memory, but for two.
      adapters: bytes of LoRAs beside the weights, whole on every device.
      rows: of every stage, clips times guidance passes.
      tokens: of video, that are split.

    Raises:
      UserError: the weights do not fit on all devices together.
    """
    blocks = 2 if offload else None
    needed = weight_bytes(release, "transformer", "connectors", form=form, blocks=blocks)
    room = (device_bytes() if free is None else free) or math.inf
    room -= 0 if offload else adapters / SHARE
    slices = len({getattr(device, "slice_index", None) or 0 for device in jax.devices()})
    count = jax.device_count() // slices
    sizes = meshes.choose(count, heads=heads, weights=needed, room=room, rows=rows, tokens=tokens)
    split = sizes[1]
    if needed / split <= SHARE * room:
        return make_mesh(*sizes)
    missing = needed / split - SHARE * room
    helps = {None: ["quantised weights (--quantize)"], "int4": []}.get(form, ["int4"])
    helps += [] if offload else ["weights in the host's memory (--offload)"]
    raise UserError(
        f"too little memory: the weights of {release.name} are {needed / GIB:.1f} GiB, and "
        f"{split} device{'s' if split > 1 else ''} of {room / GIB:.1f} GiB can hold "
        f"{SHARE * room * split / GIB:.1f} GiB of weights: {missing * split / GIB:.1f} GiB are "
        f"missing; {', or '.join(['use more devices', *helps])}"
    )


def check_host(release: Release, mesh: jax.sharding.Mesh, form: str | None) -> None:
    """UserError unless this host's memory can hold the transformer for all of its devices."""
    here = len(_here(mesh))
    needed = weight_bytes(release, "transformer", form=form) * here / mesh.shape["model"]
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise UserError(
            f"--offload: {needed / GIB:.1f} GiB of weights, for {here} device{'s'[: here > 1]}, do "
            f"not fit into the {room / GIB:.1f} GiB of this host"
        )


def fit_together(files: Files, mesh: jax.sharding.Mesh, form: str | None = None) -> bool:
    """Whether text encoder, transformer and codec leave room beside one another on the devices."""
    room = device_bytes()
    with open_release(files.text_encoder) as language:
        encoder = weight_bytes(language, "gemma", "text_projection", form=form)
    split = weight_bytes(files.release, "transformer", "connectors", form=form) + encoder
    whole = weight_bytes(files.release, *CODEC)
    return room is not None and split / mesh.shape["model"] + whole <= SHARE * room / 2


def explain(error: Exception, name: str) -> None:
    """UserError in the place of an allocator's report."""
    text = str(error)
    if isinstance(error, UserError) or "RESOURCE_EXHAUSTED" not in text:
        return
    # A TPU's allocator leaves out the B.
    asked = re.search(r"allocat\w+ (?:of )?([\d.]+ ?(?:[KMGT]i?B?|B|bytes)\b)", text)
    needs = f" ({asked[1]} more were asked for)" if asked else ""
    raise UserError(
        f"too little memory for {name}{needs}: fewer frames, a smaller size, a mesh of more "
        "devices (--mesh), clips one at a time (--max-batch-size 1), quantised weights "
        "(--quantize) or weights on the host (--offload) need less"
    ) from None
