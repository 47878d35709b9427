"""A dataset that is made in a bucket: shard by shard on this disk, and each sent whole.

    gs://bucket/.NAME.prepare/       beside the dataset NAME: the files that `data.staging` lists
        process-0/.run.json          who is process 0, see `files.only_run`
        publishing.json              files are being copied to NAME, the index after the others

A bucket has no locks, no file that only one can create, and no folder that could be renamed. So
nobody claims a shard: the processes are told their numbers, and shard i is the work of process i
mod their number. Two with one number, as two commands that do not know of each other, are told
apart by a file that each writes again and again. A shard is done when its .json is in the bucket,
which is sent after its records. The dataset appears by its index, which comes when the bucket says
that all other files are there. Only what is in the bucket counts: a run goes on from any machine.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from ltx2_jax.data.fetching import AT_ONCE
from ltx2_jax.data.records import INDEX_NAME, check_target
from ltx2_jax.data.staging import (
    BEGUN,
    CAPTIONS,
    CLIPS,
    READY,
    SCENES,
    STATE,
    Staging,
    is_of_making,
)
from ltx2_jax.errors import UserError
from ltx2_jax.files import (
    bucket_files,
    download,
    in_bucket,
    in_time,
    location,
    of_bucket,
    only_run,
    read_bytes,
    reason,
    saying,
    upload,
)

HELD, PUBLISHING = "process-", "publishing.json"
_CHANGING = (STATE, BEGUN, READY)
_SHARD = re.compile(rf"({CLIPS}|{CAPTIONS}|{SCENES})-\d+\.json")


def check_place(out: str | os.PathLike, seconds: float = 30.0) -> None:
    """Sees to it that a dataset can be made in a bucket, before any work; a disk is not looked at.

    Raises:
      UserError: the scheme cannot be served, there is no such bucket, or nobody can write there.
    """
    target = location(out)
    if not in_bucket(target):
        return
    if re.fullmatch(r"gs://[^/]+/*", os.fspath(target)):
        raise UserError(f"{out}: give a folder in the bucket, such as gs://bucket/clips")
    probe = _making(target) / f".probe-{secrets.token_hex(8)}"

    def work() -> None:
        try:
            probe.write_text("")
        except FileNotFoundError:
            raise OSError("no such bucket") from None
        if probe.name not in bucket_entries(probe.parent):
            raise OSError("a file that was written is not listed")
        remove_from_bucket(probe)

    in_time(work, seconds, str(out), "no dataset can be made there")


class BucketStaging(Staging):
    """`Staging` of a dataset in a bucket.

    Attributes:
      folder: of this disk, gone at the end: the shard in hand, codec, text encoder, and what is
        said of all shards.
      place: in the bucket, what is done.
    """

    def __init__(self, target: str | os.PathLike, settings: Mapping[str, Any], **options: Any):
        """See `Staging`."""
        super().__init__(target, settings, **options)
        self.target = location(target)
        self.place = _making(self.target)
        self._found: dict[str, dict[str, Any]] = {}  # what the bucket holds, as it was last seen
        self._named: dict[str, str] = {}  # of a file of the dataset, its name here
        self._check: Callable[[], None] = lambda: None  # nobody has taken over
        self._sign, self._lock = time.time(), threading.RLock()

    def __enter__(self) -> "BucketStaging":
        try:
            self.folder = self._held.enter_context(_scratch())
            self._look()
            if self._process == 0 and STATE not in self._found:
                self.clear()  # what came after the end of another dataset
            return super().__enter__()
        except BaseException:
            self._held.close()
            raise

    def _check_target(self, overwrite: bool) -> None:
        there = _files(self.target)
        if there and PUBLISHING not in self._found:  # else its files are ours
            check_target(self.target, overwrite)

    def _hold(self) -> None:
        self._check = self._held.enter_context(only_run(self.place / f"{HELD}{self._process}"))

    # ---- files

    def _look(self) -> None:
        """Lists the bucket, and fetches what is said there of shards."""
        own = f"{HELD}{self._process}/"
        with self._lock, _told(self.place, "read"):
            found = bucket_entries(self.place)
            theirs = {name: entry for name, entry in found.items() if not name.startswith(own)}
            if any(entry != self._found.get(name) for name, entry in theirs.items()):
                self._sign = time.time()
            for name in self._found.keys() - found.keys():
                (self.folder / name).unlink(missing_ok=True)
            wanted = [
                name
                for name in found
                if name in _CHANGING or (_SHARD.fullmatch(name) and not self._is_here(name))
            ]
            _at_once(self._fetch_if_there, wanted)
            self._found = found

    def _is_here(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _fetch(self, name: str) -> None:
        half = self.folder / f".{name}"
        download(self.place / name, half)
        os.replace(half, self.folder / name)

    def _fetch_if_there(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            self._fetch(name)

    def _send(self, name: str) -> None:
        self._check()
        with _told(self.place / name, "written"):
            upload(self.folder / name, self.place / name)
        self._found[name] = {"size": (self.folder / name).stat().st_size}

    def write_json(self, name: str, values: Any) -> None:
        with self._lock:  # who looks meanwhile would not find it
            super().write_json(name, values)
            self._send(name)

    def file(self, name: str) -> Path:
        if not self._is_here(name):
            with _told(self.place / name, "read"):
                self._fetch(name)
        return self.folder / name

    def keep(self, *names: str) -> None:
        for name in names:
            self._send(name)

    def clear(self) -> None:
        kept = (HELD, PUBLISHING, ".")  # files of others, who may have just begun
        self._remove([name for name in self._found if not name.startswith(kept)])

    def remove(self) -> None:
        self._look()
        self._remove(list(self._found))

    def _remove(self, names: list[str]) -> None:
        self._check()
        _remove(self.place, names)
        for name in names:
            self._found.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)

    # ---- shards

    def _holds(self, kind: str, shard: int, size: int) -> bool:
        return self._found.get(self.path(kind, shard).name, {}).get("size") == size

    def undo(self, kind: str, shard: int) -> None:
        self._remove([f"{kind}-{shard:05d}.json"])

    def finish(self, kind: str, shard: int, blobs: Iterable[bytes], about: dict[str, Any]) -> None:
        try:
            super().finish(kind, shard, blobs, about)
        finally:
            self.path(kind, shard).unlink(missing_ok=True)

    @property
    def published(self) -> bool:
        self._look()
        return STATE not in self._found and INDEX_NAME in _files(self.target)

    def _last_sign(self) -> float:
        return self._sign

    # ---- the end

    def adopt(
        self, parts: Iterable[tuple[str, int, str | None, dict]], makers: Iterable[str]
    ) -> None:
        def tell(part: tuple[str, int, str | None, dict]) -> None:
            name = f"{part[0]}-{part[1]:05d}.json"
            Staging.write_json(self, name, part[3])
            self._send(name)

        parts = list(parts)
        sources = {self.path(kind, shard).name: name for kind, shard, name, _ in parts if name}
        with _told(self.place, "written"):
            _copy(self.target, self.place, sources | {name: name for name in makers})
        _at_once(tell, parts)
        self._look()

    def name_shard(self, kind: str, shard: int, name: str) -> None:
        self._named[name] = self.path(kind, shard).name

    def publish(self, index: Mapping[str, Any], overwrite: bool) -> None:
        """Copies all files to the dataset's folder, the index last; removes what is there before.

        While it lasts there is no dataset, and after a crash none until the same command goes on.
        """
        self._look()
        self._check_target(overwrite)
        text = json.dumps(index, ensure_ascii=False) + "\n"
        self.write_json(PUBLISHING, hashlib.sha256(text.encode()).hexdigest())
        sources = {name: name for name in self._found if not _stays_behind(name)} | self._named
        with _told(self.target, "written"):
            there = _files(self.target)
            for names in ({INDEX_NAME}.intersection(there), there.keys() - {INDEX_NAME}):
                _at_once(lambda name: remove_from_bucket(self.target / name), names)
            _copy(self.place, self.target, sources)
            sizes = {name: self._found[source]["size"] for name, source in sources.items()}
            if (made := _files(self.target)) != sizes:
                first = min(name for name, _ in made.items() ^ sizes.items())
                raise OSError(f"{first} has {made.get(first)} bytes, not {sizes.get(first)}")
            self._check()
            (self.folder / INDEX_NAME).write_text(text, encoding="utf-8")
            upload(self.folder / INDEX_NAME, self.target / INDEX_NAME)
        self.remove()


def tidy_bucket(target: epath.Path) -> None:
    """Removes what only the making of a dataset needed, which a crash at its end may leave."""
    place = _making(target)
    with _told(place, "read"):
        found = bucket_entries(place)
        if PUBLISHING in found:
            made = hashlib.sha256(read_bytes(target / INDEX_NAME)).hexdigest()
            if json.loads(read_bytes(place / PUBLISHING)) == made:
                _remove(place, list(found))


def _making(target: epath.Path) -> epath.Path:
    """Where in its bucket a dataset is made."""
    return target.with_name(f".{target.name}.prepare")


def _stays_behind(name: str) -> bool:
    """Whether a file of a making is none of the dataset."""
    return is_of_making(name) or name.startswith((HELD, PUBLISHING, "."))


def bucket_entries(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """What a bucket says of all files below a folder, by their paths from there: "size", dates."""
    begin = os.fspath(folder).removeprefix("gs://") + "/"
    with of_bucket() as bucket:
        try:
            found = bucket.find(os.fspath(folder), detail=True)
        except FileNotFoundError:
            return {}
    files = {name: entry for name, entry in found.items() if entry["type"] == "file"}
    return {name.removeprefix(begin): e for name, e in files.items() if name.startswith(begin)}


def copy_in_bucket(source: epath.Path, target: epath.Path) -> None:
    """A file of a bucket to another name, without a way through this machine if the bucket can."""
    with of_bucket() as bucket:
        try:
            bucket.cp_file(os.fspath(source), os.fspath(target))
        except NotImplementedError:  # of a zonal bucket
            source.copy(target, overwrite=True)


def _copy(folder: epath.Path, target: epath.Path, sources: Mapping[str, str]) -> None:
    """Copies files of a folder to another one, under the names whose `sources` they are."""
    _at_once(lambda name: copy_in_bucket(folder / sources[name], target / name), sources)


def remove_from_bucket(place: epath.Path) -> None:
    """Removes a file of a bucket, if it is there."""
    with contextlib.suppress(FileNotFoundError), of_bucket() as bucket:
        bucket.rm_file(os.fspath(place))


def _files(place: epath.Path) -> dict[str, int]:
    with _told(place, "read"):
        return bucket_files(place)


def _remove(place: epath.Path, names: list[str]) -> None:
    """Removes files of a making: first what says that it goes on, last that it was published."""
    with _told(place, "written"):
        for group in ({STATE}, {*names} - {STATE, PUBLISHING}, {PUBLISHING}):
            _at_once(lambda name: remove_from_bucket(place / name), group.intersection(names))


def _at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, items))


@contextlib.contextmanager
def _told(place: epath.Path, what: str) -> Iterator[None]:
    """What a bucket refuses becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be {what} ({reason(error)})") from None


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder of this disk that is gone at the end, also where a host ends at once."""
    with tempfile.TemporaryDirectory(prefix="ltx2-jax-", ignore_cleanup_errors=True) as folder:
        with saying(lambda _: shutil.rmtree(folder, ignore_errors=True)):
            yield Path(folder)
