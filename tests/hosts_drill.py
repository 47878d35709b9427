"""What hosts tell each other, without devices: run by `test_hosts.py` in two processes.

The first argument says what happens: "talk", "stuck", "stopped", "meshes".
"""

import dataclasses
import os
import signal
import sys
import time

from ltx2_jax import command, hosts
from ltx2_jax.config import MeshConfig
from ltx2_jax.errors import UserError
from ltx2_jax.training import loop


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
    told()


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


def meshes():
    """One training after the other, each on a mesh of its own: how they are named, sizes, slices.

    Arguments: a dataset, a folder for the workdirs, and such meshes as "interleaved,2,2,1,1".
    """
    import hosts_config

    config = hosts_config.get_config("drill")
    records, folder, *names = (word for word in sys.argv[2:] if not word.startswith("--"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=records))
    usual = loop.make_mesh
    for name in names:
        order, *sizes = name.split(",")
        loop.make_mesh = hosts_config.interleaved if order == "interleaved" else usual
        mesh = MeshConfig(*map(int, sizes))
        loop.train(
            dataclasses.replace(config, mesh=mesh, workdir=f"{folder}/{name}", num_steps=6),
            make_clips=lambda *_: None,
        )


def told():
    """A signal to host 1 while host 0 waits for it."""
    if hosts.index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # never ignored, as SIGHUP under nohup
        time.sleep(60)
    hosts.barrier("waiting")


WHAT = {f.__name__: f for f in (talk, stuck, stopped, meshes)}

if __name__ == "__main__":
    work = WHAT[sys.argv[1]]
    sys.exit(command.run("drill", lambda: command.on_hosts(None, work), stopped=143))
