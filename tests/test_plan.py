"""plan compiles the program that runs, and says what it needs."""

import json
from functools import partial

import jax
import pytest
import tiny_codec

from ltx2_jax import plan, plan_vae, topology
from ltx2_jax.errors import UserError
from ltx2_jax.weights.video_vae import video_vae_config

TINY = video_vae_config(tiny_codec.VAE)


@pytest.fixture
def eight_devices(monkeypatch):
    """The machine's own devices in the place of a slice's."""
    monkeypatch.setattr(plan_vae, "tpu_devices", lambda topology: jax.devices())
    monkeypatch.setattr(topology, "hbm_bytes", lambda kind: 2**30)


def test_a_plan_counts_what_a_chip_holds_and_sends(eight_devices):
    facts = plan_vae.plan_vae(TINY, "decode", (9, 128, 128), "v5p:2x2x2")
    assert facts["tile"] == [9, 128, 128]
    assert facts["split"] == {"rows": 2, "columns": 4}
    # A float32 picture of [9, 128, 128, 3], an eighth on each chip.
    assert facts["output_bytes_per_chip"] == 9 * 128 * 128 * 3 * 4 // 8
    # bfloat16 matrices of the half that is compiled.
    assert facts["parameters"] < facts["weight_bytes_per_chip"] < 2 * facts["parameters"]
    assert set(facts["collectives"]) == {"collective-permute"}
    assert facts["fits"]
    assert facts["flops_of_tile"] == facts["flops_of_clip"]
    json.dumps(facts)


def test_a_long_clip_needs_no_more_than_a_tile(eight_devices):
    one = plan_vae.plan_vae(TINY, "decode", (73, 32, 64), "v5p:2x2x2")
    many = plan_vae.plan_vae(TINY, "decode", (4801, 32, 64), "v5p:2x2x2")
    assert many["peak_bytes_per_chip"] < 1.25 * one["peak_bytes_per_chip"]
    assert many["flops_of_clip"] > 60 * one["flops_of_clip"]


def test_what_does_not_fit_is_said_and_is_not_success(eight_devices, monkeypatch, capsys):
    monkeypatch.setattr(topology, "hbm_bytes", lambda kind: 2**10)
    monkeypatch.setattr(plan_vae, "VAES", {"2.3": TINY})
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    arguments = ["--what=vae", "--topology=v5p:2x2x2", "--height=32", "--width=64", "--frames=1"]
    assert plan.cli(arguments) == 1
    assert "does not fit: 0.00 GiB too much" in capsys.readouterr().out
    assert plan.cli([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_illegal_sizes_are_refused_before_compiling(eight_devices):
    refused = partial(plan_vae.plan_vae, TINY, "encode", topology="v5p:2x2x2")
    with pytest.raises(UserError, match="--frames=10 is not 8 k"):
        refused(size=(10, 64, 64))
    with pytest.raises(UserError, match="height 60"):
        refused(size=(9, 60, 64))


def test_collectives_are_counted_once_each():
    program = """
      %a = f32[2] all-gather-start(%x), %b = f32[2] all-gather-done(%a)
      %c = f32[2] collective-permute(%b), %d = f32[2] collective-permute(%c)
      %all-to-all.3 = f32[2] add(%c, %d)
    """
    assert topology.collectives(program) == {"all-gather": 1, "collective-permute": 2}


@pytest.mark.parametrize(
    ("kind", "gib"), [("TPU v5", 95), ("TPU v5 lite", 16), ("TPU v6 lite", 32), ("cpu", None)]
)
def test_memory_of_a_chip_is_known_by_its_kind(kind, gib):
    assert topology.hbm_bytes(kind) == (gib and gib * 2**30)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("JAX TPU support not installed; cannot generate", "pip install 'ltx2-jax"),
        ("INVALID_ARGUMENT: Invalid TPU external name", "--topology=v9:1x1: .*v5p:2x2x1, .*"),
    ],
)
def test_a_slice_that_is_not_known_is_one_line(monkeypatch, raised, message):
    def fail(**_):
        raise RuntimeError(raised)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UserError, match=message):
        topology.tpu_devices("v9:1x1")
