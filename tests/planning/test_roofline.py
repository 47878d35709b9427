"""The schedule of a small program, timed by hand."""

import pytest

from ltx2_jax.chips import CHIPS
from ltx2_jax.planning.compiled import hlo
from ltx2_jax.planning.compiled.interconnect import Network
from ltx2_jax.planning.compiled.roofline import HBM_EFFICIENCY, roofline

CHIP = CHIPS["h100"]
SWITCH = Network(CHIP, None)
MESH = {"data": 4}
# A matrix product of 2 x 4096^3 FLOPs, 96 MiB of bfloat16; a gather of 64 MiB over four devices.
WIDE, SHARD, WHOLE = "bf16[4096,4096]{1,0}", "bf16[2048,4096]{1,0}", "bf16[8192,4096]{1,0}"
DOT = "dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
GROUPS = "channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
COMPUTE = 2 * 4096**3 / CHIP.flops
GATHER = 3 / 4 * 2**26 / CHIP.interconnect


def program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"ENTRY %main (a: bf16[4096,4096]) -> () {{\n{body}\n}}\n")


def ideal(*lines, **options):
    arguments = (f"%a = {WIDE} parameter(0)", f"%s = {SHARD} parameter(1)")
    module = program(*arguments, *lines, f"ROOT %r = {WIDE} copy-done(%a)")
    return roofline(module, MESH, SWITCH, **options)["ideal"]


def test_a_collective_is_waited_for_unless_it_is_asynchronous():
    times = ideal(f"%g = {WHOLE} all-gather(%s), {GROUPS}", f"%d = {WIDE} {DOT}")
    assert times["waited"] == pytest.approx(GATHER)
    assert times["step"] == pytest.approx(COMPUTE + GATHER)


@pytest.mark.parametrize(
    ("chip", "sides", "rate"),
    [("v6e", ("s8", "s8"), 2), ("v6e", ("s8", "bf16"), 1), ("v6e", ("f8e4m3fn",) * 2, 1),
     ("v7x", ("f8e4m3fn",) * 2, 2), ("v4", ("s8", "s8"), 1)],
)  # fmt: skip
def test_products_of_eight_bits_are_as_fast_as_the_chip_makes_them(chip, sides, rate):
    """If both sides have them: what is cast up is multiplied in bfloat16."""
    given = [f"%{name} = {side}[4096,4096]{{1,0}} parameter({i})"
             for i, (name, side) in enumerate(zip("ab", sides, strict=True))]  # fmt: skip
    dot = DOT.replace("%a, %a", "%a, %b")
    module = program(*given, f"ROOT %d = f32[4096,4096]{{1,0}} {dot}")
    times = roofline(module, MESH, Network(CHIPS[chip], None))["ideal"]
    assert times["compute"] == pytest.approx(2 * 4096**3 / CHIPS[chip].device_flops / rate)


def test_an_asynchronous_collective_hides_behind_what_runs_before_it_is_awaited():
    start = f"%g = ({SHARD}, {WHOLE}) all-gather-start(%s), {GROUPS}"
    done = f"%e = {WHOLE} all-gather-done(%g)"
    hidden = ideal(start, f"%d = {WIDE} {DOT}", done)
    assert GATHER < COMPUTE
    assert hidden["waited"] == 0
    assert hidden["step"] == pytest.approx(COMPUTE)
    assert hidden["interconnect"] == pytest.approx(GATHER)
    exposed = ideal(start, done, f"%d = {WIDE} {DOT}")
    assert exposed["waited"] == pytest.approx(GATHER)
    assert exposed["step"] == pytest.approx(COMPUTE + GATHER)


