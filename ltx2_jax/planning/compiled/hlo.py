"""The text of a compiled XLA program, parsed: computations, instructions, shapes.

`compiled.as_text()` is the program that one device runs: partitioned, fused, scheduled. Only what
`facts.py` needs is read; the grammar is XLA's HLO text as jax 0.10 to 0.12 print
it for TPU and CPU.
"""

import dataclasses
import functools
import json
import math
import re
from typing import Any

# A memory space other than HBM, by the number in a layout's S(n): VMEM is fast and on the chip,
# HOST is the memory of the chip's host. Others hold scalars and semaphores.
HBM, VMEM, HOST = 0, 1, 5

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([0-9,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*)$", re.DOTALL)
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*-> .* \{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([^\s,(){}]+)")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program: on one device, in one memory space."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the elements alone."""
        return self.elements * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """What the array takes and moves: its two minor dimensions fill whole tiles."""
        tile = _TILE.search(self.layout)
        if not tile or not self.dims or "*" in tile[1]:
            return self.bytes
        order = [int(axis) for axis in self.layout.split(":")[0].split(",") if axis]
        sizes = [self.dims[axis] for axis in order] or list(self.dims[::-1])  # minor first
        sides = [int(side) for side in tile[1].split(",")][::-1]
        sizes += [1] * (len(sides) - len(sizes))
        sizes[: len(sides)] = [-(-n // side) * side for n, side in zip(sizes, sides, strict=False)]
        return math.prod(sizes) * _bits(self.dtype) // 8

    @property
    def space(self) -> int:
        """Number of the memory space: HBM, VMEM, HOST."""
        found = _SPACE.search(self.layout)
        return int(found[1]) if found else HBM


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the leaves of the result, in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the operation's parentheses
    attributes: str
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """The text of an attribute, without the braces around it."""
        at = self.attributes.find(f", {name}=")
        if at < 0:
            return None
        text = self.attributes[at + len(name) + 3 :]
        if text.startswith("{"):
            return text[1 : _closing(text, "{", "}")]
        return re.match(r'"(?:[^"\\]|\\.)*"|[^\s,]*', text)[0]

    @property
    def config(self) -> dict[str, Any]:
        """The backend's own notes, a dict; {} where they are none or not JSON."""
        at = self.attributes.find(", backend_config=")
        if at < 0:
            return {}
        try:
            config, _ = json.JSONDecoder().raw_decode(self.attributes[at + 17 :])
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from: "jit(step)/while/body/dot_general"."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'").replace('\\"', '"') if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs; not those that a reduction applies."""
        names = []
        runs = ("condition", "body", "calls", "called_computations", "branch_computations",
                "true_computation", "false_computation")  # fmt: skip
        for attribute in (*runs, *(("to_apply",) if "call" in self.opcode else ())):
            names += _NAME.findall(self.attribute(attribute) or "")
        return names


@dataclasses.dataclass
class Computation:
    """A list of instructions, in the order in which they run if the program is scheduled."""

    name: str
    instructions: list[Instruction]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take the result of each, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of a call's operands."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    def source(self, instruction: Instruction, through: tuple[str, ...]) -> Instruction:
        """Where the data comes from: `instruction`, or further up past the opcodes `through`."""
        while instruction.opcode in through and self.operands(instruction):
            instruction = self.operands(instruction)[0]
        return instruction


@dataclasses.dataclass
class Module:
    """A program. `entry` is the computation that runs; the others are called."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called if name in self.computations]


def parse(text: str) -> Module:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry = current = None
    pending: list[str] = []

    def flush() -> None:
        if pending and current is not None:
            current.instructions.append(_instruction("\n".join(pending)))
        pending.clear()

    for line in text.split("\n"):
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2], [])
                entry = current if header[1] else entry
        elif line.startswith("}") and (line == "}" or line.startswith("}, execution_thread=")):
            flush()
            current = None
        elif _INSTRUCTION.match(line):
            flush()
            pending.append(line)
        elif pending:  # an attribute of several lines, such as a kernel's metadata
            pending.append(line)
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return Module(computations, entry)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened: "(f32[8,2]{1,0}, s32[])" has two."""
    return tuple(
        Shape(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction:
    root, name, rest = _INSTRUCTION.match(line).groups()
    end = _closing(rest, "(", ")") + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = _COMMENT.sub("", rest[:end]), rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, "(", ")") - 1
    literal = rest[:end]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(literal))
    return Instruction(name, opcode, shapes(kind), operands, literal, rest[end + 1 :], bool(root))


def _closing(text: str, left: str, right: str) -> int:
    """Index of the bracket that closes the first one of `text`; quoted ones do not count."""
    depth = 0
    for match in re.finditer(rf'"(?:[^"\\]|\\.)*"|[{re.escape(left + right)}]', text):
        depth += {left: 1, right: -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced {left}{right} in {text[:80]!r}")


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque", "tuple"):
        return 0
    if dtype == "pred":
        return 8
    return int(_BITS.match(dtype)[1])
