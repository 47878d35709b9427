"""Safetensors files on disk: headers that are checked, byte ranges in, tensors out one by one.

The `safetensors` package reads whole tensors or copies of slices, and writes what is in memory as a
whole. Here every host reads the rows that it needs into buffers of its own, and a file larger than
any host's memory is written by all of them. The format: 8 bytes with the length of the header, the
header as JSON (name -> dtype, shape, offsets), and the tensors, back to back.
Source: https://huggingface.co/docs/safetensors (the format and its rules).
"""

import json
import math
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason

METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes; the format's own limit

# In the order of the format's own list, by which writers sort.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype("int16"),
    "U16": np.dtype("uint16"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("int32"),
    "U32": np.dtype("uint32"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "I64": np.dtype("int64"),
    "U64": np.dtype("uint64"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what it is and where its bytes start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file. Its header is read and checked at once, its tensors when asked for.

    Attributes:
      path: of the file.
      metadata: of the header; text by text.
      tensors: name -> `Stored`, in the order of the bytes.
      bytes_read: of tensors, so far.
    """

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
          UserError: no such file, not a safetensors file, or a header that its bytes contradict:
            a truncated file, offsets outside of it, tensors that overlap or leave gaps, sizes that
            do not fit shape and dtype, a name that is there twice.
        """
        self.path = Path(path)
        self.bytes_read = 0
        self._lock = threading.Lock()
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
            # A file that nobody closed is closed with its last user.
            self._close = weakref.finalize(self, os.close, self._fd)
            size = os.fstat(self._fd).st_size
            start = os.pread(self._fd, 512, 0)
            self.metadata, self.tensors = _read_header(self._fd, size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        except ValueError as error:
            self._close()
            if what := _another_kind(start):
                raise UserError(f"{path}: is {what}") from None
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def close(self) -> None:
        self._close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def read(self, name: str, rows: slice = slice(None), out: np.ndarray | None = None) -> Any:
        """A tensor, or the rows `rows` (step 1) of its leading axis, into `out` if that is given.

        Several threads may read at once.

        Raises:
          UserError: the file ended early or cannot be read any more.
        """
        stored = self.tensors[name]
        shape, start = stored.shape, stored.start
        if stored.shape:
            first, last, _ = rows.indices(shape[0])
            start += first * math.prod(shape[1:]) * stored.dtype.itemsize
            shape = (max(last - first, 0), *shape[1:])
        if out is None:
            out = np.empty(shape, stored.dtype)
        # As bytes: the dtypes of ml_dtypes have no buffer interface.
        view = memoryview(out.reshape(-1).view(np.uint8))
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], start + done)
                if count == 0:
                    raise UserError(f"{self.path}: ends inside of {name}")
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        with self._lock:
            self.bytes_read += done
        return out


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """A file's metadata; errors as `TensorFile`."""
    with TensorFile(path) as file:
        return file.metadata


def dtype_name(dtype: Any) -> str:
    """How headers call a dtype: "BF16"."""
    return _NAMES[np.dtype(dtype)]


# ---------------------------------------------------------------------------------------- reading

# How files of other kinds begin, in small letters, and what to say of them.
_OTHER_KINDS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, a small text in place of the weights: fetch them with `git lfs pull`"
    ),
    b"gguf": (
        "a GGUF file, which is not read: use a safetensors file, as Lightricks released it"
    ),
    b"pk\x03\x04": (
        "a zip archive or a file of torch.save, which is not read: unpack it, or save its tensors "
        "as safetensors"
    ),
    b"\x80\x02": "a file of torch.save, which is not read: save its tensors as safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89hdf": "an HDF5 file, which is not read: use a safetensors file",
    b"<": (
        "a web page, not weights: download the file itself (the site may want you to log in or "
        "accept a licence first)"
    ),
    b"{": "text (JSON), not weights: give the safetensors file that belongs to it",
}  # fmt: skip


def _another_kind(start: bytes) -> str:
    """What a file that begins so is, and what to do; "" if that does not tell."""
    if not start:
        return "empty: download it again"
    if not start.strip(b"\0"):
        return "filled with zeros from its start: the download did not finish; download it again"
    text = b"\0" not in start[:8]  # where a header has its length, which is never that large
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for kind, what in _OTHER_KINDS.items():
        if start.startswith(kind) and (text or kind not in (b"<", b"{")):
            return what
    return ""


def _read_header(fd: int, size: int) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors; a ValueError says what is wrong."""
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a header")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"its header would have {length} bytes, the file has {size}")
    try:
        header = json.loads(os.pread(fd, length, 8).decode(), object_pairs_hook=_without_doubles)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not text")
    start = 8 + length
    tensors = [(name, _stored(name, entry, start)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].nbytes))
    end, before = start, "the header"
    for name, stored in tensors:
        if stored.start < end:
            raise ValueError(f"{name} overlaps {before}")
        if stored.start > end:
            raise ValueError(f"{stored.start - end} bytes before {name} belong to no tensor")
        end, before = stored.start + stored.nbytes, name
    if end > size:
        raise ValueError(
            f"truncated: its tensors end at byte {end}, the file at {size}; download it again"
        )
    if end < size:
        raise ValueError(f"its tensors end at byte {end}, but the file has {size}")
    return metadata, dict(tensors)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found


def _stored(name: str, entry: Any, start: int) -> Stored:
    try:
        kind, shape = entry["dtype"], entry["shape"]
        first, last = entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"the header's entry of {name} is malformed")
    if kind not in DTYPES:
        raise ValueError(f"{name} has the dtype {kind}, which is not one of {', '.join(DTYPES)}")
    stored = Stored(DTYPES[kind], tuple(shape), start + first)
    if last - first != stored.nbytes:
        raise ValueError(
            f"{name} takes {last - first} bytes, but {kind} {list(shape)} has {stored.nbytes}"
        )
    return stored


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Layout:
    """Where everything of a file to be written will lie."""

    header: bytes  # with its length in front
    tensors: dict[str, Stored]
    nbytes: int  # of the whole file


def layout(
    tensors: Mapping[str, tuple[Any, Iterable[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """The layout of a file with `tensors`, name -> (dtype, shape).

    Wide dtypes first, then by name, exactly as the `safetensors` package does it: every tensor
    starts at a multiple of the size of its numbers, which some readers need.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at, places = 0, {}
    order = list(DTYPES.values())
    for name in sorted(tensors, key=lambda n: (-order.index(np.dtype(tensors[n][0])), n)):
        dtype, shape = tensors[name]
        stored = Stored(np.dtype(dtype), tuple(shape), at)
        places[name] = stored
        end = at + stored.nbytes
        header[name] = {
            "dtype": dtype_name(dtype), "shape": list(stored.shape), "data_offsets": [at, end]
        }  # fmt: skip
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    start = 8 + len(text)
    moved = {n: Stored(s.dtype, s.shape, start + s.start) for n, s in places.items()}
    return Layout(len(text).to_bytes(8, "little") + text, moved, start + at)


def write_rows(fd: int, stored: Stored, values: np.ndarray, first_row: int = 0) -> None:
    """Rows of a tensor, from `first_row` of its leading axis on, to their place in an open file."""
    start = stored.start
    if stored.shape:
        start += first_row * math.prod(stored.shape[1:]) * stored.dtype.itemsize
    values = np.ascontiguousarray(values, stored.dtype)
    view, done = memoryview(values.reshape(-1).view(np.uint8)), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], start + done)
