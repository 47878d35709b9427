"""How long a compiled program takes on a chip: its schedule walked with the clocks of a roofline.

The compiler's order is followed, loops multiplied out. An instruction takes the longer of its
FLOPs at the chip's rate and its bytes at the bandwidth of HBM. A collective takes the time of
`interconnect.py` on the mesh axes that it uses. The program waits for it where the schedule does:
at once, or, of an asynchronous one, where the result is awaited. Copies to VMEM, or to the host's
memory, run beside the program in the same way.

Two rates: ideal, all peaks; and practical, with the chip's sustained fractions: attention kernels
by their head width, all other FLOPs as matrix products (those of int8 or float8 at the chip's rate
for them), HBM and links as measured. Left out: vector and transcendental work (most hides behind
bandwidth), the time to start a kernel, matrices too small to fill the matrix unit, the slower
products of float32, copies that slow each other down, and all that `traffic.py` leaves out. It is
an estimate to compare programs with.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ltx2_jax.planning.compiled.collectives import Collective, collectives_of
from ltx2_jax.planning.compiled.execution import (
    Step,
    flops,
    head_width,
    is_kernel,
    runs,
)
from ltx2_jax.planning.compiled.hlo import Computation, Instruction, Module
from ltx2_jax.planning.compiled.interconnect import Network, seconds
from ltx2_jax.planning.compiled.traffic import hbm_bytes, host_bytes

HBM_EFFICIENCY = 0.87  # of the nominal bandwidth: a copy on v7x (tpu-recipes, microbenchmarks)


@dataclasses.dataclass
class Times:
    """Seconds of a program or a part of it.

    `elapsed` is on the program's own clock: `busy`, `waited` for the interconnect, and `stalled`
    for copies, to VMEM or the host. The others are sums over instructions, however those overlap.
    """

    elapsed: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    stalled: float = 0.0
    compute: float = 0.0
    hbm: float = 0.0
    host: float = 0.0
    interconnect: float = 0.0

    def add(self, other: "Times", rounds: int = 1) -> None:
        for field in dataclasses.fields(self):
            more = getattr(self, field.name) + rounds * getattr(other, field.name)
            setattr(self, field.name, more)


def roofline(
    module: Module,
    mesh: Mapping[str, int],
    network: Network,
    *,
    model_flops: float | None = None,
) -> dict[str, Any]:
    """Times of one execution of a program, {"ideal": {...}, "practical": {...}}, in seconds.

    "step" is the estimate, "bound" the largest of compute, hbm, waited and stalled. Given
    the FLOPs that the model needs for a step on all devices together, "mfu" is their share of what
    the devices could do in that time.
    """
    result = {}
    for rates in ("ideal", "practical"):
        times = Clock(module, mesh, network, ideal=rates == "ideal").run(module.entry)
        facts = dataclasses.asdict(times)
        step = max(facts.pop("elapsed"), times.hbm)
        bound = max(("compute", "hbm", "waited", "stalled"), key=facts.get)
        result[rates] = {"step": step, "bound": bound, **facts}
        if model_flops is not None:
            peak = network.chip.device_flops * math.prod(mesh.values())
            result[rates]["mfu"] = model_flops / step / peak
    return result


@dataclasses.dataclass
class _Task:
    """An instruction's time, and the clocks other than the program's that it occupies."""

    seconds: float
    sums: Times
    clocks: tuple[str, ...] = ()
    links: bool = False


@dataclasses.dataclass
class _Now:
    """State of the walk: times so far, when each clock is free, and what is under way."""

    times: Times = dataclasses.field(default_factory=Times)
    free: dict[str, float] = dataclasses.field(default_factory=dict)
    under_way: dict[str, tuple[float, bool]] = dataclasses.field(default_factory=dict)

    def wait(self, until: float, links: bool) -> None:
        behind = max(0.0, until - self.times.elapsed)
        self.times.elapsed += behind
        if links:
            self.times.waited += behind
        else:
            self.times.stalled += behind

    def occupy(self, task: _Task) -> float:
        """Starts a task on its clocks; returns when it ends."""
        begin = max([self.times.elapsed, *(self.free.get(clock, 0.0) for clock in task.clocks)])
        self.free |= dict.fromkeys(task.clocks, begin + task.seconds)
        return begin + task.seconds


@dataclasses.dataclass
class Clock:
    """Walks the computations of a program at the rates of a chip."""

    module: Module
    mesh: Mapping[str, int]
    network: Network
    ideal: bool

    def run(self, computation: Computation) -> Times:
        """One execution, from idle links until all that it starts has ended."""
        now = _Now()
        for instruction in computation.instructions:
            if instruction.opcode in ("while", "call", "conditional"):
                body, rounds = runs(self.module, computation, instruction)
                now.times.add(self.run(body), rounds or 1)
                continue
            awaited = _awaited(self.module, computation, instruction)
            if awaited in now.under_way:
                now.wait(*now.under_way.pop(awaited))
            task = self._task(computation, instruction)
            now.times.add(task.sums)
            started = _started(self.module, instruction)
            if started:
                now.under_way[started] = (now.occupy(task), task.links)
            elif task.clocks:
                now.wait(now.occupy(task), task.links)
            else:
                now.times.elapsed += task.seconds
                now.times.busy += task.seconds
        for end in now.under_way.values():
            now.wait(*end)
        return now.times

    def _task(self, computation: Computation, instruction: Instruction) -> _Task:
        beside = instruction.opcode.endswith("-start")
        called = self.module.called(instruction) if beside else []
        if called:
            sums = self.run(called[0])
            inside = (c for i in called[0].instructions for c in self._moved(called[0], i))
            parts = dataclasses.replace(sums, elapsed=0.0, busy=0.0, waited=0.0, stalled=0.0)
            return _Task(sums.elapsed, parts, _axes(inside) or ("copies",), sums.interconnect > 0)
        moved = self._moved(computation, instruction)
        sums = self._legs(computation, instruction)
        if moved:
            sums.interconnect = sum(seconds(c, self.network, ideal=self.ideal) for c in moved)
            return _Task(max(sums.interconnect, sums.compute), sums, _axes(moved), True)
        clocks = ("host" if sums.host else "copies",) if beside else ()
        return _Task(max(sums.compute, sums.hbm, sums.host), sums, clocks)

    def _moved(self, computation: Computation, instruction: Instruction) -> list[Collective]:
        return collectives_of(self.module, Step(instruction, computation), self.mesh)

    def _legs(self, computation: Computation, instruction: Instruction) -> Times:
        """Seconds of an instruction's FLOPs, of its bytes in HBM, of those to and from the host."""
        chip, at = self.network.chip, (computation, instruction)
        fraction = hbm_fraction = 1.0
        if not self.ideal:
            width = head_width(*at) if is_kernel(instruction) else None
            fraction = chip.attention(width) if width else chip.gemm
            hbm_fraction = HBM_EFFICIENCY
        return Times(
            compute=flops(self.module, *at, chip.products) / chip.device_flops / fraction,
            hbm=sum(hbm_bytes(self.module, *at)) / chip.device_hbm_bandwidth / hbm_fraction,
            host=host_bytes(self.module, *at) / chip.host_bandwidth,
        )


