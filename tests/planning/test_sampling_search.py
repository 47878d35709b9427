"""plan --search of sampling: meshes by time, as compiled programs and the default mesh say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ltx2_jax import config, plan, planning
from ltx2_jax.errors import UserError
from ltx2_jax.planning import programs, reports, sampling_estimate, search, topology
from ltx2_jax.sampling import meshes
from ltx2_jax.sharding import make_mesh

CONFIG = config.load(f"{Path(__file__).parents[2]}/configs/ltx2_19b.py")
SMALL, LARGE = (352, 640), (704, 1280)
MIDDLE = (512, 768)


def request(size):
    return programs.request_of(CONFIG, num_frames=121, height=size[0], width=size[1])


def estimated(name, sizes, size=MIDDLE, *, rows=1):
    where = topology.slice_of(name)
    mesh = make_mesh(*sizes, devices=topology.places(where))
    return sampling_estimate.estimate_sample(CONFIG.networks, request(size), mesh, where.chip, rows)


def searched(name, size=MIDDLE, *, passes=1, quantize=None, compiled=0):
    counts = {"batch": 1, "passes": passes, "steps": 1, "quantize": quantize}
    return search.search_samples(CONFIG, request(size), name, compiled=compiled, **counts)


@pytest.mark.parametrize(
    ("name", "sizes", "seconds", "waited", "peak"),
    [
        # Of one pass of 768x512x121, by `plan --what=sample --steps=1`, which also counts what
        # comes before and after the step: seconds, of them waiting for links, GiB of a device.
        ("v6e:4x4", (1, 2, 8), 0.0518, 0.0235, 19.0),
        ("v6e:4x4", (1, 4, 4), 0.076, 0.050, 10.0),
        ("v5e:2x2", (1, 4, 1), 0.50, 0.17, 10.5),
    ],
)
def test_estimates_are_near_what_the_compiler_makes(name, sizes, seconds, waited, peak):
    guess = estimated(name, sizes)
    assert guess.step == pytest.approx(seconds, rel=0.1)
    assert guess.links == pytest.approx(waited, rel=0.15)
    assert guess.peak / reports.GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["v6e:4x4", "v6e:2x4", "v5e:2x2", "v5e:4x4", "v5p:2x2x1",
                                  "v5p:2x2x4", "tpu7x:2x2x1"])  # fmt: skip
@pytest.mark.parametrize(
    ("size", "passes", "quantize"),
    [(SMALL, 1, None), (MIDDLE, 1, None), (LARGE, 1, None), (MIDDLE, 4, None), (LARGE, 1, "fp8")],
)
def test_the_default_mesh_is_the_one_that_a_search_finds(name, size, passes, quantize):
    where = topology.slice_of(name)
    networks = dataclasses.replace(CONFIG.networks, quantized=quantize)
    default = meshes.choose(
        where.devices,
        heads=CONFIG.model.num_heads,
        weights=sampling_estimate.weight_bytes(networks, 1),
        room=where.chip.device_hbm_bytes,
        rows=[passes],
        tokens=[math.prod(request(size).video_shape)],
    )
    first = searched(name, size, passes=passes, quantize=quantize)["rows"][0]
    assert tuple(first["mesh"]) == default


def test_products_of_eight_bits_are_estimated_by_the_chip():
    """All but attention takes half of the time where the chip has them."""

    def times(form, name):
        where = topology.slice_of(name)
        mesh = make_mesh(1, 1, 4, devices=topology.places(where))
        networks = dataclasses.replace(CONFIG.networks, quantized=form)
        guess = sampling_estimate.estimate_sample(networks, request(MIDDLE), mesh, where.chip, 1)
        return guess.products, guess.weights

    forms = ("int8", "int8-products")
    (plain, held), (few, same) = (times(form, "v6e:2x2") for form in forms)
    assert held == same
    assert 0.5 < few / plain < 0.75
    first, second = (times(form, "v4:2x2x1") for form in forms)
    assert first == second


def test_what_a_mesh_exchanges_decides_not_the_bytes():
    """Splitting heads four times moves fewer bytes than eight shards of tokens, and is slower."""
    rows = searched("v6e:4x4")["rows"]
    assert [row["mesh"] for row in rows[:2]] == [[1, 2, 8], [1, 4, 4]]
    steps = [row["estimate"]["step"] for row in rows]
    assert steps == pytest.approx(sorted(steps), abs=1e-4)
    assert [1, 1, 16] not in [row["mesh"] for row in rows]  # 37 GiB
    assert searched("v6e:4x4", quantize="fp8")["rows"][0]["mesh"] == [1, 1, 16]


@pytest.mark.parametrize("name", ["v6e:2x4", "v5e:2x2", "v5p:2x2x1", "v5p:2x2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("model", [2, 4])
def test_shards_of_model_are_neighbours_on_small_slices(name, model):
    """On one link, or the two cores of a chip."""
    places = topology.places(topology.slice_of(name))
    for sequence in (1, 2, 4):
        if len(places) % (model * sequence):
            continue
        mesh = make_mesh(-1, model, sequence, devices=places)
        shards = np.moveaxis(mesh.devices, 1, -1).reshape(-1, model)
        coords = np.array([[device.coords for device in row] for row in shards])
        if model < len(places):
            assert np.abs(np.diff(coords, axis=1)).sum(-1).max() <= 1
        assert set(mesh.devices.flat) == set(places)


def test_the_fastest_by_estimate_are_compiled_and_ranked_again(monkeypatch):
    monkeypatch.setattr(search, "has_compiler", lambda: True)
    seconds, made = iter([0.06, 0.05]), []

    def fake(option, request, name, **counts):
        made.append((tuple(dataclasses.astuple(option.mesh))[:3], counts))
        times = {"step": next(seconds), "waited": 0.02}
        return {"fits": True, "peak_bytes_per_device": 2**30, "roofline": {"practical": times}}

    monkeypatch.setattr(search, "plan_sample", fake)
    facts = searched("v6e:4x4", passes=2, compiled=2)
    estimates = sorted(facts["rows"], key=lambda row: row["estimate"]["step"])
    assert {mesh for mesh, _ in made} == {tuple(row["mesh"]) for row in estimates[:2]}
    assert made[0][1] == {"batch": 1, "passes": 2, "steps": 1, "quantize": None}
    first, second, third, *_ = facts["rows"]
    assert first["plan"]["roofline"]["practical"]["step"] == 0.05
    assert second["plan"]["roofline"]["practical"]["step"] == 0.06
    assert third["plan"] is None
    table = reports.describe(facts).splitlines()
    assert "1 clip, 2 passes, 6144 video tokens a clip" in table[0]
    assert table[2].endswith("1.00    50.0    20.0")
    json.dumps(facts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2xv6e:4x4", "--what=sample runs on one slice"),
        ("v5e:1x1", r"nothing fits the 15\.8 GiB of a device of v5e:1x1; the least is 3\d\.\d"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        searched(name)


def test_the_command_searches_meshes_of_sampling(monkeypatch):
    given = {}
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(
        planning, "search_samples", lambda *_, **named: given.update(named) or {"fits": True}
    )
    monkeypatch.setattr(planning, "describe", str)
    path = f"{Path(__file__).parents[2]}/configs/ltx2_19b.py"
    flags = ["--what=sample", f"--config={path}", "--topology=v6e:4x4", "--search", "--compile=1"]
    assert plan.cli([*flags, "--passes=4", "--steps=8", "--quantize=int8"]) == 0
    assert given == {"compiled": 1, "batch": 1, "passes": 4, "steps": 8, "quantize": "int8"}
