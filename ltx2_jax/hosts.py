"""The processes of a run: the only file that knows that there may be more than one."""

import jax


def rows_of_host(
    sharding: jax.sharding.Sharding, batch_size: int, process: int | None = None
) -> tuple[int, ...]:
    """Rows of a global batch that the devices of one process hold, in ascending order.

    They lie apart where the mesh follows the torus of a slice, of which a host is a block; hosts
    that share a shard of the batch, as along a sequence axis, hold the same rows.

    Args:
      sharding: of an array [batch_size].
      batch_size: rows of the global batch.
      process: whose devices; None is this process.
    """
    process = jax.process_index() if process is None else process
    spans = sharding.devices_indices_map((batch_size,)).items()
    here = [span for device, (span,) in spans if device.process_index == process]
    return tuple(sorted({row for span in here for row in range(batch_size)[span]}))
