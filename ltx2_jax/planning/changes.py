"""Configs like a given one that need other memory, by estimate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from ltx2_jax.config import Config, MeshConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.topology import Slice
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import abstract_mesh, batch_shards, bytes_per_chip, mesh_sizes

Changes = dict[str, Any]  # fields of a config, as "model.remat"; "mesh" is (data, model, sequence)


def sizes_of(config: Config) -> tuple[int, int, int]:
    """Of the config's mesh, data = -1 included."""
    return config.mesh.data, config.mesh.model, config.mesh.sequence


def mesh_of(config: Config, where: Slice) -> jax.sharding.AbstractMesh:
    """The mesh of a config on a slice, or several, without the devices."""
    asked, count = config.mesh.slices, where.count
    if asked not in (-1, count):
        raise UserError(f"mesh.slices={asked}, but {where.name} is {count}: leave it at -1")
    return abstract_mesh(*mesh_sizes(*sizes_of(config), where.devices // count, count), count)


def changed(config: Config, changes: Changes) -> Config:
    """`config` with other values of some fields."""
    for path, value in changes.items():
        part, _, field = path.partition(".")
        old = getattr(config, part)
        if path == "mesh":
            new = MeshConfig(*value, slices=config.mesh.slices)
        else:
            new = dataclasses.replace(old, **{field: value})
        config = dataclasses.replace(config, **{part: new})
    return config


def what_helps_training(config: Config, request: Request, where: Slice) -> list[dict[str, Any]]:
    """Single changes that make the peak of a train step smaller, by estimate, the best first.

    Each is {"change": flags, "saves": bytes of a device}.
    """
    mesh = mesh_of(config, where)
    data, model, sequence = mesh_sizes(*sizes_of(config), where.devices // where.count)
    batch, chunks = config.data.batch_size, config.optim.accumulate_steps
    options = [{"model.remat": policy} for policy in POLICIES if policy != config.model.remat]
    if config.tune is not None and config.tune.quantize is None:
        options.append({"tune.quantize": "int8"})
    if batch % (2 * batch_shards(mesh) * chunks) == 0:
        options += [{"data.batch_size": batch // 2}, {"optim.accumulate_steps": 2 * chunks}]
    if data % 2 == 0 and batch % 2 == 0:
        # Half as many clips at once, each on twice as many devices.
        meshes = (data // 2, model, 2 * sequence), (data // 2, 2 * model, sequence)
        options += [{"mesh": mesh, "data.batch_size": batch // 2} for mesh in meshes]

    def peak(config: Config, mesh: jax.sharding.AbstractMesh) -> float:
        return estimate(config, request, mesh, where.chip).peak

    return _ranked(config, request, where, options, peak)


def what_helps_sampling(config: Config, request: Request, where: Slice) -> list[dict[str, Any]]:
    """As `what_helps_training`: weights split over more devices, which is most of a sampler."""
    devices = where.devices // where.count
    data, model, sequence = mesh_sizes(*sizes_of(config), devices)
    meshes = {(data // 2, 2 * model, sequence), (data, 2 * model, sequence // 2)}
    options = [{"mesh": mesh} for mesh in sorted(meshes) if math.prod(mesh) == devices]

    def weights(config: Config, mesh: jax.sharding.AbstractMesh) -> float:
        return bytes_per_chip(ltx2.abstract_params(config.networks, mesh, for_sampling=True))

    return _ranked(config, request, where, options, weights)


def _ranked(
    config: Config,
    request: Request,
    where: Slice,
    options: list[Changes],
    size: Callable[[Config, jax.sharding.AbstractMesh], float],
) -> list[dict[str, Any]]:
    """Options that are allowed and save bytes of what `size` says, the best first."""
    now, found = size(config, mesh_of(config, where)), []
    for changes in options:
        option = changed(config, changes)
        try:
            mesh = mesh_of(option, where)
            check(option, request, mesh)
            saves = now - size(option, mesh)
        except UserError:
            continue
        if saves > 0:
            found.append({"change": _flags(changes), "saves": saves})
    return sorted(found, key=lambda change: -change["saves"])


def _flags(changes: Changes) -> str:
    return " ".join(
        f"--mesh={','.join(map(str, value))}" if path == "mesh" else f"--config.{path}={value}"
        for path, value in changes.items()
    )
