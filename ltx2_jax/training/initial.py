"""Between a run and released weights: what a run starts from, and the file that it becomes.

Training starts from `config.init_from`; `convert` makes an official file of what it has trained.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ltx2_jax import chips
from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import abstract_state, resident_weights, spec_of
from ltx2_jax.training import trainable
from ltx2_jax.training.trainable import adapted
from ltx2_jax.weights import export, mapping, versions
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights.loading import automatic
from ltx2_jax.weights.names import transformer
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release

# In the metadata of what was trained here: whose text features it reads, and whose latents.
TEXT, LATENTS = "text_release", "latents_release"
# Fields of ours that released configs do not have.
FREE = ("dtype", "remat", "attention")


def check(config: Config) -> None:
    """UserError unless the weights of `config.init_from` are those of its networks.

    Reads nothing but headers; does nothing without `init_from`.
    """
    if config.init_from is None:
        return
    trainable.check(config)
    with open_release(config.init_from) as release:
        check_same(config, release)
        if adapted(config) and (given := config.tune.lora.init_from) is not None:
            lora = loras.read_lora(given)
            loras.check(lora, config.model, release.release_of("transformer"))
            list(loras.continued(lora, adapted(config), _scales(config)))
        metadata = release.metadata("transformer")
        # Files of the version before say "generation".
        own = metadata.get(TEXT, metadata.get("text_generation"))
        text = own or release.release_of("transformer")
        if config.text.release != text:
            raise UserError(
                f"init_from={config.init_from} reads text features of {text!r}, but "
                f"text.release={config.text.release!r}"
            )
        # A file of ours from before this was noted says only whose text features it reads.
        latents = metadata.get(LATENTS, config.data.release if own else text)
        if config.data.release != latents:
            raise UserError(
                f"init_from={config.init_from} is for latents of {latents!r}, but "
                f"data.release={config.data.release!r}"
            )
        for network in ("transformer", "connectors"):
            release.parameters(network, release.config(network))


def check_same(config: Config, release: Release) -> None:
    """UserError unless a run's transformer and connectors are those of a release."""
    pairs = {"model": (release.config("transformer"), config.model)}
    if "connectors" in release.networks:
        video, audio = release.config("connectors")
        pairs["text.video_connector"] = (video, config.text.video_connector)
        pairs["text.audio_connector"] = (audio, config.text.audio_connector)
    lines = [
        line
        for name, (theirs, ours) in pairs.items()
        for line in difference(theirs, ours, f"{name}.")
        if line.partition(":")[0].rpartition(".")[2] not in FREE
    ]
    if lines:
        raise UserError(f"{release.name}: is another network ({'; '.join(lines)})")


# ------------------------------------------------------------------------------------------ loading


