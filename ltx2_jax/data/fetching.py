"""Datasets of a bucket, copied to a disk: ArrayRecord reads files of disks alone.

The order of examples is shuffled over all shards, so that every host needs all of them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from ltx2_jax import hosts
from ltx2_jax.data.records import INDEX_NAME, NAMES_NAME, Records
from ltx2_jax.errors import UserError
from ltx2_jax.files import bucket_files, download, location, locked, reason, replacing

AT_ONCE = 16  # files that are copied at a time


def local_dataset(path: str, cache: str | None, flag: str = "--config.data.cache") -> str:
    """The folder of a dataset; that of a bucket is copied into `cache` first, and stays there.

    Its folder there has the sum of its index in its name: another dataset at the same place gets
    another folder. What is there already, whole, is not copied again. Processes that share the
    disk wait for each other. `flag` is how a user gives the cache.

    Raises:
      UserError: no such dataset, no `cache`, or the disk does not take it.
    """
    if not path.startswith("gs://"):
        return path
    place = location(path)
    if cache is None:
        raise UserError(
            f"{path}: a dataset in a bucket is copied to every host first: name a folder of a disk "
            f"with {flag}"
        )
    try:
        files = bucket_files(place)
        index = (place / INDEX_NAME).read_bytes() if INDEX_NAME in files else b"{}"
        if "shards" not in json.loads(index):
            raise UserError(
                f"{path}: no dataset that prepare wrote is there (.precomputed folders are read on "
                "disks alone)"
            )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    folder = Path(cache) / f"{place.name}-{hashlib.sha256(index).hexdigest()[:12]}"
    with _alone(folder):
        _copy(place, files, folder)
    return str(folder)


def open_in_bucket(path: str | os.PathLike) -> Records | None:
    """The dataset in a folder of a bucket, as far as it is known without its records.

    None if there is none.

    Raises:
      UserError: the bucket does not answer; as `open_records` does.
    """
    place = location(path)
    try:
        files = bucket_files(place)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    if NAMES_NAME in files:
        raise UserError(f"{path}: .precomputed folders are read on disks alone")
    return Records(place, files) if INDEX_NAME in files else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While in context, no other process of this machine copies into the folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from None
    with alone(folder) as held:
        for left in folder.glob(".*") if held else ():  # by a process that was killed
            left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool | None]:
    """While in context, no other process has `files.locked` the path; waits for one that has."""
    while True:
        with locked(path) as held:
            if held is not False:
                yield held
                return
        time.sleep(1.0)


def _copy(place: epath.Path, files: dict[str, int], folder: Path) -> None:
    """The files that are missing or have another size."""
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    missing = {name: size for name, size in files.items() if there.get(name) != size}
    size, free = sum(missing.values()), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: {size / 1e9:,.1f} GB of {place} are to be copied there, and "
            f"{free / 1e9:,.1f} GB are free"
        )
    if missing:
        hosts.say(f"copying {len(missing)} files, {size / 1e9:,.1f} GB, from {place} to {folder}")

    def fetch(name: str) -> None:
        with replacing(folder / name) as temporary:
            try:
                download(place / name, temporary)
            except OSError as error:
                raise UserError(f"{place / name}: cannot be copied ({reason(error)})") from None
            if (found := os.path.getsize(temporary)) != files[name]:
                raise UserError(f"{place / name}: {found} bytes came of {files[name]}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, missing))
