#!/usr/bin/env python3
"""Stands in for gcloud: hosts are folders, and what runs on them are processes of this machine.

State is in the folder $FAKE_GCLOUD: NAME.json of a request, NAME/HOST of a host's home folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
HOSTS = {"v5p-8": 1, "v5p-16": 2}


def main(words: list[str]) -> int:
    with (ROOT / "calls").open("a") as calls:
        print(*words[2:4], file=calls)
    flags = dict(w.removeprefix("--").partition("=")[::2] for w in words if w.startswith("--"))
    _, _, group, verb, *names = [w for w in words if not w.startswith("--")]
    assert flags["zone"] == "us-east5-a"
    return {"queued-resources": queue, "tpu-vm": vm}[group](verb, names, flags)


def queue(verb: str, names: list[str], flags: dict[str, str]) -> int:
    file = ROOT / f"{names[0]}.json"
    if verb == "create":
        count = int(flags.get("node-count", 1))
        prefix = flags.get("node-prefix")
        nodes = [f"{prefix}-{i}" for i in range(count)] if prefix else [flags["node-id"]]
        for node in nodes:
            for host in range(HOSTS[flags["accelerator-type"]]):
                (ROOT / node / str(host)).mkdir(parents=True)
        states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        file.write_text(json.dumps({"states": states, "nodes": nodes}))
        return 0
    if not file.exists():
        print("NOT_FOUND", file=sys.stderr)
        return 1
    request = json.loads(file.read_text())
    if verb == "describe":
        if "nodeCount" in flags["format"]:
            print(len(request["nodes"]) if len(request["nodes"]) > 1 else "")
            return 0
        print(request["states"][0])
        if len(request["states"]) > 1:
            request["states"].pop(0)
            file.write_text(json.dumps(request))
        return 0
    assert verb == "delete"
    assert {"force", "quiet"} <= set(flags)
    for node in request["nodes"]:
        for home in sorted((ROOT / node).iterdir()):
            end(home)
        while (ROOT / node).exists():  # who ends may still write how
            shutil.rmtree(ROOT / node, ignore_errors=True)
    file.unlink()
    return 0


def end(home: Path) -> None:
    """What a host that goes away does to its processes."""
    for pid in home.glob("ltx2_jax_run/pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def vm(verb: str, names: list[str], flags: dict[str, str]) -> int:
    if verb == "scp":
        source, target = names
        node, _, name = target.partition(":")
        for home in (ROOT / node).iterdir():
            shutil.copyfile(source, home / name)
        return 0
    assert verb == "ssh"
    worker = flags["worker"]
    homes = [h for h in sorted((ROOT / names[0]).iterdir()) if worker in ("all", h.name)]
    assert homes
    for home in homes:
        environment = os.environ | {"HOME": str(home), "FAKE_HOST": f"{names[0]}/{home.name}"}
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environment)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
