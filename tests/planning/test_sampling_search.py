"""plan --search of sampling: meshes by time, as compiled programs and the default mesh say."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ltx2_jax import chips, config, plan, planning
from ltx2_jax.errors import UserError
from ltx2_jax.models import flops
from ltx2_jax.models.transformer.config import PRESETS
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


def searched(name, size=MIDDLE, *, batch=1, passes=1, quantize=None, compiled=0):
    counts = {"batch": batch, "passes": passes, "steps": 1, "quantize": quantize}
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


def test_clips_and_their_passes_together_fill_the_shards_of_data():
    """Two clips of two passes go on one, two or four; none is computed for no clip."""
    rows = searched("v6e:4x4", batch=2, passes=2)["rows"]
    assert {row["mesh"][0] for row in rows} == {1, 2, 4}
    for row in rows:
        assert row["estimate"] == estimated("v6e:4x4", row["mesh"], rows=4).facts()


# The arithmetic of a step, by hand: 704 x 1280 are 14,080 tokens of video and 126 of audio, the
# transformer of 2.0 has 48 layers, 4096 and 2048 wide, with 32 heads.


def on(sizes, *, name="v6e:8x8", networks=CONFIG.networks, rows=1, chip="v6e", **rates):
    """The estimate of a large clip on a mesh, on chips with other rates."""
    where = topology.slice_of(name)
    mesh = make_mesh(*sizes, devices=topology.places(where))
    chip = dataclasses.replace(chips.CHIPS[chip], **rates)
    return sampling_estimate.estimate_sample(networks, request(LARGE), mesh, chip, rows)


def in_blocks(*rows, version="2.0"):
    """FLOPs of the matrices of all blocks, without attention itself, for so many rows."""
    terms = flops.forward_flops(PRESETS[version], *rows)
    outside = ("core", "timestep", "input and output", "caption")
    return sum(work for name, work in terms.items() if not any(x in name for x in outside))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_products_take_as_long_as_the_rows_of_a_device(version):
    """Tokens of video are split over sequence, those of audio and text are whole there.

    Keys and values of the text are made once, unless every step modulates the text.
    """
    video, audio = (in_blocks(*rows, version=version) for rows in ((14080, 0, 0), (0, 126, 0)))
    text = in_blocks(0, 0, 1024, version=version) * (version == "2.3")
    wide = 4 * 48 * (14080**2 + 14080 * 1024) * 4096  # of heads of 128
    narrow = 2 * 4 * 48 * 14080 * 126 * 2048  # between the streams, heads of 64
    chip = chips.CHIPS["v6e"]
    gemm = (video / 4 + audio + text) / 0.8
    sound = 4 * 48 * 126 * (126 + 1024) * 2048  # to itself and to the text
    core = (wide / chip.attention_128 + narrow / chip.attention_64) / 4 + sound / chip.attention_64
    networks = dataclasses.replace(CONFIG.networks, transformer=PRESETS[version])
    guess = on(
        (8, 2, 4), networks=networks, rows=11
    )  # two rows a device, of which some are for nothing
    assert guess.products == pytest.approx(2 * (gemm + core) / 2 / chip.flops)


@pytest.mark.parametrize(("form", "size"), [(None, 2), ("int8", 1), ("int8-products", 1)])
def test_few_rows_wait_for_the_weights(form, size):
    """From slow memory, the weights of the blocks and 16 times the activations of each."""
    networks = dataclasses.replace(CONFIG.networks, quantized=form)
    weights = size * (in_blocks(1, 0, 0) + in_blocks(0, 1, 0)) / 2 / 2
    moved = 48 * 16 * 2 * 14080 / 4 * 4096
    guess = on((8, 2, 4), networks=networks, hbm_bandwidth=1e8)
    plain = on((8, 2, 4), networks=networks)
    assert guess.products == plain.products
    busy = plain.products
    assert guess.memory == pytest.approx((weights + moved) / 0.87e8, abs=busy)
    # At its own rate all but the weights that the sound reads hide behind products.
    rate = 0.87 * chips.CHIPS["v6e"].hbm_bandwidth
    own = size * in_blocks(0, 1, 0) / 2 / 2
    assert moved / rate < plain.memory < (moved + own) / rate


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_memory_is_weights_and_activations_and_text_that_stays(version):
    """Its keys and values stay, unless every step modulates the text."""
    networks = dataclasses.replace(CONFIG.networks, transformer=PRESETS[version])
    guess = on((8, 2, 4), networks=networks, rows=8)
    activation, text = 2 * 14080 / 4 * 4096, 2 * 2 * 48 * 1024 * (4096 + 2048) / 2
    assert guess.working == 12 * activation + text * (version == "2.0")
    assert guess.weights == pytest.approx(2 * flops.total_parameters(PRESETS[version]) / 2, rel=0.1)


def test_what_a_block_sends_is_summed():
    """On a switch of 450 GB/s, 16 shards of heads and 4 of tokens: two heads, so keys go round."""
    rate, hop = 0.9 * 450e9, 1e-6
    video, audio = 2 * 14080 / 4 * 4096, 2 * 126 * 2048

    def reduced(size, shards):
        return 2 * size * (shards - 1) / shards / rate + hop

    summed = reduced(video + audio, 16)  # after two attentions, the exchange and the MLPs
    norms = reduced(4 * 2 * (14080 / 4 + 126), 16)  # queries' and keys' squares, in float32
    traded = 4 * video / 16 / 2 / rate + 2 * hop  # half of q, k, v, and of the result
    around = 2 * video / 16 / rate + hop
    merged = reduced(2 * audio / 16 / 64, 4) + reduced(2 * audio / 16, 4)
    block = 4 * (summed + norms) + traded + around + merged
    assert on((1, 16, 4), chip="h100").links == pytest.approx(48 * block)


def test_shards_of_model_lie_apart_on_the_mesh_and_side_by_side_on_the_chips():
    """Four in a square, whose sums use two links each; the two of sequence two chips apart."""
    guess = on((1, 4, 2), name="v6e:2x4", interconnect=4e9)
    video, audio = 2 * 14080 / 2 * 4096, 2 * 126 * 2048
    summed = 4 * (video + audio + 4 * 2 * (14080 / 2 + 126)) * 2 * 3 / 4 / 2
    traded = 4 * video / 4 / 2 * 2  # half of it, over half of a link
    merged = 2 * (2 * audio / 4 / 64 + 2 * audio / 4)
    assert guess.links == pytest.approx(48 * (summed + traded + merged) / 0.9e9, rel=1e-3)


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


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("v5p:4x4x4", (8, 2, 4)), ("v5p:4x4x4", (2, 2, 16)), ("v6e:4x4", (2, 8, 1))],
)
def test_shards_of_model_are_neighbours_where_dimensions_are_cut(name, sizes):
    """No whole dimensions of the slice multiply to these sizes."""
    mesh = make_mesh(*sizes, devices=topology.places(topology.slice_of(name)))
    coords = np.array([device.coords for device in mesh.devices.swapaxes(1, 2).flat])
    steps = np.abs(np.diff(coords.reshape(-1, sizes[1], 3), axis=1)).sum(-1)
    assert steps.max() == 1


def test_what_has_no_neighbours_in_the_order_of_places_lies_as_jax_lays_it():
    places = topology.places(topology.slice_of("v5p:2x2x4"))
    axes, kinds = ("data", "model", "sequence"), (jax.sharding.AxisType.Explicit,) * 3
    ours = make_mesh(2, 8, 1, devices=places).devices
    assert (ours == jax.make_mesh((2, 8, 1), axes, kinds, devices=places).devices).all()


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
        ("h100:8", "--topology=h100:8: the compiler at hand is for TPUs.* for --what=train"),
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
