"""`.pt` files of the official trainer, read and written without torch and without running a pickle.

Such a file is a zip, uncompressed: `<any folder>/data.pkl`, a pickled dict of numbers, strings and
tensors, and `<folder>/data/<n>`, the bytes behind the tensors. A pickle is a program. Here it is
stepped through by an interpreter of the few operations that build such a dict; it knows two
functions and the storage types by name, imports nothing and refuses everything else.

Memory stays within a small multiple of the file's size: nothing is decompressed, a tensor is a view
of the file's bytes and never larger than they are, and the pickle has a bound of its own.
"""

import dataclasses
import hashlib
import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing

PICKLE_BYTES = 2**16  # that of a dataset's file takes some hundreds

_TENSOR = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"
_STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}


class Refused(ValueError):
    """Why a file is not read; it says nothing of the path."""


class Storage(NamedTuple):
    """What lies behind tensors: `count` elements [count], None if they were not read."""

    dtype: np.dtype
    count: int
    elements: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as its file describes it.

    Attributes:
      storage: its elements, which other tensors may share.
      offset, shape, strides: where in it the tensor lies, in elements.
    """

    storage: "Storage"
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A view of the storage, read-only; zeros that take no memory if that was not read."""
        dtype, elements = self.storage.dtype, self.storage.elements
        if elements is None:
            return np.broadcast_to(np.zeros((), dtype), self.shape)
        strides = [stride * dtype.itemsize for stride in self.strides]
        part = elements[self.offset :]
        return np.lib.stride_tricks.as_strided(part, self.shape, strides, writeable=False)


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name of the pickle: a storage type, or one of the two functions."""

    name: str


# ---- reading -------------------------------------------------------------------------------------


def read_pt(path: str | os.PathLike, *, sizes_only: bool = False) -> dict[str, Any]:
    """The dict in a `.pt` file: numbers, strings, None, and numpy arrays (read-only) for tensors.

    With `sizes_only` the tensors' bytes stay on the disk, unchecked, and zeros are in their place,
    which take no memory: a few blocks are read of a file of any size.

    Raises:
      UserError: naming the file, in one line: it cannot be read, is no such file, is damaged, or
        holds anything else, which is named.
    """
    return {
        name: value.array() if isinstance(value, Tensor) else value
        for name, value in read_entries(path, sizes_only=sizes_only).items()
    }


def read_entries(path: str | os.PathLike, *, sizes_only: bool = False) -> dict[str, Any]:
    """What `read_pt` reads, with a `Tensor` for every tensor."""
    try:
        with open(path, "rb") as file:
            return _entries(file if sizes_only else io.BytesIO(file.read()), sizes_only)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except Refused as error:
        raise UserError(f"{path}: {error}") from None


def _entries(file: BinaryIO, sizes_only: bool) -> dict[str, Any]:
    archive = _Archive(file, sizes_only)
    values = _run(archive)
    for name, value in values.items():
        if not isinstance(name, str):
            raise Refused(f"an entry is named by {_kind(name)}, not by text")
        if not isinstance(value, Tensor | str | int | float | None):
            raise Refused(f"entry {_shown(name)} is {_kind(value)}, not a number, text or tensor")
    return values


class _Archive:
    """The uncompressed zip around a pickle and its storages."""

    def __init__(self, file: BinaryIO, sizes_only: bool):
        self._file, self._sizes_only = file, sizes_only
        self._unread = file.seek(0, os.SEEK_END)  # bytes that may still be asked for
        try:
            with zipfile.ZipFile(file) as directory:
                infos = directory.infolist()
        # What the library raises for damaged zips is not told in one place.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError,
                IndexError, OverflowError, RuntimeError, struct.error) as error:  # fmt: skip
            raise Refused(f"not a zip as torch.save writes it ({reason(error):.80})") from None
        self._infos = {info.filename: info for info in infos}
        pickles = [name for name in self._infos if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"holds {len(pickles)} files data.pkl; torch.save writes one")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"
        if order in self._infos and self._read(order) != b"little":
            raise Refused("was written on a machine with another byte order")
        self._storages: dict[str, Storage] = {}

    def pickle(self) -> bytes:
        """The pickle's bytes."""
        name = f"{self._folder}data.pkl"
        if self._infos[name].file_size > PICKLE_BYTES:
            raise Refused(f"its data.pkl is larger than {PICKLE_BYTES} bytes")
        return self._read(name)

    def storage(self, key: Any, dtype: np.dtype, count: Any) -> Storage:
        """What lies behind tensors; one object for all who name it."""
        if not isinstance(key, str) or not _natural(count):
            raise Refused("damaged: a storage has no name or size")
        if key not in self._storages:
            self._storages[key] = Storage(dtype, count, self._elements(key, dtype, count))
        storage = self._storages[key]
        if (storage.dtype, storage.count) != (dtype, count):
            raise Refused(f"damaged: storage {_shown(key)} is named as two things")
        return storage

    def _elements(self, key: str, dtype: np.dtype, count: int) -> np.ndarray | None:
        info = self._info(f"{self._folder}data/{key}")
        if info.file_size != count * dtype.itemsize:
            size = f"{info.file_size} bytes, not {count} x {dtype.itemsize}"
            raise Refused(f"damaged: storage {_shown(key)} has {size}")
        if self._sizes_only:
            return None
        content = self._read(info.filename)
        if dtype.kind == "b" and np.frombuffer(content, "u1").max(initial=0) > 1:
            raise Refused(f"damaged: storage {_shown(key)} has other bytes than 0 and 1")
        return np.frombuffer(content, dtype)

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._infos.get(name)
        if info is None:
            raise Refused(f"damaged: no {_shown(name)} in it")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise Refused(f"{_shown(name)} in it is compressed; torch.save compresses nothing")
        return info

    def _read(self, name: str) -> bytes:
        """A file's bytes. All files together have no more than the zip: none is read twice."""
        info = self._info(name)
        self._unread -= info.file_size
        if self._unread < 0:
            raise Refused("damaged: the files in it overlap")
        self._file.seek(max(0, info.header_offset))
        header = self._file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise Refused(f"damaged: {_shown(name)} in it has no header")
        self._file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)  # name, padding
        content = self._file.read(info.file_size)
        if len(content) != info.file_size:
            raise Refused(f"damaged: {_shown(name)} in it is cut off")
        if zlib.crc32(content) != info.CRC:
            raise Refused(f"damaged: the checksum of {_shown(name)} in it does not agree")
        return content


