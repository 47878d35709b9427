"""How a call is timed: the first, which compiles, apart from the others."""

import time
from collections.abc import Callable
from typing import Any

import jax


def best_of(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds of the fastest of `calls` calls, and of the one before them."""
    seconds = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), seconds[0]
