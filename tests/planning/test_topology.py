"""Slices by name: those that exist are found, others are one line that lists the valid ones."""

import importlib.util

import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.planning import topology

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@pytest.fixture
def requests(monkeypatch):
    """What is asked of libtpu, instead of asking it."""
    asked = []

    def remember(**request):
        asked.append(request)
        return type("Description", (), {"devices": []})

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", remember)
    return asked


@pytest.mark.parametrize(
    ("name", "asked", "options"),
    [
        ("v5p:2x2x1", "v5p:2x2x1", {"wrap": (False, False, False)}),
        ("v5p:4x4x8", "v5p:4x4x8", {"wrap": (True, True, True)}),
        ("v6e:8x16", "v6e:8x16", {"wrap": (False, True, False)}),
        ("v7x:4x4x4", "tpu7x:4x4x4", {"wrap": (True, True, True)}),
        ("v5litepod:2x4", "v5e:2x4", {"wrap": (False, False, False)}),
        (
            "v4:2x2x1",
            "v4:2x2x1",
            {"wrap": (False, False, False), "chip_config_name": "megacore"},
        ),
        ("2xv5p:2x2x2", "v5p:2x2x2", {"wrap": (False, False, False), "num_slices": 2}),
        ("1xv6e:2x4", "v6e:2x4", {"wrap": (False, False, False)}),
        (
            "v6e:1x1",
            "v6e:1x1",
            {"wrap": (False, False, False), "chips_per_host_bounds": (1, 1, 1)},
        ),
    ],
)
def test_a_slice_is_asked_for_as_it_is_wired(requests, name, asked, options):
    topology.tpu_devices(name)
    assert requests == [{"platform": "tpu", "topology_name": asked, **options}]


@pytest.mark.parametrize("name", ["v9:1x1", "", "tpu", "6e:2x4", "2xv9:1x1", "2x", "2v5p:2x2x1"])
def test_an_unknown_generation_shows_slices_of_every_one(requests, name):
    with pytest.raises(UserError, match=r"no such slice; .*v5p:2x2x2.*v6e:4x8.*tpu7x:") as raised:
        topology.tpu_devices(name)
    assert str(raised.value).startswith(f"--topology={name}: ")
    assert not requests


@pytest.mark.parametrize("name", ["v5p-8", "v5p", "v5p:4", "v5p:2x2x1\n", "v5p:axbxc", "2xv5p-8"])
def test_a_wrong_shape_lists_the_slices_of_its_generation(requests, name):
    with pytest.raises(UserError, match=r"no such slice; slices are v5p:2x2x1, .*v5p:16x16x24$"):
        topology.tpu_devices(name)
    assert not requests


@pytest.mark.parametrize("name", ["v6e:4x5", "v5p:4x4x9", "v5p:1x2x1", "v5p:1x1x1"])
def test_chips_come_in_powers_of_two_and_cubes(requests, name):
    with pytest.raises(UserError, match=r"sizes are 1, 2 or a multiple of 4; slices are v"):
        topology.tpu_devices(name)
    assert not requests


@pytest.mark.parametrize("name", ["0xv5p:2x2x1", "257xv5p:2x2x1", "9999999xv5p:2x2x1"])
def test_so_many_slices_are_not_to_be_had(requests, name):
    count = name.partition("x")[0]
    with pytest.raises(UserError, match=f"{count} slices; a name asks for 1 to 256.*; slices are"):
        topology.tpu_devices(name)
    assert not requests


def test_several_slices_are_one_name():
    two = topology.slice_of("2xv7x:2x2x1")
    assert (two.name, two.count, two.shape, two.devices) == ("2xtpu7x:2x2x1", 2, (2, 2, 1), 16)
    assert topology.slice_of("1xv5p:2x2x1") == topology.slice_of("v5p:2x2x1")
    with pytest.raises(UserError, match="--topology=2xv5p:2x2x1: --what=vae runs on one slice"):
        topology.one_slice("2xv5p:2x2x1", "vae")


def test_a_slice_has_as_many_sizes_as_its_network_dimensions(requests):
    with pytest.raises(UserError, match="v6e slices have two sizes"):
        topology.tpu_devices("v6e:2x2x2")
    with pytest.raises(UserError, match="v5p slices have three sizes"):
        topology.tpu_devices("v5p:2x4")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("JAX TPU support not installed; cannot generate", "pip install 'ltx2-jax"),
        (
            "INVALID_ARGUMENT: not divisible by the given",
            "--topology=v5p:2x2x1: refused .*v5p:2x2x1, ",
        ),
    ],
)
def test_a_refusal_is_one_line(monkeypatch, raised, message):
    def fail(**_):
        raise RuntimeError(raised)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UserError, match=message):
        topology.tpu_devices("v5p:2x2x1")


@needs_compiler
@pytest.mark.parametrize("generation", topology.SLICES)
def test_every_slice_of_the_list_is_known_to_the_compiler(generation):
    chip_name, sizes = topology.SLICES[generation]
    chip = topology.chips.CHIPS[chip_name]
    for size in sizes[:8]:
        devices = topology.tpu_devices(f"{generation}:{size}")
        count = 1
        for side in size.split("x"):
            count *= int(side)
        assert len(devices) == count * chip.devices
        assert topology.chips.of_kind(devices[0].device_kind) == chip
        assert {d.core_on_chip for d in devices} == set(range(chip.devices))


def test_of_gpus_there_is_arithmetic_alone():
    where = topology.slice_of("h100:8")
    assert (where.chip.name, where.devices, where.count) == ("h100", 8, 1)
    with pytest.raises(UserError, match=r"^--topology=h100:8: the compiler at hand is for TPUs"):
        topology.tpu_devices("h100:8")
    for name in ("h100:9", "h100:0", "h100", "2xh100:1", "v5p:4"):
        with pytest.raises(UserError, match=f"^--topology={name}: no such slice"):
            topology.slice_of(name)


def test_places_are_numbered_along_x_then_y_then_z_and_core_by_core():
    coords = [place.coords for place in topology.places(topology.slice_of("v5p:2x2x2"))]
    assert coords[:3] == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert coords[4] == (0, 0, 1)
    cores = [(p.id, p.coords[0], p.core_on_chip)
             for p in topology.places(topology.slice_of("tpu7x:2x2x1"))]  # fmt: skip
    assert cores[:3] == [(0, 0, 0), (1, 0, 1), (2, 1, 0)]


@needs_compiler
def test_places_are_those_of_the_compiler():
    for name in ("v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"):
        where = topology.slice_of(name)
        ours, theirs = topology.places(where), topology.tpu_devices(name)
        told = lambda devices: {  # noqa: E731
            (d.id, tuple(d.coords), d.core_on_chip, d.device_kind) for d in devices
        }
        assert told(ours) == told(theirs)
