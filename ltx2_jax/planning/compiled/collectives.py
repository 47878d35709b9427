"""The collectives of a compiled program: what moves between devices, over which axes of the mesh.

Bytes are those of the result on one device. A reduce-scatter can stand in the program as what it
is, or, on TPU, as a fusion of an all-reduce of which each device keeps its share; both count as a
reduce-scatter. An asynchronous collective runs beside the instructions up to where it is awaited.

Between slices a TPU program has no collective, but hands what it sends to a runtime on its host,
and receives from it what all slices together have made of that. This counts as the collective that
the runtime is asked for, over the axis of the slices; its bytes are what the device hands over.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ltx2_jax.planning.compiled.execution import Step, in_layer_loop, steps
from ltx2_jax.planning.compiled.hlo import Computation, Instruction, Module
from ltx2_jax.planning.compiled.traffic import COLLECTIVES, counted_collectives, finished, share_of
from ltx2_jax.sharding import SLICE

OP_NAMES = 4  # that a row of the table keeps
BETWEEN = (SLICE,)  # the axes of what crosses the data-center network
_RUNTIME = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
Groups = list[list[int]]
# mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
_NAMED_GROUPS = r", replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{(.*?)\}"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices, run `times` times inside `loops`.

    `axes` are the mesh axes that a group of `group` devices spans; if `group` is less than their
    product, it spans a part of them. `members` are the devices of one group, as positions in the
    flattened mesh.
    """

    kind: str
    dtype: str
    bytes: int
    times: int
    loops: tuple[str, ...]
    axes: tuple[str, ...]
    group: int
    members: tuple[int, ...]
    asynchronous: bool
    op_name: str


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a program on a mesh of these axis sizes, in the order of execution."""
    return [c for step in steps(module) for c in collectives_of(module, step, mesh)]


def collectives_of(module: Module, step: Step, mesh: Mapping[str, int]) -> list[Collective]:
    """Those that one instruction starts: itself, or those fused into it."""
    instruction, found = step.instruction, []
    if instruction.opcode == "send" and _RUNTIME in instruction.attributes:
        return [_between_slices(step, mesh)]
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        found.append((step.computation, instruction, instruction.opcode.endswith("-start")))
    for computation, inner in counted_collectives(module, instruction):
        spread = "chain_id" in (inner.attribute("frontend_attributes") or "")
        found.append((computation, inner, spread))
    return [_collective(step, *one, mesh) for one in found]


def _collective(
    step: Step,
    computation: Computation,
    instruction: Instruction,
    hidden: bool,
    mesh: Mapping[str, int],
) -> Collective:
    share = share_of(computation, instruction)
    result = share or finished(computation, instruction)
    arrays = [shape for shape in result.shapes if shape.dtype not in ("token", "opaque")]
    groups = groups_of(instruction, math.prod(mesh.values()))
    members = tuple(max(groups, key=len))
    return Collective(
        kind="reduce-scatter" if share else instruction.opcode.removesuffix("-start"),
        dtype=arrays[0].dtype,
        bytes=sum(shape.bytes for shape in arrays),
        times=step.times,
        loops=step.loops,
        axes=axes_of(groups, mesh),
        group=len(members),
        members=members,
        asynchronous=step.asynchronous or hidden,
        op_name=instruction.op_name or step.instruction.op_name,
    )


def _between_slices(step: Step, mesh: Mapping[str, int]) -> Collective:
    """Of a `send` to the runtime of the data-center network."""
    instruction = step.instruction
    (sent,) = (operand.shapes[0] for operand in step.computation.operands(instruction)[:1])
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    slices = mesh.get(SLICE, 1)
    return Collective(
        kind=kind[1].lower().replace("_", "-") if kind else "collective-permute",
        dtype=sent.dtype,
        bytes=sent.bytes,
        times=step.times,
        loops=step.loops,
        axes=BETWEEN,
        group=slices,
        members=tuple(range(0, math.prod(mesh.values()), math.prod(mesh.values()) // slices)),
        asynchronous=True,
        op_name=instruction.op_name,
    )


# ----------------------------------------------------------------------------------------- groups


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ; positions in the flattened mesh."""
    sizes = tuple(mesh.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))  # [axes, devices]
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, yes in zip(mesh, differ, strict=True) if yes)


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The groups of devices that talk to each other, as positions in the flattened mesh.

    Of a collective-permute the groups are the pairs (source, target).
    """
    text = instruction.attributes
    pairs = re.search(r", source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", text)
    if pairs:
        return _lists(pairs[1]) or [[0]]
    named = re.search(_NAMED_GROUPS, text)
    if named:
        return _mesh_groups(*named.groups())
    iota = re.search(r", replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota[1]).tolist()
    listed = re.search(r", replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    return (_lists(listed[1]) if listed else []) or [list(range(devices))]


def _lists(text: str) -> Groups:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """ "[4,2]<=[2,4]T(1,0)": 0..7 as [2, 4], transposed, as [4, 2]."""
    numbers = r"[\d,]+"
    found = re.fullmatch(rf"\[({numbers})\](?:<=\[({numbers})\])?(?:T\(({numbers})\))?", text)
    shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in
                            found.groups())  # fmt: skip
    source = source or shape
    places = np.arange(np.prod(source)).reshape(source)
    return (places.transpose(order) if order else places).reshape(shape)


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    """Groups along named axes of a mesh, or along parts of them: 'a':(2)4 is the middle of 16."""
    sizes = {name: int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", axes)}
    ids = np.arange(np.prod(list(sizes.values())))
    if device_ids and device_ids.startswith("["):
        ids = _iota(device_ids).ravel()
    elif device_ids:
        ids = np.array([int(n) for n in device_ids.split(",")])
    parts = {name: [] for name in sizes}  # of each axis: (first, size) of what is grouped of it
    for name, before, size in re.findall(r"('[^']*'|[^,:]+)(?::\((\d+)\)(\d+))?(?:,|$)", grouped):
        parts[name].append((int(before or 1), int(size or sizes[name])))
    shape, chosen = [], []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(parts[name]):
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    places = ids.reshape(shape).transpose([*rest, *chosen])
    return places.reshape(-1, int(np.prod([shape[axis] for axis in chosen]))).tolist()


def table(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, dtype, axes and place as one row each, most bytes first.

    "bytes" are of all executions together; "in_layers" inside a loop over the layers; "depth" the
    number of loops around; "op_names" where in the traced function the first few come from.
    """
    rows: dict[str, dict[str, Any]] = {}
    for c in found:
        key = {
            "kind": c.kind,
            "dtype": c.dtype,
            "axes": list(c.axes),
            "group": c.group,
            "depth": len(c.loops),
            "in_layers": in_layer_loop(c.loops),
            "asynchronous": c.asynchronous,
        }
        row = rows.setdefault(str(key), {**key, "times": 0, "bytes": 0, "op_names": []})
        row["times"] += c.times
        row["bytes"] += c.times * c.bytes
        if c.op_name and c.op_name not in row["op_names"] and len(row["op_names"]) < OP_NAMES:
            row["op_names"].append(c.op_name)
    return sorted(rows.values(), key=lambda row: -row["bytes"])
