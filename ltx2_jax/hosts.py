"""The processes of a run: the only file that knows that there may be more than one.

What hosts tell each other here goes over JAX's coordination service, not over the devices: it works
before any program is compiled, and while one hangs. Every function is called by all hosts, in the
same order.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed

from ltx2_jax.errors import UserError

T = TypeVar("T")

_calls = itertools.count()


def index() -> int:
    """Which process this is; process 0 speaks, and writes what only one may write."""
    return jax.process_index()


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def say(text: str) -> None:
    """Prints on process 0."""
    if index() == 0:
        print(text, flush=True)


def gather(value: str, seconds: float = 300) -> list[str]:
    """The strings that all hosts give, in order of the processes."""
    if count() == 1:
        return [value]
    call, client = next(_calls), _client()
    client.key_value_set(f"ltx2_jax/gather/{call}/{index()}", value)
    keys = (f"ltx2_jax/gather/{call}/{process}" for process in range(count()))
    return [client.blocking_key_value_get(key, int(seconds * 1000)) for key in keys]


def broadcast(value: str, seconds: float = 300) -> str:
    """What process 0 gives."""
    return gather(value if index() == 0 else "", seconds)[0]


def agree(check: Callable[[], T]) -> T:
    """What `check` returns here; if it is refused on any host, all hosts refuse.

    Raises:
      UserError: that of the first host that refuses, with its name if there are several.
    """
    refusal, result = "", None
    try:
        result = check()
    except UserError as error:
        refusal = str(error) or "refused"
    for process, found in enumerate(gather(refusal)):
        if found:
            raise UserError(found if count() == 1 else f"host {process}: {found}")
    return result


def _client() -> Any:
    return distributed.global_state.client


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
    process = index() if process is None else process
    spans = sharding.devices_indices_map((batch_size,)).items()
    here = [span for device, (span,) in spans if device.process_index == process]
    return tuple(sorted({row for span in here for row in range(batch_size)[span]}))