def load(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The weights that a run trains as it begins, float32, on their shards.

    All of `init_from`, the trained part of it, or adapters: new ones, or those of a LoRA file.
    """
    if adapted(config):
        return _adapters(config, mesh)
    return _read(config, trained_homes(config, mesh))


def load_frozen(
    config: Config, mesh: jax.sharding.Mesh, *, resident: bool = False
) -> dict[str, Any]:
    """The weights that a run does not train, as it keeps them; often none.

    They are in the dtypes in which they are used, or quantised by `tune.quantize`, always to the
    same numbers. `resident` keeps them whole along data and sequence, as a sampler does.
    """
    return _read(config, frozen_homes(config, mesh, resident=resident))


def frozen_homes(
    config: Config, mesh: jax.sharding.Mesh, *, resident: bool = False
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `load_frozen`."""
    if config.tune is None:
        return {}
    with resident_weights() if resident or config.tune.resident else contextlib.nullcontext():
        create = partial(trainable.params_of, config)
        homes = abstract_state(create, jax.eval_shape(jax.random.key, 0), mesh=mesh)
    return trainable.split(ltx2.as_used(config.networks, homes), config)[1]


def trained_homes(
    config: Config, mesh: jax.sharding.Mesh, *, for_sampling: bool = False
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what a run trains; see `ltx2.abstract_params`."""
    if not adapted(config):
        whole = ltx2.abstract_params(config.networks, mesh, for_sampling=for_sampling)
        return trainable.split(whole, config)[0]
    with resident_weights() if for_sampling else contextlib.nullcontext():
        create = partial(trainable.new_adapters, config=config)
        return abstract_state(create, jax.eval_shape(jax.random.key, 0), mesh=mesh)


def _read(config: Config, homes: dict[str, Any]) -> dict[str, Any]:
    """The weights of `init_from` that `homes` has, with its dtypes, where it says."""
    found: dict[str, Any] = {}
    if not homes:
        return found
    form = None if config.tune is None else config.tune.quantize
    with open_release(config.init_from) as release:
        for network, tree in homes.items():
            leaves = mapping.leaves(tree)
            wanted = [
                parameter.at(leaves, form)
                for parameter in release.parameters(network, release.config(network))
                if parameter.path in leaves
            ]
            dtype = lambda parameter: parameter.leaf.dtype  # noqa: E731
            # Its programs are those of a mesh of Auto axes, whatever the mesh around.
            with jax.set_mesh(automatic(next(iter(leaves.values())).sharding).mesh):
                stream = release.stream(network, wanted, dtype, progress=network)
                found[network] = mapping.tree(stream)
    return found


def _adapters(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    create = jax.jit(
        partial(trainable.new_adapters, config=config), compiler_options=chips.one_run_options()
    )
    with jax.set_mesh(mesh):
        new = create(jax.random.key(config.seed))
    if config.tune.lora.init_from is None:
        return new
    leaves = mapping.leaves(new)
    lora = loras.read_lora(config.tune.lora.init_from)
    for one, *pair, some in loras.continued(lora, adapted(config), _scales(config)):
        for name, given, rows in zip("ab", pair, (some[..., None], some[:, None]), strict=True):
            given, rows = (given, rows) if one.stacked else (given[0], rows[0])
            path = ("transformer", *one.path, trainable.ADAPTER, name)
            where = leaves[path].sharding
            given = jax.make_array_from_callback(given.shape, where, given.__getitem__)
            with jax.set_mesh(mesh):
                leaves[path] = jnp.where(rows, given, leaves[path])
    return mapping.nested(leaves)


def _scales(config: Config) -> dict[trainable.Path, np.ndarray]:
    return {path: np.atleast_1d(scale) for path, scale in trainable.scales(config).items()}


# ----------------------------------------------------------------------------------- the two parts


def tied(config: Config, state: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """A state that knows which frozen weights it belongs to.

    A new one learns it here, and carries it into every checkpoint.

    Raises:
      UserError: it was trained on others.
    """
    if "base" not in state:
        return state
    home = state["base"].sharding
    found = identity(frozen)
    check_base(config, np.asarray(state["base"]), found)
    return state | {"base": jax.device_put(found, home)}


def check_base(config: Config, trained_on: np.ndarray, found: np.ndarray) -> None:
    """UserError unless the identity of the frozen weights is that of those trained on, or new."""
    if trained_on.any() and not np.array_equal(trained_on, found):
        raise UserError(
            f"init_from={config.init_from}: its weights are not those that the checkpoint was "
            "trained on"
        )


def identity(params: dict[str, Any]) -> np.ndarray:
    """Numbers that tell weights from others, uint32 [2]: the same on any mesh, from any file.

    Of the weights rounded to bfloat16, so that it does not matter in which dtype they are kept.
    """
    leaves = mapping.leaves(params)
    if not leaves:
        return np.zeros(2, np.uint32)
    home = next(iter(leaves.values())).sharding
    mesh = jax.set_mesh(home.mesh) if isinstance(home, NamedSharding) else contextlib.nullcontext()
    program = jax.jit(_sums, compiler_options=chips.one_run_options())
    with mesh:
        sums = jax.device_get({path: program(leaf) for path, leaf in leaves.items()})
    names = {path: zlib.crc32("/".join(map(str, path)).encode()) for path in sums}
    total = sum(value.astype(np.uint64) * names[path] for path, value in sums.items())
    return (total % 2**32).astype(np.uint32)


def _sums(leaf: Array) -> Array:
    """Two sums of an array, of its bits times odd numbers made of their places: uint32 [2]."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16)
    mixed = (bits.astype(jnp.uint32) + 1) * (2 * _places(leaf) + 1)
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in (mixed, mixed ^ (mixed >> 16))])


