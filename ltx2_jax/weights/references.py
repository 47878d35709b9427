"""Small files that name released ones: how a dataset refers to its codec and its text encoder.

The weights are gigabytes and the same for every dataset: they stay where they are.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.numpy import save

from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing


def fingerprint(path: Path) -> str:
    """A hash that tells a released file from others without reading all of it.

    Of its size, its first megabyte with the header, and a megabyte at its middle and its end; of a
    folder of weights those of all its files, and their names.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        named = [f"{file.relative_to(path)} {fingerprint(file)}" for file in files]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
    size, piece = path.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - piece)):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def write(path: str | os.PathLike, kind: str, files: Sequence[Path], **about: str) -> None:
    """A file at `path` that names released ones; `about` goes into its metadata, beside `kind`."""
    named = [{"path": str(p), "fingerprint": fingerprint(p)} for p in files]
    metadata = {"kind": kind, "files": json.dumps(named), **about}
    with replacing(path) as temporary:
        temporary.write_bytes(save({}, metadata))


def follow(path: str | os.PathLike, metadata: Mapping[str, str]) -> list[Path]:
    """The released files that a file of `write` names, from its metadata.

    Raises:
      UserError: the file is damaged; a file that it names is gone, or is another one by now.
    """
    try:
        named = [(Path(f["path"]), f["fingerprint"]) for f in json.loads(metadata["files"])]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); run prepare again") from error
    for released, expected in named:
        if not released.exists():
            raise UserError(f"{path}: names {released}, which is not there; put it back")
        if fingerprint(released) != expected:
            raise UserError(f"{path}: {released} is not the file that the latents were made with")
    return [released for released, _ in named]
