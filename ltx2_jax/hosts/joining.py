"""How the processes of a run find each other."""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import clusters, compilation_cache, compiler, distributed

from ltx2_jax.errors import UserError
from ltx2_jax.hosts import ending
from ltx2_jax.hosts.agreement import (
    INTERRUPTED,
    LOST,
    ROOM,
    LostError,
    client,
    count,
    gather,
    index,
    names,
)

# Detectors of JAX that are asked for the other hosts of a pod.
DETECTORS = ("gcetpu", "gketpu", "slurm")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    seconds: float = 300,
    heartbeat: float = 60,
) -> None:
    """Joins the other processes of the run; does nothing if there are none.

    To be called before anything touches a device. What is not given, JAX's detectors say, on a TPU
    VM, in GKE and under SLURM.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which one this is.
      seconds: to wait for the others.
      heartbeat: seconds without a sign of life after which a host is lost.

    Raises:
      UserError: flags that do not fit together, or another number of processes than process 0 says.
      LostError: no coordinator there.
    """
    if distributed.is_initialized():  # by a launcher of its own
        if count() > 1 and not names:
            ending.catch_aborts()
            _meet(count(), seconds)
            ending.Watch(heartbeat).start()
        return
    local = None
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    if any(value is not None for value in given.values()):
        if missing := [flag for flag, value in given.items() if value is None]:
            raise UserError(f"{' and '.join(missing)}: missing; all three or none")
    elif (found := _detected(seconds)) is not None:
        coordinator, processes, process, local = found
    else:
        return
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id={process}: with --num-processes={processes} it is from 0 to "
            f"{processes - 1}"
        )
    if processes == 1:
        return
    _find_coordinator(coordinator, process, seconds)
    _connect(coordinator, processes, process, local, seconds, heartbeat)
    _meet(processes, seconds)
    ending.Watch(heartbeat).start()


def _detected(seconds: float) -> tuple[str, int, int, Any] | None:
    """What the first detector that finds its kind of cluster says of it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "proxy" in platforms:  # one controller of all hosts
        return None
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.name not in DETECTORS or ("tpu" in kind.name and platforms == "cpu"):
            continue
        try:
            if kind.is_env_present():
                return clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, kind.name, int(seconds)
                )
        except Exception as error:
            text = " ".join(str(error).split())
            raise LostError(
                f"{kind.name}: the other hosts cannot be found ({text:.200})"
            ) from error
    return None


def _find_coordinator(coordinator: str, process: int, seconds: float) -> None:
    """Waits until somebody listens there: JAX would end the process with a stack trace."""
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    if process == 0:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise UserError(
                    f"--coordinator={coordinator}: host-0 cannot listen there ({error.strerror})"
                ) from None
        return
    deadline, why = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.2)
    raise LostError(f"--coordinator={coordinator}: nobody answers there in {seconds:.0f} s ({why})")


def _connect(
    coordinator: str, processes: int, process: int, local: Any, seconds: float, heartbeat: float
) -> None:
    late = threading.Timer(seconds, _too_few, (coordinator, processes, process, seconds))
    late.daemon = True
    late.start()
    ending.catch_aborts()
    # Signals are ours: JAX's service would know of SIGTERM alone, and only at the next step.
    jax.config.update("jax_enable_preemption_service", False)
    join = functools.partial(
        jax.distributed.initialize,
        coordinator,
        processes,
        process,
        local_device_ids=local,
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds) + 60,
        heartbeat_timeout_seconds=int(2 * heartbeat + 20),  # we find and name lost hosts before
    )
    wrong: list[Exception] = []

    def try_to() -> None:
        try:
            join()
        except Exception as error:
            wrong.append(error)

    joining = threading.Thread(target=try_to, daemon=True)  # so that this one hears Ctrl-C
    joining.start()
    try:
        while joining.is_alive():
            joining.join(0.1)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    late.cancel()
    if wrong:
        text = " ".join(str(wrong[0]).split())
        raise LostError(f"--coordinator={coordinator}: cannot be joined ({text:.300})")
    _cache_on_every_process()


def _too_few(coordinator: str, processes: int, process: int, seconds: float) -> None:
    print(
        f"host-{process} ({socket.gethostname()}): not all {processes} processes came to "
        f"{coordinator} in {seconds:.0f} s: start the command on every host, each with a "
        "--process-id of its own",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _meet(processes: int, seconds: float) -> None:
    """All learn each other's names; from here on one that fails ends all."""
    threading.Thread(target=ending.end_with_others, name="hosts end", daemon=True).start()
    key = f"{ROOM}/processes"
    if index() == 0:
        client().key_value_set(key, str(processes))
    expected = int(client().blocking_key_value_get(key, int(seconds * 1000)))
    if processes != expected:
        refuse = f"--num-processes={processes} on host-{index()} ({socket.gethostname()})"
        raise UserError(f"{refuse}, but {expected} on host-0")
    names[:] = gather(socket.gethostname(), seconds)


def _cache_on_every_process() -> None:
    """On CPU each process reads compiled programs of its own alone; JAX lets process 0 write."""
    usual = compiler._cache_write

    @functools.wraps(usual)
    def write(key: str, seconds: float, module: str, backend: Any, program: Any, *rest: Any):
        if backend.platform != "cpu" or index() == 0:
            return usual(key, seconds, module, backend, program, *rest)
        if seconds >= jax.config.jax_persistent_cache_min_compile_time_secs and not any(rest):
            with contextlib.suppress(Exception):  # it would only have saved time
                put = compilation_cache.put_executable_and_time
                put(key, module, program, backend, int(seconds))

    compiler._cache_write = write
