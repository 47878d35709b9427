"""What a train step should need, against sums done by hand for the 19B model."""

import dataclasses
from pathlib import Path

import pytest

from ltx2_jax import chips, config
from ltx2_jax.models import flops
from ltx2_jax.planning import changes, estimate, programs, topology
from ltx2_jax.training import trainable

PRESET = config.load(f"{Path(__file__).parents[2]}/configs/ltx2_19b.py")  # a clip on each of 64
CLIP = programs.request_of(PRESET)  # 121 frames of 1280x704: 14,080 tokens, 126 of sound


def guessed(fields, run=PRESET, name="v5p:4x4x4", **rates):
    """The estimate of a run with other fields, on chips with other rates."""
    where, option = topology.slice_of(name), changes.changed(run, fields)
    chip = dataclasses.replace(where.chip, **rates)
    return estimate.estimate(option, CLIP, changes.mesh_of(option, where), chip)


def test_micro_batches_need_the_memory_of_one_and_the_time_of_all():
    one = guessed({})
    two = guessed({"data.batch_size": 128, "optim.accumulate_steps": 2})
    assert two.facts() | {"peak": one.peak} == two.facts()
    for leg in ("compute", "hbm", "links", "step"):
        assert getattr(two, leg) == pytest.approx(2 * getattr(one, leg))
    assert two.mfu == pytest.approx(one.mfu)


def test_a_step_waits_for_what_goes_to_the_host_and_back():
    kept = guessed({"model.remat": "attention"}).saved
    fields = {"data.batch_size": 128, "optim.accumulate_steps": 2}
    fields |= {"model.remat": "attention_offload"}
    slow = guessed(fields, host_bandwidth=1e6)
    assert kept > slow.saved == 0
    assert slow.step == pytest.approx(2 * 2 * kept / 1e6)


def test_weights_are_gathered_twice_and_gradients_reduced():
    """In bfloat16, on slow links. A v7x sends half of the gradients, and beside the products."""
    sent = 2 * flops.total_parameters(PRESET.model) * 63 / 64
    v5p = guessed({}, interconnect=1e6)
    unit = sent / 0.9e6
    assert v5p.links == pytest.approx(4 * unit)
    # A fifth of the gathering is waited for, and all of the reduction.
    assert v5p.step == pytest.approx(v5p.compute + v5p.hbm + (0.2 * 2 + 2) * unit)
    v7x = guessed({}, name="tpu7x:2x4x4", interconnect=1e6)  # two devices have a chip's links
    assert v7x.links == v7x.step == pytest.approx(3 * 2 * unit)


def test_activations_are_exchanged_over_the_links_of_one_dimension():
    """On (8, 2, 4): a clip of 14,080 tokens on 4 x 2 devices, 48 layers, 4096 wide."""
    guess = guessed({"mesh": (8, 2, 4), "data.batch_size": 8})
    total, row = flops.total_parameters(PRESET.model), 2 * 14080 / 4 * 4096
    shared = (4 + 4) * total / 2 * 31 / 32 / (0.9 * 600e9)  # of weights and gradients
    summed = 4 * 2 * 2 * row / 2  # four products, both passes, an all-reduce of two shards
    traded = 4 * 3 * row / 2 * 3 / 4  # queries, keys, values and results, half of the heads
    assert guess.links == pytest.approx(shared + 48 * (summed + traded) / (0.9 * 200e9))
    assert guess.weights == pytest.approx(2 * total / 48 / 2)


def test_remat_of_blocks_computes_attention_once_more():
    """At the rates of its heads: those of the sound are half as wide. And what the MFU is of."""
    block, attention = (guessed({"model.remat": remat}) for remat in ("block", "attention"))
    terms = flops.forward_flops(PRESET.model, 14080, 126, 1024)
    core = {name: work for name, work in terms.items() if "core" in name}
    wide = sum(work for name, work in core.items() if name.startswith("video"))
    chip = chips.CHIPS["v5p"]
    seconds = wide / chip.attention_128 + (sum(core.values()) - wide) / chip.attention_64
    assert block.compute - attention.compute == pytest.approx(seconds / chip.flops)
    assert block.mfu == pytest.approx(3 * sum(terms.values()) / block.step / chip.flops)


def test_frozen_weights_are_gathered_as_they_are_kept(monkeypatch):
    monkeypatch.setattr(estimate, "_state_bytes", lambda *_: (0, 0))  # which takes a while
    tune = config.TuneConfig(lora=config.LoraConfig())
    tuned = dataclasses.replace(PRESET, init_from="weights", tune=tune)
    share, total = trainable.trained_share(tuned), flops.total_parameters(PRESET.model)
    unit = 2 * total * 63 / 64 / (0.9 * 600e9)  # bfloat16 on the links, once
    all_of_it, plain = guessed({}), guessed({}, tuned)
    whole = guessed({"tune.resident": True}, tuned)
    few = guessed({"tune.quantize": "int8"}, tuned)
    assert whole.links == pytest.approx(2 * share * unit)
    assert plain.links - whole.links == pytest.approx(2 * unit)
    assert plain.links - few.links == pytest.approx(unit)
    terms = flops.forward_flops(PRESET.model, 14080, 126, 1024)
    products = sum(work for name, work in terms.items() if "core" not in name)
    saved = (1 - share) * products / (0.8 * 459e12)
    assert all_of_it.compute - plain.compute == pytest.approx(saved)
    some = {"tune.resident": True, "tune.lora": None, "tune.train": ("audio",)}
    share = trainable.trained_share(changes.changed(tuned, some))
    assert guessed(some, tuned).links == pytest.approx((2 + 2) * share * unit)


def test_frozen_weights_are_part_of_the_state():
    """In bfloat16, and of the adapters weights and two moments; a tenth more are connectors."""
    tune = config.TuneConfig(lora=config.LoraConfig())
    guess = guessed({}, dataclasses.replace(PRESET, init_from="weights", tune=tune))
    weights = 2 * flops.total_parameters(PRESET.model) / 64
    assert guess.state - 3 * guess.gradients == pytest.approx(weights, rel=0.1)
