"""What hosts tell each other, over JAX's coordination service: they agree, or refuse together."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from ltx2_jax.errors import UserError

T = TypeVar("T")

LOST, INTERRUPTED, STOPPED = 42, 130, 143  # exit codes: start me again; Ctrl-C; another signal
AGAIN = "the same command resumes"

ROOM = "ltx2_jax"  # of our keys
names: list[str] = []  # of all hosts, once they have met
_calls = itertools.count()


class AgreedError(UserError):
    """A refusal that all hosts know of."""


class LostError(RuntimeError):
    """Another host did not come, or does not answer: to be started again."""


def index() -> int:
    """Which process this is; process 0 speaks, and writes what only one may write."""
    return distributed.global_state.process_id


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes if client() is not None else 1


def name(process: int) -> str:
    """How a process is called in messages: "host-1 (its host name)"."""
    return f"host-{process} ({names[process]})" if process < len(names) else f"host-{process}"


def say(text: str) -> None:
    """Prints on process 0."""
    if index() == 0:
        print(text, flush=True)


def client() -> Any:
    """The coordination service; None where this process is alone."""
    return distributed.global_state.client


def gather(value: str, seconds: float = 300, waiting: str = "") -> list[str]:
    """The strings that all hosts give, in order of the processes.

    Args:
      value: of this host.
      seconds: to wait for the others.
      waiting: what process 0 says it waits for, every half minute, with the hosts it waits for.

    Raises:
      LostError: a host did not come.
    """
    if count() == 1:
        return [value]
    call = next(_calls)
    if call >= 2:  # all have come to the call before this one, and so have read what was before it
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_delete(f"{ROOM}/gather/{call - 2}/{index()}")
            if index() == 0:
                client().key_value_delete(f"{ROOM}/all/gather/{call - 2}")
    return exchange(f"gather/{call}", value, seconds, waiting)


def exchange(where: str, value: str, seconds: float, waiting: str = "") -> list[str]:
    """`gather` at a place of its own, for threads beside the one that works."""
    place = f"{ROOM}/{where}"
    client().key_value_set(f"{place}/{index()}", json.dumps(value))
    if index() == 0:
        found = _collect(place, seconds, waiting)
        client().key_value_set(f"{ROOM}/all/{where}", json.dumps(found))
        return found
    return json.loads(_get(f"{ROOM}/all/{where}", seconds + 30))


def _collect(place: str, seconds: float, waiting: str) -> list[str]:
    """On process 0: waits for everybody's value."""
    began, told, pause = time.monotonic(), 0, 0.005
    while True:
        pairs = client().key_value_dir_get(f"{place}/")
        found = {int(key.rpartition("/")[2]): json.loads(value) for key, value in pairs}
        if len(found) == count():
            return [found[process] for process in range(count())]
        missing = [name(process) for process in range(count()) if process not in found]
        late = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        waited = time.monotonic() - began
        if waited > seconds:
            raise LostError(
                f"{waiting or 'waited'}: {late} did not come in {seconds:.0f} s; {AGAIN}"
            )
        if waiting and waited // 30 > told:
            told = waited // 30
            say(f"{waiting}: {waited:.0f} s, still without {late}")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _get(key: str, seconds: float) -> str:
    """Waits for a key, in pieces: a signal is heard between two of them."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return client().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LostError(f"{name(0)} does not answer; {AGAIN}") from None
            if time.monotonic() > deadline:
                raise LostError(f"{name(0)} did not go on in {seconds:.0f} s; {AGAIN}") from None


def tell(key: str, value: str) -> None:
    """Says something once; what another host said before stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().key_value_set(f"{ROOM}/{key}", value)


def hear(key: str) -> str:
    """What a host told, whenever it does; for a thread."""
    return _get(f"{ROOM}/{key}", float("inf"))


def broadcast(value: str, seconds: float = 300) -> str:
    """What process 0 gives."""
    return gather(value if index() == 0 else "", seconds)[0]


def barrier(waiting: str, seconds: float = 3600) -> None:
    """Waits for all hosts; process 0 says for what and for whom."""
    gather("", seconds, waiting)


def agree(check: Callable[[], T], seconds: float = 300, waiting: str = "") -> T:
    """What `check` returns here; if it is refused on any host, all hosts refuse.

    Raises:
      UserError: that of the first host that refuses, with its name if not all say the same.
    """
    refusal, result = "", None
    try:
        result = check()
    except UserError as error:
        if count() == 1:
            raise
        refusal = str(error) or "refused"
    refusals = gather(refusal, seconds, waiting)
    if not any(refusals):
        return result
    first = next(process for process, found in enumerate(refusals) if found)
    others = sum(bool(found) for found in refusals) - 1
    more = f" (and {others} more host{'s' if others > 1 else ''})" if others else ""
    same = len(set(refusals)) == 1
    raise AgreedError(refusals[0] if same else f"{name(first)}: {refusals[first]}{more}")


def agree_on_first(work: Callable[[], Any], seconds: float, waiting: str) -> None:
    """Process 0 works, the others wait; they refuse what it refuses."""
    agree(work if index() == 0 else lambda: None, seconds, waiting)


def same_everywhere(values: dict[str, str]) -> None:
    """Refuses unless all hosts give the same values under the same names.

    Raises:
      UserError: names host, key, and what it and process 0 have.
    """
    if count() == 1:
        return
    first = json.loads(broadcast(json.dumps(values)))

    def check() -> None:
        for key in {**first, **values}:
            if (ours := values.get(key)) != (theirs := first.get(key)):
                raise UserError(f"{key} is {ours}, but {theirs} on {name(0)}")

    agree(check)


def whole(x: jax.Array) -> np.ndarray:
    """An array that may lie on the devices of several hosts, all of which call this."""
    here = count() == 1 or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))


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
