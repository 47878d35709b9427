"""Groups of devices are read in every form, and named by the axes of the mesh."""

import pytest

from ltx2_jax.planning.compiled import hlo
from ltx2_jax.planning.compiled.collectives import axes_of, groups_of

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
