"""What is fastest on a slice: ranked by arithmetic, then compiled.

For training mesh, remat policy and batch size; for sampling the mesh.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.planning.changes import changed, mesh_of
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.reports import GIB, counted
from ltx2_jax.planning.sampling_estimate import estimate_sample
from ltx2_jax.planning.topology import (
    A_GPU,
    NO_COMPILER,
    Slice,
    has_compiler,
    one_slice,
    places,
    slice_of,
)
from ltx2_jax.planning.transformer import plan_sample, plan_train
from ltx2_jax.sampling import meshes
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import make_mesh

CLIPS = (1, 2, 4)  # per data shard
SPLITS = (1, 2, 4, 8, 16)  # of model and of sequence
MOST_SPLIT = 16  # model x sequence; beyond it a clip is on more chips than any plan gains from
SPARE = 0.97  # of a chip's memory that an estimate may fill


def search_plans(
    config: Config, request: Request, topology: str, *, compiled: int
) -> dict[str, Any]:
    """Ranks what fits by the estimated MFU, compiles the best few, and ranks these as compiled.

    {"rows": [{"mesh", "remat", "batch", "estimate", "plan": facts of `plan_train` or None}]}, best
    first. Equally fast ones are ordered by the memory they leave.

    Raises:
      UserError: no such slice; nothing fits.
    """
    where = slice_of(topology)
    room, rows, least = where.chip.device_hbm_bytes, [], None
    meshes = _meshes(where.devices // where.count)
    for mesh, remat, clips in itertools.product(meshes, POLICIES, CLIPS):
        row = {
            "mesh": list(mesh),
            "remat": remat,
            "batch": clips * mesh[0] * where.count * config.optim.accumulate_steps,
        }
        option = _option(config, row)
        try:
            check(option, request, mesh_of(option, where))
            guess = estimate(option, request, mesh_of(option, where), where.chip)
        except UserError:
            continue
        least = min(guess.peak, least or guess.peak)
        if guess.peak <= SPARE * room:
            rows.append({**row, "estimate": guess.facts(), "plan": None})
    if not rows:
        raise _nothing_fits(topology, room, least)
    rows.sort(key=lambda row: (-round(row["estimate"]["mfu"], 3), row["estimate"]["peak"]))
    for row in rows[: compiled if _compiles(where) else 0]:
        row["plan"] = plan_train(_option(config, row), request, topology)
    return _facts("train", where, rows, lambda times: -times["mfu"])


def search_samples(
    config: Config,
    request: Request,
    topology: str,
    *,
    compiled: int,
    batch: int,
    passes: int,
    steps: int,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Ranks the meshes on which no device repeats another's work, and compiles the best few.

    {"rows": [{"mesh", "estimate", "plan": facts of `plan_sample` or None}]}, the fastest first.

    Raises:
      UserError: no such slice, several, or GPUs; nothing fits; no mesh divides clips, heads and
        tokens.
    """
    where = one_slice(topology, "sample")
    if not where.chip.torus:
        raise UserError(f"--topology={topology}: {A_GPU} for --what=train")
    devices, room, rows, least = places(where), where.chip.device_hbm_bytes, [], None
    networks = dataclasses.replace(config.networks, quantized=quantize)
    tokens = math.prod(request.video_shape)
    for mesh in meshes.legal(len(devices), config.model.num_heads, [tokens]):
        if batch * passes % mesh[0]:
            continue
        on = make_mesh(*mesh, devices=devices)
        guess = estimate_sample(networks, request, on, where.chip, batch * passes)
        least = min(guess.peak, least or guess.peak)
        if guess.peak <= SPARE * room:
            rows.append({"mesh": list(mesh), "estimate": guess.facts(), "plan": None})
    if not rows:
        raise _nothing_fits(topology, room, least)
    rows.sort(key=lambda row: (round(row["estimate"]["step"], 4), row["estimate"]["peak"]))
    counts = {"batch": batch, "passes": passes, "steps": steps, "quantize": quantize}
    for row in rows[: compiled if _compiles(where) else 0]:
        option = changed(config, {"mesh": row["mesh"]})
        row["plan"] = plan_sample(option, request, topology, **counts)
    work = f"{counted(batch, 'clip')}, {counted(passes, 'pass')}"
    return _facts("sample", where, rows, lambda times: times["step"]) | {
        "work": f"{work}, {counted(tokens, 'video token')} a clip", "steps": steps
    }  # fmt: skip


def _compiles(where: Slice) -> bool:
    """Whether programs can be compiled for it here."""
    return has_compiler() and where.chip.torus > 0


def _nothing_fits(topology: str, room: float, least: float | None) -> UserError:
    """With the least memory of all that was tried, unless nothing could be."""
    need = f"; the least is {least / GIB:.1f} GiB" if least else ""
    return UserError(
        f"--search: by estimate nothing fits the {room / GIB:.1f} GiB of a device of "
        f"{topology}{need}"
    )


def _facts(
    of: str, where: Slice, rows: list[dict[str, Any]], worse: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """Those compiled first, by their practical times, then the others, then what does not fit."""
    done, rest = ([row for row in rows if bool(row["plan"]) == yes] for yes in (True, False))
    fit, failed = ([row for row in done if row["plan"]["fits"] == yes] for yes in (True, False))
    fit.sort(key=lambda row: worse(row["plan"]["roofline"]["practical"]))
    return {
        "what": "search",
        "of": of,
        "topology": where.name,
        "devices": where.devices,
        "compiled": _compiles(where),
        "why": NO_COMPILER if where.chip.torus else A_GPU,
        "fits": bool(fit) or not done,
        "rows": fit + rest + failed,
    }


def _option(config: Config, row: dict[str, Any]) -> Config:
    fields = {"model.remat": row["remat"], "data.batch_size": row["batch"], "mesh": row["mesh"]}
    return changed(config, fields)


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    return [
        (devices // (model * sequence), model, sequence)
        for model, sequence in itertools.product(SPLITS, SPLITS)
        if model * sequence <= MOST_SPLIT and devices % (model * sequence) == 0
    ]