def _run(archive: _Archive) -> dict[Any, Any]:
    """What the pickle builds."""
    machine = _Machine(archive)
    try:
        # The library only cuts the program into operations and their arguments.
        for operation, argument, _ in pickletools.genops(archive.pickle()):
            machine.step(operation.name, argument)
            if operation.name == "STOP":
                break
        return machine.result()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise Refused(f"damaged: data.pkl is no dict of tensors ({reason(error)!s:.80})") from None


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of a pickle, and the operations that these files are made of."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def result(self) -> dict[Any, Any]:
        (value,) = self._stack
        if self._below or not isinstance(value, dict):
            raise Refused(f"holds {_kind(value)}, not a dict")
        return value

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _TUPLES:
            self._replace(_TUPLES[name], tuple(stack[-_TUPLES[name] :]))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "TUPLE":
            self._stack = self._below.pop()
            self._stack.append(tuple(stack))
        elif name == "SETITEMS":
            self._stack = self._below.pop()
            self._set(self._stack[-1], stack)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set(stack[-1], [key, value])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name == "BINPERSID":
            self._replace(1, self._storage(stack[-1]))
        elif name == "REDUCE":
            self._replace(2, self._called(*stack[-2:]))
        elif name not in ("PROTO", "STOP"):
            raise Refused(f"its pickle has the operation {name}, which no tensor is made of")

    def _replace(self, count: int, value: Any) -> None:
        if len(self._stack) < count:
            raise IndexError("nothing on the stack")
        self._stack[-count:] = [value]

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise Refused(f"an entry is named by {_kind(key)}, not by text")
            target[key] = value

    def _storage(self, name: Any) -> Storage:
        word, kind, key, _, count = name
        if word != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise TypeError("a reference that is not to a storage")
        return self._archive.storage(key, _STORAGES[kind.name], count)

    def _called(self, function: Any, arguments: Any) -> Any:
        called = function.name if isinstance(function, _Global) else ""
        if called == _ORDERED_DICT and arguments == ():
            return {}
        if called != _TENSOR:
            raise Refused(f"its pickle calls {_kind(function)}")
        storage, offset, shape, strides, _, hooks, *metadata = arguments
        if hooks or any(metadata):
            raise Refused("a tensor with hooks or metadata")
        return _tensor(storage, offset, shape, strides)


