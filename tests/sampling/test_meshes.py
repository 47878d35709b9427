"""The mesh that clips are sampled on by default: memory first, nothing done twice."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ltx2_jax.sampling import meshes
from ltx2_jax.sampling.loading import Files, Weights
from ltx2_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "v2.3"
GIB = 2**30
WEIGHTS = 36 * GIB  # those of the released models, in bfloat16


def chosen(devices, room, rows, tokens, *, weights=WEIGHTS, heads=32):
    return meshes.choose(
        devices, heads=heads, weights=weights, room=room * GIB, rows=rows, tokens=tokens
    )


@pytest.mark.parametrize(
    ("devices", "room", "rows", "tokens", "mesh"),
    [
        (8, 95, [1, 1], [3520, 14080], (1, 1, 8)),  # the weights are whole: tokens alone are split
        (8, 31, [1, 1], [3520, 14080], (1, 2, 4)),  # halves fit
        (4, 15, [1], [6144], (1, 4, 1)),  # a fourth fits
        (8, 31, [4], [6144], (4, 2, 1)),  # passes exchange nothing
        (8, 31, [4, 1], [3520, 14080], (1, 2, 4)),  # those of stage 1 alone would repeat stage 2
        (8, 95, [2], [6144], (2, 1, 4)),
        (8, 95, [6], [6144], (2, 1, 4)),  # three clips of two passes
        (8, 95, [16], [6144], (8, 1, 1)),
        (1, 15, [1], [6144], (1, 1, 1)),  # too small: the caller sees that
        (8, 95, [1], [3520, 220], (1, 2, 4)),  # beside a keyframe of 220 tokens 8 shards are none
        (6, 95, [1], [6144], (1, 1, 6)),
        (6, 95, [1], [3520], (3, 1, 2)),  # nothing divides: as little as can be is repeated
    ],
)
def test_memory_decides_then_passes_then_tokens(devices, room, rows, tokens, mesh):
    assert chosen(devices, room, rows, tokens) == mesh


def test_without_a_clip_to_make_all_devices_take_rows():
    assert chosen(8, 31, (), ()) == (4, 2, 1)
    assert meshes.choose(8, heads=32, weights=1e15, room=None) == (8, 1, 1)


def test_heads_are_not_cut():
    assert chosen(8, 4, [1], [6144], heads=4) == (1, 4, 2)


@pytest.mark.parametrize("devices", [2, 3, 4, 6, 8, 12, 16, 48])
def test_a_mesh_without_repeated_work_is_found_if_there_is_one(devices):
    for rows, tokens in (([1], [36]), ([4, 1], [64]), ([3], [10]), ([8, 2], [20, 6])):
        data, model, sequence = chosen(devices, 95, rows, tokens, heads=8)
        assert data * model * sequence == devices
        assert 8 % model == math.gcd(*tokens) % sequence == 0
        clean = [
            mesh for mesh in meshes.legal(devices, 8, tokens) if all(n % mesh[0] == 0 for n in rows)
        ]
        assert not clean or (data, model, sequence) in clean


def test_weights_move_to_another_mesh_without_being_read_again(monkeypatch):
    files = Files.open([GOLDEN / "checkpoint.safetensors"], GOLDEN / "gemma", None, None)
    one, two = make_mesh(8, 1, 1), make_mesh(1, 2, 4)
    weights = Weights(files.release, files.networks("float32"), one)
    before = jax.tree.map(np.asarray, weights.params())
    monkeypatch.setattr(weights, "_load", None)
    weights.move(two)
    after = weights.params()
    jax.tree.map(np.testing.assert_array_equal, after, before)
    homes = {leaf.sharding.mesh.axis_sizes for leaf in jax.tree.leaves(after)}
    assert homes == {(1, 2, 4)}
    split = after["transformer"]["blocks"]["video_self"]["to_q"]["weight"]
    assert split.addressable_shards[0].data.size * 2 == split.size
