"""One table of chips, found by the kind of a jax device."""

import pytest

from ltx2_jax import chips

GIB = 2**30


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 5090", None),
    ],
)
def test_peak_is_known_by_device_kind(kind, peak):
    assert chips.peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("kind", "gib"),
    [
        ("TPU v5", 95.74),
        ("TPU v5 lite", 15.75),
        ("TPU v6 lite", 31.25),
        ("TPU v4", 30.75),
        ("TPU7x", 94.75),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("cpu", None),
    ],
)
def test_memory_is_known_by_device_kind(kind, gib):
    assert chips.hbm_bytes(kind) == (gib and round(gib * GIB))


def test_a_core_of_v7x_has_half_of_the_chip():
    v7x = chips.CHIPS["v7x"]
    assert v7x.device_flops == v7x.flops / 2
    assert v7x.device_hbm_bandwidth == 3690e9
    # Six links, of 100 GB/s in each direction, belong to the chip.
    assert v7x.link == 100e9


def test_links_of_a_chip_go_both_ways_along_each_dimension():
    assert chips.CHIPS["v5p"].link == 100e9
    assert chips.CHIPS["v6e"].link == 100e9
    assert chips.CHIPS["h100"].link == 450e9


def test_rings_close_over_whole_cubes_and_over_whole_pods():
    v5p, v6e = chips.CHIPS["v5p"], chips.CHIPS["v6e"]
    assert chips.wraps(v5p, (4, 4, 8)) == (True, True, True)
    assert chips.wraps(v5p, (2, 4, 4)) == (False, False, False)
    assert chips.wraps(v6e, (8, 16)) == (False, True)


def test_narrow_heads_are_slower():
    for chip in chips.CHIPS.values():
        assert chip.attention(128) == chip.attention(256) == chip.attention_128
        assert chip.attention(64) == chip.attention_64 < chip.attention_128 < 1
