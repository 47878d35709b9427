"""TPU slices that are not there: their devices, to compile for on any machine.

The TPU compiler is part of libtpu and runs without a TPU: install the `tpu` extra.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax import chips
from ltx2_jax.errors import UserError

# Slices of each generation that exist, in chips; the compiler takes any whole number of hosts of
# 2x2 chips. Its name of a generation, ours in `chips.py`, the sizes.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {
    "v4": ("v4", _CUBES),
    "v5e": ("v5e", _FLAT),
    "v5p": ("v5p", (*_CUBES, "8x16x16", "16x16x16", "16x16x24")),
    "v6e": ("v6e", _FLAT),
    "tpu7x": ("v7x", ("1x1x1", *_CUBES, "8x16x16", "16x16x16")),
}
# Without these libtpu asks the network for the slice that it runs on, complains that there is none,
# and refuses a second process.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GPUS = tuple(name for name, chip in chips.CHIPS.items() if not chip.torus)
A_GPU = "the compiler at hand is for TPUs; of GPUs plan knows what arithmetic can tell"
NO_COMPILER = "the TPU compiler is not installed: pip install 'ltx2-jax[tpu]'"
# What jax calls a device of each.
_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "v7x": "TPU7x",
}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
MOST_SLICES = 256  # that a name may ask for; 199 is the most that one program is known to have used


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice, or several that are alike, by name, without the devices."""

    name: str
    chip: chips.Chip
    shape: tuple[int, ...]  # of one, in chips
    count: int = 1

    @property
    def devices(self) -> int:
        """Number of jax devices, of all slices together."""
        return self.count * math.prod(self.shape) * self.chip.devices


@dataclasses.dataclass(frozen=True)
class Place:
    """What jax knows of a device: enough to lay out a mesh, not to compile for it."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


def slice_of(topology: str) -> Slice:
    """What is named, "v5p:2x2x1" or "2xv5p:2x2x1"; asks no compiler. UserError if there is none.

    "h100:1" to "h100:8" are the GPUs of one host, for which nothing is compiled.
    """
    name, _, cards = topology.partition(":")
    if name in GPUS and re.fullmatch("[1-8]", cards):
        return Slice(topology, chips.CHIPS[name], (int(cards),))

    def refused(reason: str) -> UserError:
        return UserError(f"--topology={topology}: {reason}; {_valid(generation)}")

    count, one = re.fullmatch(r"(?:(\d+)x)?(.*)", topology, re.DOTALL).groups()
    found = re.fullmatch(r"([a-z0-9]+):([1-9]\d*(?:x[1-9]\d*){1,2})", one)
    generation = found[1] if found else one.split(":")[0].split("-")[0]
    generation = _ALIASES.get(generation, generation)
    if count is not None and not 1 <= int(count) <= MOST_SLICES:
        raise refused(f"{count} slices; a name asks for 1 to {MOST_SLICES}, as 2xv5p:4x4x4")
    count = int(count or 1)
    if not found or generation not in SLICES:
        raise refused("no such slice")
    chip_name, sizes = SLICES[generation]
    chip, shape = chips.CHIPS[chip_name], _sides(found[2])
    if len(shape) != chip.torus:
        raise refused(f"{generation} slices have {'two' if chip.torus == 2 else 'three'} sizes")
    whole_pod = max(math.prod(_sides(size)) for size in sizes)
    if math.prod(shape) > whole_pod:
        raise refused(f"no such slice: the largest is of {whole_pod:,} chips")
    odd = any(size not in (1, 2) and size % 4 for size in shape)
    if odd or (math.prod(shape) < 4 and found[2] not in sizes):
        raise refused("no such slice: sizes are 1, 2 or a multiple of 4")
    several = f"{count}x" if count > 1 else ""
    return Slice(f"{several}{generation}:{found[2]}", chip, shape, count)


def one_slice(topology: str, what: str) -> Slice:
    """As `slice_of`, for what makes no use of several. UserError for those."""
    where = slice_of(topology)
    if where.count > 1:
        raise UserError(
            f"--topology={topology}: --what={what} runs on one slice; each of several does its own"
        )
    return where


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of "v5p:2x2x1", or of two such slices, "2xv5p:2x2x1".

    Programs can be compiled for them, not run.

    Raises:
      UserError: no such slice, or the TPU compiler is not installed.
    """
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    where = slice_of(topology)
    if not where.chip.torus:
        raise UserError(f"--topology={topology}: {A_GPU} for --what=train")
    name = where.name.removeprefix(f"{where.count}x")
    generation = name.split(":")[0]
    # Left alone, libtpu takes every slice for a mesh without closed rings.
    options: dict[str, Any] = {"wrap": (*chips.wraps(where.chip, where.shape), False)[:3]}
    if generation == "v4":  # a chip's two cores as one device, as in jax on a v4
        options["chip_config_name"] = "megacore"
    if max(where.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if where.count > 1:
        options["num_slices"] = where.count
    get = topologies.get_topology_desc
    try:
        return get(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # whatever libtpu raises, and a missing one an ordinary RuntimeError
        text = " ".join(str(error).split())
        if "not installed" in text:
            raise UserError(NO_COMPILER) from None
        raise UserError(
            f"--topology={topology}: refused by the TPU compiler ({text:.200}); "
            f"{_valid(generation)}"
        ) from None


def places(where: Slice) -> list[Place]:
    """The devices of one of a slice's kind, without the compiler: enough to lay out a mesh."""
    shape = (*where.shape, 1, 1)[:3]
    at = itertools.product(*map(range, reversed(shape)), range(where.chip.devices))
    return [Place(i, (x, y, z), core, _KINDS[where.chip.name])
            for i, (z, y, x, core) in enumerate(at)]  # fmt: skip


def _sides(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def _valid(generation: str) -> str:
    """The names that are accepted, for an error message."""
    if generation in SLICES:
        _, sizes = SLICES[generation]
        return f"slices are {', '.join(f'{generation}:{size}' for size in sizes)}"
    some = (f"{name}:{sizes[i]}" for name, (_, sizes) in SLICES.items() for i in (1, 4))
    return f"slices are named GENERATION:SHAPE, in chips: {', '.join(some)}"
