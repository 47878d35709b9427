"""What lies in a folder of checkpoints, as files alone tell it; and what a checkpoint is told."""

import functools
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ltx2_jax import __version__, hosts
from ltx2_jax.files import in_bucket, location

FOLDER = "checkpoints"  # in a workdir
# In a checkpoint: what Orbax notes first and what it notes last.
METADATA, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"


def newest_saved(workdir: str | Path) -> tuple[int, float] | None:
    """Step of the newest checkpoint and seconds since 1970 when it was complete, from files alone.

    None: there is none.
    """
    folder = location(workdir) / FOLDER
    for step in sorted(_numbered(folder), reverse=True):
        if in_bucket(folder) and not (folder / str(step) / COMMITTED).exists():
            continue
        return step, _committed(folder / str(step))
    return None


def _committed(folder: epath.Path) -> float:
    """Seconds since 1970 when all of a checkpoint was written; 0 if that is not noted."""
    try:
        noted = json.loads((folder / METADATA).read_text())
        return (noted.get("commit_timestamp_nsecs") or 0) / 1e9
    except (OSError, ValueError, AttributeError):
        return 0.0


def _numbered(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in listed(folder) if path.name.isdecimal())


def listed(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder; a bucket has no empty ones."""
    return list(folder.iterdir()) if folder.is_dir() else []


def uncommitted(folder: epath.Path) -> list[int]:
    """Steps of a bucket that are complete but for the file that says so.

    Folders of a bucket cannot be renamed in one go: those that are complete hold a file more.
    """
    if not in_bucket(folder):
        return []
    steps = [step for step in _numbered(folder) if not (folder / str(step) / COMMITTED).exists()]
    return [step for step in steps if _committed(folder / str(step))]


def half_written(folder: epath.Path) -> list[epath.Path]:
    """Folders of checkpoints that were never complete."""
    found = [path for path in listed(folder) if ".orbax-checkpoint-tmp" in path.name]
    if in_bucket(folder):
        unmarked = (folder / str(step) for step in _numbered(folder))
        found += [path for path in unmarked if not (path / COMMITTED).exists()]
    return found


def made_by() -> dict[str, Any]:
    """What explains a checkpoint, and how it went on: hosts, mesh, versions, revision."""
    packages = ("jax", "flax", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "hosts": hosts.count(),
        "mesh": dict(jax.sharding.get_abstract_mesh().shape),
        "versions": versions | {"ltx2_jax": __version__},
        "revision": _revision(),
    }


@functools.cache
def _revision() -> str | None:
    """The commit of this program, and "+" if files differ from it; None outside of a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        # Killed while it refreshed the index, it would leave a lock in the user's repository.
        command = ("git", "--no-optional-locks", "-C", str(root), *words)
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "ltx2_jax")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Values that differ, as `path: a -> b` lines; what was not noted does not."""
    lines = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} -> {new}")
    return sorted(lines)
