"""Configs like a given one that need other memory, by estimate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from ltx2_jax.config import Config, MeshConfig
from ltx2_jax.errors import UserError
from ltx2_jax.pipeline import Request
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.topology import Slice
from ltx2_jax.sharding import abstract_mesh, bytes_per_chip, mesh_sizes
from ltx2_jax.training import abstract_params


def sizes_of(config: Config) -> tuple[int, int, int]:
    """Of the config's mesh, data = -1 included."""
    return config.mesh.data, config.mesh.model, config.mesh.sequence


def mesh_of(config: Config, where: Slice) -> jax.sharding.AbstractMesh:
    """The mesh of a config on a slice, without its devices."""
    return abstract_mesh(*mesh_sizes(*sizes_of(config), where.devices))


def changed(
    config: Config,
    *,
    remat: str | None = None,
    batch: int | None = None,
    chunks: int | None = None,
    mesh: tuple[int, int, int] | None = None,
) -> Config:
    """`config` with another remat policy, batch size, number of micro-batches, mesh."""
    if remat is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    if batch is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, batch_size=batch)
        )
    if chunks is not None:
        optim = dataclasses.replace(config.optim, accumulate_steps=chunks)
        config = dataclasses.replace(config, optim=optim)
    return config if mesh is None else dataclasses.replace(config, mesh=MeshConfig(*mesh))


def what_helps_training(config: Config, request: Request, where: Slice) -> list[dict[str, Any]]:
    """Single changes that make the peak of a train step smaller, by estimate, the best first.

    Each is {"change": flags, "saves": bytes of a device}.
    """
    data, model, sequence = mesh_of(config, where).shape.values()
    batch, chunks = config.data.batch_size, config.optim.accumulate_steps
    options = {
        f"--config.model.remat={policy}": {"remat": policy}
        for policy in POLICIES
        if policy != config.model.remat
    }
    if batch % (2 * data * chunks) == 0:
        options[f"--config.data.batch_size={batch // 2}"] = {"batch": batch // 2}
        flag = f"--config.optim.accumulate_steps={2 * chunks}"
        options[flag] = {"chunks": 2 * chunks}
    if data % 2 == 0 and batch % 2 == 0:
        # Half as many clips at once, each on twice as many devices.
        for mesh in ((data // 2, model, 2 * sequence), (data // 2, 2 * model, sequence)):
            flags = f"--mesh={','.join(map(str, mesh))} --config.data.batch_size={batch // 2}"
            options[flags] = {"mesh": mesh, "batch": batch // 2}

    def peak(config: Config) -> float:
        mesh = mesh_of(config, where)
        check(config, request, mesh)
        return estimate(config, request, mesh, where.chip).peak

    return _ranked(config, options, peak)


def what_helps_sampling(config: Config, request: Request, where: Slice) -> list[dict[str, Any]]:
    """As `what_helps_training`: weights split over more devices, which is most of a sampler."""
    data, model, sequence = mesh_of(config, where).shape.values()
    meshes = {(data // 2, 2 * model, sequence), (data, 2 * model, sequence // 2)}
    options = {
        f"--mesh={','.join(map(str, mesh))}": {"mesh": mesh}
        for mesh in sorted(meshes)
        if math.prod(mesh) == where.devices
    }

    def weights(config: Config) -> float:
        mesh = mesh_of(config, where)
        check(config, request, mesh)
        return bytes_per_chip(abstract_params(config, mesh, for_sampling=True))

    return _ranked(config, options, weights)


def _ranked(
    config: Config, options: dict[str, Any], size: Callable[[Config], float]
) -> list[dict[str, Any]]:
    now, found = size(config), []
    for flags, change in options.items():
        try:
            saves = now - size(changed(config, **change))
        except UserError:
            continue
        if saves > 0:
            found.append({"change": flags, "saves": saves})
    return sorted(found, key=lambda change: -change["saves"])
