"""Official tensors from files onto devices: stacked, sharded, and in the dtype that is wanted.

Whatever the sharding of a parameter, its tensors are read by rows, shared out among all devices: so
every byte is read by one host, in long runs, and the devices exchange what they have and turn it
into our layout. A host holds two pieces of at most `PIECE_BYTES` of its own rows at a time. On CPU
devices, whose memory is the host's, a stack is one piece, read into the memory of the array.
"""

import collections
import functools
import inspect
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm import tqdm

from ltx2_jax.models import quantized
from ltx2_jax.sharding import SLICE
from ltx2_jax.weights.mapping import SAME, Parameter, in_short
from ltx2_jax.weights.tensor_files import DTYPES, Stored, TensorFile

PIECE_BYTES = 2**29  # of a stack, that a host reads and hands over at a time
READ_BYTES = 2**22  # of a system call: what it brings is checked while it is in the cache
ALIGNMENT = 64  # bytes, of arrays on CPU devices
WHOLE_BYTES = 2**16  # smaller tensors are read whole by every host
NO_MESH = Mesh(np.empty((), object), ())  # in context, arrays say by themselves where they are

# Dtype -> the first pattern, without the sign, that is no number but infinity or NaN.
_NOT_FINITE = {
    "F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80,
    "F8_E4M3": 0x7F, "F8_E5M2": 0x7C,
}  # fmt: skip
_LIMITS = {DTYPES[name]: limit for name, limit in _NOT_FINITE.items()}
FLOAT8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])


class Source(NamedTuple):
    """One tensor in one file."""

    file: TensorFile
    name: str

    @property
    def stored(self) -> Stored:
        return self.file.tensors[self.name]


