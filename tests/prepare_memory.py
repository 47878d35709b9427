"""Measures the memory of `prepare` on a long film of 3840x2160, and on thousands of small ones.

    python tests/prepare_memory.py film --minutes=10 --clips=12
    python tests/prepare_memory.py film --minutes=10 --clips=12 --scenes
    python tests/prepare_memory.py films --clips=10000

The codec has the released form and tiny networks, so that what is measured is what reads, waits and
writes. The film repeats one encoded second; its clips are spread over it. The small films are few
files under many names. Printed is the largest resident size that the process had (VmHWM).
"""

import argparse
import csv
import fractions
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import film
import numpy as np
import tiny_codec
from pod import environment

FPS = 24


def long_film(path: Path, minutes: float) -> None:
    """A second of 3840x2160 with sound, encoded once and repeated."""
    second = path.with_name("second.mp4")
    y, x = np.mgrid[:2160, :3840]
    images = (
        np.stack([(x // 15 + 9 * k) % 256, (y // 9 + 5 * k) % 256, (x + y) // 24 % 256], axis=-1)
        for k in range(FPS)
    )
    frames = [film.as_frame(image.astype(np.uint8)) for image in images]
    options = {"preset": "ultrafast", "g": str(FPS), "bf": "0", "sc_threshold": "0"}
    film.write_film(second, frames, fps=FPS, options=options)
    times = np.arange(16000, dtype=np.float32) / 16000
    tone = av.AudioFrame.from_ndarray(np.sin(2765 * times)[None], format="fltp", layout="mono")
    tone.sample_rate, tone.time_base = 16000, fractions.Fraction(1, 16000)
    with av.open(str(second)) as source, av.open(str(path), "w") as target:
        pictures = target.add_stream_from_template(source.streams.video[0])
        sound = target.add_stream("aac", rate=16000, layout="mono")
        packets = [packet for packet in source.demux() if packet.size]
        for repeat in range(round(60 * minutes)):
            for packet in packets:
                copy, later = av.Packet(bytes(packet)), round(repeat / packet.time_base)
                copy.time_base = packet.time_base
                copy.pts, copy.dts = packet.pts + later, packet.dts + later
                copy.is_keyframe, copy.stream = packet.is_keyframe, pictures
                target.mux(copy)
            tone.pts = 16000 * repeat
            target.mux(sound.encode(tone))
        target.mux(sound.encode())


def prepare(folder: Path, rows: list[dict[str, object]], *flags: str) -> None:
    """Runs the command on these rows, and prints what it took."""
    with open(folder / "films.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (codec,) = tiny_codec.write(folder)
    command = [sys.executable, "-m", "ltx2_jax.prepare", str(folder / "films.csv")]
    command += [str(folder / "set"), f"--codec={codec}", "--text-widths=8,8", *flags]
    began = time.monotonic()
    running = subprocess.Popen(command, env=environment(1), stdout=subprocess.PIPE, text=True)
    said = running.stdout.read()
    _, status, used = os.wait4(running.pid, 0)
    assert status == 0
    print(said.splitlines()[0])
    print(f"{used.ru_maxrss / 1024:.0f} MiB at most, in {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("film", "films"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--size", default="384x256x25", help="width x height x frames")
    parser.add_argument("--scenes", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, flags = Path(name), ["--scenes"] * args.scenes
        if args.what == "film":
            long_film(folder / "film.mp4", args.minutes)
            print(f"a film of {(folder / 'film.mp4').stat().st_size / 2**20:.0f} MiB")
            last = 60 * args.minutes - 10
            starts = np.linspace(0, last, args.clips).round(3).tolist()
            rows = [{"video": "film.mp4", "caption": f"from {t:g}", "start": t} for t in starts]
            return prepare(folder, rows, f"--buckets={args.size}", *flags)
        for n in range(8):
            film.write_film(folder / f"{n}.mp4", film.plain((9 * n, 99, 50)), tones=[200 + 50 * n])
        for n in range(8, args.clips):
            os.link(folder / f"{n % 8}.mp4", folder / f"{n}.mp4")
        rows = [{"video": f"{n}.mp4", "caption": f"film {n}"} for n in range(args.clips)]
        prepare(folder, rows, "--buckets=32x32x9", *flags)


if __name__ == "__main__":
    main()
