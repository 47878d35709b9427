"""What a compiled program does on one device: the facts behind `python -m ltx2_jax.plan`.

FLOPs of matrix products and kernels, traffic with HBM, collectives by mesh axis, kernels, copies of
weights, and from them the time of a step, all from the text of the program that the compiler made,
every loop counted as often as it runs. `execution.py`, `traffic.py`, `collectives.py` and
`roofline.py` say what is counted and what is not.
"""

import dataclasses
import re
from typing import Any

import jax

from ltx2_jax import chips, units
from ltx2_jax.chips import Chip
from ltx2_jax.planning.compiled import roofline
from ltx2_jax.planning.compiled.collectives import by_kind, collectives, table
from ltx2_jax.planning.compiled.execution import (
    Step,
    flops,
    head_width,
    in_layer_loop,
    is_kernel,
    loops,
    steps,
)
from ltx2_jax.planning.compiled.hlo import HBM, Computation, Instruction, Module, parse
from ltx2_jax.planning.compiled.interconnect import Network
from ltx2_jax.planning.compiled.traffic import finished, hbm_bytes, host_bytes

LARGE = 2**24  # bytes of a copied weight that is worth a line


def program_facts(
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh,
    *,
    model_flops: float | None = None,
    chip: Chip | None = None,
) -> dict[str, Any]:
    """Facts of one execution on one device of `mesh`; everything in it is JSON.

    `model_flops` is what the model needs for one execution on all devices together, for the MFU.
    `chip` is that of the mesh's devices unless given; a CPU has none, and its facts no "roofline".
    """
    module, axes = parse(compiled.as_text()), dict(mesh.shape)
    devices = list(mesh.devices.flat)
    chip = chip or chips.of_kind(devices[0].device_kind)
    found = collectives(module, axes)
    facts = {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": axes,
        **module_facts(module),
        "collectives": table(found),
        "collective_counts": by_kind(found),
    }
    if chip is not None:
        network = Network.of(devices, chip)
        facts["chip"] = chip.name
        facts["roofline"] = roofline.roofline(module, axes, network, model_flops=model_flops)
    return facts


def module_facts(module: Module) -> dict[str, Any]:
    """The facts that need no mesh: FLOPs, bytes, loops, kernels, copies of weights."""
    names = ("flops", "kernel_flops", "hbm_read_bytes", "hbm_written_bytes", "host_traffic_bytes")
    totals = dict.fromkeys((*names, "flops_in_layers", "hbm_bytes_in_layers"), 0.0)
    kernels: dict[tuple[str, int | None, bool], dict[str, Any]] = {}
    copies: dict[str, dict[str, Any]] = {}
    for step in steps(module):
        instruction, computation = step.instruction, step.computation
        work = step.times * flops(module, computation, instruction)
        read, written = hbm_bytes(module, computation, instruction)
        totals["flops"] += work
        totals["hbm_read_bytes"] += step.times * read
        totals["hbm_written_bytes"] += step.times * written
        totals["host_traffic_bytes"] += step.times * host_bytes(module, computation, instruction)
        in_layers = in_layer_loop(step.loops)
        if in_layers:
            totals["flops_in_layers"] += work
            totals["hbm_bytes_in_layers"] += step.times * (read + written)
        if is_kernel(instruction):
            totals["kernel_flops"] += work
            _count_kernel(kernels, step, work, in_layers)
        if not step.loops:
            _note_copy(copies, module, computation, instruction)
    return {
        **totals,
        "loops": [dataclasses.asdict(loop) for loop in loops(module)],
        "kernels": list(kernels.values()),
        "weight_copies": sorted(copies.values(), key=lambda copy: -copy["bytes"]),
    }


def _count_kernel(
    kernels: dict[tuple[str, int | None, bool], dict[str, Any]],
    step: Step,
    work: float,
    in_layers: bool,
) -> None:
    """Adds a kernel's runs to those of the same name, head width and place."""
    name = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", step.instruction.name)
    width = head_width(step.computation, step.instruction)
    row = kernels.setdefault(
        (name, width, in_layers),
        {"name": name, "head_width": width, "in_layers": in_layers, "times": 0, "flops": 0.0},
    )
    row["times"] += step.times
    row["flops"] += work


# ------------------------------------------------------------------------------ copies of weights

_MOVES = ("bitcast", "copy", "convert", "transpose", "reshape", "slice", "pad")


def _note_copy(
    copies: dict[str, dict[str, Any]],
    module: Module,
    computation: Computation,
    instruction: Instruction,
) -> None:
    """Notes a large array in HBM that is an argument once more, in another layout or type.

    XLA makes such copies of stacked weights outside the loop over the layers, and they stay for as
    long as it runs: a layout that the loop does not like, or a cast that could be done per layer.
    """
    if computation is not module.entry or not _only_moves(module, instruction):
        return
    operands = computation.operands(instruction)
    source = computation.source(operands[0], (*_MOVES, "get-tuple-element")) if operands else None
    result = finished(computation, instruction).shapes
    size = sum(shape.padded_bytes for shape in result if shape.space == HBM)
    if source is None or source.opcode != "parameter" or size < LARGE:
        return
    name, before = source.op_name or source.name, source.shapes[0]
    kind = "layout" if result[0].layout != before.layout else "copy"
    kind = kind if result[0].dtype == before.dtype else f"to {result[0].dtype}"
    row = copies.setdefault(f"{name} {kind}", {"parameter": name, "kind": kind, "bytes": 0})
    row["bytes"] += size


