"""A program that does not fit is told in numbers, in whatever form the compiler says so."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.planning.compiled import memory

HBM = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(114.69G) exceeds available HBM (31.25G)."
)
REPORT = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/while/body/dot_general" source_file="f.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265 = fusion(custom-call.224), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[128,6]{1,0}
     Unpadded size: 3.0K
     ==========================
"""
SCOPED = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for "
    "%flash.1 = bf16[1,16,80]. Scoped allocation with size 37.22M and limit 32.00M exceeded "
    "scoped vmem limit by 5.22M."
)
WINDOW = (
    "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: "
    "#allocation2 [shape = 'u8[268435456]{0}', space=vmem, size = 0x10000000, scoped, tag = 'x'] "
    ":: big_block.1"
)
GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("text", "where", "needed", "available"),
    [
        (HBM, "hbm", 114.69 * GIB, 31.25 * GIB),
        (REPORT, "hbm", 63.80 * GIB, 30.75 * GIB),
        (SCOPED, "vmem", 37.22 * MIB, 32 * MIB),
        (WINDOW, "vmem", 2**28, 2**27),
    ],
)
def test_every_form_of_too_much_is_read(text, where, needed, available):
    facts = memory.overflow(jax.errors.JaxRuntimeError(text))
    assert not facts["fits"]
    assert facts["memory"] == where
    assert facts["needed_bytes"] == round(needed)
    assert facts["available_bytes"] == round(available)


def test_the_message_names_the_excess_and_the_largest_allocations():
    facts = memory.overflow(jax.errors.JaxRuntimeError(REPORT))
    assert facts["largest"] == [
        {"bytes": 2 * GIB, "shape": "f32[32,4096,4096]{1,2,0:T(8,128)}",
         "operator": "jit(step)/while/body/dot_general"},
        {"bytes": 512 * MIB, "shape": "bf16[128,6]{1,0}", "operator": ""},
    ]  # fmt: skip
    first, second, _ = facts["message"].split("\n")
    assert first == ("does not fit: needs 63.80 of 30.75 GiB of HBM per device, 33.05 too much")
    assert second.split() == [
        "2.00", "GiB", "f32[32,4096,4096]{1,2,0:T(8,128)}", "jit(step)/while/body/dot_general"
    ]  # fmt: skip
    kernel = memory.overflow(jax.errors.JaxRuntimeError(WINDOW))["message"]
    assert kernel.endswith(
        "256.00 of 128.00 MiB of VMEM per device, 128.00 too much, in big_block.1"
    )


def test_other_errors_are_no_overflow():
    assert memory.overflow(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")) is None
    odd = memory.overflow(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: in a new way"))
    assert odd["message"] == "RESOURCE_EXHAUSTED: in a new way"
    assert odd["needed_bytes"] is None


def test_donated_memory_counts_once(monkeypatch):
    monkeypatch.setattr("ltx2_jax.chips.hbm_bytes", lambda kind: 4096 + 4096)
    x = jax.ShapeDtypeStruct((1024,), "float32")
    kept = jax.jit(lambda x: x + 1).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    facts = [memory.memory_facts(program, "cpu") for program in (kept, donated)]
    assert [f["aliased_bytes_per_device"] for f in facts] == [0, 4096]
    assert facts[0]["peak_bytes_per_device"] == facts[1]["peak_bytes_per_device"] + 4096
    assert "(0.00 in place)" in memory.describe_memory(facts[1], "given", "results")


def test_memory_is_added_up_on_the_device_and_on_its_host(monkeypatch):
    sizes = {"argument": 100, "output": 50, "alias": 20, "temp": 7}
    fields = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
    fields |= {f"host_{name}_size_in_bytes": 10 * size for name, size in sizes.items()}
    analysis = SimpleNamespace(generated_code_size_in_bytes=3, **fields)
    compiled = SimpleNamespace(memory_analysis=lambda: analysis)
    facts = memory.memory_facts(compiled, "TPU v5")
    assert facts["peak_bytes_per_device"] == 100 + 50 - 20 + 7 + 3
    assert facts["host_bytes_per_device"] == 10 * (100 + 50 - 20 + 7)
    assert facts["hbm_bytes_per_device"] == round(95.74 * GIB)
    for room, fits in ((140, True), (139, False), (None, True)):  # None: nobody knows
        monkeypatch.setattr("ltx2_jax.chips.hbm_bytes", lambda kind, room=room: room)
        assert memory.memory_facts(compiled, "cpu")["fits"] == fits


@pytest.mark.parametrize("error", [None, UserError("no")])
def test_what_is_compiled_for_chips_that_are_not_here_is_kept_in_no_cache(error):
    """JAX could not read it back; what is compiled for those that are here is kept as before."""

    class Lowered:
        def compile(self):
            if error:
                raise error
            return jax.config.jax_persistent_cache_min_compile_time_secs

    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with pytest.raises(UserError) if error else contextlib.nullcontext():
        assert memory.compile_or_overflow(Lowered()) == float("inf") > before
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