def _axes(moved: Iterable[Collective]) -> tuple[str, ...]:
    return tuple(axis for c in moved for axis in c.axes)


def _started(module: Module, instruction: Instruction) -> str | None:
    """A name for what an instruction leaves running, or None."""
    if instruction.opcode.endswith("-start") or instruction.opcode == "send":
        return instruction.name
    return _chain(module, instruction, "AsyncCollectiveStart")


def _awaited(module: Module, computation: Computation, instruction: Instruction) -> str | None:
    """The name of what an instruction waits for, or None."""
    if instruction.opcode in ("send-done", "recv-done"):
        return _sent(computation, instruction)
    if instruction.opcode.endswith("-done"):
        start = computation.operands(instruction)[0]
        while start.opcode.endswith("-update"):
            start = computation.operands(start)[0]
        return start.name
    return _chain(module, instruction, "AsyncCollectiveDone")


def _sent(computation: Computation, done: Instruction) -> str | None:
    """The `send` between slices whose answer a `recv-done` waits for; a `send-done` waits not."""
    for start in computation.operands(done) if done.opcode == "recv-done" else ():
        rendezvous = _rendezvous(start)
        for other in computation.instructions if rendezvous else ():
            if other.opcode == "send" and _rendezvous(other) == rendezvous:
                return other.name
    return None


def _rendezvous(instruction: Instruction) -> str | None:
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return found and found[1]


def _chain(module: Module, fusion: Instruction, target: str) -> str | None:
    """The chain of fusions over which a collective is spread, if this one has its start or end."""
    for inner in module.called(fusion) if fusion.opcode == "fusion" else ():
        if any(target in i.attributes for i in inner.instructions):
            for instruction in inner.instructions:
                found = re.search(r'chain_id="(\w+)"', instruction.attributes)
                if found:
                    return f"chain {found[1]}"
    return None