def _places(leaf: Array) -> Array:
    """A number for every place of an array, uint32, of its shape and on its shards."""
    homes = [*spec_of(jax.typeof(leaf)), *[None] * leaf.ndim][: leaf.ndim]
    places = jnp.zeros((), jnp.uint32)
    for axis, home in enumerate(homes):
        along = jnp.arange(leaf.shape[axis], dtype=jnp.uint32)
        if not jax.sharding.get_abstract_mesh().empty:
            along = jax.sharding.reshard(along, PartitionSpec(home))
        along = jnp.expand_dims(along, [i for i in range(leaf.ndim) if i != axis])
        places = places * np.uint32(0x9E3779B1) + along
    return (places ^ (places >> 15)) * np.uint32(0x85EBCA6B)


def whole(
    config: Config,
    trained: dict[str, Any],
    trained_on: Any,
    mesh: jax.sharding.Mesh,
    *,
    for_sampling: bool = False,
) -> dict[str, Any]:
    """All weights of a run that tuned some, without adapters, none of them quantised.

    With `for_sampling` as `trainable.as_sampled` has them.

    Raises:
      UserError: `init_from` does not hold the weights that the run was trained on any more.
    """
    frozen = load_frozen(config, mesh, resident=for_sampling)
    check_base(config, np.asarray(trained_on), identity(frozen))
    if for_sampling:
        return trainable.as_sampled(trained, frozen, config)
    if config.tune.quantize is not None:
        del frozen
        config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, quantize=None))
        frozen = load_frozen(config, mesh)
    return trainable.merged(trained, frozen, config)


# ------------------------------------------------------------------------------------------- export


def as_lora(config: Config, trained: dict[str, Any], **metadata: str) -> loras.Lora:
    """The adapters of a run as a LoRA, alpha / rank in b."""
    beside = trainable.join(trained, trainable.constants(config))["transformer"]
    found = mapping.leaves(beside)
    tree = mapping.nested({(*path[:-2], path[-1]): leaf for path, leaf in found.items()})
    release = versions.release_of_config(transformer.section_of(config.model))
    metadata = {"model_version": f"{release}.0"} | metadata
    return loras.from_adapters(tree, config.model, **metadata)


def as_export(
    config: Config,
    params: Mapping[str, Any],
    *,
    base: Release | None = None,
    param_dtype: Any = None,
) -> export.Export:
    """The official file of a run's weights, with all other networks from `base`.

    Args:
      config: of the run.
      params: its weights, {"transformer": .., "connectors": ..}.
      base: a release with the other networks; its transformer and connectors are replaced.
      param_dtype: of the tensors; None takes those of `base`, or keeps what is given.

    Raises:
      UserError: a config that no official network has, or another one than `base`.

    Warns:
      UserWarning: what the official code would read differently.
    """
    if base is not None:
        check_same(config, base)
    networks = {
        "transformer": config.model,
        "connectors": (config.text.video_connector, config.text.audio_connector),
    }
    return export.of_params(
        networks,
        params,
        base=base,
        param_dtype=param_dtype,
        metadata={TEXT: config.text.release, LATENTS: config.data.release},
    )
