"""Files that appear whole or not at all, on a disk or in a bucket; locks; who runs in a workdir."""

import atexit
import contextlib
import fcntl
import json
import os
import queue
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ltx2_jax.errors import UserError

# The file of a workdir that says which run writes there. It is written anew every REFRESH seconds;
# a run that has not done so for STALE seconds is taken for dead.
RUN_FILE = ".run.json"
REFRESH, STALE = 10.0, 60.0


# What is still to be done with files, for `last_words`.
_unsaid: list[Callable[[str], None]] = []


def last_words(why: str, seconds: float) -> None:
    """For a process that ends at once, by `os._exit`: sends what is unsent, frees the workdir.

    `why` it ends is noted where such things are; what takes longer than `seconds` is left.
    """

    def say() -> None:
        for words in reversed(_unsaid.copy()):
            with contextlib.suppress(Exception):  # the process ends for another reason
                words(why)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    thread.join(seconds)


@contextlib.contextmanager
def saying(words: Callable[[str], None]) -> Iterator[None]:
    """While in context, `last_words` calls `words` with the reason; the latest comes first."""
    _unsaid.append(words)
    try:
        yield
    finally:
        _unsaid.remove(words)


def location(path: str | os.PathLike) -> epath.Path:
    """A file or folder by its name, on a disk or in a bucket (gs://bucket/name).

    Nothing is looked up there.

    Raises:
      UserError: the name begins with a scheme that cannot be served.
    """
    text = os.fspath(path)
    scheme = re.match(r"([A-Za-z][\w+.-]*):/", text)
    if scheme and not re.match(r"gs://[^/]", text):
        raise UserError(
            f"{text}: {scheme[1]}:// cannot be written to; give a folder or gs://bucket/folder"
        )
    place = epath.Path(text)
    if in_bucket(place):
        if not scheme:
            raise UserError(f"{text}: would be taken for {place}; give a folder of another name")
        _open_buckets(text)
    return place


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, where no file can be changed, only replaced as a whole."""
    return "://" in os.fspath(path)


def _open_buckets(text: str) -> None:
    """Sees to it that gs:// can be served, and that lists are what is there now."""
    import fsspec

    try:
        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise UserError(f"{text}: gs:// needs gcsfs: pip install 'ltx2_jax[gcs]'") from None
    # Other hosts and other libraries write there too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *errors: type[Exception]) -> Iterator[Path]:
    """A new name beside `path`, for the block to write; it takes the place of `path` at its end.

    If the block raises, `path` stays as it was and the new file is removed. Folders on the way are
    created. `errors`: what the writing library raises besides OSError. What goes into a bucket is
    written on a disk first.

    Raises:
      UserError: naming `path` and the reason, in place of an OSError or one of `errors`.
    """
    place = location(path)
    folder = Path(tempfile.gettempdir() if in_bucket(place) else place.parent)
    # Not tempfile, whose files only their owner can read, whatever the umask says. The name ends in
    # no suffix, so that a search for "*.mp4" does not find what a killed program left.
    temporary = folder / f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield temporary
        if in_bucket(place):
            upload(temporary, place)
        else:
            os.replace(temporary, place)
    except (OSError, *errors) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def upload(source: Path, place: epath.Path) -> None:
    """A local file into a bucket, where it appears whole; OSError if it cannot."""
    try:
        epath.Path(source).copy(place, overwrite=True)
    except Exception as error:  # each library has its own
        raise OSError(reason(error)) from error


