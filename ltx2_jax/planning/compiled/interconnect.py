"""How long a collective takes on the links between chips: a model of bandwidth and hops.

The model. A group of devices spans a box of the torus: along each of its dimensions a ring if it
covers a closed dimension, else a line; a device receives over both links of a ring, over one of a
line, and all dimensions of the box are used at once. If the group steps over chips, as many groups
share its links. Then

    all-gather, reduce-scatter    (n - 1) / n of the whole array per device
    all-reduce                    twice that
    all-to-all                    n / 4 of a device's array over the links that halve the box
    collective-permute            the array over one link

on v7x n counts chips, the two cores of a chip share its links, and between the two alone runs a
link as fast as six; a permute is taken to leave the chip, as a ring does somewhere. On a switch
every device has all its links at once. Between n slices the same parts of an array cross the
data-center network, at a device's share of its host's rate. Not modelled: other traffic on the same
links or network, and the copies to the host and back.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ltx2_jax import chips
from ltx2_jax.chips import Chip
from ltx2_jax.planning.compiled.collectives import BETWEEN, Collective

CORE_LINKS = 6  # of a v7x chip's two cores, in links between chips (docs.cloud.google.com, tpu7x)
EFFICIENCY = 0.9  # of a link's nominal rate that collectives reach (jax-ml.github.io/scaling-book)
HOP_SECONDS = 1e-6  # of latency; ditto


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the devices of a mesh are. `places` [devices, 4] are x, y, z, core; None: a switch."""

    chip: Chip
    places: np.ndarray | None

    @classmethod
    def of(cls, devices: Sequence[Any], chip: Chip) -> "Network":
        """Of a mesh's devices, flattened; devices that know no coordinates hang on a switch."""
        if not chip.torus or not hasattr(devices[0], "coords"):
            return cls(chip, None)
        places = [(*d.coords, d.core_on_chip) for d in devices]
        return cls(chip, np.array(places))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice, in chips."""
        return tuple(self.places[:, : self.chip.torus].max(axis=0) + 1)


@dataclasses.dataclass(frozen=True)
class _Box:
    """What a group spans: devices, chips, and what a chip has of links for it."""

    devices: int
    chips: int
    links: float  # over which a chip receives
    cut: float  # that lead from one half of the box to the other
    hops: int


def seconds(collective: Collective, network: Network, *, ideal: bool) -> float:
    """Time of one execution; `ideal` at the links' nominal rate and without latency."""
    if collective.group < 2:
        return 0.0
    chip, share = network.chip, 1.0 if ideal else EFFICIENCY
    if collective.axes == BETWEEN and chip.network:
        return network_bytes(collective) / chip.device_network / share
    rate = chip.link * share
    box = _box(collective, network)
    moved = _bytes_per_link(collective, box)
    return float(moved / rate + (0.0 if ideal else HOP_SECONDS * box.hops))


def network_bytes(collective: Collective) -> float:
    """Bytes that a device sends to other slices in one execution."""
    size, others = collective.bytes, 1 - 1 / collective.group
    if collective.kind == "all-reduce":
        return 2 * size * others
    if collective.kind == "all-gather":  # what the device hands over is its part alone
        return size * (collective.group - 1)
    return size * others if collective.kind in ("reduce-scatter", "all-to-all") else float(size)


def _bytes_per_link(collective: Collective, box: _Box) -> float:
    size, kind = float(collective.bytes), collective.kind
    parts = box.chips if box.chips > 1 else box.devices
    if kind == "collective-permute":
        return size / min(1.0, box.links)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * box.devices / 4 / box.cut
    if kind == "all-reduce":
        return 2 * size * (parts - 1) / parts / box.links
    whole = size * box.devices if kind == "reduce-scatter" else size
    return whole * (parts - 1) / parts / box.links


def _box(collective: Collective, network: Network) -> _Box:
    count = collective.group
    if network.places is None:  # every device has the switch to itself: n / 4 of an all-to-all
        return _Box(count, count, 1.0, count * count / 4 / (count - 1), 1)
    places = network.places[list(collective.members)]
    torus, cores = network.chip.torus, network.chip.devices
    coordinates = [np.unique(places[:, axis]) for axis in range(torus)]
    chips_spanned = math.prod(len(c) for c in coordinates)
    if chips_spanned == 1:
        return _Box(count, 1, CORE_LINKS, CORE_LINKS, 1)
    share = min(1.0, count / chips_spanned / cores)  # the other core's group takes the rest
    closed = chips.wraps(network.chip, network.shape)
    links, cuts, hops = 0.0, [], 0
    for axis, found in enumerate(coordinates):
        if len(found) < 2:
            continue
        ring = closed[axis] and len(found) == network.shape[axis]
        reach = found[-1] - found[0]
        if closed[axis] and len(found) == 2:  # the shorter way round
            reach = min(reach, network.shape[axis] - reach)
        stride = reach / (len(found) - 1)
        here = (2.0 if ring else 1.0) / stride
        links += here
        cuts.append(here * chips_spanned / len(found))
        hops += len(found) // 2 if ring else len(found) - 1
    return _Box(count, chips_spanned, links * share, min(cuts) * share, hops)