def test_what_crosses_between_slices_hides_behind_what_runs_before_the_answer():
    """A send to the host's runtime and a receive from it are one collective, here of 4 MiB."""
    part, end = "f32[1024,1024]{1,0}", "token[]"
    runtime = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale'
        '_runtime",_xla_host_transfer_rendezvous="sum_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    start = (
        f"%t = {end} after-all()",
        f"%send = ({part}, u32[], {end}) send(%s, %t), channel_id=1, {runtime}",
        f"%recv = ({part}, u32[], {end}) recv(%t), channel_id=2, {runtime}",
        f"%sent = {end} send-done(%send), channel_id=1, {runtime}",
    )
    answer = f"%got = ({part}, {end}) recv-done(%recv), channel_id=2, {runtime}"
    work = f"%d = {WIDE} {DOT}"
    chip = CHIPS["v5p"]
    crossing, busy = 2**22 / (50e9 / 8), 2 * 4096**3 / chip.flops

    def times(*lines):
        arguments = (f"%a = {WIDE} parameter(0)", f"%s = {part} parameter(1)")
        module = program(*arguments, *lines, f"ROOT %r = {WIDE} copy-done(%a)")
        return roofline(module, {"slice": 2, "data": 2}, Network(chip, None))["ideal"]

    hidden, exposed = times(*start, work, answer), times(*start, answer, work)
    assert hidden["interconnect"] == exposed["interconnect"] == pytest.approx(crossing)
    assert hidden["waited"] == pytest.approx(crossing - busy, rel=0.1)
    assert exposed["waited"] == pytest.approx(crossing, rel=0.01)


def test_a_copy_to_the_host_is_as_slow_as_its_bus():
    there = f"{WIDE[:-1]}:S(5)}}"
    start = f"%h = ({there}, {WIDE}, u32[]) copy-start(%a)"
    times = ideal(start, f"%d = {WIDE} {DOT}", f"%e = {there} copy-done(%h)")
    bus = 2 * 4096**2 / CHIP.host_bandwidth
    assert times["host"] == times["step"] == pytest.approx(bus)
    assert times["stalled"] == pytest.approx(bus - COMPUTE)
    assert (times["busy"], times["waited"]) == (pytest.approx(COMPUTE), 0)
    assert times["bound"] == "stalled"


def test_two_collectives_on_an_axis_go_one_after_the_other():
    times = ideal(
        f"%g = ({SHARD}, {WHOLE}) all-gather-start(%s), {GROUPS}",
        f"%h = ({SHARD}, {WHOLE}) all-gather-start(%s), {GROUPS}",
        f"%e = {WHOLE} all-gather-done(%g)",
        f"%f = {WHOLE} all-gather-done(%h)",
    )
    assert times["step"] == pytest.approx(2 * GATHER)


def test_an_instruction_takes_the_longer_of_its_flops_and_its_bytes():
    times = ideal(f"%c = {WIDE} copy(%a)")
    moved = 2 * 2 * 4096**2 / CHIP.hbm_bandwidth  # read and written
    assert times["step"] == times["hbm"] == pytest.approx(moved)
    assert times["compute"] == 0
    assert times["bound"] == "hbm"


def test_practical_rates_tell_attention_from_matrix_products():
    heads = "bf16[8,1024,64]{2,1,0}"
    module = program(
        f"%a = {heads} parameter(0)",
        f'%k.1 = {heads} custom-call(%a, %a, %a), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000000000000"}}}',
        "ROOT %d = bf16[8,1024,1024]{2,1,0} dot(%k.1, %a), lhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}",
    )
    product = 2 * 8 * 1024 * 1024 * 64
    times = roofline(module, MESH, SWITCH)
    assert times["ideal"]["compute"] == pytest.approx((1e12 + product) / CHIP.flops)
    slow = 1e12 / CHIP.attention_64 + product / CHIP.gemm
    assert times["practical"]["compute"] == pytest.approx(slow / CHIP.flops)
    rate = times["ideal"]["hbm"] / times["practical"]["hbm"]
    assert rate == pytest.approx(HBM_EFFICIENCY)


def test_utilisation_is_of_the_models_flops_on_all_devices():
    times = ideal(f"%d = {WIDE} {DOT}", model_flops=2 * 4096**3)
    assert times["mfu"] == pytest.approx(1 / 4)  # three of the four repeat the first one's work
