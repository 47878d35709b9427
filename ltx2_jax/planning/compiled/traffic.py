"""Bytes that a compiled program moves between HBM and the chip, instruction by instruction.

Counted: what an executed instruction reads of its operands and writes of its results in HBM, tile
padding included. Of a stacked operand only the slice that is read counts, of an update in place
only the update. Buffers in VMEM cost nothing; a copy into VMEM is one read. Not counted: what a
kernel or a large matrix product reads again because its tiles do not fit on the chip (a kernel's
own estimate is taken where it is higher), spills, and the passes of a collective beyond one read
and one write. So this is a lower bound of the traffic.
"""

from collections.abc import Iterable

from ltx2_jax.planning.compiled.execution import BOOKKEEPING
from ltx2_jax.planning.compiled.hlo import HBM, HOST, Computation, Instruction, Module, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "collective-permute",
)
# Nothing moves: names, places, and the calls whose bodies are counted by themselves.
_FREE = (
    "add-dependency",
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
_SLICES = ("dynamic-slice", "gather", "slice")
_MOVES = ("MoveToDevice", "MoveToHost")


def hbm_bytes(
    module: Module, computation: Computation, instruction: Instruction, space: int = HBM
) -> tuple[float, float]:
    """Bytes (read, written) of HBM, or of another memory space, by one run of an instruction."""
    operands = computation.operands(instruction)
    opcode = instruction.opcode.removesuffix("-start")
    if _is_free(instruction) or (opcode != instruction.opcode and module.called(instruction)):
        return 0.0, 0.0
    if opcode == "fusion":
        return _fusion(module, instruction, operands, space)
    results = finished(computation, instruction).shapes
    if opcode == "send":  # its result is its operand
        results = ()
    if opcode == "custom-call":
        return _custom_call(instruction, operands, space)
    if opcode in _SLICES:
        read = sum(s.padded_bytes for s in results) if _lies_in(operands[0], space) else 0
        return float(read), _in_space(results, space)
    if opcode == "dynamic-update-slice":
        update = operands[1].shapes[0].padded_bytes
        written = update if _lies_in(operands[0], space) else 0
        return _in_space(operands[1].shapes, space), float(written)
    read = sum(_in_space(operand.shapes, space) for operand in operands)
    return read, _in_space(results, space)


def host_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one run of an instruction moves between the chip and its host's memory."""
    return sum(hbm_bytes(module, computation, instruction, HOST))


def finished(computation: Computation, start: Instruction) -> Instruction:
    """The `-done` of a `-start`, whose shape is the result; another instruction is its own.

    Some asynchronous calls have an `-update` between the two.
    """
    instruction = start
    while instruction.opcode.endswith(("-start", "-update")):
        ends = [
            user
            for user in computation.users[instruction.name]
            if user.opcode.endswith(("-update", "-done"))
        ]
        if not ends:
            return start
        instruction = ends[0]
    return instruction


def counted_collectives(
    module: Module, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    """The collectives inside a fusion that it starts, each with its computation.

    A collective spread over the fusions that hide it stands in all of them; the first starts it.
    """
    found = []
    for inner in module.called(instruction) if instruction.opcode == "fusion" else ():
        starts = any("AsyncCollectiveStart" in i.attributes for i in inner.instructions)
        for candidate in inner.instructions:
            spread = "chain_id" in (candidate.attribute("frontend_attributes") or "")
            if candidate.opcode in COLLECTIVES and (starts or not spread):
                found.append((inner, candidate))
            found += counted_collectives(module, candidate)
    return found


def share_of(computation: Computation, instruction: Instruction) -> Instruction | None:
    """The slice of an all-reduce's result that the device keeps, if it keeps no more than that.

    So a fusion on TPU scatters what it reduces: every device takes the slice of its own number.
    """
    users = computation.users[instruction.name] if instruction.opcode == "all-reduce" else []
    while len(users) == 1 and users[0].opcode in ("bitcast", "copy", "reshape", "transpose"):
        users = computation.users[users[0].name]
    return users[0] if len(users) == 1 and users[0].opcode == "dynamic-slice" else None


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        return target in BOOKKEEPING and target not in _MOVES
    return instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update"))


def _in_space(shapes: Iterable[Shape], space: int) -> float:
    return float(sum(shape.padded_bytes for shape in shapes if shape.space == space))


def _lies_in(instruction: Instruction, space: int) -> bool:
    return any(shape.space == space for shape in instruction.shapes)


def _custom_call(
    instruction: Instruction, operands: list[Instruction], space: int
) -> tuple[float, float]:
    read = sum(_in_space(x.shapes, space) for x in operands)
    written = _in_space(instruction.shapes, space)
    estimate = instruction.config.get("custom_call_config", {}).get("cost_estimate", {})
    if space == HBM:
        read = max(read, float(estimate.get("bytes_accessed", 0)) - written)
    return read, written


# ---------------------------------------------------------------------------------------- fusions


def _fusion(
    module: Module, fusion: Instruction, operands: list[Instruction], space: int
) -> tuple[float, float]:
    inner = module.called(fusion)[0]
    read = written = 0.0
    for operand, parameter in zip(operands, inner.parameters, strict=True):
        whole = _in_space(operand.shapes, space)
        read += _read(module, inner, parameter.name, whole) if whole else 0.0
    sizes = _written(module, inner)
    if len(sizes) != len(fusion.shapes):
        sizes = [float(shape.padded_bytes) for shape in fusion.shapes]
    for shape, size in zip(fusion.shapes, sizes, strict=True):
        written += size if shape.space == space else 0.0
    for computation, collective in counted_collectives(module, fusion):
        sent = computation.operands(collective)
        read += sum(_in_space(x.shapes, space) for x in sent if x.opcode == "parameter")
        kept = share_of(computation, collective) or collective
        written += _in_space(fusion.shapes if kept.is_root else kept.shapes, space)
    return read, written


def _read(module: Module, computation: Computation, name: str, whole: float) -> float:
    """Bytes of `name`, which has `whole`, that the instructions of a fused computation read."""
    read = 0.0
    for user in computation.users[name]:
        first = user.operands[0] == name and name not in user.operands[1:]
        if _reshapes(module, user) and not user.is_root:
            read += _read(module, computation, user.name, whole)
        elif user.opcode in _SLICES and first:
            read += sum(shape.padded_bytes for shape in user.shapes)
        elif user.opcode == "fusion":
            inner = module.called(user)[0]
            for operand, parameter in zip(user.operands, inner.parameters, strict=True):
                read += _read(module, inner, parameter.name, whole) if operand == name else 0.0
        elif not (
            (user.opcode == "dynamic-update-slice" and first)  # in place
            or (user.opcode == "tuple" and user.is_root)  # passed through
            or user.opcode in COLLECTIVES  # counted by themselves
            or _is_free(user)
        ):
            return whole
    return min(read, whole)


def _written(module: Module, computation: Computation) -> list[float]:
    """Bytes that a fused computation writes of each array of its result."""
    root = computation.root
    leaves = computation.operands(root) if root.opcode == "tuple" else [root]
    sizes: list[float] = []
    for leaf in leaves:
        value = leaf
        while _reshapes(module, value) and computation.operands(value)[0].opcode != "parameter":
            value = computation.operands(value)[0]
        if value.opcode == "dynamic-update-slice":
            sizes.append(float(computation.operands(value)[1].shapes[0].padded_bytes))
        elif value.opcode == "fusion":
            inner = _written(module, module.called(value)[0])
            whole = [float(shape.padded_bytes) for shape in leaf.shapes]
            sizes += inner if len(inner) == len(whole) else whole
        elif value.opcode == "parameter" or value.opcode in COLLECTIVES or _is_free(value):
            sizes += [0.0] * len(leaf.shapes)
        elif any(share_of(computation, i) is value for i in computation.instructions):
            sizes.append(0.0)  # counted with the collective
        else:
            sizes += [float(shape.padded_bytes) for shape in leaf.shapes]
    return sizes


def _reshapes(module: Module, instruction: Instruction) -> bool:
    """Whether it gives the elements of its one operand another place or type.

    Inside a fusion that costs no traffic: only what is read of the result is read of the operand.
    """
    if instruction.opcode in ("bitcast", "convert", "copy"):
        return True
    if instruction.opcode != "fusion" or len(instruction.operands) != 1:
        return False
    inner = module.called(instruction)[0].instructions
    return all(i.opcode == "parameter" or _reshapes(module, i) for i in inner)
