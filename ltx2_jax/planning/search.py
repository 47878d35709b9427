"""Which mesh, remat policy and batch size train fastest on a slice: ranked, then compiled."""

import itertools
from typing import Any

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.planning.changes import changed, mesh_of
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.reports import GIB
from ltx2_jax.planning.topology import A_GPU, NO_COMPILER, has_compiler, slice_of
from ltx2_jax.planning.transformer import plan_train
from ltx2_jax.sampling.programs import Request

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
        need = f"; the least is {least / GIB:.1f} GiB" if least else ""
        raise UserError(
            f"--search: by estimate nothing fits the {room / GIB:.1f} GiB of a device of "
            f"{topology}{need}"
        )
    rows.sort(key=lambda row: (-round(row["estimate"]["mfu"], 3), row["estimate"]["peak"]))
    compiles = has_compiler() and where.chip.torus > 0
    for row in rows[: compiled if compiles else 0]:
        row["plan"] = plan_train(_option(config, row), request, topology)
    done, rest = ([row for row in rows if bool(row["plan"]) == yes] for yes in (True, False))
    fit, failed = ([row for row in done if row["plan"]["fits"] == yes] for yes in (True, False))
    fit.sort(key=lambda row: -row["plan"]["roofline"]["practical"]["mfu"])
    return {
        "what": "search",
        "topology": topology,
        "devices": where.devices,
        "compiled": compiles,
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