def stream(
    wanted: Sequence[Parameter],
    tensors: Mapping[str, Source],
    scales: Mapping[str, Source] | None = None,
    *,
    dtype: Any = None,
    progress: str | None = None,
) -> Iterator[tuple[Parameter, jax.Array]]:
    """Our parameters as jax arrays, one by one; `Release.parameters` has found that all fit.

    Args:
      wanted: what to load; a leaf's sharding says where to, without one the default device.
      tensors: official name -> where it is.
      scales: official name of a float8 tensor -> where its scale is: a number, or one for each row.
      dtype: of the result where it is not quantised, or a function of a parameter that gives it;
        None keeps what is stored, and makes bfloat16 of float8.
      progress: what to call the work in a progress bar; None shows none.

    Raises:
      UserError: a file that ends early or cannot be read any more.

    Warns:
      UserWarning: tensors that hold NaN or infinity, all of them named.
    """
    loader = _Loader(tensors, scales or {}, dtype)
    total = sum(tensors[n].stored.nbytes for p in wanted for n in p.names if n in tensors)
    bar = tqdm(
        desc=progress, total=total, unit="B", unit_scale=True, disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for piece, array in loader.run(wanted, pool):
            bar.update(piece.nbytes)
            if piece.last and piece.parameter.form:
                yield from _apart(piece.parameter, *array)
            elif piece.last:
                yield piece.parameter, array
    if loader.not_finite:
        names = ", ".join(in_short(sorted(loader.not_finite)))
        warnings.warn(f"NaN or infinity in {names}", stacklevel=2)


def dtype_for(parameter: Parameter, dtype: Any) -> np.dtype | None:
    """What a `dtype` of `stream` says of one parameter."""
    dtype = dtype(parameter) if inspect.isfunction(dtype) else dtype
    return None if dtype is None else np.dtype(dtype)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that an array of a CPU device takes over as it is; jax copies what numpy aligns."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def finite(values: np.ndarray) -> bool:
    """Whether no number is infinite or NaN; faster than numpy, which converts short floats."""
    limit = _LIMITS.get(values.dtype)
    if limit is None or values.size == 0:
        return True
    patterns = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    return int(np.max(patterns << 1)) < limit << 1  # the shift takes the sign away


# ------------------------------------------------------------------------------ one piece at a time


@dataclass
class _Piece:
    """Some layers of a parameter, all of one dtype, on their way."""

    parameter: Parameter
    first: int
    layers: int
    dtype: np.dtype | None  # None: the file lacks it, and it is zero
    sharding: Any = None  # of the official tensors, [layers, *official] or [*official]
    buffers: dict[Any, np.ndarray] = field(default_factory=dict)  # by index into that array
    reads: list[Future] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return self.parameter.names[self.first : self.first + self.layers]

    @property
    def last(self) -> bool:
        return self.first + self.layers == len(self.parameter.names)

    @property
    def whole(self) -> bool:
        return self.layers == len(self.parameter.names)

    @property
    def shape(self) -> tuple[int, ...]:
        official = self.parameter.official_shape
        return (self.layers, *official) if self.parameter.stacked else official

    @property
    def nbytes(self) -> int:
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


class _Loader:
    def __init__(self, tensors: Mapping[str, Source], scales: Mapping[str, Source], dtype: Any):
        self.tensors, self.scales, self.dtype = tensors, scales, dtype
        self.not_finite: set[str] = set()

    def run(
        self, wanted: Sequence[Parameter], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Piece, jax.Array]]:
        """Every piece, and what its parameter is so far."""
        pieces = (piece for parameter in wanted for piece in self._pieces(parameter))
        started: collections.deque[_Piece] = collections.deque()
        array: jax.Array | None = None
        for piece in pieces:
            self._start(piece, pool)
            started.append(piece)
            # While this one is read, the one before goes to the devices.
            if len(started) == 2:
                array = self._finish(started[0], array)
                yield started.popleft(), array
        for piece in started:
            array = self._finish(piece, array)
            yield piece, array

    def _pieces(self, parameter: Parameter) -> Iterator[_Piece]:
        """Runs of layers that share a dtype, of a size that a host can hold twice."""
        kinds = [
            _kind(self.tensors[name].stored) if name in self.tensors else None
            for name in parameter.names
        ]
        first = 0
        while first < len(kinds):
            piece = _Piece(parameter, first, 1, kinds[first])
            piece.sharding = by_rows(
                automatic(_home(parameter)),
                parameter.official_shape,
                piece.nbytes,
                stacked=parameter.stacked,
            )
            most = len(kinds)
            if _platform(piece.sharding) != "cpu":
                most = max(1, PIECE_BYTES // max(1, _local_bytes(piece)))
            while (end := first + piece.layers) < len(kinds) and piece.layers < most:
                if kinds[end] != piece.dtype:
                    break
                piece.layers += 1
            yield piece
            first += piece.layers

    def _start(self, piece: _Piece, pool: ThreadPoolExecutor) -> None:
        """Makes room for this host's rows of the piece and has them read."""
        if piece.dtype is None:
            return
        stacked = piece.parameter.stacked
        for index in piece.sharding.addressable_devices_indices_map(piece.shape).values():
            if str(index) in piece.buffers:  # that of another device, too
                continue
            bounds = [s.indices(n)[:2] for s, n in zip(index, piece.shape, strict=True)]
            buffer = aligned([stop - start for start, stop in bounds], piece.dtype)
            piece.buffers[str(index)] = buffer
            row = bounds[stacked][0] if len(bounds) > stacked else 0
            for name, out in zip(piece.names, buffer if stacked else [buffer], strict=True):
                piece.reads += [
                    pool.submit(self._read, name, row + start, part) for start, part in _parts(out)
                ]

    def _read(self, name: str, row: int, out: np.ndarray) -> None:
        file, stored_name = self.tensors[name]
        rows = slice(row, row + len(out)) if out.ndim else slice(None)
        if file.tensors[stored_name].dtype == out.dtype:
            file.read(stored_name, rows, out)
        else:
            out[...] = file.read(stored_name, rows)
        if not finite(out):
            self.not_finite.add(name)

    def _finish(self, piece: _Piece, before: jax.Array | None) -> jax.Array:
        """The parameter with this piece in it, on its devices if that was the last."""
        for read in piece.reads:
            read.result()
        parameter = piece.parameter
        # Programs are shared by all parameters of one shape.
        kind = replace(parameter, path=(), names=(), leaf=shape_of(parameter.leaf))
        dtype = self._result_dtype(parameter)
        made = jax.ShapeDtypeStruct(kind.leaf.shape, dtype, sharding=_home(parameter))
        if parameter.form:
            made = quantized.shapes(made, parameter.form)
        homes = jax.tree.map(lambda leaf: automatic(leaf.sharding), made)
        with jax.set_mesh(NO_MESH):  # that around may be of other devices, as a training's is
            if (piece.first == 0 and not piece.whole) or piece.dtype is None:
                zeros = lambda leaf, home: _zeros(leaf.shape, leaf.dtype, home)  # noqa: E731
                before = jax.tree.map(zeros, made, homes)
            if self._by_host(piece):
                ours = kind.to_ours(*piece.buffers.values()).astype(dtype)
                before = jax.make_array_from_callback(ours.shape, homes, ours.__getitem__)
            elif piece.dtype is not None:
                raw = jax.make_array_from_callback(
                    piece.shape, piece.sharding, lambda index: piece.buffers[str(index)]
                )
                before = self._converted(piece, raw, before, kind, dtype, homes)
        piece.buffers.clear()
        jax.block_until_ready(before)  # or buffers of several pieces would wait for their transfer
        if not piece.last:
            return before
        return jax.tree.map(lambda array, leaf: typed(array, leaf.sharding), before, made)

    def _by_host(self, piece: _Piece) -> bool:
        """Whether the host, which has all of it, turns it: sooner than a program is compiled."""
        if piece.dtype is None or not piece.whole or piece.parameter.form:
            return False
        scaled = any(name in self.scales for name in piece.names)
        return not scaled and piece.nbytes <= len(piece.names) * WHOLE_BYTES

    def _converted(
        self, piece: _Piece, raw: jax.Array, before: Any, kind: Parameter, dtype: Any, home: Any
    ) -> jax.Array:
        scale = None
        if any(name in self.scales for name in piece.names):
            each = [self._scale(name) for name in piece.names]
            scale = np.stack(np.broadcast_arrays(*each)) if kind.stacked else each[0]
        as_it_is = scale is None and kind.layout == SAME and raw.dtype == dtype and not kind.form
        if piece.whole:
            if as_it_is and raw.sharding.is_equivalent_to(home, raw.ndim):
                return raw
            return _convert(kind, dtype, home)(raw, scale)
        return _insert(kind, dtype, home)(before, raw, scale, piece.first)

    def _scale(self, name: str) -> np.ndarray:
        """float32 [1] or [rows]."""
        if name not in self.scales:
            return np.ones(1, np.float32)
        file, stored_name = self.scales[name]
        return file.read(stored_name).astype(np.float32).reshape(-1)

    def _result_dtype(self, parameter: Parameter) -> np.dtype:
        if (wanted := dtype_for(parameter, self.dtype)) is not None:
            return wanted
        kinds = {_kind(self.tensors[n].stored) for n in parameter.names if n in self.tensors}
        kinds = {np.dtype(jnp.bfloat16) if kind in FLOAT8 else kind for kind in kinds}
        return np.dtype(jnp.result_type(*kinds)) if kinds else np.dtype("float32")


def _apart(
    parameter: Parameter, values: jax.Array, scale: jax.Array
) -> Iterator[tuple[Parameter, jax.Array]]:
    """A quantised weight as the two parameters that a `Linear` has of it."""
    yield parameter, values
    yield replace(parameter, path=(*parameter.path[:-1], "scale")), scale


def _kind(stored: Stored) -> np.dtype:
    """The dtype in memory: jax has no float64 unless it is asked to."""
    return np.dtype("float32") if stored.dtype == np.float64 else stored.dtype


def _parts(out: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Row number and view of parts of `READ_BYTES`."""
    if out.ndim == 0:
        yield 0, out
        return
    rows = max(1, READ_BYTES // max(1, out[:1].nbytes))
    for start in range(0, len(out), rows):
        yield start, out[start : start + rows]


# ----------------------------------------------------------------------------------- on the devices
#
# All of it under a mesh of Auto axes: XLA's partitioner splits transposes and reshapes of sharded
# arrays by itself. The result is given its explicit sharding without being touched.


def _home(parameter: Parameter) -> Any:
    sharding = getattr(parameter.leaf, "sharding", None)
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding


def automatic(sharding: Any) -> Any:
    """The same sharding under a mesh of Auto axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return NamedSharding(automatic, sharding.spec)


def by_rows(home: Any, shape: Sequence[int], nbytes: int, *, stacked: bool) -> Any:
    """A sharding of an official tensor of `shape` by rows, over as many devices as divide them.

    With a layer axis in front if it is stacked. `home` is where it lies, by an automatic mesh;
    `nbytes` decides whether it is worth it. Every slice reads the whole tensor for itself.
    """
    if not isinstance(home, NamedSharding):
        return home
    axes: tuple[str, ...] = ()
    if nbytes > WHOLE_BYTES:
        names, sizes = tuple(n for n in home.mesh.axis_names if n != SLICE), home.mesh.shape
        choices = [names[i:j] for i in range(len(names)) for j in range(i, len(names) + 1)]
        counts = {c: math.prod(sizes[name] for name in c) for c in choices}
        axes = max((c for c in choices if shape[0] % counts[c] == 0), key=counts.get)
    return NamedSharding(home.mesh, PartitionSpec(*[None] * stacked, axes or None))


def _local_bytes(piece: _Piece) -> int:
    """What this host reads of a piece."""
    indices = piece.sharding.addressable_devices_indices_map(piece.shape).values()
    shard = (
        math.prod(piece.sharding.shard_shape(piece.shape))
        * np.dtype(piece.dtype or np.uint8).itemsize
    )
    return len({str(index) for index in indices}) * shard


def _platform(sharding: Any) -> str:
    return next(iter(sharding.device_set)).platform


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without the sharding, so that equal shapes share a program."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def typed(array: jax.Array, home: Any) -> jax.Array:
    """The same buffers under the sharding `home`, which may be explicit."""
    if array.sharding == home:
        return array
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, home, shards)


@functools.cache
def _zeros_program(shape: tuple[int, ...], dtype: np.dtype, home: Any) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=home)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, home: Any) -> jax.Array:
    return _zeros_program(tuple(shape), dtype, home)()


