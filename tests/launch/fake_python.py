#!/usr/bin/env python3
"""Stands in for a host's Python: makes environments that hold itself, and trains by counting.

A training counts to 30 in the file WORKDIR/step, and ends as the file WORKDIR/exit says, once: a
code, and which host, if not any. It counts no further while there is a file WORKDIR/hold.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    if words[:2] == ["-m", "venv"]:
        bin = Path(words[2]) / "bin"
        bin.mkdir(parents=True)
        for name in ("python", "pip"):
            shutil.copy(__file__, bin / name)
        return 0
    if Path(sys.argv[0]).name == "pip":
        assert Path("src/pyproject.toml").exists()
        return 0
    assert words[:2] == ["-m", "ltx2_jax.train"]
    assert Path("ltx2_jax/train.py").exists()
    if words[2] == "--status":
        print("step", (Path(words[3]) / "step").read_text())
        return 0
    return train(Path(words[-1].removeprefix("--config.workdir=")))


def train(workdir: Path) -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    signal.signal(
        signal.SIGUSR1, lambda *_: print(f"stack of {os.environ['FAKE_HOST']}", flush=True)
    )
    file = workdir / "step"
    first = int(file.read_text()) if file.exists() else 0
    print(f"run      steps {first} to 30", flush=True)
    for step in range(first, 30):
        time.sleep(0.05)
        while (workdir / "hold").exists() and not (workdir / "exit").exists() and not stopped:
            time.sleep(0.05)
        if os.environ["FAKE_HOST"].endswith("/0"):
            part = file.with_suffix(f".{os.getpid()}")  # each slice has a first host
            part.write_text(str(step + 1))
            part.replace(file)
        with contextlib.suppress(FileNotFoundError):
            code, host = (workdir / "exit").read_text().split()
            if host in ("any", os.environ["FAKE_HOST"]):
                (workdir / "exit").unlink()
                return int(code)
        if stopped:
            print(f"stopped and saved at step {step + 1}", flush=True)
            return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
