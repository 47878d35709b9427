"""One table of chips, found by the kind of a jax device."""

import jax
import jax.numpy as jnp
import pytest

from ltx2_jax import chips
from ltx2_jax.planning.topology import tpu_devices
from ltx2_jax.sharding import make_mesh

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


def test_products_of_eight_bits_are_named_as_xla_does_or_as_weights_are_kept():
    v6e, v7x = chips.CHIPS["v6e"], chips.CHIPS["v7x"]
    for name, rates in (("s8", (2, 1)), ("int8", (2, 1)), ("f8e4m3fn", (1, 2)), ("fp8", (1, 2))):
        assert (v6e.products(name), v7x.products(name)) == rates
    assert v6e.products("bf16") == v7x.products("bf16") == 1


@pytest.mark.parametrize("slice_", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_of_every_tpu_takes_the_options_and_puts_the_checker_in(slice_):
    def bytes_of_code(**checked):
        options = chips.compiler_options(training=True, **checked)
        program = jax.jit(lambda x: jnp.tanh(x @ x), compiler_options=options)
        found = program.lower(jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)).compile()
        return found.memory_analysis().generated_code_size_in_bytes

    with jax.set_mesh(make_mesh(devices=tpu_devices(slice_))):
        assert bytes_of_code(checked=True) > bytes_of_code()


def test_an_option_that_no_compiler_knows_is_refused_by_it():
    with jax.set_mesh(make_mesh(devices=tpu_devices("v5p:2x2x1"))):
        program = jax.jit(jnp.sin, compiler_options={"xla_tpu_no_such_checker": True})
        with pytest.raises(Exception, match="xla_tpu_no_such_checker"):
            program.lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()


@pytest.mark.parametrize(
    ("platform", "kind", "training", "sampling"),
    [
        ("tpu", "TPU v5", "sparse_core", None),
        ("tpu", "TPU v6 lite", "sparse_core", None),
        ("tpu", "TPU7x", "large_2nd_minor_layout", "large_2nd_minor_layout"),
        ("tpu", "TPU v5 lite", None, None),
        ("gpu", "NVIDIA H100 80GB HBM3", None, None),
        ("cpu", "cpu", None, None),
    ],
)
def test_a_program_has_the_options_of_its_chip_and_work(
    monkeypatch, platform, kind, training, sampling
):
    monkeypatch.setattr(chips, "target", lambda: (platform, kind))
    for work, wanted in ((True, training), (False, sampling)):
        plain = chips.compiler_options(training=work)
        checked = chips.compiler_options(training=work, checked=True)
        assert (plain is None) == (wanted is None)
        assert wanted is None or any(wanted in name for name in plain)
        added = set(checked or {}) - set(plain or {})
        assert (len(added) == 3 and all("sdc" in name for name in added)) == (platform == "tpu")
    assert (chips.one_run_options() is None) == (platform != "cpu")