def _ours(kind: Parameter, raw: jax.Array, scale: jax.Array | None, dtype: np.dtype) -> Any:
    """Official tensors, with their scale if they are float8, as ours: one array, or two."""
    if kind.form == "fp8" and raw.dtype == DTYPES["F8_E4M3"]:
        # As stored. What has no scale is as if it were 1.
        scale = jnp.ones(1, jnp.float32) if scale is None else scale
        return raw, jnp.broadcast_to(scale, raw.shape[:-1])
    if scale is not None:
        # [layers, 1 or rows] or [1 or rows], beside [layers, rows, ...] or [rows, ...]
        scale = scale.reshape(*scale.shape, *[1] * (raw.ndim - scale.ndim))
        raw = raw.astype(jnp.float32) * scale
    if kind.form:
        return quantized.quantized(kind.to_ours(raw), kind.form)
    return kind.to_ours(raw).astype(dtype)


@functools.cache
def _convert(kind: Parameter, dtype: np.dtype, home: Any) -> Any:
    return jax.jit(lambda raw, scale: _ours(kind, raw, scale, dtype), out_shardings=home)


@functools.cache
def _insert(kind: Parameter, dtype: np.dtype, home: Any) -> Any:
    def insert_layers(total: Any, raw: jax.Array, scale: Any, first: jax.Array) -> Any:
        new = _ours(kind, raw, scale, dtype)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return jax.tree.map(put, total, new)

    return jax.jit(insert_layers, out_shardings=home, donate_argnums=0)
