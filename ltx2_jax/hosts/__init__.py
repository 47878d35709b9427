"""The processes of a run: the only room that knows that there may be more than one.

What hosts tell each other here goes over JAX's coordination service, not over the devices: it works
before any program is compiled, and while one hangs. Functions that wait for all hosts are called by
all of them, in the same order.

A run of several processes ends together: whatever happens on one of them, all leave with the same
exit code within seconds, by `os._exit`. The usual way out of Python would wait, up to five minutes,
for processes that hang.
"""

from ltx2_jax.hosts.agreement import (
    AGAIN,
    INTERRUPTED,
    LOST,
    STOPPED,
    AgreedError,
    LostError,
    agree,
    agree_on_first,
    barrier,
    broadcast,
    count,
    exchange,
    gather,
    hear,
    index,
    name,
    rows_of_host,
    same_everywhere,
    say,
    tell,
    whole,
)
from ltx2_jax.hosts.ending import (
    end,
    fail,
    leaving,
    progress,
    slowest,
    together,
    watched,
)
from ltx2_jax.hosts.joining import DETECTORS, start

__all__ = [
    "AGAIN",
    "DETECTORS",
    "INTERRUPTED",
    "LOST",
    "STOPPED",
    "AgreedError",
    "LostError",
    "agree",
    "agree_on_first",
    "barrier",
    "broadcast",
    "count",
    "end",
    "exchange",
    "fail",
    "gather",
    "hear",
    "index",
    "leaving",
    "name",
    "progress",
    "rows_of_host",
    "same_everywhere",
    "say",
    "slowest",
    "start",
    "tell",
    "together",
    "watched",
    "whole",
]
