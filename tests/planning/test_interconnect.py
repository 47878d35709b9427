"""Times of collectives against sums done by hand: links, rings, lines, switches."""

import dataclasses
import math

import numpy as np
import pytest

from ltx2_jax.chips import CHIPS
from ltx2_jax.planning.compiled.collectives import Collective
from ltx2_jax.planning.compiled.interconnect import EFFICIENCY, HOP_SECONDS, Network, seconds

GB = 1e9
LINK = 100 * GB  # one way, of every TPU but v5e


def network(chip, shape):
    """A slice of `shape` chips, its devices in the order of their coordinates."""
    chip = CHIPS[chip]
    grid = np.indices((*shape, *(1,) * (3 - len(shape)), chip.devices))
    return Network(chip, grid.reshape(4, -1).T)


def collective(kind, size, members):
    members = tuple(members)
    return Collective(kind, "bf16", int(size), 1, (), ("a",), len(members), members, False, "")


def ideal(kind, size, members, net):
    return seconds(collective(kind, size, members), net, ideal=True)


def test_a_gather_along_a_closed_ring_uses_both_links():
    net = network("v5p", (4, 4, 4))
    along_z = range(4)
    assert ideal("all-gather", GB, along_z, net) == pytest.approx(GB * 3 / 4 / (2 * LINK))
    assert ideal("reduce-scatter", GB / 4, along_z, net) == pytest.approx(GB * 3 / 4 / (2 * LINK))
    assert ideal("all-reduce", GB, along_z, net) == pytest.approx(2 * GB * 3 / 4 / (2 * LINK))


def test_a_gather_along_a_line_is_bound_by_its_ends():
    net = network("v5p", (2, 4, 4))  # no cubes, no rings
    assert ideal("all-gather", GB, range(4), net) == pytest.approx(GB * 3 / 4 / LINK)
    part_of_a_ring = ideal("all-gather", GB, (0, 1), network("v5p", (4, 4, 4)))
    assert part_of_a_ring == pytest.approx(GB / 2 / LINK)


def test_a_gather_over_a_box_uses_all_of_its_dimensions():
    cube = network("v5p", (4, 4, 4))
    assert ideal("all-gather", GB, range(64), cube) == pytest.approx(GB * 63 / 64 / (6 * LINK))
    small = network("v5p", (2, 2, 2))
    assert ideal("all-gather", GB, range(8), small) == pytest.approx(GB * 7 / 8 / (3 * LINK))


def test_a_group_that_steps_over_chips_shares_its_links():
    net = network("v5p", (2, 2, 4))
    every_second = [0, 2]
    assert ideal("all-gather", GB, every_second, net) == pytest.approx(GB / 2 / (LINK / 2))


def test_an_all_to_all_crosses_the_middle():
    line = network("v5p", (2, 2, 4))
    # Two chips on each side send half of their arrays over the one link between the halves.
    assert ideal("all-to-all", GB, range(4), line) == pytest.approx(GB / LINK)
    ring = network("v5p", (4, 4, 4))
    assert ideal("all-to-all", GB, range(4), ring) == pytest.approx(GB / (2 * LINK))
    assert ideal("ragged-all-to-all", GB, range(4), ring) == ideal("all-to-all", GB, range(4), ring)
    flat = network("v6e", (2, 4))  # four chips on each side, two links between them
    assert ideal("all-to-all", GB, range(8), flat) == pytest.approx(GB / LINK)


def test_a_permute_takes_one_link_the_shorter_way_round():
    net = network("v5p", (4, 4, 4))
    assert ideal("collective-permute", GB, (0, 1), net) == pytest.approx(GB / LINK)
    assert ideal("collective-permute", GB, (3, 0), net) == pytest.approx(GB / LINK)


def test_cores_of_a_v7x_share_the_links_of_their_chip():
    net = network("v7x", (2, 2, 1))
    pair = (0, 1)  # the two cores of a chip
    assert ideal("all-gather", GB, pair, net) == pytest.approx(GB / 2 / (6 * LINK))
    one_core_each = (0, 2, 4, 6)
    assert ideal("all-gather", GB, one_core_each, net) == pytest.approx(GB * 3 / 4 / LINK)
    assert ideal("all-to-all", GB, one_core_each, net) == pytest.approx(GB * 4 / 4 / LINK)
    # Both cores of a chip need the same data: it crosses the links once.
    assert ideal("all-gather", GB, range(8), net) == pytest.approx(GB * 3 / 4 / (2 * LINK))
    assert ideal("all-to-all", GB, range(8), net) == pytest.approx(GB * 8 / 4 / (2 * LINK))


def test_on_a_switch_every_device_has_all_its_links():
    net = Network(CHIPS["h100"], None)
    assert ideal("all-gather", GB, range(8), net) == pytest.approx(GB * 7 / 8 / (450 * GB))
    assert ideal("all-to-all", GB, range(8), net) == pytest.approx(GB * 7 / 8 / (450 * GB))
    assert ideal("collective-permute", GB, (0, 5), net) == pytest.approx(GB / (450 * GB))


@pytest.mark.parametrize(
    ("kind", "slices", "sent"),
    [
        ("all-reduce", 2, 1),
        ("all-reduce", 4, 1.5),
        ("all-gather", 4, 3),
        ("reduce-scatter", 4, 0.75),
        ("all-to-all", 4, 0.75),
        ("collective-permute", 2, 1),
    ],
)
def test_slices_talk_at_the_rate_of_a_chip_of_their_hosts(kind, slices, sent):
    net = network("v7x", (4, 4, 4))
    crossing = dataclasses.replace(collective(kind, GB, range(slices)), axes=("slice",))
    rate = 100e9 / 8 / 2  # 100 Gbit/s a chip, for its two devices
    assert seconds(crossing, net, ideal=True) == pytest.approx(sent * GB / rate)
    assert seconds(crossing, net, ideal=False) == pytest.approx(sent * GB / rate / EFFICIENCY)


def test_practical_links_are_slower_and_take_a_while_to_start():
    net = network("v5p", (4, 4, 4))
    gather = collective("all-gather", GB, range(4))
    bound = GB * 3 / 4 / (2 * LINK)
    assert seconds(gather, net, ideal=False) == pytest.approx(bound / EFFICIENCY + 2 * HOP_SECONDS)
    nothing = collective("all-gather", GB, range(1))
    for shape, hops in (((4, 4, 4), 3 * 2), ((2, 2, 2), 3 * 1), ((2, 2, 4), 1 + 1 + 3)):
        net, whole = network("v5p", shape), range(math.prod(shape))
        told = seconds(collective("all-gather", GB, whole), net, ideal=False)
        bound = ideal("all-gather", GB, whole, net)
        assert told - bound / EFFICIENCY == pytest.approx(hops * HOP_SECONDS)
    assert seconds(nothing, net, ideal=False) == 0
