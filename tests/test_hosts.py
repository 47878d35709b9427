"""Which rows of a batch a host holds."""

from types import SimpleNamespace

import jax
import pytest

from ltx2_jax.hosts import rows_of_host
from ltx2_jax.sharding import make_mesh, sharding_of


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def sharding(*devices):
    """Of devices (process, (first, end) of the rows)."""
    spans = {Device(process): (slice(*span),) for process, span in devices}
    return SimpleNamespace(devices_indices_map=lambda shape: spans)


def test_rows_may_lie_apart():
    interleaved = sharding((0, (0, 1)), (1, (1, 2)), (0, (2, 3)), (1, (3, 4)))
    assert rows_of_host(interleaved, 4, 0) == (0, 2)
    assert rows_of_host(interleaved, 4, 1) == (1, 3)


def test_hosts_that_share_a_shard_hold_the_same_rows():
    shared = sharding((0, (0, 2)), (0, (2, 4)), (1, (2, 4)), (1, (0, 2)))
    assert rows_of_host(shared, 4, 0) == rows_of_host(shared, 4, 1) == (0, 1, 2, 3)
    assert rows_of_host(sharding((0, (None,)), (1, (None,))), 4, 1) == (0, 1, 2, 3)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_host_holds_the_whole_batch_whatever_the_mesh(mesh):
    assert rows_of_host(sharding_of(make_mesh(*mesh), "batch"), 8) == tuple(range(8))
    assert rows_of_host(sharding_of(make_mesh(devices=jax.devices()[:1]), "batch"), 2) == (0, 1)
