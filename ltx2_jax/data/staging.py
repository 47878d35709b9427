"""A dataset in the making: shards of work that are done once, by whichever process and run.

    .NAME.prepare/                  beside the dataset NAME, whose name it takes at the end
        state.json                  the settings that it is made with
        codec.safetensors ...       what makes the latents and the text features
        captions-00000.arrayrecord  features of so many captions      captions-00000.json
        clips-00000.arrayrecord     records of so many rows           clips-00000.json
                                    where so many films are cut       scenes-00000.json

A shard is done when its .json is there, which says what became of each of its clips. So a crash, a
preemption or Ctrl-C costs the shards in hand; the same command does those that are not done. Shard
i is the work of process i mod the number of processes, which may change from run to run.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ltx2_jax.data.records import INDEX_NAME, check_target, put_in_place
from ltx2_jax.data.shards import write_shard
from ltx2_jax.errors import UserError
from ltx2_jax.files import locked, reason, replacing

STATE, BEGUN, READY = "state.json", "begun.json", "ready.json"
CLIPS, CAPTIONS, SCENES = "clips", "captions", "scenes"
LOST_SECONDS = 1800.0  # without a sign of a process


class Staging:
    """The folder of a dataset in the making; a context manager. It stays when the block fails.

    Attributes:
      folder: where it is (pathlib.Path).
      target: the dataset to be.
      place: where what is done stays: the folder, or for `BucketStaging` one in a bucket.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        process: int = 0,
        overwrite: bool = False,
    ):
        """
        Args:
          target: the dataset to be; its parents are created.
          settings: JSON values that its contents depend on.
          process: which of the processes at work this is; 0 sets the folder up.
          overwrite: begin anew where another dataset is half made.
        """
        self.target = Path(os.path.abspath(target))
        self.place = self.folder = self.target.with_name(f".{self.target.name}.prepare")
        self._settings, self._process, self._overwrite = dict(settings), process, overwrite
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Staging":
        if self._process == 0:
            self._check_target(overwrite=True)
            self._set_up()
        else:
            self.wait(lambda: self._stored() == self._settings, "begins")
            if not self.published:
                self._hold()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._held.close()

    def _check_target(self, overwrite: bool) -> None:
        check_target(self.target, overwrite)

    def _set_up(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder.parent}: cannot write here: {error.strerror}") from None
        self._hold()
        stored = self._stored()
        if stored is not None and stored != self._settings:
            if not self._overwrite:
                raise UserError(
                    f"{self.place}: a dataset is half made there with other settings; finish it "
                    "with those, or begin anew (--overwrite)"
                )
            self.clear()
        if stored != self._settings:
            self.write_json(STATE, self._settings)

    def _hold(self) -> None:
        """Keeps another run of the same process number out, for as long as this one lives."""
        try:
            held = self._held.enter_context(locked(self.folder / f"lock-{self._process}"))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write here ({reason(error)})") from None
        if held is False:
            self._held.close()
            raise UserError(f"{self.target}: another prepare is at work on it")

    def _stored(self) -> dict[str, Any] | None:
        return self.read_json(STATE)

    # ---- files

    def read_json(self, name: str) -> Any:
        """What a file says; None if there is none, or a crash of the machine left a part of it."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, values: Any) -> None:
        """Writes a file, whole or not at all."""
        with replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")

    def file(self, name: str) -> Path:
        """A file that `keep` was told of, by whichever process."""
        return self.folder / name

    def keep(self, *names: str) -> None:
        """Tells that files of the folder are written."""

    def clear(self) -> None:
        """Removes what was made, but for the locks."""
        for path in self.folder.iterdir():
            if not path.name.startswith("lock-"):
                path.unlink()

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- shards

    def done(self, kind: str, shard: int) -> dict[str, Any] | None:
        """What a shard holds; None while it is not done."""
        about = self.read_json(f"{kind}-{shard:05d}.json")
        if about is None or (about["bytes"] and not self._holds(kind, shard, about["bytes"])):
            return None
        return about

    def _holds(self, kind: str, shard: int, size: int) -> bool:
        return self.path(kind, shard).exists()

    def path(self, kind: str, shard: int) -> Path:
        """The file of a shard's records; a shard without records has none."""
        return self.folder / f"{kind}-{shard:05d}.arrayrecord"

    def undo(self, kind: str, shard: int) -> None:
        """Makes a shard one that is not done."""
        (self.folder / f"{kind}-{shard:05d}.json").unlink(missing_ok=True)

    def finish(self, kind: str, shard: int, blobs: Iterable[bytes], about: dict[str, Any]) -> None:
        """Writes the records of a shard, then what it holds.

        Raises:
          UserError: the disk does not take it.
        """
        if self.published:  # another process has made this shard too
            return
        path = self.path(kind, shard)
        count, size = write_shard(path, blobs)
        if count:
            self.keep(path.name)
        self.write_json(f"{kind}-{shard:05d}.json", about | {"count": count, "bytes": size})

    def alive(self) -> None:
        """Gives a sign of life to those who wait."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / f"lock-{self._process}")

    @property
    def published(self) -> bool:
        """Whether another process has finished the dataset."""
        return not self.folder.exists() and (self.target / INDEX_NAME).exists()

    def wait(self, there: Callable[[], bool], what: str) -> None:
        """Until something is there that another process makes, or the dataset is.

        Raises:
          UserError: no process has given a sign of life for `LOST_SECONDS`.
        """
        pause, newest = 0.02, time.time()
        while not there() and not self.published:
            time.sleep(pause)
            pause = min(5.0, 2 * pause)
            newest = max(newest, self._last_sign())
            if time.time() - newest > LOST_SECONDS:
                raise UserError(
                    f"{self.place}: waited until another process {what}, and none is at work; "
                    "the same command on all hosts goes on"
                )

    def _last_sign(self) -> float:
        """When a process gave a sign of life, in seconds since 1970; 0 if none did."""
        newest = 0.0
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                newest = max(newest, path.stat().st_mtime)
        return newest

    # ---- the end

    def adopt(
        self, parts: Iterable[tuple[str, int, str | None, dict]], makers: Iterable[str]
    ) -> None:
        """Takes shards of a finished dataset, as (kind, number, file or None, about), and files."""
        for kind, shard, name, about in parts:
            if name is not None:
                link_or_copy(self.target / name, self.path(kind, shard))
            self.write_json(f"{kind}-{shard:05d}.json", about)
        for name in makers:
            (self.folder / name).write_bytes((self.target / name).read_bytes())

    def name_shard(self, kind: str, shard: int, name: str) -> None:
        """Gives the records of a shard the name that they have in the dataset.

        They keep the other one until the folder is published: a crash before costs nothing.
        """
        link_or_copy(self.path(kind, shard), self.folder / name)

    def publish(self, index: Mapping[str, Any], overwrite: bool) -> None:
        """Writes the index, takes the dataset's name, and removes what only the making needs."""
        self.write_json(INDEX_NAME, index)
        self._check_target(overwrite)
        put_in_place(self.folder, self.target)
        tidy(self.target)  # not before: a crash between the two must not cost what was done


def tidy(dataset: Path) -> None:
    """Removes what only the making of a dataset needed, which a crash at its end may leave."""
    for path in dataset.iterdir():
        killed = re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}", path.name)  # while it wrote a file
        if killed or is_of_making(path.name):
            path.unlink(missing_ok=True)
    shutil.rmtree(dataset.with_name(f".{dataset.name}.old"), ignore_errors=True)


def is_of_making(name: str) -> bool:
    """Whether a file of a dataset in the making is none of the dataset."""
    kind, _, rest = name.partition("-")
    shard = kind in (CLIPS, CAPTIONS, SCENES) and "-of-" not in rest
    return shard or kind == "lock" or name in (STATE, BEGUN, READY)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, without its bytes where the disk can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
