"""What a compiled program does on one device: the facts behind `python -m ltx2_jax.plan`.

FLOPs of matrix products and kernels, traffic with HBM, collectives by mesh axis, kernels, copies of
weights, and from them the time of a step, all from the text of the program that the compiler made,
every loop counted as often as it runs. `execution.py`, `traffic.py`, `collectives.py` and
`roofline.py` say what is counted and what is not.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax import chips, units
from ltx2_jax.chips import Chip
from ltx2_jax.planning.compiled import roofline
from ltx2_jax.planning.compiled.collectives import BETWEEN, Collective, collectives, table
from ltx2_jax.planning.compiled.execution import (
    flops,
    head_width,
    in_layer_loop,
    is_kernel,
    loops,
    steps,
)
from ltx2_jax.planning.compiled.hlo import HBM, Computation, Instruction, Module, parse
from ltx2_jax.planning.compiled.interconnect import EFFICIENCY, Network, network_bytes, seconds
from ltx2_jax.planning.compiled.traffic import finished, hbm_bytes, host_bytes
from ltx2_jax.sharding import SLICE

GIB = 2**30
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
    moved = collectives(module, axes)
    rows, counts = table(moved), collections.Counter()
    for row in rows:
        counts[row["kind"]] += row["times"]
    facts = {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": axes,
        **module_facts(module),
        "collectives": rows,
        "collective_counts": counts,
    }
    if chip is not None:
        network = Network.of(devices, chip)
        facts["chip"] = chip.name
        if SLICE in axes:
            facts["between_slices"] = between_slices(moved, network)
        facts["roofline"] = roofline.roofline(module, axes, network, model_flops=model_flops)
    return facts


def between_slices(moved: Sequence[Collective], network: Network) -> dict[str, Any]:
    """What a device sends over the data-center network in one execution, by the table of chips.

    "forward" and "backward" are the bytes in the loops over the layers, by the pass that a loop is
    of: in the forward pass, what crosses would hold up every layer.
    """
    crossing = [c for c in moved if c.axes == BETWEEN]
    sent = {"bytes": 0.0, "forward": 0.0, "backward": 0.0}
    for c in crossing:
        backward = any("transpose(" in loop for loop in c.loops)
        sent["bytes"] += c.times * network_bytes(c)
        if in_layer_loop(c.loops):
            sent["backward" if backward else "forward"] += c.times * network_bytes(c)
    return {
        "times": sum(c.times for c in crossing),
        **sent,
        "seconds": sum(c.times * seconds(c, network, ideal=False) for c in crossing),
        "assumed_bytes_per_second": network.chip.device_network * EFFICIENCY,
    }


def module_facts(module: Module) -> dict[str, Any]:
    """The facts that need no mesh: FLOPs, bytes, loops, kernels, copies of weights."""
    names = ("flops", "kernel_flops", "hbm_read_bytes", "hbm_written_bytes", "host_traffic_bytes")
    totals = dict.fromkeys((*names, "flops_in_layers", "hbm_bytes_in_layers"), 0.0)
    kernels: dict[tuple[str, int | None, bool], dict[str, Any]] = {}
    copies: dict[str, dict[str, Any]] = {}
    for step in steps(module):
        at = step.computation, step.instruction
        work, in_layers = step.times * flops(module, *at), in_layer_loop(step.loops)
        read, written = (step.times * moved for moved in hbm_bytes(module, *at))
        totals["flops"] += work
        totals["hbm_read_bytes"] += read
        totals["hbm_written_bytes"] += written
        totals["host_traffic_bytes"] += step.times * host_bytes(module, *at)
        if in_layers:
            totals["flops_in_layers"] += work
            totals["hbm_bytes_in_layers"] += read + written
        if is_kernel(step.instruction):
            totals["kernel_flops"] += work
            name = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", step.instruction.name)
            key = {"name": name, "head_width": head_width(*at), "in_layers": in_layers}
            row = kernels.setdefault(tuple(key.values()), {**key, "times": 0, "flops": 0.0})
            row["times"] += step.times
            row["flops"] += work
        if not step.loops:
            _note_copy(copies, module, *at)
    return {
        **totals,
        "loops": [dataclasses.asdict(loop) for loop in loops(module)],
        "kernels": list(kernels.values()),
        "weight_copies": sorted(copies.values(), key=lambda copy: -copy["bytes"]),
    }


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
    """The facts as lines; `execution` names one of the program, such as "a step"."""
    in_layers = facts["flops_in_layers"] / (facts["flops"] or 1)
    host = facts["host_traffic_bytes"] / GIB
    lines = [
        f"  as compiled    {units.flops(facts['flops'])}FLOP per device, "
        f"{units.flops(facts['kernel_flops'])} of them in kernels"
        + (f"; {in_layers:.1%} in the layers" if in_layers else ""),
        f"  HBM traffic    {facts['hbm_read_bytes'] / GIB:,.1f} GiB read, "
        f"{facts['hbm_written_bytes'] / GIB:,.1f} written per device",
        *([f"  host traffic   {host:,.1f} GiB per device"] if host else []),
        *_kernel_lines(facts["kernels"]),
        *_collective_lines(facts["collectives"]),
        *_between_lines(facts),
        *_copy_lines(facts["weight_copies"]),
        *(
            f"  unknown loop   {loop['name']}: its rounds are not in the program, counted once"
            for loop in facts["loops"]
            if loop["trips"] is None
        ),
        *(
            _roofline_line(rates, times, execution)
            for rates, times in facts.get("roofline", {}).items()
        ),
    ]
    return "\n".join(lines)


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
            f"  {row['times']:20,} {row['bytes'] / GIB:11.3f}  "
            f"{' x '.join(row['axes']) or '-'} ({row['group']}), {row['kind']}: {notes}"
        )
    if rest := rows[most:]:
        times, size = (sum(row[name] for row in rest) for name in ("times", "bytes"))
        lines.append(f"  {times:20,} {size / GIB:11.3f}  of {len(rest)} more kinds")
    return lines


def _between_lines(facts: dict[str, Any]) -> list[str]:
    if "between_slices" not in facts:
        return []
    sent = facts["between_slices"]
    forward, backward = (sent[name] / GIB for name in ("forward", "backward"))
    return [
        f"  between slices {sent['bytes'] / GIB:.3f} GiB sent per device in {sent['times']:,} "
        f"parts, {_seconds(sent['seconds'])} at an assumed "
        f"{sent['assumed_bytes_per_second'] / 1e9:.3g} GB/s",
        f"                 {forward:.3f} GiB of it in the layers' forward pass, {backward:.3f} in "
        "their backward pass",
    ]


def _copy_lines(copies: list[dict[str, Any]], most: int = 3) -> list[str]:
    if not copies:
        return []
    total = sum(copy["bytes"] for copy in copies) / GIB
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
