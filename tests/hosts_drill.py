"""What hosts tell each other, without devices: run by `test_hosts.py` in two processes."""

import sys

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


def drill():
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


if __name__ == "__main__":
    sys.exit(command.run("drill", lambda: command.on_hosts(None, drill)))
