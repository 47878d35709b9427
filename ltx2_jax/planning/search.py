"""Which mesh, remat policy and batch size train fastest on a slice: ranked, then compiled."""

from typing import Any

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.pipeline import Request
from ltx2_jax.planning.changes import changed, mesh_of
from ltx2_jax.planning.estimate import POLICIES, estimate
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.topology import NO_COMPILER, has_compiler, slice_of
from ltx2_jax.planning.transformer import plan_train

CLIPS = (1, 2, 4)  # per data shard
MOST_SPLIT = 16  # model x sequence; beyond it a clip is on more chips than any plan gains from
SPARE = 0.97  # of a chip's memory that an estimate may fill
GIB = 2**30


def search(config: Config, request: Request, topology: str, *, compiled: int) -> dict[str, Any]:
    """Ranks what fits by the estimated MFU, compiles the best few, and ranks these as compiled.

    {"rows": [{"mesh", "remat", "batch", "estimate", "plan": facts of `plan_train` or None}]}, best
    first. Equally fast ones are ordered by the memory they leave.

    Raises:
      UserError: no such slice; nothing fits.
    """
    where = slice_of(topology)
    room, rows = where.chip.device_hbm_bytes, []
    least = None
    for mesh in _meshes(where.devices):
        for remat in POLICIES:
            for clips in CLIPS:
                batch = clips * mesh[0] * config.optim.accumulate_steps
                option = changed(config, remat=remat, batch=batch, mesh=mesh)
                try:
                    check(option, request, mesh_of(option, where))
                    guess = estimate(option, request, mesh_of(option, where), where.chip)
                except UserError:
                    continue
                least = min(guess.peak, least or guess.peak)
                if guess.peak <= SPARE * room:
                    row = {"mesh": list(mesh), "remat": remat, "batch": batch}
                    rows.append({**row, "estimate": guess.facts(), "plan": None})
    if not rows:
        need = f"; the least is {least / GIB:.1f} GiB" if least else ""
        raise UserError(
            f"--search: by estimate nothing fits the {room / GIB:.1f} GiB of a device of "
            f"{topology}{need}"
        )
    rows.sort(key=lambda row: (-round(row["estimate"]["mfu"], 3), row["estimate"]["peak"]))
    for row in rows[: compiled if has_compiler() else 0]:
        option = changed(config, remat=row["remat"], batch=row["batch"], mesh=tuple(row["mesh"]))
        row["plan"] = plan_train(option, request, topology)
    done = [row for row in rows if row["plan"]]
    failed = [row for row in done if not row["plan"]["fits"]]
    fit = [row for row in done if row["plan"]["fits"]]
    fit.sort(key=lambda row: -row["plan"]["roofline"]["practical"]["mfu"])
    return {
        "topology": topology,
        "devices": where.devices,
        "compiled": has_compiler(),
        "fits": bool(fit) or not done,
        "rows": fit + [row for row in rows if not row["plan"]] + failed,
    }


def describe(facts: dict[str, Any], most: int = 12) -> str:
    """The best rows as a table."""
    lines = [
        f"train on {facts['topology']} ({facts['devices']} devices), best first; the estimates "
        "are by arithmetic",
        "  data model sequence  remat              batch    estimated: GiB    MFU"
        "    compiled: GiB    MFU  clips/s",
    ]
    for row in facts["rows"][:most]:
        data, model, sequence = row["mesh"]
        guess = row["estimate"]
        lines.append(
            f"  {data:4} {model:5} {sequence:8}  {row['remat']:<17} {row['batch']:6,} "
            f"{guess['peak'] / GIB:17.1f} {guess['mfu']:6.1%}{_compiled(row)}"
        )
    if len(facts["rows"]) > most:
        lines.append(f"  and {len(facts['rows']) - most} more that should fit")
    if not facts["compiled"]:
        lines.append(f"  not compiled   {NO_COMPILER}")
    return "\n".join(lines)


def _compiled(row: dict[str, Any]) -> str:
    plan = row["plan"]
    if plan is None:
        return ""
    if not plan["fits"]:
        return "    does not fit"
    times = plan["roofline"]["practical"]
    peak = plan["peak_bytes_per_device"] / GIB
    return f"{peak:17.1f} {times['mfu']:6.1%} {row['batch'] / times['step']:8.2f}"


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    """Powers of two for model and sequence, the rest for data."""
    powers = [2**i for i in range(MOST_SPLIT.bit_length()) if 2**i <= MOST_SPLIT]
    return [
        (devices // (model * sequence), model, sequence)
        for model in powers
        for sequence in powers
        if model * sequence <= MOST_SPLIT and devices % (model * sequence) == 0
    ]
