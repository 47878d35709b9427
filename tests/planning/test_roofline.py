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


def test_what_nobody_awaits_is_over_before_the_program_is():
    host = f"{WIDE[:-1]}:S(5)}}"
    times = ideal(f"%h = ({host}, {WIDE}, u32[]) copy-start(%a)")
    assert times["step"] == times["stalled"] == pytest.approx(2 * 4096**2 / CHIP.host_bandwidth)


def test_what_is_awaited_is_the_start_behind_its_updates():
    pair = f"({SHARD}, {WHOLE})"
    times = ideal(
        f"%g = {pair} all-gather-start(%s), {GROUPS}",
        f"%u = {pair} async-update(%g)",
        f"%e = {WHOLE} async-done(%u)",
        f"%d = {WIDE} {DOT}",
    )
    assert times["waited"] == pytest.approx(GATHER)
    assert times["step"] == pytest.approx(COMPUTE + GATHER)


def test_a_loop_takes_the_time_of_its_rounds():
    carried = f"(s32[], {WIDE})"
    body = "\n  ".join([
        f"%p = {carried} parameter(0)",
        "%i = s32[] get-tuple-element(%p), index=0",
        f"%a = {WIDE} get-tuple-element(%p), index=1",
        f"%d = {WIDE} {DOT}",
        f"ROOT %t = {carried} tuple(%i, %d)",
    ])  # fmt: skip
    module = hlo.parse(
        f"%body (p: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {{\n  {body}\n}}\n\n"
        f"ENTRY %main (x: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {{\n"
        f"  %x = {carried} parameter(0)\n"
        f"  ROOT %l = {carried} while(%x), condition=%none, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}\n}\n'
    )
    times = roofline(module, MESH, SWITCH)["ideal"]
    assert times["compute"] == times["step"] == pytest.approx(3 * COMPUTE)


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


def crossing(number=0):
    """Lines of a sum over slices of 4 MiB, and the line that awaits it."""
    part, end, n = "f32[1024,1024]{1,0}", "token[]", number
    runtime = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale'
        f'_runtime",_xla_host_transfer_rendezvous="sum_{n}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    start = (
        f"%t{n} = {end} after-all()",
        f"%send{n} = ({part}, u32[], {end}) send(%s, %t{n}), channel_id=1, {runtime}",
        f"%recv{n} = ({part}, u32[], {end}) recv(%t{n}), channel_id=2, {runtime}",
        f"%sent{n} = {end} send-done(%send{n}), channel_id=1, {runtime}",
    )
    return start, f"%got{n} = ({part}, {end}) recv-done(%recv{n}), channel_id=2, {runtime}"


def test_what_crosses_between_slices_hides_behind_what_runs_before_the_answer():
    """A send to the host's runtime and a receive from it are one collective."""
    (start, answer), (second, its_answer) = crossing(), crossing(1)
    work, chip = f"%d = {WIDE} {DOT}", CHIPS["v5p"]
    over, busy = 2**22 / (50e9 / 8), 2 * 4096**3 / chip.flops

    def times(*lines):
        arguments = (f"%a = {WIDE} parameter(0)", "%s = f32[1024,1024]{1,0} parameter(1)")
        module = program(*arguments, *lines, f"ROOT %r = {WIDE} copy-done(%a)")
        return roofline(module, {"slice": 2, "data": 2}, Network(chip, None))["ideal"]

    hidden, exposed = times(*start, work, answer), times(*start, answer, work)
    assert hidden["interconnect"] == exposed["interconnect"] == pytest.approx(over)
    assert hidden["waited"] == pytest.approx(over - busy, rel=0.1)
    assert exposed["waited"] == pytest.approx(over, rel=0.01)
    # Of two the second crosses after the first, and an answer is that to its own question.
    assert times(*start, *second, its_answer, work)["waited"] == pytest.approx(2 * over, rel=0.01)
    hidden = times(*start, *second, answer, work, its_answer)
    assert hidden["waited"] == pytest.approx(2 * over - busy, rel=0.1)


def test_a_copy_to_the_host_is_as_slow_as_its_bus():
    there = f"{WIDE[:-1]}:S(5)}}"
    start = f"%h = ({there}, {WIDE}, u32[]) copy-start(%a)"
    times = ideal(start, f"%d = {WIDE} {DOT}", f"%e = {there} copy-done(%h)")
    bus = 2 * 4096**2 / CHIP.host_bandwidth
    assert times["host"] == times["step"] == pytest.approx(bus)
    assert times["stalled"] == pytest.approx(bus - COMPUTE)
    assert (times["busy"], times["waited"]) == (pytest.approx(COMPUTE), 0)
    assert times["bound"] == "stalled"


def test_copies_to_the_host_and_to_vmem_go_side_by_side():
    host, vmem = f"{WIDE[:-1]}:S(5)}}", f"{WIDE[:-1]}:S(1)}}"
    times = ideal(
        f"%h = ({host}, {WIDE}, u32[]) copy-start(%a)",
        f"%v = ({vmem}, {WIDE}, u32[]) copy-start(%a)",
        f"%w = {vmem} copy-done(%v)",
        f"%d = {WIDE} {DOT}",
        f"%e = {host} copy-done(%h)",
    )
    assert times["step"] == pytest.approx(2 * 4096**2 / CHIP.host_bandwidth)


def test_a_step_is_no_faster_than_memory_gives_all_its_bytes():
    """A copy to VMEM runs beside one in HBM, at the bandwidth that both have together."""
    vmem = f"{WIDE[:-1]}:S(1)}}"
    times = ideal(
        f"%v = ({vmem}, {WIDE}, u32[]) copy-start(%a)",
        f"%c = {WIDE} copy(%a)",
        f"%w = {vmem} copy-done(%v)",
    )
    assert times["step"] == times["hbm"] == pytest.approx(3 * 2 * 4096**2 / CHIP.hbm_bandwidth)


def test_a_product_in_which_a_collective_is_fused_takes_the_longer_of_the_two():
    inner = "\n  ".join([
        f"%a = {WIDE} parameter(0)",
        f"%s = {SHARD} parameter(1)",
        f"%g = {WHOLE} all-gather(%s), {GROUPS}",
        f"ROOT %d = {WIDE} {DOT}",
    ])  # fmt: skip
    module = hlo.parse(
        f"%inner (a: bf16[4096,4096], s: bf16[2048,4096]) -> bf16[4096,4096] {{\n  {inner}\n}}\n\n"
        f"ENTRY %main (a: bf16[4096,4096], s: bf16[2048,4096]) -> bf16[4096,4096] {{\n"
        f"  %a = {WIDE} parameter(0)\n  %s = {SHARD} parameter(1)\n"
        f"  ROOT %f = {WIDE} fusion(%a, %s), kind=kOutput, calls=%inner\n}}\n"
    )
    times = roofline(module, MESH, SWITCH)["ideal"]
    assert times["interconnect"] == pytest.approx(GATHER)
    assert times["step"] == times["waited"] == pytest.approx(COMPUTE)


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


def test_a_kernel_moves_as_many_bytes_as_it_claims():
    claim = '{"custom_call_config":{"cost_estimate":{"bytes_accessed":"1000000000"}}}'
    kernel = f'custom-call(%a), custom_call_target="tpu_custom_call", backend_config={claim}'
    assert ideal(f"%k.1 = {WIDE} {kernel}")["hbm"] == pytest.approx(1e9 / CHIP.hbm_bandwidth)


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
