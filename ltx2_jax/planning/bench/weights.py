"""How fast official files are loaded.

A file in the official layout, of full width and few blocks, is written, and read again: from front
to back into memory, which is the most that a loader can reach, and by the loader onto the devices.
Before every reading the file is dropped from the page cache, so that it comes from the disk.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from ltx2_jax.command import count, positive
from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.transformer.config import PRESETS, TransformerConfig
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import transformer
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.writing import writing

PREFIX = "model.diffusion_model."


def run(args: argparse.Namespace) -> None:
    """Prints a line per way of reading: GB/s of the best call, and its share of plain reading."""
    config = sized(PRESETS[args.release], args.gigabytes)
    try:
        scratch = tempfile.TemporaryDirectory(dir=args.folder)
    except OSError as error:
        raise UserError(f"--folder={args.folder}: {reason(error)}") from None
    with scratch as folder:
        path = Path(folder) / "synthetic.safetensors"
        started = time.perf_counter()
        write_synthetic(path, config, progress=True)
        size, seconds = path.stat().st_size, time.perf_counter() - started
        print(
            f"{size / 1e9:.2f} GB, the transformer of {args.release} with {config.num_layers} "
            f"blocks, on {jax.device_count()} {jax.devices()[0].device_kind}\n"
            f"{'':32}{'seconds':>9}{'GB/s':>8}{'of reading':>12}\n"
            f"{'written':32}{seconds:9.2f}{size / 1e9 / seconds:8.2f}"
        )
        ways: dict[str, Callable[[], None]] = {
            "read into memory": partial(read_into_memory, path),
            "loaded as stored": partial(load, path, None),
            "loaded as float32": partial(load, path, "float32"),
        }
        times = {name: [] for name in ways}
        for _ in range(args.calls):  # in turn, so that a slow moment hits them all
            for name, way in ways.items():
                times[name].append(timed(way, path))
        reading = min(times["read into memory"])
        for name, seconds in ((name, min(found)) for name, found in times.items()):
            rate = size / 1e9 / seconds
            print(f"{name:32}{seconds:9.2f}{rate:8.2f}{reading / seconds:12.0%}")


def sized(config: TransformerConfig, gigabytes: float) -> TransformerConfig:
    """The config with as many blocks as make about so many gigabytes of bfloat16."""

    def nbytes(blocks: int) -> int:
        cfg = dataclasses.replace(config, num_layers=blocks)
        return 2 * mapping.count(mapping.parameters(partial(transformer.create, cfg),
                                                    transformer.TABLE))  # fmt: skip

    one, two = nbytes(1), nbytes(2)
    blocks = 1 + round((gigabytes * 1e9 - one) / (two - one))
    return dataclasses.replace(config, num_layers=max(1, blocks))


def write_synthetic(path: Path, config: TransformerConfig, *, progress: bool = False) -> None:
    """A transformer with random bfloat16 weights, as an official file.

    Raises:
      UserError: the file cannot be written.
    """
    wanted = mapping.parameters(partial(transformer.create, config), transformer.TABLE)
    tensors = {
        PREFIX + name: (np.dtype(ml_dtypes.bfloat16), parameter.official_shape)
        for parameter in wanted
        for name in parameter.names
    }
    metadata = {
        "config": json.dumps({"transformer": transformer.section_of(config)}),
        "model_version": "2.3.0" if config.caption_channels is None else "2.0.0",
    }
    noise = np.random.default_rng(0).normal(size=2**20, scale=0.02).astype(ml_dtypes.bfloat16)
    bar = "writing" if progress else None
    with writing(path, tensors, metadata, progress=bar) as writer:
        for name, (_, shape) in tensors.items():
            writer.put_array(name, np.resize(noise, shape))


def read_into_memory(path: Path) -> None:
    """The file from front to back, into memory of its size."""
    np.fromfile(path, np.uint8)


def load(path: Path, dtype: str | None) -> None:
    """The transformer onto all devices."""
    with open_release(path) as release:
        jax.block_until_ready(release.load("transformer", make_mesh(), param_dtype=dtype)[1])


def timed(way: Callable[[], None], path: Path) -> float:
    """Seconds that `way` takes with the file on the disk only."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bench weights`."""
    add = parser.add_argument
    add("--release", choices=tuple(PRESETS), default="2.3", help="(default: %(default)s)")
    add("--gigabytes", type=positive, default=4.0, metavar="N", help="of the file (%(default)s)")
    add("--folder", metavar="DIR", help="where the file goes (default: that of temporary files)")
    add("--calls", type=count, default=3, metavar="N", help="of which the best counts (3)")