def _known(name: str) -> _Global:
    if name not in (_TENSOR, _ORDERED_DICT, *_STORAGES):
        raise Refused(f"its pickle asks for {_shown(name.replace(' ', '.'))}, which is refused")
    return _Global(name)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Checked: within its storage, and no larger, so that no few bytes stand for terabytes."""
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not isinstance(storage, Storage) or not sizes:
        raise TypeError("a tensor without storage or shape")
    if len(shape) > 16 or not all(map(_natural, (offset, *shape, *strides))):
        raise Refused("damaged: a tensor's shape, strides or offset are not numbers from 0 on")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if max(count, offset) > storage.count or (count and last >= storage.count):
        raise Refused(f"damaged: a tensor reaches beyond its storage of {storage.count} elements")
    if not count:  # of an empty tensor nothing is read, whatever its other sizes say
        shape, strides = tuple(min(size, 1) for size in shape), (0,) * len(shape)
    return Tensor(storage, offset, shape, strides)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _kind(value: Any) -> str:
    if isinstance(value, _Global):
        return _shown(value.name.replace(" ", "."))
    return "a storage" if isinstance(value, Storage) else f"a {type(value).__name__}"


def _shown(text: str) -> str:
    return f"{text[:60]!r}"


# ---- writing -------------------------------------------------------------------------------------


def write_pt(path: str | os.PathLike, entries: Mapping[str, Any]) -> None:
    """Writes a `.pt` file as `torch.save` does, whole or not at all; equal entries, equal bytes.

    Args:
      path: the file; folders on the way are created.
      entries: numbers, strings, None, and arrays, written in C order. An array that is given twice
        is stored once.

    Raises:
      UserError: the disk does not take it.
      TypeError: a value that `read_pt` would not read.
    """
    program, storages = _pickled(entries)
    with replacing(path) as temporary:
        folder = f"{Path(path).name}.tmp/"  # the official scripts write to that name first
        files = {
            "data.pkl": program,
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": b"little",
            **{f"data/{i}": storage.tobytes() for i, storage in enumerate(storages)},
            "version": b"3\n",
        }
        digest = hashlib.sha256(b"".join(files.values())).digest()
        files[".data/serialization_id"] = b"%040d" % (int.from_bytes(digest, "little") % 10**40)
        with zipfile.ZipFile(temporary, "w") as file:
            for name, content in files.items():
                info = zipfile.ZipInfo(folder + name)  # of a fixed date
                start = file.fp.tell() + 30 + len(info.filename.encode()) + 4
                pad = -start % 64  # storages begin at multiples of 64 bytes, to be mapped
                info.extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
                file.writestr(info, content)


def _pickled(entries: Mapping[str, Any]) -> tuple[bytes, list[np.ndarray]]:
    """The program that builds a dict, and the storages that it names."""
    writer = _Writer()
    writer.out += b"\x80\x02}"
    writer.put()
    writer.out += b"(" if len(entries) > 1 else b""
    for name, value in entries.items():
        writer.string(name)
        writer.value(value)
    writer.out += {0: b".", 1: b"s."}.get(len(entries), b"u.")
    return bytes(writer.out), writer.storages


class _Writer:
    """The operations of `_Machine`, written; memo numbers run as torch's pickler counts them."""

    def __init__(self):
        self.out = bytearray()
        self.storages: list[np.ndarray] = []
        self._arrays: list[Any] = []  # whose storages those are
        self._memo: dict[str, int] = {}
        self._count = 0

    def put(self, key: str | None = None) -> None:
        number, self._count = self._count, self._count + 1
        self.out += b"q%c" % number if number < 256 else b"r" + struct.pack("<I", number)
        if key is not None:
            self._memo[key] = number

    def _again(self, key: str) -> bool:
        number = self._memo.get(key)
        if number is not None:
            self.out += b"h%c" % number if number < 256 else b"j" + struct.pack("<I", number)
        return number is not None

    def string(self, text: str) -> None:
        if not self._again(f"text {text}"):
            content = text.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(content)) + content
            self.put(f"text {text}")

    def name(self, name: str) -> None:
        if not self._again(f"name {name}"):
            self.out += b"c" + name.replace(" ", "\n").encode() + b"\n"
            self.put(f"name {name}")

    def value(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.string(value)
        else:
            self._tensor(value)

    def _integer(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.out += b"K%c" % value
        elif 0 <= value < 2**16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a%c" % len(content) + content

    def _tuple(self, values: tuple[int, ...]) -> None:
        if not values:
            self.out += b")"
            return
        self.out += b"(" if len(values) > 3 else b""
        for value in values:
            self._integer(value)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")
        self.put()

    def _tensor(self, array: Any) -> None:
        if not isinstance(array, np.ndarray) or array.dtype not in _NAMES:
            raise TypeError(f"a .pt file takes no {getattr(array, 'dtype', type(array).__name__)}")
        seen = [array is other for other in self._arrays]
        key = seen.index(True) if any(seen) else len(seen)
        if key == len(seen):
            self._arrays.append(array)
            self.storages.append(np.ascontiguousarray(array))
        self.name(_TENSOR)
        self.out += b"(("
        self.string("storage")
        self.name(_NAMES[array.dtype])
        self.string(str(key))
        self.string("cpu")
        self._integer(array.size)
        self.out += b"t"
        self.put()
        self.out += b"Q"
        self._integer(0)
        self._tuple(array.shape)
        sizes = [max(size, 1) for size in array.shape]
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(array.ndim)]
        self._tuple(tuple(strides))
        self.out += b"\x89"
        self.name(_ORDERED_DICT)
        self.out += b")R"
        self.put()
        self.out += b"t"
        self.put()
        self.out += b"R"
        self.put()
