"""The text of a program is read as XLA prints it: layouts, tuples, metadata of several lines."""

import pytest

from ltx2_jax.planning.compiled import hlo
from ltx2_jax.planning.compiled.execution import loops, steps

PROGRAM = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

FileNames
1 "f.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x, %y)
}

%body (p.1: (s32[], f32[8])) -> (s32[], /*index=1*/f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x.1 = f32[8]{0} get-tuple-element(%p.1), index=1
  %kernel.2 = (f32[8]{0}, f32[2,8]{1,0:T(8,128)}) custom-call(%x.1, /*index=1*/%x.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 512, \\"odd\\": \\"}\\"}"
}}, metadata={op_name="jit(f)/while/body/kernel[a={1}]"}, backend_config={"custom_call_config":\
{"body":"TUzv","cost_estimate":{"flops":"640","bytes_accessed":"12"}}}
  %y.1 = f32[8]{0} get-tuple-element(%kernel.2), index=0
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y.1)
}

%condition (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %zero = s32[] constant(START)
  %init = (s32[], f32[8]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def program(start="0", limit="5"):
    return hlo.parse(PROGRAM.replace("START", start).replace("LIMIT", limit))


def test_computations_and_their_instructions_are_found():
    module = program()
    assert module.entry.name == "main"
    assert set(module.computations) == {"add", "body", "condition", "main"}
    body = module.computations["body"]
    assert [i.opcode for i in body.instructions if i.operands] == [
        *("get-tuple-element", "add", "get-tuple-element"),
        *("custom-call", "get-tuple-element", "tuple"),
    ]
    assert body.root.operands == ("next", "y.1")
    assert [i.name for i in body.users["x.1"]] == ["kernel.2"]
    assert module.entry.parameters[0].op_name == "params['w']"


def test_attributes_of_several_lines_are_one_instruction():
    kernel = program().computations["body"].by_name["kernel.2"]
    assert kernel.operands == ("x.1", "x.1")
    assert kernel.attribute("custom_call_target") == '"tpu_custom_call"'
    assert kernel.attribute("frontend_attributes").startswith("kernel_metadata={")
    assert kernel.op_name == "jit(f)/while/body/kernel[a={1}]"
    assert kernel.config["custom_call_config"]["cost_estimate"]["flops"] == "640"
    assert [shape.dims for shape in kernel.shapes] == [(8,), (2, 8)]


@pytest.mark.parametrize(
    ("text", "size", "padded", "space"),
    [
        ("f32[3,4]{1,0}", 48, 48, hlo.HBM),
        # Two minor dimensions, rows 4 -> 8 and columns 64 -> 128, as in a table of half a head.
        ("bf16[10,4,64]{2,1,0:T(8,128)(2,1)}", 5120, 20480, hlo.HBM),
        # The minor dimension is the first one here.
        ("bf16[100,8]{0,1:T(8,128)(2,1)S(1)}", 1600, 2048, hlo.VMEM),
        ("f32[6144]{0:T(1024)S(1)SC(0:3072)}", 24576, 24576, hlo.VMEM),
        ("bf16[2,8]{1,0:T(8,128)S(5)}", 32, 2048, hlo.HOST),
        ("s32[]{:T(128)}", 4, 4, hlo.HBM),
        ("pred[7]{0}", 7, 7, hlo.HBM),
        ("s4[10]{0}", 5, 5, hlo.HBM),
        ("f8e4m3fn[10]{0}", 10, 10, hlo.HBM),
        ("token[]", 0, 0, hlo.HBM),
        ("f32[<=6,2]{1,0}", 48, 48, hlo.HBM),
    ],
)
def test_an_array_takes_whole_tiles_in_one_memory(text, size, padded, space):
    (shape,) = hlo.shapes(text)
    assert (shape.bytes, shape.padded_bytes, shape.space) == (size, padded, space)


def test_tuples_are_flattened():
    found = hlo.shapes("((bf16[1,4]{1,0}, token[]), (s32[], u32[]{:S(2)}), f32[2]{0})")
    assert [shape.dtype for shape in found] == ["bf16", "token", "s32", "u32", "f32"]


def test_rounds_of_a_loop_come_from_its_condition():
    assert [(loop.times, loop.trips) for loop in loops(program())] == [(1, 5)]
    assert loops(program(start="2"))[0].trips == 3
    runs = {step.instruction.name: (step.times, step.loops) for step in steps(program())}
    assert runs["kernel.2"] == (5, ("jit(f)/while",))
    assert runs["loop"] == (1, ())


@pytest.mark.parametrize(
    ("step", "rounds"),
    [
        ("%next = s32[] add(%i, %two)\n  %two = s32[] constant(2)", 3),  # unrolled by the compiler
        ("%half = s32[] add(%one, %i)\n  %next = s32[] add(%half, %one)", 3),
        ("%c = s32[] copy(%i)\n  %next = s32[] fusion(%c), kind=kLoop, calls=%increment", 5),
        ("%next = s32[] multiply(%i, %one)", None),
    ],
)
def test_a_round_may_count_in_larger_steps(step, rounds):
    text = PROGRAM.replace("LIMIT", "5").replace("START", "0")
    text = text.replace("%next = s32[] add(%i, %one)", step)
    text = text.replace(
        "%body (",
        "%increment (n: s32[]) -> s32[] {\n  %n = s32[] parameter(0)\n  %u = s32[] constant(1)\n"
        "  ROOT %m = s32[] add(%n, %u)\n}\n\n%body (",
    )
    assert loops(hlo.parse(text))[0].trips == rounds


def test_a_loop_of_unknown_length_is_said_and_counts_once():
    text = PROGRAM.replace("LIMIT", "5").replace("constant(START)", "copy(%seed)")
    text = text.replace("  %zero", "  %seed = s32[] parameter(1)\n  %zero")
    module = hlo.parse(text)
    assert loops(module)[0].trips is None
    runs = {step.instruction.name: step.times for step in steps(module)}
    assert runs["kernel.2"] == 1


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("not a program")
