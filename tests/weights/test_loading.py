"""Large files: hosts share the reading, and none holds more than a part of what it loads."""

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from pod import environment
from safetensors.numpy import load_file

from ltx2_jax.models.transformer.config import LTX2_3_22B
from ltx2_jax.planning.bench.weights import write_synthetic
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights import loading as placing
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import transformer
from ltx2_jax.weights.sources import open_release

# The wiring of 2.3, 16 MB; its matrices are large enough to be shared out.
SMALL = dataclasses.replace(
    LTX2_3_22B, num_layers=2, num_heads=8, head_dim=48, audio_num_heads=8, audio_head_dim=32,
    context_dim=384, audio_context_dim=256,
)  # fmt: skip
# The same at a size where a second copy would be seen: 0.6 GB, the largest stack 0.15 GB.
LARGE = dataclasses.replace(
    SMALL, num_layers=6, num_heads=16, head_dim=112, audio_num_heads=16, audio_head_dim=32,
    context_dim=1792, audio_context_dim=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_synthetic(path, SMALL)
    return path


def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(devices, script, *arguments):
    command = [sys.executable, script, *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(devices), **output)


def test_two_hosts_read_half_of_a_file_each_and_write_it_back_together(small, tmp_path):
    out, number = tmp_path / "out.safetensors", port()
    script = Path(__file__).parents[1] / "read_shared.py"
    processes = [run(2, script, small, out, i, 2, number) for i in range(2)]
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-2000:]
        results.append(json.loads(stdout.splitlines()[-1]))
    size = sum(value.nbytes for value in load_file(small).values())
    for result in results:
        assert 0.45 * size < result["read"] < 0.56 * size
    # Both have what one process has on the same mesh.
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    with open_release(small) as release:
        _, params = release.load("transformer", mesh)
    for path, array in mapping.leaves(params).items():
        want = {
            (str(s.index), hashlib.sha256(np.asarray(s.data).tobytes()).hexdigest())
            for s in array.addressable_shards
        }
        name = ".".join(map(str, path))
        assert {tuple(shard) for r in results for shard in r["shards"][name]} == want, name
    assert out.read_bytes() == small.read_bytes()


def test_a_host_reads_each_byte_once_however_weights_are_split(small):
    size = sum(value.nbytes for value in load_file(small).values())
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        with open_release(small) as release:
            release.load("transformer", make_mesh(*sizes))
            assert release.files[0].bytes_read == size


@pytest.mark.parametrize("piece", [2**17, 2**21])
def test_a_stack_read_in_pieces_is_the_stack(small, monkeypatch, piece):
    with open_release(small) as release:
        _, whole = release.load("transformer")
        monkeypatch.setattr(placing, "PIECE_BYTES", piece)
        monkeypatch.setattr(placing, "_platform", lambda _: "tpu")  # not in one piece as on a CPU
        for where in (None, make_mesh(2, 2, 2)):
            _, parts = release.load("transformer", where)
            same = jax.tree.map(
                lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), whole, parts
            )
            assert jax.tree.all(same)


MEASURE = """
import os, sys, resource
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from ltx2_jax.weights.sources import open_release
jax.numpy.zeros(1).block_until_ready()
with open_release(sys.argv[1]) as release:
    config = release.config("transformer")
    release.parameters("transformer", config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, params = release.load("transformer", config=config)
    jax.block_until_ready(params)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (after - before), sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def test_loading_needs_little_memory_beside_the_weights(tmp_path):
    path = tmp_path / "large.safetensors"
    write_synthetic(path, LARGE)
    wanted = mapping.parameters(partial(transformer.create, LARGE), transformer.TABLE)
    stacks = [p.leaf.size * 2 for p in wanted if p.stacked]
    process = run(1, "-c", MEASURE, path)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-2000:]
    grown, weights = map(int, stdout.split())
    assert weights > 0.5e9
    # On a CPU the weights themselves are in the host's memory. Beside them there may be twice the
    # largest stack (and a gigabyte, at full size); there is much less.
    assert grown - weights < max(stacks) < 0.2e9


def test_synthetic_files_have_the_official_layout(small):
    with open_release(small) as release:
        assert release.release_of() == "2.3"
        assert release.config("transformer") == SMALL
        kinds = {s.stored.dtype for s in release.networks["transformer"].tensors.values()}
    assert kinds == {np.dtype(ml_dtypes.bfloat16)}


def test_a_cpu_device_takes_over_the_memory_that_was_read_into():
    buffer = placing.aligned((1000, 3), np.dtype(np.float32))
    buffer[...] = np.arange(3)
    array = jax.make_array_from_callback(
        buffer.shape, jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda _: buffer
    )
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    # And a train step that is given it to write into does so safely.
    want = buffer.copy() + 1
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, donate_argnums=0)(array), want)
