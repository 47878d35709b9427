"""Kills a run of several processes at random, and shows that it comes to the same end.

    python tests/soak.py --kills=50 --seed=0

The step is a stand-in that compiles at once (`hosts_config.py`); reading, checkpoints, signals and
ends are the real ones. After each kill the next processes go on, in the same layout or, with
`--layouts`, in a random one: 1 x 4, 2 x 2 or 4 x 1 processes x devices. A run that has come to its
end is followed by another. At the end of each:

- the last weights are those of a run that nobody disturbed: bit for bit on one layout, within 1e-5
  on several;
- nothing that was committed was trained again: a run goes on from its newest checkpoint;
- no half-written checkpoint is left.

    python tests/soak.py --prepare --kills=20 --seed=0

does the same with two processes that prepare 200 films. One of them, or both, are killed after so
many more files of what is done, and the same command goes on, beside the other one if that still
works. Every dataset that they come to equals that of a calm run, file by file and record by record.

    python tests/soak.py --real

trains the small model itself instead, on meshes of several hosts that share rows, on two slices of
two processes each, with a process that is killed, and with hosts whose workdirs are on disks of
their own (mount namespaces: for root).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import film
import numpy as np
from pod import TESTS, environment, free_port, pod

from ltx2_jax.training.metrics import read_metrics

LAYOUTS = ((2, 2), (1, 4), (4, 1))
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
EVERY = 5


def start(
    folder: Path, data: Path, layout: tuple[int, int], log: Path, steps: int
) -> list[subprocess.Popen]:
    """The processes of one attempt."""
    processes, devices = layout
    running, port = [], free_port()
    for index in range(processes):
        flags = [
            f"--config={TESTS / 'hosts_config.py'}:drill;slow", f"--config.workdir={folder}",
            f"--config.data.path={data}", f"--config.num_steps={steps}", "--heartbeat=6",
            f"--config.checkpoint.every_steps={EVERY}", "--config.compile_cache=False",
        ]  # fmt: skip
        if processes > 1:
            flags += [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}"]
            flags += [f"--process-id={index}"]
        with open(f"{log}-{index}", "w") as output:
            command = [sys.executable, "-m", "ltx2_jax.train", *flags]
            running.append(
                subprocess.Popen(command, env=environment(devices), stdout=output, stderr=output)
            )
    return running


def committed(folder: Path) -> int:
    """The newest step on disk."""
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def first_step(log: Path) -> int | None:
    """Where an attempt went on, as its first process says."""
    found = re.search(r"run +steps (\d+) to", Path(f"{log}-0").read_text())
    return int(found[1]) if found else None


def attempt(
    folder: Path, data: Path, layout: tuple[int, int], log: Path, steps: int, kill: tuple | None
) -> list[int]:
    """To the end, or until `kill`: signal, process, seconds after its start or first commit."""
    before, running = committed(folder), start(folder, data, layout, log, steps)
    if kill is not None:
        name, victim, after, progress = kill
        while running[0].poll() is None and (
            committed(folder) <= before if progress else first_step(log) is None
        ):
            time.sleep(0.02)
        time.sleep(after)
        running[victim].send_signal(signal.Signals[name])
    deadline = time.monotonic() + (60 if kill else 600)
    others = [p for i, p in enumerate(running) if not (kill and name == "SIGSTOP" and i == victim)]
    while any(p.poll() is None for p in others) and time.monotonic() < deadline:
        time.sleep(0.05)
    hung = [i for i, p in enumerate(running) if p in others and p.poll() is None]
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in running]
    began = first_step(log)
    told = f"from {began}, codes {codes}, now {committed(folder)}"
    print(f"{layout[0]}x{layout[1]} {kill or ''}: {told}", flush=True)
    assert not hung, f"{hung} did not end: {log}"
    assert began is None or began >= before, f"went back from {before} to {began}: {log}"
    return codes


def weights(folder: Path, step: int) -> np.ndarray:
    """Those of the checkpoint of a step."""
    import jax

    from ltx2_jax.sharding import replicated_on
    from ltx2_jax.training.checkpoint import Checkpoints

    home = replicated_on(jax.devices()[:1])
    abstract = jax.ShapeDtypeStruct((16, 8), np.float32, sharding=home)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_part(step, {"params": {"a": {"weight": abstract}}})
    return np.asarray(found["params"]["a"]["weight"])


# ---- prepare -------------------------------------------------------------------------------------

# Small shards, so that there are many places to be killed at.
PREPARE = """
import sys
from ltx2_jax.data import work
from ltx2_jax.prepare import cli
work.SHARD_ROWS, work.SHARD_CAPTIONS, work.SHARD_FILMS = 8, 16, 16
sys.exit(cli(sys.argv[1:]))
"""
PREPARE_SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")


def films(folder: Path, count: int) -> Path:
    """So many films of one or two scenes, two sizes, some silent, three missing; their table."""
    folder.mkdir()
    rows = []
    for i in range(count):
        height, width = (32, 48) if i % 3 else (48, 32)
        grey = [40 + i % 200, 60 + (i * 7 + 60) % 190]
        scenes = [film.plain((g, i, g), 11, height, width) for g in grey[: 1 + i % 2]]
        tones = [] if i % 10 == 0 else [200 + 10 * i]
        if i % 80 != 33:
            film.write_film(folder / f"{i}.mp4", np.concatenate(scenes), tones=tones)
        rows.append({"video": f"{i}.mp4", "caption": f"film {i % 150}"})
    (folder / "films.json").write_text(json.dumps(rows))
    return folder / "films.json"


# A linear codec that is fitted another time may differ in the last digits: all runs have one.
FITTED = ("--video-strides=4,16,16", "--video-channels=8", "--audio-channels=8")


def preparing(
    table: Path, out: Path, process: int, log: Path, codec: Path | None
) -> subprocess.Popen:
    """One of two processes at work on a dataset."""
    flags = [
        str(table), str(out), "--buckets=48x32x9,32x48x9,32x32x9", "--stride=9", "--scenes",
        "--incomplete", "--text-widths=8,8", f"--part={process}/2",
        *(FITTED if codec is None else (f"--codec={codec}",)),
    ]  # fmt: skip
    with open(log, "a") as output:
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, *flags],
            env=environment(1), stdout=output, stderr=output,
        )  # fmt: skip


def contents(folder: Path) -> tuple[dict[str, str], list]:
    """Of a dataset: a hash of every file, and all that its records say."""
    from ltx2_jax.blobs import content_hash, serialize
    from ltx2_jax.data.records import open_records

    opened = open_records(folder)
    hashes = {
        path.name: content_hash(path)  # which the order of its header is no part of
        if path.suffix == ".safetensors"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }
    records = [
        (serialize(record), int(opened.buckets[i]), opened.captions(i))
        for i, record in enumerate(opened)
    ]
    return hashes, records


def done(out: Path) -> int:
    """How many files there are of a dataset in the making."""
    staging = out.with_name(f".{out.name}.prepare")
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir(staging))
    return 0


def soak_prepare(kills: int, chance: random.Random) -> None:
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    table, out = films(root / "films", 200), root / "set"
    codec = None
    for name in ("fitted", "calm"):
        calm = [preparing(table, root / name, i, root / f"{name}-{i}.log", codec) for i in (0, 1)]
        assert [process.wait() for process in calm] == [0, 0], root
        codec = root / "fitted" / "codec.safetensors"
    hashes, records = contents(root / "calm")
    print(f"calm: {len(records)} records in {len(hashes)} files", flush=True)
    running: dict[int, subprocess.Popen] = {}
    datasets, killed = 0, 0

    def finished() -> bool:
        """Whether the dataset is there; then it is compared, and made anew."""
        nonlocal datasets
        for i, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, (
                    f"process {i} ended with {process.returncode}: {root}"
                )
        if 0 not in running or running[0].poll() is None:
            return False
        assert running[1].wait(60) == 0, root
        theirs, made = contents(out)
        different = {name for name, _ in hashes.items() ^ theirs.items()}
        assert made == records, f"records differ: {root}"
        assert not different, f"{different} differ: {root}"
        assert not done(out), root
        shutil.rmtree(out)
        running.clear()
        datasets += 1
        print(f"dataset {datasets} after {killed} kills: equal", flush=True)
        return True

    def go_on() -> None:
        for i in {0, 1} - running.keys():
            running[i] = preparing(table, out, i, root / f"{i}.log", codec)

    while killed < kills:
        go_on()
        more, deadline = done(out) + chance.randrange(30), time.monotonic() + 120
        after = chance.uniform(0, 0.3)
        while not (ended := finished()) and done(out) < more:
            assert time.monotonic() < deadline, f"no progress beyond {done(out)} files: {root}"
            time.sleep(0.005)
        if ended:
            continue
        time.sleep(after)
        name, victims = chance.choice(PREPARE_SIGNALS), chance.choice(((0,), (1,), (0, 1)))
        victims = [i for i in victims if running[i].poll() is None]
        there = done(out)
        for i in victims:
            running[i].send_signal(signal.Signals[name])
        codes = [running.pop(i).wait(60) for i in victims]
        killed += bool(victims)
        print(f"{name} to {victims} at {there} files: {codes}", flush=True)
        # One that is done when it is told to stop has ended well; SIGTERM is as Ctrl-C here.
        # Before the command has begun a signal ends Python itself.
        early = {-signal.SIGTERM, -signal.SIGINT}
        assert set(codes) <= {0, -signal.SIGKILL, 130, 143} | early, root
    go_on()
    while not finished():
        time.sleep(0.05)
    print(f"{killed} kills: {datasets} datasets, all equal to that of a calm run")
    shutil.rmtree(root)


# ---- the model itself ----------------------------------------------------------------------------

# Processes, devices of each, sizes of the mesh: data, model, sequence, slices.
REAL = (
    (1, 4, (4, 1, 1, 1)),
    (2, 2, (2, 2, 1, 1)),
    (2, 2, (2, 1, 2, 1)),
    (2, 2, (1, 2, 2, 1)),
    (4, 1, (2, 1, 1, 2)),
)


def train_small(root: Path, data: Path, name: str, processes: int, devices: int, *flags: str):
    """A training of the small model: its workdir, and how it ended."""
    flags = f"--config.workdir={root / name}", f"--config.data.path={data}", *flags
    command = "-m", "ltx2_jax.train", *flags
    if processes > 1:
        return root / name, pod(root / f"{name}-log", processes, devices, *command)
    run = subprocess.run([sys.executable, *command], env=environment(devices), check=True)
    return root / name, run


def real(root: Path, data: Path) -> None:
    """What the stand-in cannot show: losses of the model itself, and the end of its run."""
    config, reference = f"--config={TESTS / 'hosts_config.py'}:unsampled", None
    for processes, devices, sizes in REAL:
        names = ("data", "model", "sequence", "slices")
        flags = [f"--config.mesh.{n}={size}" for n, size in zip(names, sizes, strict=True)]
        # Devices of two hosts take turns, so that the hosts share rows on each of these meshes.
        flags += [config + ";interleaved" * (processes == 2), "--config.num_steps=6"]
        name = f"{processes}x{devices}-" + "-".join(map(str, sizes))
        workdir, ended = train_small(root, data, name, processes, devices, *flags)
        assert processes == 1 or not any(ended.codes), ended.err
        losses = np.array([row["loss"] for row in read_metrics(workdir)])
        reference = losses if reference is None else reference
        difference = np.abs(losses - reference).max()
        print(
            f"{name}: losses differ by {difference:.1e}, the last is {losses[-1]:.6f}", flush=True
        )
        assert len(losses) == 6
        assert difference < 2e-6 * np.abs(reference).max(), losses - reference
    _, ended = train_small(root, data, "killed", 2, 1, f"{config};1,5,SIGKILL", "--heartbeat=6")
    assert ended.codes == [42, -signal.SIGKILL], ended.codes
    assert re.search(r"host-1 \(.*\): lost in \"\w+\" of step \d+", ended.lines()[0])
    print(f"killed: {ended.lines()[0]}, {ended.seconds:.0f} s after it", flush=True)


def own_disks(root: Path, data: Path) -> None:
    """Each process sees another folder at the place of the workdir, as on disks of their own."""
    workdir, running, port = root / "apart", [], free_port()
    workdir.mkdir()
    for index in range(2):
        (root / f"disk-{index}").mkdir()
        mount = f"mount --bind {root / f'disk-{index}'} {workdir} && exec "
        flags = f"--config={TESTS / 'hosts_config.py'}:drill --config.data.path={data} "
        flags += f"--config.workdir={workdir} --coordinator=127.0.0.1:{port} --num-processes=2 "
        command = f"{mount}{sys.executable} -m ltx2_jax.train {flags} --process-id={index}"
        given = {"env": environment(1), "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(["unshare", "-m", "sh", "-c", command], **given))
    began = time.monotonic()
    errors = [process.communicate()[1] for process in running]
    print(f"own disks: {errors[0].strip()}, after {time.monotonic() - began:.0f} s", flush=True)
    assert [process.returncode for process in running] == [2, 2]
    assert re.search(r"host-1 \(.*\): .*is not shared: this host does not see what", errors[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true", help="another layout after each kill")
    parser.add_argument("--prepare", action="store_true", help="of prepare, not of train")
    parser.add_argument("--real", action="store_true", help="the small model, and no kills")
    args = parser.parse_args()
    if args.prepare:
        return soak_prepare(args.kills, random.Random(args.seed))
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ.setdefault("XLA_FLAGS", flags)
    import resume_config

    from ltx2_jax.training import loop

    # Begun in the background, this may be told to ignore Ctrl-C, and so would its processes be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance, steps = random.Random(args.seed), 240
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    config = dataclasses.replace(resume_config.get_config(), workdir=str(root / "data"))
    data, runs = loop.dataset(config).folder, [root / "run-1"]
    if args.real:
        real(root, data)
        own_disks(root, data)
        shutil.rmtree(root)
        return
    assert set(attempt(root / "calm", data, LAYOUTS[0], root / "calm-log", steps, None)) == {0}
    for kill in range(args.kills):
        if committed(runs[-1]) == steps:
            runs.append(root / f"run-{len(runs) + 1}")
        layout = chance.choice(LAYOUTS) if args.layouts else LAYOUTS[0]
        early = chance.random() < 0.3
        after = round(chance.uniform(0, 4 if early else 1), 2)
        what = chance.choice(SIGNALS), chance.randrange(layout[0]), after, not early
        attempt(runs[-1], data, layout, root / f"log-{kill:02d}", steps, what)
    layout = chance.choice(LAYOUTS) if args.layouts else LAYOUTS[0]
    assert set(attempt(runs[-1], data, layout, root / "log-last", steps, None)) == {0}
    calm = weights(root / "calm", steps)
    for run in runs:
        left = [name for name in os.listdir(run / "checkpoints") if not name.isdecimal()]
        assert not left, left
        ours = weights(run, steps)
        difference = np.abs(ours - calm).max() / np.abs(calm).max()
        print(f"{run.name}: weights differ by {difference:g} of the largest")
        assert np.array_equal(ours, calm) if not args.layouts else difference < 1e-5
    print(f"{args.kills} kills in {len(runs)} runs of {steps} steps")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