def local_folder(folder: str | os.PathLike) -> Path:
    """A folder as the libraries need it that read files of a disk alone.

    That of a bucket is copied, its files and not the folders in it, until the program ends.
    """
    place = location(folder)
    if not in_bucket(place):
        return Path(place)
    copy = Path(tempfile.mkdtemp(prefix="ltx2-jax-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    try:
        for source in place.iterdir() if place.exists() else ():
            if not source.is_dir():
                source.copy(copy / source.name)
    except Exception as error:  # each library has its own
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from None
    return copy


def bucket_files(folder: epath.Path) -> dict[str, int]:
    """Names of the files of a bucket's folder, and not of the folders in it, with their bytes.

    Raises:
      OSError: the bucket does not say.
    """
    with of_bucket() as bucket:
        try:
            found = bucket.ls(os.fspath(folder), detail=True)
        except FileNotFoundError:
            return {}
    files = {entry["name"].rpartition("/")[2]: entry for entry in found if entry["type"] == "file"}
    return {name: entry["size"] for name, entry in files.items() if name}


def download(place: epath.Path, target: Path) -> None:
    """A file of a bucket onto a disk, in pieces; OSError if it cannot."""
    with of_bucket() as bucket:
        bucket.get_file(os.fspath(place), os.fspath(target))


@contextlib.contextmanager
def of_bucket() -> Iterator[Any]:
    """The library of buckets, whose errors become OSError; FileNotFoundError stays."""
    import fsspec

    try:
        yield fsspec.filesystem("gs")
    except FileNotFoundError:
        raise
    except Exception as error:  # each library has its own
        raise OSError(reason(error)) from error


def read_bytes(path: Path | epath.Path) -> bytes:
    """A small file of a disk or a bucket; OSError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        raise
    except Exception as error:  # of a bucket, each library's own
        raise OSError(reason(error)) from error


def in_time(work: Callable[[], object], seconds: float, name: str, refusal: str) -> None:
    """Does `work`; UserError if it fails, or takes longer: libraries of buckets try for minutes.

    `name` is what the error is about, and `refusal` what it is then.
    """
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
            answers.put(None)
        except Exception as error:  # each library has its own
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        error = answers.get(timeout=seconds)
    except queue.Empty:
        raise UserError(f"{name}: no answer in {seconds:.0f} s") from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise UserError(f"{name}: {refusal} ({reason(error)})") from None


class Mirror:
    """A local folder for files that grow, and a folder that gets them, which may be in a bucket.

    Where it is not, both are one folder. Else a file is sent as a whole, because a bucket takes no
    more: every so many seconds if it has changed, and at the end. What cannot be sent is told once
    and tried again.
    """

    def __init__(self, folder: str | os.PathLike, known: Sequence[str] = (), seconds: float = 60.0):
        """`known`: files of the folder that go on, if they are there."""
        self._place = location(folder)
        self._remote, self._thread = in_bucket(self._place), None
        if not self._remote:
            self.folder = Path(self._place)
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        self.folder = Path(tempfile.mkdtemp(prefix="ltx2-jax-"))
        self._sent: dict[Path, tuple[int, int]] = {}
        self._told, self._end, self._seconds = False, threading.Event(), seconds
        for name in known:
            if (self._place / name).exists():
                (self._place / name).copy(self.folder / name)
        self._thread = threading.Thread(target=self._send_often, daemon=True)
        self._thread.start()
        self._said = contextlib.ExitStack()
        self._said.enter_context(saying(lambda _: self._send()))

    def _send_often(self) -> None:
        while not self._end.wait(self._seconds):
            self._send()

    def _send(self) -> None:
        for path in sorted(self.folder.rglob("[!.]*")):
            place = self._place / str(path.relative_to(self.folder))
            try:
                # Looked at before: what comes while it is sent is sent next time.
                stamp = (path.stat().st_mtime_ns, path.stat().st_size)
                if not path.is_dir() and self._sent.get(path) != stamp:
                    upload(path, place)
                    self._sent[path] = stamp
            except OSError as error:
                if not self._told:
                    print(f"{place}: cannot be written now ({error})", file=sys.stderr)
                self._told = True

    def close(self) -> None:
        """Sends what is left; calling it again does nothing."""
        if self._thread is not None:
            self._said.close()
            self._end.set()
            self._thread.join()
            self._thread = None
            self._send()
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[bool | None]:
    """True: holds a file, which is made, or a folder that exists. False: somebody else holds it.

    None: the disk knows no such locks; those over a network have none of folders. The system lets
    go when the process ends, however it ends.
    """
    flags = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT
    descriptor, held = os.open(path, flags, 0o666), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = False if isinstance(error, BlockingIOError) else None
        yield held
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------- who runs in a workdir


@contextlib.contextmanager
def only_run(workdir: str | os.PathLike, process_index: int = 0) -> Iterator[Callable[[], None]]:
    """Keeps a second run out of a workdir, which is made: each would destroy what the other saves.

    Only process 0 of a run looks. On a disk it holds a lock. Where there are none, as in a bucket,
    the run that writes there is known by a file that it writes again and again; one that stopped
    doing so without a word is waited for, and then replaced. The context is a function that raises
    UserError if that happened to this run, as it may to one that was cut off from the bucket.

    Raises:
      UserError: another run is writing there, or nobody can.
    """
    if process_index != 0:
        yield lambda: None
        return
    place = location(workdir)
    marker = place / RUN_FILE
    with contextlib.ExitStack() as stack:
        held = None
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not in_bucket(place):
                held = stack.enter_context(locked(Path(place) / ".lock"))
            if held is False:
                raise UserError(f"{workdir}: another run is writing here{_who(read_run(workdir))}")
            if held is None:
                _wait_for_silence(workdir, marker)
            check = stack.enter_context(_marked(workdir, marker))
            if held is None:
                time.sleep(REFRESH / 10)  # of two that started at once, the later one is left
                check()
        except UserError:
            raise
        except Exception as error:  # of a bucket, each library's own
            raise UserError(f"{workdir}: cannot be a workdir ({reason(error)})") from None
        yield check


def read_run(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Which run writes in a workdir, or did until it was killed: host, pid, since, refreshed.

    The last two are seconds of its clock since 1970. None: nobody, or nobody knows.
    """
    try:
        found = json.loads((location(workdir) / RUN_FILE).read_text())
        return found if found.keys() >= {"host", "pid", "since", "refreshed", "run"} else None
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None


def _who(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    return f" ({run['host']}, process {run['pid']}, since {clock_time(run['since'])})"


def clock_time(seconds: float) -> str:
    """Seconds since 1970 as a date and a time, the same on all hosts."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _wait_for_silence(workdir: str | os.PathLike, marker: epath.Path) -> None:
    """Returns when no run writes there; UserError if one does.

    Clocks of hosts differ: what counts is whether the file changes while we look, and, to save the
    wait, its age by the clock of the bucket.
    """
    before = read_run(workdir)
    if before is None or _age(marker) > STALE:
        return
    end = time.monotonic() + STALE
    print(
        f"{workdir}: another run was writing here{_who(before)}: waiting up to {STALE:.0f} s to "
        "see whether it still does",
        flush=True,
    )
    while time.monotonic() < end:
        time.sleep(REFRESH / 2)
        now = read_run(workdir)
        if now is None:  # it has ended
            return
        if now != before:
            raise UserError(f"{workdir}: another run is writing here{_who(now)}")
    print(f"{workdir}: taken over from the run that stopped{_who(before)}", flush=True)


def _age(path: epath.Path) -> float:
    """Seconds since `path` was written, by the clock that dates the files there; 0 if unknown."""
    now = path.with_name(f".now-{secrets.token_hex(4)}")
    now.write_text("")
    try:
        written = [
            place.stat().mtime if in_bucket(place) else os.stat(place).st_mtime
            for place in (now, path)
        ]
    except FileNotFoundError:  # it has just ended
        return 0.0
    finally:
        now.unlink()
    return written[0] - written[1]


@contextlib.contextmanager
def _marked(workdir: str | os.PathLike, marker: epath.Path) -> Iterator[Callable[[], None]]:
    """Writes `marker` as long as the context lasts; see `only_run`."""
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    ours["run"] = secrets.token_hex(8)
    end, others = threading.Event(), []

    def write() -> None:
        with replacing(marker) as temporary:
            temporary.write_text(json.dumps(ours | {"refreshed": time.time()}))

    def look() -> None:
        found = read_run(workdir)
        if found is not None and found["run"] != ours["run"]:
            others.append(found)

    def check() -> None:
        with contextlib.suppress(Exception):  # a network that fails says nothing about a run
            look()
        if others:
            raise UserError(
                f"{workdir}: another run has taken over{_who(others[0])}: this one ends"
            )

    def refresh() -> None:
        while not others and not end.wait(REFRESH):
            with contextlib.suppress(Exception):  # a network may come back
                look()
                if not others:
                    write()

    def leave(_: str = "") -> None:
        end.set()
        thread.join()
        with contextlib.suppress(Exception):
            look()
            if not others:
                marker.unlink()

    write()
    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        with saying(leave):
            yield check
    finally:
        leave()


def reason(error: BaseException) -> str:
    """One line about an exception of a library or the system, without the path again."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def is_passing(error: BaseException | None) -> bool:
    """Whether the disk, the network or memory was at fault, and not what the file holds."""
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return not isinstance(error, FileNotFoundError | PermissionError)
        error = error.__cause__ or error.__context__
    return False
