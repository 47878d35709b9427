"""Official safetensors files from parameters on devices, without any host holding all of them.

A tensor is turned into its official form on the devices, by rows that all of them share, and every
host writes the rows of its own devices into one file. On several hosts that file has to be on a
file system that they share.
"""

import contextlib
import functools
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.weights.loading import WHOLE_BYTES, Source, automatic, by_rows, shape_of, typed
from ltx2_jax.weights.mapping import Parameter
from ltx2_jax.weights.tensor_files import Layout, layout, write_rows

COPY_ROWS_BYTES = 2**26  # of a tensor that is copied as it is


class Writer:
    """A file that is being written; `writing` makes one."""

    def __init__(self, fd: int, places: Layout, bar: Any):
        self._fd, self._places, self._bar = fd, places, bar
        self._left = set(places.tensors)

    def put(self, parameter: Parameter, array: Any, names: Mapping[str, str]) -> None:
        """Writes the official tensors of one of our parameters, in the dtypes of the layout.

        `names` gives the name in the file for each of `parameter.names`; what it lacks is left out.
        """
        for layer, name in enumerate(parameter.names):
            if name not in names:
                continue
            stored = self._places.tensors[names[name]]
            for row, values in _rows(parameter, array, layer, stored.dtype):
                write_rows(self._fd, stored, values, row)
            self._written(names[name])

    def copy(self, name: str, source: Source) -> None:
        """Writes a tensor with the bytes that it has in another file."""
        stored = self._places.tensors[name]
        # The hosts take turns: copying needs no device.
        turn = sorted(self._places.tensors).index(name) % jax.process_count()
        if turn == jax.process_index():
            rows = stored.shape[0] if stored.shape else 1
            step = max(1, COPY_ROWS_BYTES * rows // max(1, stored.nbytes))
            for row in range(0, rows, step):
                part = slice(row, row + step) if stored.shape else slice(None)
                write_rows(self._fd, stored, source.file.read(source.name, part), row)
        self._written(name)

    def put_array(self, name: str, values: np.ndarray) -> None:
        """Writes a tensor that every host has."""
        if jax.process_index() == 0:
            write_rows(self._fd, self._places.tensors[name], values)
        self._written(name)

    def _written(self, name: str) -> None:
        self._left.remove(name)
        self._bar.update(self._places.tensors[name].nbytes)

    def finish(self) -> None:
        if self._left:
            raise RuntimeError(f"not written: {sorted(self._left)[:5]}")
        os.fsync(self._fd)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    progress: str | None = None,
) -> Iterator[Writer]:
    """A safetensors file of `tensors`, name -> (dtype, shape), which the block has to put into it.

    It appears under `path` at the end of the block; if that raises, nothing does. Its bytes are
    reserved on the disk at the start. On several hosts all of them call this, in step.

    Args:
      path: of the file, which does not exist yet.
      tensors: all that will be in it.
      metadata: of its header.
      progress: what to call the work in a progress bar; None shows none.

    Raises:
      UserError: the path exists or cannot be written, or the disk is or becomes full.
    """
    path, places = Path(path), layout(tensors, metadata)
    first = jax.process_index() == 0
    with appearing(path, places.nbytes) as temporary:
        if first:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.posix_fallocate(fd, 0, places.nbytes)
            os.pwrite(fd, places.header, 0)
        _barrier("created")
        if not first:
            fd = _open_shared(temporary, path)
        bar = tqdm(
            desc=progress, total=places.nbytes, unit="B", unit_scale=True,
            disable=None if progress and first else True,
        )  # fmt: skip
        try:
            with bar:
                writer = Writer(fd, places, bar)
                yield writer
                writer.finish()
        finally:
            os.close(fd)


@contextlib.contextmanager
def appearing(path: str | os.PathLike, nbytes: int) -> Iterator[Path]:
    """A new name beside `path`, for all hosts to write a file of `nbytes` under.

    At the end of the block it becomes `path`; if the block raises, what it wrote is removed.

    Raises:
      UserError: the path exists or cannot be written, or the disk is or becomes full.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already")
    check_free(path, nbytes)
    temporary = path.with_name(f".{path.name}.{_shared_token()}")
    first = jax.process_index() == 0
    try:
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _barrier("written")
        if first:
            os.rename(temporary, path)
        _barrier("renamed")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None
    finally:
        if first:
            with contextlib.suppress(OSError):
                temporary.unlink()


def check_writable(path: Path) -> None:
    """UserError, before any work, if nothing can be written where `path` is to be."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


def _existing(path: Path) -> Path:
    """The innermost folder of a path that is there."""
    return next(parent for parent in path.resolve().parents if parent.exists())


def check_free(path: Path, nbytes: int) -> None:
    """UserError unless the disk that `path` is to be on has room for `nbytes`."""
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"{path}: needs {nbytes / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free"
        )


def _rows(
    parameter: Parameter, array: Any, layer: int, dtype: np.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and values of the parts of a layer's official tensor that this host writes."""
    sharding, shape = getattr(array, "sharding", None), parameter.official_shape
    small = math.prod(shape) * array.dtype.itemsize <= WHOLE_BYTES
    if small and getattr(array, "is_fully_addressable", True):
        # The host turns it: sooner than a program is compiled.
        array, sharding = np.asarray(array), None
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        value = array[layer] if parameter.stacked else array
        yield 0, np.asarray(parameter.to_official(value).astype(dtype))
        return
    home = automatic(sharding)
    where = by_rows(home, shape, math.prod(shape) * dtype.itemsize, stacked=False)
    kind = replace(parameter, path=(), names=(), leaf=shape_of(parameter.leaf))
    program = _official(kind, dtype, where)
    for shard in program(typed(array, home), layer).addressable_shards:
        if shard.replica_id == 0:
            row = shard.index[0].start if shard.index else 0
            yield row or 0, np.asarray(shard.data)


@functools.cache
def _official(kind: Parameter, dtype: np.dtype, where: Any) -> Any:
    def official(array: jax.Array, layer: jax.Array) -> jax.Array:
        if kind.stacked:
            array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        return kind.to_official(array).astype(dtype)

    return jax.jit(official, out_shardings=where)


# ------------------------------------------------------------------------------------ several hosts


def _shared_token() -> str:
    if jax.process_count() == 1:
        return f"{os.getpid()}-{secrets.token_hex(4)}"
    mine = np.frombuffer(secrets.token_bytes(4), np.uint32)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine))).hex()


def _barrier(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"ltx2_jax.weights.writing.{what}")


def _open_shared(temporary: Path, path: Path) -> int:
    try:
        return os.open(temporary, os.O_RDWR)
    except FileNotFoundError:
        raise UserError(f"{path}: has to be on a file system that all hosts share") from None
