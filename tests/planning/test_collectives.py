"""Groups of devices are read in every form, and named by the axes of the mesh."""

import pytest

from ltx2_jax.planning.compiled import hlo
from ltx2_jax.planning.compiled.collectives import axes_of, collectives, groups_of

MESH = {"data": 2, "model": 2, "sequence": 2}
SEQUENCE = [[0, 1], [2, 3], [4, 5], [6, 7]]
MODEL = [[0, 2], [1, 3], [4, 6], [5, 7]]
DATA = [[0, 4], [1, 5], [2, 6], [3, 7]]


def instruction(attributes):
    return hlo.Instruction("x", "all-reduce", (), (), "", f", channel_id=1, {attributes}")


def sets(groups):
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize(
    ("attributes", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", SEQUENCE, ("sequence",)),
        ("replica_groups=[4,2]<=[8]", SEQUENCE, ("sequence",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", MODEL, ("model",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", DATA, ("data",)),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], ("model", "sequence")),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]],
         ("data", "sequence")),
        ("replica_groups=mesh['data'=2,'model'=2,'sequence'=2] {'model'}", MODEL, ("model",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", SEQUENCE, ("sequence",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]],
         ("data", "model")),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'a','b'}", DATA, ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", DATA, ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", SEQUENCE,
         ("sequence",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", MODEL, ("model",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]],
         ("data", "sequence")),
        ("replica_groups={}", [list(range(8))], ("data", "model", "sequence")),
        ("source_target_pairs={{0,1},{1,0},{2,3}}", [[0, 1], [0, 1], [2, 3]], ("sequence",)),
        ("source_target_pairs={{0,1},{2,2}}", [[0, 1], [2, 2]], ("sequence",)),
        ("source_target_pairs={{0,4},{4,2}}", [[0, 4], [2, 4]], ("data", "model")),
    ],
)  # fmt: skip
def test_groups_in_every_form_are_axes_of_the_mesh(attributes, groups, axes):
    found = groups_of(instruction(attributes + ", dimensions={0}"), 8)
    assert sets(found) == sets(groups)
    assert axes_of(found, MESH) == axes


def test_a_part_of_an_axis_is_smaller_than_the_axis():
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axes_of(groups, {"data": 2, "sequence": 4}) == ("sequence",)
    assert len(groups[0]) < 4


def test_a_collective_that_is_awaited_later_is_asynchronous():
    text = """ENTRY %main (s: bf16[2,4]) -> bf16[8,4] {
  %s = bf16[2,4]{1,0} parameter(0)
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%s), replica_groups=[1,4]<=[4]
  %d = bf16[8,4]{1,0} all-gather-done(%g)
  ROOT %h = bf16[8,4]{1,0} all-gather(%s), replica_groups=[1,4]<=[4]
}
"""
    found = collectives(hlo.parse(text), {"data": 4})
    assert [(c.kind, c.bytes, c.asynchronous) for c in found] == [
        ("all-gather", 64, True), ("all-gather", 64, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("root", "kind", "size"),
    [
        ("bf16[2,4]{1,0} copy(%k)", "reduce-scatter", 16),
        ("(bf16[2,4]{1,0}, bf16[8,4]{1,0}) tuple(%k, %r)", "all-reduce", 64),
    ],
)
def test_a_sum_of_which_a_device_keeps_its_share_alone_is_scattered(root, kind, size):
    result = root.split(" copy")[0].split(" tuple")[0]
    text = f"""%inner (p: bf16[8,4], i: s32[]) -> bf16[2,4] {{
  %p = bf16[8,4]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %r = bf16[8,4]{{1,0}} all-reduce(%p), replica_groups=[1,4]<=[4]
  %k = bf16[2,4]{{1,0}} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={{2,4}}
  ROOT %o = {root}
}}

ENTRY %main (a: bf16[8,4], n: s32[]) -> bf16[2,4] {{
  %a = bf16[8,4]{{1,0}} parameter(0)
  %n = s32[] parameter(1)
  ROOT %f = {result} fusion(%a, %n), kind=kCustom, calls=%inner
}}
"""
    (found,) = collectives(hlo.parse(text), {"data": 4})
    assert (found.kind, found.bytes, found.group) == (kind, size, 4)
