"""Films to pixels and sound, and records to batches, on this machine's processors and disk.

Clips a second from the files of a folder, for every second of processor time and by the clock; and
records a second through the loader, beside reading the same bytes and nothing else. With --step,
how long a training that takes so many seconds a step would wait for its data.

With --peer the same films go through PyAV in a torch DataLoader, in a Python that has both.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ltx2_jax.command import count, positive
from ltx2_jax.data.clips import ClipReader, PrepareConfig, Rates
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.records import Linked, Records, open_records
from ltx2_jax.data.table import Row
from ltx2_jax.errors import UserError

FILMS = {".mp4", ".mov", ".mkv", ".webm", ".avi"}
SAMPLE_RATE = 16000


def run(args: argparse.Namespace) -> None:
    """Prints a line for each way as it is measured."""
    if args.films is None and args.records is None:
        raise UserError("bench data: give a folder of films, or --records")
    if args.films is not None:
        paths = films_in(Path(args.films))
        print(
            f"{len(paths)} films to {args.frames} frames of {args.width}x{args.height} and "
            f"{SAMPLE_RATE} Hz, {os.cpu_count()} processors\n"
            f"{'':24}{'clips':>8}{'clips/s':>10}{'clips/s/core':>14}"
        )
        _print("ltx2_jax", *timed(lambda: read_all(paths, args)))
        if args.peer is not None:
            _print("PyAV in a DataLoader", *peer(paths, args))
    if args.records is not None:
        for line in records_lines(args):
            print(line, flush=True)


def films_in(folder: Path) -> list[Path]:
    """The films below a folder; UserError if there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FILMS)
    if not paths:
        raise UserError(f"{folder}: no films here ({', '.join(sorted(FILMS))})")
    return paths


def _print(name: str, clips: int, seconds: float, busy: float) -> None:
    print(f"{name:24}{clips:8d}{clips / seconds:10.2f}{clips / busy:14.2f}", flush=True)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """What `work` counts, the seconds it takes, and those of processors, in all its processes."""

    def busy() -> float:
        usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before, began = busy(), time.perf_counter()
    counted = work()
    return counted, time.perf_counter() - began, max(busy() - before, 1e-9)


def read_all(paths: list[Path], args: argparse.Namespace) -> int:
    """Decodes all films as `prepare` does: how many can be used."""
    config = PrepareConfig(args.frames, args.height, args.width, fps=args.fps, incomplete=True)
    rows = [Row(path.name, path, "") for path in paths]
    reader = ClipReader(rows, config, Rates(SAMPLE_RATE, 25.0), cache_bytes=0)
    decoded = sum(1 for _ in reader)
    if not decoded:
        first = next(iter(reader.failures.values()))
        raise UserError(f"none of the films can be used; the first: {first.reason}")
    return decoded


PEER = """\
import json, resource, sys, time
import av, numpy as np, torch

size = json.loads(sys.argv[1])

class Films(torch.utils.data.Dataset):
    def __len__(self):
        return len(size["paths"])

    def __getitem__(self, index):
        images, sound = [], []
        try:
            with av.open(size["paths"][index]) as file:
                for frame in file.decode(video=0):
                    scale = max(size["height"] / frame.height, size["width"] / frame.width)
                    height = max(size["height"], round(frame.height * scale))
                    width = max(size["width"], round(frame.width * scale))
                    image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC")
                    image = image.to_ndarray()
                    top, left = (height - size["height"]) // 2, (width - size["width"]) // 2
                    images.append(image[top : top + size["height"], left : left + size["width"]])
                    if len(images) == size["frames"]:
                        break
                else:
                    return 0
            with av.open(size["paths"][index]) as file:
                if file.streams.audio:
                    seconds = size["frames"] / float(file.streams.video[0].average_rate)
                    resampler = av.AudioResampler("fltp", "stereo", size["sample_rate"])
                    for frame in file.decode(audio=0):
                        sound += [x.to_ndarray() for x in resampler.resample(frame)]
                        if frame.time > seconds:
                            break
        except av.FFmpegError:
            return 0
        torch.from_numpy(np.stack(images)), sound and torch.from_numpy(np.concatenate(sound, 1))
        return 1

def busy():
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)

before, began = busy(), time.perf_counter()
loader = torch.utils.data.DataLoader(Films(), batch_size=None, num_workers=size["workers"])
used = sum(int(used) for used in loader)
del loader
print(json.dumps([used, time.perf_counter() - began, busy() - before]))
"""


