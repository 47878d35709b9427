"""Tensors and strings as safetensors bytes: records of a dataset, features of a prompt.

A blob describes itself, keeps bfloat16, and reading it can never run code.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

_DTYPES = {  # by safetensors' names
    "BOOL": np.bool_,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
}


def content_hash(path: str | os.PathLike) -> str:
    """16 hex digits for what a file says.

    A safetensors file is hashed tensor by tensor in the order of their names: its library writes
    the metadata in random order, so the bytes of two equal files differ.
    """
    digest = hashlib.sha256()
    if Path(path).suffix == ".safetensors":
        arrays, metadata = unpack(np.memmap(path, np.uint8, "r"))
        digest.update(json.dumps(metadata, sort_keys=True).encode())
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype.name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    else:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def unpack(data) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (views of `data`) and metadata of a safetensors blob. Raises ValueError, KeyError."""
    # Not safetensors.numpy.load: it cannot read bfloat16 and does not return the metadata.
    buffer = memoryview(data)
    start = 8 + int.from_bytes(buffer[:8], "little")
    header = json.loads(bytes(buffer[8:start]))
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        content = np.frombuffer(buffer[start + begin : start + end], _DTYPES[tensor["dtype"]])
        arrays[name] = content.reshape(tensor["shape"])
    return arrays, metadata


def serialize(record: Mapping[str, Any]) -> bytes:
    """One record as safetensors bytes; equal records give equal bytes."""
    strings = {k: v for k, v in record.items() if isinstance(v, str)}
    arrays = {k: np.asarray(v, order="C") for k, v in record.items() if k not in strings}
    # One metadata entry, because the library writes several in random order.
    return safetensors.numpy.save(arrays, {"strings": json.dumps(strings, ensure_ascii=False)})


def deserialize(data: bytes) -> dict[str, Any]:
    """The reverse of `serialize`; arrays are read-only views of `data`.

    Raises:
      ValueError, KeyError: the bytes are not a record.
    """
    arrays, metadata = unpack(data)
    return {**arrays, **json.loads(metadata["strings"])}
