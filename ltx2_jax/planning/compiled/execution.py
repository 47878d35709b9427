"""What a compiled program runs and how often: its loops multiplied out, its kernels' FLOPs.

Followed from the entry: bodies of `while` loops times their trip count, calls, asynchronous calls,
and of a conditional the branch with the most FLOPs. A fusion is one instruction here.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from ltx2_jax.planning.compiled.hlo import Computation, Instruction, Module, Shape

# Custom calls by which the compiler talks to itself; every other target is a kernel.
BOOKKEEPING = (
    "AllocateBuffer",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "MoveToDevice",
    "MoveToHost",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
    "Sharding",
    "SliceToDynamic",
    "annotate_device_placement",
)
# jax's splash attention kernels carry no cost estimate. They are matrix products [queries, keys]
# or [., head width], two in the forward pass, and in the backward passes the scores again.
_SPLASH_PRODUCTS = (("fwd", 2), ("dq", 3), ("dkv", 4))
_FUSED_DKV_PRODUCTS = 5  # with the queries' gradient in the same kernel
_SAME = ("bitcast", "copy", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction of a computation that runs `times` times, inside `loops`."""

    instruction: Instruction
    computation: Computation
    times: int = 1
    loops: tuple[str, ...] = ()  # where in the traced function the loops around it come from
    asynchronous: bool = False  # on another unit of the chip, beside the instructions around it


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`: entered `times` times, each for `trips` rounds, or None if that is not known."""

    name: str
    times: int
    trips: int | None
    depth: int  # of the loops around it


def steps(module: Module) -> Iterator[Step]:
    """Every instruction that the program runs, loops and calls before what is inside them."""
    yield from _run(module, module.entry, Step(module.entry.root, module.entry))


def loops(module: Module) -> list[Loop]:
    """The program's loops, outer ones before inner ones."""
    return [
        Loop(
            _name(module, step.instruction),
            step.times,
            trip_count(module, step.computation, step.instruction),
            len(step.loops),
        )
        for step in steps(module)
        if step.instruction.opcode == "while"
    ]


def _run(module: Module, computation: Computation, around: Step) -> Iterator[Step]:
    """The steps of a computation that runs as `around` does."""
    for instruction in computation.instructions:
        step = dataclasses.replace(around, instruction=instruction, computation=computation)
        yield step
        if instruction.opcode in ("while", "call", "conditional"):
            body, rounds = runs(module, computation, instruction)
            loop = (_name(module, instruction),) if instruction.opcode == "while" else ()
            times = step.times * (rounds or 1)
            yield from _run(
                module, body, dataclasses.replace(step, times=times, loops=step.loops + loop)
            )
        elif instruction.opcode.endswith("-start") and "fusion" not in instruction.opcode:
            for body in module.called(instruction)[:1]:
                yield from _run(module, body, dataclasses.replace(step, asynchronous=True))


def runs(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Computation, int | None]:
    """What a `while`, call or conditional runs, and how many rounds of it; None if not known.

    Of a conditional that is the branch with the most FLOPs.
    """
    if instruction.opcode == "while":
        return _body(module, instruction), trip_count(module, computation, instruction)
    called = module.called(instruction)
    return max(called, key=lambda branch: computation_flops(module, branch)), 1


def _body(module: Module, loop: Instruction) -> Computation:
    return module.computations[loop.attribute("body").lstrip("%")]


def _name(module: Module, loop: Instruction) -> str:
    """Where a loop comes from; of one that XLA made anew, as around offloading, its body tells."""
    names = (i.op_name for i in _body(module, loop).instructions)
    found = (re.match(r"(.*?/while)/body/", name) for name in names)
    return loop.op_name or next((match[1] for match in found if match), loop.name)


def in_layer_loop(loops: tuple[str, ...]) -> bool:
    """Whether one of these loops is over the layers of the model, by the name that it gives them.

    XLA takes the first or the last round out of a loop where that lets copies run ahead, and makes
    no loop of a single round; such rounds count as outside.
    """
    return any(re.search(r"\blayers\b", loop) for loop in loops)


# ------------------------------------------------------------------------------------ trip counts


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Rounds of a `while` in `computation`, or None.

    The CPU compiler writes the count down. The TPU's does not: there it comes from a condition
    `counter < constant`, a counter that starts at a constant, and a body that adds one to it.
    """
    known = loop.config.get("known_trip_count")
    if known:
        return int(known["n"])
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    test, inputs = condition.source(condition.root, _SAME), []
    if test.opcode == "fusion":  # the comparison alone, its operands passed in
        inputs = condition.operands(test)
        condition = module.called(test)[0]
        test = condition.root
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, limit = (_outside(side, inputs) for side in condition.operands(test))
    end, index = _constant(limit), counter.attribute("index")
    if end is None or index is None:
        return None
    start, step = _start(computation, loop, int(index)), _step(module, loop, int(index))
    if start is None or not step or step < 0:
        return None
    return max(0, -(-(end - start) // step))


def _outside(operand: Instruction, inputs: list[Instruction]) -> Instruction:
    """An operand in a fused computation, as the instruction that the fusion is given for it."""
    return inputs[int(operand.literal)] if operand.opcode == "parameter" and inputs else operand


def _start(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant at which counter number `index` of a loop starts."""
    values = computation.source(computation.operands(loop)[0], ("copy", "bitcast"))
    if values.opcode != "tuple":
        return None
    return _constant(computation.source(computation.operands(values)[index], ("copy", "bitcast")))


def _step(module: Module, loop: Instruction, index: int) -> int | None:
    """The constant that a round adds to counter number `index`, in one addition or several."""
    body = _body(module, loop)
    if body.root.opcode != "tuple":
        return None
    value, step = body.operands(body.root)[index], 0
    while True:
        value = body.source(value, ("copy", "bitcast"))
        if value.opcode == "get-tuple-element":
            return step if int(value.attribute("index")) == index else None
        sides = body.operands(value)
        if value.opcode == "fusion":
            inner = module.called(value)[0]
            sides = [_outside(side, sides) for side in inner.operands(inner.root)]
            value = inner.root
        constants = [side for side in sides if _constant(side) is not None]
        if value.opcode != "add" or len(sides) != 2 or len(constants) != 1:
            return None
        step += _constant(constants[0])
        value = sides[1 - sides.index(constants[0])]


def _constant(instruction: Instruction) -> int | None:
    integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if integer else None


# ------------------------------------------------------------------------------------------- FLOPs


Rate = Callable[[str], float]  # of a dtype: its products in the time of one of bfloat16


def flops(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    rate: Rate = lambda dtype: 1.0,
) -> float:
    """FLOPs of the matrix products and kernels of one run of an instruction, fused ones included.

    A multiply-accumulate is 2 FLOPs; of a convolution only products with elements count, not those
    with padding or between dilated ones, as XLA's own cost analysis counts. Elementwise work is
    bandwidth, not FLOPs. What a `while` or a call runs is not part of it. Given the `rate` of
    dtypes, they are those of bfloat16 that take as long.
    """
    opcode = instruction.opcode
    if opcode in ("dot", "convolution"):
        sides = {operand.shapes[0].dtype for operand in computation.operands(instruction)[:2]}
        return _product(computation, instruction) / min(map(rate, sides))
    if opcode == "custom-call":
        return kernel_flops(computation, instruction)
    if opcode == "fusion":
        return sum(computation_flops(module, inner, rate) for inner in module.called(instruction))
    return 0.0


def _product(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        left = computation.operands(instruction)[0].shapes[0]
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        sizes = (left.dims[int(axis)] for axis in contracted)
        return 2.0 * instruction.shapes[0].elements * math.prod(sizes)
    return _convolution(computation, instruction)


def computation_flops(
    module: Module, computation: Computation, rate: Rate = lambda dtype: 1.0
) -> float:
    """FLOPs of one run of every instruction of a computation; `rate` as in `flops`."""
    return sum(flops(module, computation, i, rate) for i in computation.instructions)


def is_kernel(instruction: Instruction) -> bool:
    """Whether a hand-written kernel or a library runs it: Mosaic, Triton, cuDNN."""
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    return instruction.opcode == "custom-call" and target not in BOOKKEEPING


def kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs that a kernel claims in its cost estimate, or those of splash attention; else 0."""
    estimate = instruction.config.get("custom_call_config", {}).get("cost_estimate")
    if estimate:
        return float(estimate.get("flops", 0))
    found = re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name)
    heads = _attention_operands(computation, instruction)
    if not found or len(heads) < 2:
        return 0.0
    products = dict(_SPLASH_PRODUCTS)[found[1]]
    if found[1] == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", instruction.attributes):
        products = _FUSED_DKV_PRODUCTS
    queries, keys = heads[:2]
    return products * 2.0 * queries.elements * keys.dims[-2]


def head_width(computation: Computation, instruction: Instruction) -> int | None:
    """Width of the heads that an attention kernel reads; None if it does not look like one."""
    heads = _attention_operands(computation, instruction)
    return heads[0].dims[-1] if len(heads) >= 3 else None


def _attention_operands(computation: Computation, instruction: Instruction) -> list[Shape]:
    """Queries, keys, values [.., tokens, width] in the order of a kernel's operands."""
    arrays = [operand.shapes[0] for operand in computation.operands(instruction) if operand.shapes]
    floats = [a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f16", "f32")]
    return [a for a in floats if a.dims[-1] == floats[0].dims[-1]]


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """The TPU compiler turns matrix products into convolutions, batch axes into strided windows."""
    inputs, kernel = (operand.shapes[0] for operand in computation.operands(instruction)[:2])
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")).groups()
    of_input, of_kernel, of_output = (
        dict(zip(label, shape.dims, strict=True))
        for label, shape in zip(labels, (inputs, kernel, instruction.shapes[0]), strict=True)
    )
    # "size=3x1 stride=2x1" -> {"size": ["3", "1"], "stride": ["2", "1"]}
    options = re.findall(r"(\w+)=(\S+)", instruction.attribute("window") or "")
    window = {name: value.split("x") for name, value in options}
    products = math.prod(
        _positions(
            of_input[axis], of_kernel[axis], of_output[axis],
            {name: values[int(axis)] for name, values in window.items()},
        )
        for axis in filter(str.isdigit, labels[0])
    )  # fmt: skip
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * products * of_kernel["i"] * of_kernel["o"] * of_input["b"] / groups


def _positions(size: int, taps: int, outputs: int, window: dict[str, str]) -> int:
    """Pairs of output and tap, along one axis, that meet an element of the input."""
    stride, spread, gap = (int(window.get(x, 1)) for x in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    tap = np.arange(taps)  # in either order: reversed ones meet the same elements
    met = np.arange(outputs)[:, None] * stride + tap * spread - low  # of the input, spread by gap
    return int(((met >= 0) & (met <= (size - 1) * gap) & (met % gap == 0)).sum())