def peer(paths: list[Path], args: argparse.Namespace) -> tuple[int, float, float]:
    """The same by PyAV and torch, in another Python: as `timed`, without its imports."""
    size = {name: getattr(args, name) for name in ("frames", "height", "width")}
    size |= {"paths": [str(path) for path in paths], "sample_rate": SAMPLE_RATE}
    size |= {"workers": os.cpu_count()}
    command = [args.peer, "-c", PEER, json.dumps(size)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used, seconds, busy = json.loads(done.stdout)
        return used, seconds, busy
    except OSError as error:
        raise UserError(f"--peer={args.peer}: {error.strerror}") from None
    except (subprocess.CalledProcessError, ValueError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise UserError(f"--peer={args.peer}: {said[-1] if said else 'it said nothing'}") from None


def records_lines(args: argparse.Namespace) -> Iterator[str]:
    """The loader, beside plain reading, and what a training would wait."""
    records = open_records(args.records)
    files = sorted(Path(args.records).glob("*.arrayrecord"))
    total = sum(path.stat().st_size for path in files)
    yield (
        f"{len(records)} records, {total / 1e6:,.0f} MB\n"
        f"{'':24}{'records/s':>10}{'MB/s':>10}{'records/s/core':>16}"
    )
    steps = max(1, len(records) // args.batch_size)

    def load() -> int:
        batches = make_dataset(
            records, batch_size=args.batch_size, seed=0, num_steps=steps, threads=args.threads
        )
        return sum(len(batch["id"]) for batch in batches)

    def read() -> int:
        for path in files:
            path.read_bytes()
        return len(records)

    ways = {"the loader": load} | ({"reading the files": read} if files else {})
    for name, work in ways.items():
        number, seconds, busy = timed(work)
        rate = total * number / len(records) / seconds / 1e6
        yield f"{name:24}{number / seconds:10.1f}{rate:10.1f}{number / busy:16.1f}"
    if args.step:
        waited = waits(records, args)
        mean = sum(waited) / len(waited)
        yield (
            f"at {args.step:g} s a step of {args.batch_size}: waits {mean:.4f} s a step, "
            f"{max(waited):.4f} s at most, of {len(waited)} steps"
        )


def waits(records: Records | Linked, args: argparse.Namespace) -> list[float]:
    """Seconds that each of some steps waits for its batch."""
    batches = make_dataset(records, batch_size=args.batch_size, seed=0, threads=args.threads)
    waited = []
    for _ in itertools.islice(_asked(batches, waited), args.steps + 1):
        time.sleep(args.step)
    return waited[1:]  # the first fills the buffers


def _asked(batches: Iterable, waited: list[float]) -> Iterator[None]:
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        next(iterator)
        waited.append(time.perf_counter() - began)
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bench data`."""
    add = parser.add_argument
    add("films", nargs="?", metavar="FOLDER", help="of films")
    add("--frames", type=count, default=121, metavar="N", help="(default: %(default)s)")
    add("--height", type=count, default=512, metavar="PIXELS", help="(default: %(default)s)")
    add("--width", type=count, default=768, metavar="PIXELS", help="(default: %(default)s)")
    add("--fps", type=positive, help="resample to this rate (default: each film's own)")
    add("--peer", metavar="PYTHON", help="a Python with torch and PyAV, to compare with")
    add("--records", metavar="DATASET", help="to read through the loader")
    add("--batch-size", type=count, default=8, metavar="N", help="of records (8)")
    add("--threads", type=count, default=4, metavar="N", help="that read records (4)")
    add("--step", type=positive, metavar="SECONDS", help="tell what steps of this length wait")
    add("--steps", type=count, default=20, metavar="N", help="of these (20)")
