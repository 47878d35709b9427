"""What hosts tell each other, without devices: run by `test_hosts.py` in two processes.

The first argument says what happens: "talk", "stuck", "stopped", "apart".
"""

import os
import signal
import sys
import time
from pathlib import Path

from ltx2_jax import command, hosts
from ltx2_jax.errors import UserError


def refused(check):
    """What all hosts are told about a refusal."""
    try:
        return f"went on with {hosts.agree(check)}"
    except UserError as error:
        return str(error)


def refuse(why):
    raise UserError(why)


def same(**values):
    try:
        hosts.same_everywhere(values)
        return "the same"
    except UserError as error:
        return str(error)


def talk():
    me = hosts.index()
    print(f"{me} of {hosts.count()}")
    print(hosts.gather(f"from {me}"))
    print(hosts.broadcast(f"from {me}"))
    print(refused(lambda: me))
    print(refused(lambda: refuse("no dataset here")))
    print(refused(lambda: refuse("no disk") if me == 1 else None))
    print(same(rate="1e-4"))
    print(same(rate=f"1e-{me + 3}"))
    print(same(**({"extra": "yes"} if me == 1 else {})))
    for call in range(30):
        assert hosts.gather(f"{call}:{me}") == [f"{call}:0", f"{call}:1"]
    hosts.say("said once")


def stuck():
    """Host 1 in its data, for longer than it may; the other waits for its step."""
    with hosts.watched():
        if hosts.index() == 1:
            hosts.progress("data", 7)
        else:
            time.sleep(2.5)
            hosts.progress("step", 7, seconds=0.5)
        time.sleep(60)


def stopped():
    hosts.progress("step" if hosts.index() == 0 else "data", 3)
    time.sleep(1.5)
    if hosts.index() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def apart():
    """Each host with a disk of its own."""
    from ltx2_jax.training.workdir import opened

    opened(Path(sys.argv[2]) / str(hosts.index()), seconds=0.5)


def told():
    """A signal to host 1 while host 0 waits for it."""
    if hosts.index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # never ignored, as SIGHUP under nohup
        time.sleep(60)
    hosts.barrier("waiting")


WHAT = {f.__name__: f for f in (talk, stuck, stopped, apart, told)}

if __name__ == "__main__":
    work = WHAT[sys.argv[1]]
    sys.exit(command.run("drill", lambda: command.on_hosts(None, work), stopped=143))