def _only_moves(module: Module, instruction: Instruction) -> bool:
    """Whether the result holds the operand's elements and no others."""
    opcode = instruction.opcode
    if opcode in ("copy", "convert", "transpose", "copy-start"):
        return True
    called = module.called(instruction)
    if not called or not (opcode == "fusion" or opcode.endswith("-start")):
        return False
    return all(
        i.opcode in ("parameter", "copy-done", *_MOVES) or i.opcode.endswith("-done")
        or _only_moves(module, i)
        for i in called[0].instructions
    )  # fmt: skip


# ------------------------------------------------------------------------------------ for a person


def describe(facts: dict[str, Any], execution: str) -> str:
    """`program_facts` as lines; `execution` says what takes the time told, such as "a step"."""
    lines = [
        f"  as compiled    {units.flops(facts['flops'])}FLOP per device, "
        f"{units.flops(facts['kernel_flops'])} of them in kernels{_in_layers(facts)}",
        f"  HBM traffic    {facts['hbm_read_bytes'] / 2**30:,.1f} GiB read, "
        f"{facts['hbm_written_bytes'] / 2**30:,.1f} written per device",
        *(
            [f"  host traffic   {facts['host_traffic_bytes'] / 2**30:,.1f} GiB per device"]
            if facts["host_traffic_bytes"]
            else []
        ),
        *_kernel_lines(facts["kernels"]),
        *_collective_lines(facts["collectives"]),
        *_copy_lines(facts["weight_copies"]),
        *(
            f"  unknown loop   {loop['name']}: its rounds are not in the program, counted once"
            for loop in facts["loops"]
            if loop["trips"] is None
        ),
    ]
    for rates, times in facts.get("roofline", {}).items():
        lines.append(_roofline_line(rates, times, execution))
    return "\n".join(lines)


def _in_layers(facts: dict[str, Any]) -> str:
    if not facts["flops_in_layers"]:
        return ""
    return f"; {facts['flops_in_layers'] / facts['flops']:.1%} in the layers"


def _kernel_lines(kernels: list[dict[str, Any]], most: int = 4) -> list[str]:
    kernels = sorted(kernels, key=lambda k: -k["flops"])
    rest = sum(k["times"] for k in kernels[most:])
    return [
        f"  kernel         {k['times']:,} x {k['name']}"
        + (f", heads of {k['head_width']}" if k["head_width"] else "")
        + (f", {units.flops(k['flops'])}" if k["flops"] else ", FLOPs not said")
        for k in kernels[:most]
    ] + ([f"  kernel         {rest:,} x smaller ones"] if rest else [])


def _collective_lines(rows: list[dict[str, Any]], most: int = 8) -> list[str]:
    if not rows:
        return ["  collectives    none"]
    lines = ["  collectives    times  GiB result  over (devices), kind"]
    for row in rows[:most]:
        place = "in the layers" if row["in_layers"] else ""
        hidden = "asynchronous" if row["asynchronous"] else ""
        notes = ", ".join(note for note in (row["dtype"], place, hidden) if note)
        lines.append(
            f"  {row['times']:20,} {row['bytes'] / 2**30:11.3f}  "
            f"{' x '.join(row['axes']) or '-'} ({row['group']}), {row['kind']}: {notes}"
        )
    if rest := rows[most:]:
        times, size = (sum(row[name] for row in rest) for name in ("times", "bytes"))
        lines.append(f"  {times:20,} {size / 2**30:11.3f}  of {len(rest)} more kinds")
    return lines


def _copy_lines(copies: list[dict[str, Any]], most: int = 3) -> list[str]:
    if not copies:
        return []
    total = sum(copy["bytes"] for copy in copies) / 2**30
    named = ", ".join(f"{_leaf(c['parameter'])} ({c['kind']})" for c in copies[:most])
    more = f" and {len(copies) - most} more" if len(copies) > most else ""
    return [f"  weight copies  {total:.2f} GiB outside the loops: {named}{more}"]


def _leaf(parameter: str) -> str:
    """The last three names of a path such as "state['params']['blocks']['to_q']['weight']"."""
    return "/".join(re.findall(r"\['(\w+)'\]", parameter)[-3:]) or parameter


def _roofline_line(rates: str, times: dict[str, Any], execution: str) -> str:
    mfu = f", {times['mfu']:.1%} MFU" if "mfu" in times else ""
    names = ("busy", "compute", "hbm", "waited", "stalled")
    busy, compute, hbm, waited, stalled = (_seconds(times[name]) for name in names)
    return (
        f"  {rates:<14} {_seconds(times['step'])} {execution}{mfu}: busy {busy} (FLOPs {compute}, "
        f"HBM {hbm}), waits {waited} for links, {stalled} for copies"
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
