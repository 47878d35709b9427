"""plan compiles the program that runs, and says what it needs."""

import dataclasses
import json
from functools import partial

import jax
import pytest
import tiny_codec

from ltx2_jax import chips, plan, planning
from ltx2_jax.errors import UserError
from ltx2_jax.planning import vae as plan_vae
from ltx2_jax.planning.text import TEXT_ENCODERS
from ltx2_jax.weights.names.video_vae import video_vae_config

TINY = video_vae_config(tiny_codec.VIDEO_VAE)
GEMMA = dataclasses.replace(TEXT_ENCODERS["2.5"].gemma, quantized="int8")
ENCODER = dataclasses.replace(TEXT_ENCODERS["2.5"], gemma=GEMMA)


@pytest.fixture
def eight_devices(monkeypatch):
    """The machine's own devices in the place of a slice's."""
    monkeypatch.setattr(plan_vae, "tpu_devices", lambda topology: jax.devices())
    monkeypatch.setattr(chips, "hbm_bytes", lambda kind: 2**30)


def test_a_plan_counts_what_a_chip_holds_and_sends(eight_devices):
    facts = plan_vae.plan_vae(TINY, "decode", (9, 128, 128), "v5p:2x2x2")
    assert facts["tile"] == [9, 128, 128]
    assert facts["split"] == {"rows": 2, "columns": 4}
    # A float32 picture of [9, 128, 128, 3], an eighth on each chip.
    assert facts["output_bytes_per_device"] == 9 * 128 * 128 * 3 * 4 // 8
    # bfloat16 matrices of the half that is compiled.
    assert facts["parameters"] < facts["argument_bytes_per_device"] < 2 * facts["parameters"]
    # Each convolution fetches the border of its neighbours, rows and columns one after another.
    assert set(facts["collective_counts"]) == {"collective-permute"}
    assert sorted(row["axes"] for row in facts["collectives"]) == [["columns"], ["rows"]]
    assert facts["flops"] * 8 == pytest.approx(facts["flops_of_tile"], rel=0.3)
    assert facts["fits"]
    assert facts["flops_of_tile"] == facts["flops_of_clip"]
    json.dumps(facts)


def test_a_long_clip_needs_no_more_than_a_tile(eight_devices):
    one = plan_vae.plan_vae(TINY, "decode", (73, 32, 64), "v5p:2x2x2")
    many = plan_vae.plan_vae(TINY, "decode", (4801, 32, 64), "v5p:2x2x2")
    assert many["peak_bytes_per_device"] < 1.25 * one["peak_bytes_per_device"]
    assert many["flops_of_clip"] > 60 * one["flops_of_clip"]
    assert one["tiles"] == 1
    assert many["tiles"] > 4801 / 73


def test_each_half_has_its_own_operations(eight_devices, monkeypatch):
    monkeypatch.setattr(plan_vae, "compile_facts", lambda *_: {})
    halves = [plan_vae.plan_vae(TINY, x, (9, 128, 128), "v5p:2x2x2") for x in ("encode", "decode")]
    encode, decode = (facts["flops_of_tile"] for facts in halves)
    assert encode == halves[0]["flops_of_clip"] != decode


def test_what_does_not_fit_is_said_and_is_not_success(eight_devices, monkeypatch, capsys):
    monkeypatch.setattr(chips, "hbm_bytes", lambda kind: 2**10)
    monkeypatch.setitem(plan_vae.VAES, "2.3", TINY)
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    arguments = ["--what=vae", "--topology=v5p:2x2x2", "--height=32", "--width=64", "--frames=1"]
    assert plan.cli(arguments) == 1
    assert "does not fit: 0.00 GiB too much" in capsys.readouterr().out
    assert plan.cli([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            ["--what=vae", "--half=encode", "--release=2.0", "--frames=9"],
            (plan_vae.VAES["2.0"], "encode", (9, 704, 1280)),
        ),
        (["--what=text", "--release=2.5", "--batch=8", "--quantize=int8"], (ENCODER, 8)),
    ],
)
def test_the_command_plans_the_release_that_it_names_as_it_says(flags, wanted, monkeypatch):
    given = []
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    for name in ("plan_vae", "plan_text"):
        monkeypatch.setattr(planning, name, lambda *args: given.append(args) or {"fits": True})
    monkeypatch.setattr(planning, "describe", str)
    assert plan.cli(["--topology=v6e:2x4", *flags]) == 0
    assert given == [(*wanted, "v6e:2x4")]


def test_illegal_sizes_are_refused_before_compiling(eight_devices):
    refused = partial(plan_vae.plan_vae, TINY, "encode", topology="v5p:2x2x2")
    with pytest.raises(UserError, match="--frames=10 is not 8 k"):
        refused(size=(10, 64, 64))
    with pytest.raises(UserError, match="height 60"):
        refused(size=(9, 60, 64))
