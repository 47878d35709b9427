"""Every host of a slice has rows to read: those that libtpu's own topologies give it."""

import importlib.util
from pathlib import Path

import pytest

from ltx2_jax import config, plan
from ltx2_jax.errors import UserError
from ltx2_jax.fields import replaced
from ltx2_jax.planning import hosts, plan_hosts, request_of

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
CONFIGS = Path(__file__).parents[2] / "configs"

# Preset, slice, mesh (None: the preset's), rows of a host, hosts with the same, rows of host 0.
SLICES = [
    ("ltx2_19b", "v5p:2x2x1", (4, 1, 1), 4, 1, (0, 1, 2, 3)),
    ("ltx2_19b", "v5p:2x2x2", (8, 1, 1), 4, 1, None),  # jax 0.10 and 0.12 order it differently
    ("ltx2_19b", "v5p:2x2x4", (16, 1, 1), 4, 1, (0, 4, 8, 12)),
    ("ltx2_19b", "v5p:4x4x4", None, 4, 1, (0, 4, 16, 20)),
    ("ltx2_3_22b", "v5p:4x4x4", None, 4, 1, (0, 4, 16, 20)),
    ("ltx2_5_22b", "v5p:4x4x4", None, 4, 1, (0, 4, 16, 20)),
    ("ltx2_19b", "v5p:4x4x4", (16, 4, 1), 2, 2, (0, 4)),
    ("ltx2_19b", "v5p:4x4x4", (32, 1, 2), 4, 2, (0, 2, 8, 10)),
    ("ltx2_19b", "v5p:4x4x4", (16, 2, 2), 2, 2, (0, 2)),
    ("ltx2_19b", "v5p:4x4x4", (8, 1, 8), 2, 4, (0, 2)),
    ("ltx2_19b:v5p256", "v5p:4x4x8", None, 4, 1, (0, 8, 32, 40)),
    ("ltx2_3_22b:v5p256", "v5p:4x4x8", None, 4, 1, (0, 8, 32, 40)),
    ("ltx2_19b:v5p512", "v5p:4x8x8", None, 4, 1, None),
    ("ltx2_3_22b:v5p512", "v5p:4x8x8", None, 4, 1, None),
    ("ltx2_19b:20s", "v5p:8x8x8", None, 4, 4, (0, 2, 16, 18)),
    ("ltx2_3_22b:20s", "v5p:8x8x8", None, 4, 4, (0, 2, 16, 18)),
    ("ltx2_19b", "v6e:2x4", (8, 1, 1), 4, 1, (0, 1, 2, 3)),
    ("ltx2_19b", "v6e:4x4", (16, 1, 1), 4, 1, (0, 1, 6, 15)),
    ("ltx2_19b", "v5e:4x4", (16, 1, 1), 4, 1, (0, 1, 6, 15)),
    ("ltx2_19b", "v6e:8x8", (64, 1, 1), 4, 1, (0, 1, 8, 9)),
    ("ltx2_19b:v6e256", "v6e:16x16", None, 4, 1, (0, 1, 16, 17)),
    ("ltx2_3_22b:v6e256", "v6e:16x16", None, 2, 1, (0, 8)),
    ("ltx2_19b:v7x128", "tpu7x:4x4x4", None, 8, 1, (0, 1, 8, 9, 32, 33, 40, 41)),
    ("ltx2_3_22b:v7x128", "tpu7x:4x4x4", None, 8, 1, (0, 1, 8, 9, 32, 33, 40, 41)),
    ("ltx2_19b", "v4:4x4x4", (64, 1, 1), 4, 1, (0, 4, 16, 20)),
]


def preset(name, **changes):
    file, _, variant = name.partition(":")
    loaded = config.load(f"{CONFIGS}/{file}.py{variant and ':' + variant}")
    return replaced(loaded, {path: str(value) for path, value in changes.items()})


def planned(run, topology):
    return plan_hosts(run, request_of(run), topology)


@needs_compiler
@pytest.mark.parametrize(("name", "topology", "mesh", "rows", "same", "first"), SLICES)
def test_every_host_of_a_slice_has_rows(name, topology, mesh, rows, same, first):
    run = preset(name)
    if mesh is not None:  # and a clip for each of its shards
        changes = dict(zip(("mesh.data", "mesh.model", "mesh.sequence"), mesh, strict=True))
        run = preset(name, **changes | {"data.batch_size": mesh[0]})
    facts = planned(run, topology)
    found = [host["rows"] for host in facts["hosts"]]
    assert facts["fits"]
    assert set().union(*found) == set(range(run.data.batch_size))
    assert {len(own) for own in found} == {rows}
    assert all(own == sorted(set(own)) for own in found)
    assert all(found.count(own) == same for own in found)
    assert {len(host["shares_with"]) for host in facts["hosts"]} == {same - 1}
    assert first is None or tuple(found[0]) == first


@needs_compiler
def test_hosts_of_another_slice_have_rows_of_their_own():
    one = planned(preset("ltx2_19b", **{"data.batch_size": 8}), "v5p:2x2x2")
    two = planned(preset("ltx2_19b", **{"data.batch_size": 16}), "2xv5p:2x2x2")
    assert two["split"] == {"slice": 2, "data": 8}
    rows = [host["rows"] for host in one["hosts"]]
    assert [host["rows"] for host in two["hosts"]] == rows + [[8 + r for r in own] for own in rows]


@needs_compiler
def test_a_slice_with_a_host_without_rows_does_not_fit(monkeypatch):
    for rows, fits in (
        (((0, 1), (2, 3)), True),
        (((0, 1, 2, 3), ()), False),
        (((0, 1), (1, 2)), False),
    ):
        monkeypatch.setattr(hosts, "rows_of_host", lambda *given, rows=rows: rows[given[-1]])
        facts = planned(
            preset("ltx2_19b", **{"data.batch_size": 4, "mesh.data": 4, "mesh.model": 2}),
            "v5p:2x2x2",
        )
        assert facts["fits"] == fits
        assert ("rows are missing" in hosts.describe_hosts(facts)) != fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.batch_size": 12}, "data.batch_size=12 is not a multiple of mesh.data=8"),
        ({"data.batch_size": 8, "mesh.sequence": 4}, "sequence=4 does not divide 6 video tokens"),
    ],
)
def test_hosts_of_a_run_that_cannot_be_have_no_rows(changes, message):
    run = preset("ltx2_19b", **changes)
    request = request_of(run, num_frames=9, height=32, width=96)
    with pytest.raises(UserError, match=message):
        plan_hosts(run, request, "v5p:2x2x2")


@needs_compiler
def test_the_command_prints_a_row_for_every_host(monkeypatch, capsys):
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    flags = [f"--config={CONFIGS}/ltx2_19b.py", "--topology=v5p:2x2x2", "--hosts", "--mesh=4,1,2"]
    assert plan.cli(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rows of 64 clips a step on v5p:2x2x2 (8 x v5p, 2 hosts)"
    assert lines[1] == "  split          4 data, 2 sequence"
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    assert lines[-1] == "  every host has rows, together all of the batch"


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2, 5"), ((0, 2, 3), "0, 2-3")]
)
def test_rows_are_listed_in_short(numbers, text):
    assert hosts.spans(numbers) == text
