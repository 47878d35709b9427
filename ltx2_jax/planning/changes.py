"""Configs like a given one that need other memory, by estimate."""

import dataclasses
from typing import Any

import jax

from ltx2_jax.config import Config, MeshConfig
from ltx2_jax.errors import UserError
from ltx2_jax.pipeline import Request
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.sharding import abstract_mesh, mesh_sizes
from ltx2_jax.topology import Slice


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


def what_helps(config: Config, request: Request, where: Slice) -> list[dict[str, Any]]:
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
    now, found = _peak(config, request, where), []
    for flags, change in options.items():
        try:
            saves = now - _peak(changed(config, **change), request, where)
        except UserError:
            continue
        if saves > 0:
            found.append({"change": flags, "saves": saves})
    return sorted(found, key=lambda change: -change["saves"])


def _peak(config: Config, request: Request, where: Slice) -> float:
    mesh = mesh_of(config, where)
    check(config, request, mesh)
    return estimate(config, request, mesh, where.chip).peak
