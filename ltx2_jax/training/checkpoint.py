"""Checkpoints: the only file that imports Orbax.

A checkpoint is the train state, the position in the data and the config, written asynchronously and
atomically under `<workdir>/checkpoints/<step>`, on a disk or in a bucket. It restores onto any mesh
and any number of hosts.

What one host meets, a full disk or an array that is cut, all hosts learn before any of them acts:
they go on alike, and process 0 alone removes and renames.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.files import in_bucket, location
from ltx2_jax.training import saved, saving
from ltx2_jax.training.saving import first_cause, first_said

# In a workdir: train states, and codec, text encoder and schema of the dataset.
FOLDER, ASSETS = saved.FOLDER, "assets"
# How TensorStore begins to say that a file is not what it wrote.
_DAMAGE = ("OUT_OF_RANGE: ", "DATA_LOSS: ", "NOT_FOUND: ", "FAILED_PRECONDITION: ")
# Seconds in which all hosts have written or read their parts; Orbax gives up writing after 1200.
_LONG = 1800.0

# Orbax logs every failed save with a page of traces from each of its threads; here it is one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are missing, cut or not what was written."""


class Checkpoints:
    """The checkpoints of one run; closing the context waits for pending writes.

    All hosts call every method, in the same order.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        best: str | None = None,
        max_failures: int = 0,
        check: Callable[[], None] = lambda: None,
    ):
        """Opens `<workdir>/checkpoints`.

        Args:
          workdir: a folder, or gs://bucket/folder.
          keep: of a writer: how many of the newest stay. None: reads alone.
          keep_every: checkpoints of multiples of so many steps stay as well.
          best: the one in whose scores this is lowest stays as well.
          max_failures: saves that may fail one after the other before the run ends.
          check: raises UserError where this run may write no more.

        Raises:
          UserError: a reader's folder does not exist, a writer's cannot be made.
        """
        place = location(workdir)
        self.folder = (place if in_bucket(place) else epath.Path(Path(place).resolve())) / FOLDER
        try:
            if keep is None and not self.folder.is_dir():
                raise UserError(f"{workdir}: no checkpoints there (train writes {FOLDER}/)")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer = ocp.training.Checkpointer(self.folder)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{workdir}: cannot be a workdir ({first_cause(error)})") from None
        self._keep, self._keep_every, self._check = keep, keep_every, check
        self._best, self._scores = best, {}
        self._max_failures, self._failures = max_failures, 0
        self._writes = False
        # What is being saved: what `save` was given.
        self._last: tuple[int, Any, Config, dict[str, float]] | None = None
        self._attempt = saving.Attempt()

    def __enter__(self) -> "Checkpoints":
        if self._keep is not None:
            self._put_unreadable_aside()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            with contextlib.suppress(Exception):  # told by `wait`, or less than what is on its way
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Those that this host sees, in ascending order."""
        return [found.step for found in self._checkpointer.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """The newest that process 0 sees.

        Raises:
          UserError: a host does not see it.
        """
        steps = self.steps
        latest = hosts.broadcast(str(steps[-1]) if steps else "")

        def check() -> None:
            if latest and int(latest) not in steps:
                raise UserError(f"{self.folder / latest}: seen by host 0 and not by this one")

        hosts.agree(check)
        return int(latest) if latest else None

    # ------------------------------------------------------------------------------------ writing

    def save(
        self, step: int, state: Any, config: Config, scores: dict[str, float] | None = None
    ) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices.

        One is written at a time: this waits for the save before, and says if that has failed.
        `scores`, the same on all hosts, are kept with it: what `best` compares.

        Raises:
          UserError: more saves in a row have failed than may, or another run took the workdir over.
        """
        self._settle()
        hosts.agree(self._check)
        self._open_for_writing()
        self._scores[step] = scores or {}
        metadata = {"config": json.loads(to_json(config)), "data": {"next_index": step}}
        metadata["scores"] = self._scores[step]
        self._last = step, state, config, self._scores[step]
        self._attempt.begin(step)
        try:
            pending = self._checkpointer.save_async(
                step, state, force=True, custom_metadata=metadata | {"made_by": saved.made_by()}
            )
            self._attempt.follow(pending)
        except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
            self._attempt.fail(first_cause(error))

    def wait(self) -> None:
        """Returns when the checkpoint of the last `save` is on disk; it is tried twice.

        Raises:
          UserError: it cannot be written.
        """
        if self._settle():
            return
        last, self._last = self._last, None
        self.save(*last)
        if not self._settle():
            self._last = None
            raise self._unwritten(last[0], "tried twice")

    def _settle(self) -> bool:
        """Waits for the pending save and learns from all hosts how it went: whether it is there."""
        if self._last is None:
            return True
        failed, ended = self._attempt.end()
        found = first_said(hosts.gather(failed, _LONG))
        if not found:
            self._last, self._failures = None, 0
            return True
        step, *_ = self._last
        self._reopen(leave=not ended)
        self._failures += 1
        if self._failures > self._max_failures:
            self._last = None
            raise self._unwritten(step, found)
        good = f"step {self.steps[-1]} is the last that is there" if self.steps else "there is none"
        left = self._max_failures - self._failures + 1
        end = "if the next one cannot either" if left == 1 else f"with {left} more in a row"
        hosts.say(
            f"{self.folder}: checkpoint {step} cannot be written ({found}): {good}; the run "
            f"goes on, and ends {end}"
        )
        return False

    def _unwritten(self, step: int, why: str) -> UserError:
        return UserError(f"{self.folder}: checkpoint {step} cannot be written ({why})")

    def _open_for_writing(self) -> None:
        """Before the first write only: what follows removes files, and an early exit must not."""
        if not self._writes:
            self._writes = True
            self._reopen()
            self._scores = {step: self.scores(step) for step in self.steps}

    def _reopen(self, leave: bool = False) -> None:
        """Forgets what failed, and removes what is half-written, now or by a run that was killed.

        Orbax can remove it too; in a bucket that would take all folders without its last file.
        `leave`: it waits for a host that will not come, and cannot end well.
        """
        with contextlib.suppress(Exception):  # what has failed fails again
            if not leave:
                self._checkpointer.close()
        if hosts.index() == 0:
            for path in saved.half_written(self.folder):
                with contextlib.suppress(Exception):  # no harm but its size
                    path.rmtree()
        hosts.gather("")  # nobody writes before that
        policies = ocp.training.preservation_policies
        stay = [policies.LatestN(self._keep)]
        if self._keep_every is not None:
            stay.append(policies.EveryNSteps(self._keep_every))
        if self._best is not None:
            stay.append(_Lowest(self))
        context = ocp.Context(async_options=_Options()) if hosts.count() > 1 else ocp.Context()
        # Devices that hold the same array share the writing of it, each a slice; to cut a small
        # one takes longer, as every shape is a program to compile.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(stay),
        )

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The one of these in whose scores `best` is lowest; None: it is in none of them."""
        scored = [step for step in steps if self._best in self._scores.get(step, {})]
        return min(scored, key=lambda step: self._scores[step][self._best], default=None)

    @property
    def best(self) -> tuple[int, float] | None:
        """Of a writer that has written: the step that is the best, and its score."""
        step = self.best_of(self.steps)
        return None if step is None else (step, self._scores[step][self._best])

    # ---------------------------------------------------------------------------- damaged ones

    def _put_unreadable_aside(self) -> None:
        """Damaged ones before the newest that can be read, as far as what they hold is described.

        Raises:
          UserError: there were some, and none is left.
        """
        uncommitted = hosts.broadcast(json.dumps(saved.uncommitted(self.folder)))
        for step in json.loads(uncommitted):
            self._put_aside(step, f"{saved.COMMITTED} is missing, as if it was not copied")
        while (step := self.latest_step) is not None:
            try:
                why = self._metadata(step) and self._stored(step) and ""
            except DamagedCheckpoint as error:
                why = error.why
            found = first_said(hosts.gather(why))
            if not found:
                return
            self._put_aside(step, found)
        aside = [path.name for path in saved.listed(self.folder) if ".damaged" in path.name]
        if aside := hosts.broadcast(", ".join(sorted(aside))):
            raise UserError(
                f"{self.folder}: no whole checkpoint is left there ({aside}): repair one and give "
                "it its number back, or choose another --config.workdir"
            )

    def _put_aside(self, step: int, why: str) -> None:
        """Renames a checkpoint that cannot be read. It is never removed: it may be repaired."""

        def rename() -> None:
            if hosts.index() != 0:
                return
            aside = self.folder / f"{step}.damaged"
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-again")
            try:
                (self.folder / str(step)).rename(aside)
            except Exception as error:  # a bucket has its own
                raise UserError(
                    f"{self.folder / str(step)}: damaged checkpoint ({why}) that cannot be renamed "
                    f"({first_cause(error)})"
                ) from None
            hosts.say(
                f"{self.folder / str(step)}: damaged checkpoint ({why}): kept as {aside.name}, and "
                "the one before it is taken"
            )

        hosts.agree(rename)
        self._checkpointer.reload()

    # ------------------------------------------------------------------------------------ reading

    def config(self, step: int) -> Config:
        """The config stored with a checkpoint.

        Raises:
          UserError: the checkpoint is damaged, or of another version.
        """
        stored = self._metadata(step)["config"]
        if "generation" in stored.get("text", {}):  # its name in the version before
            stored["text"]["release"] = stored["text"].pop("generation")
        text = json.dumps(stored)
        try:
            return from_json(Config, text)
        except UserError as error:
            raise UserError(f"{self.folder / str(step)}: {error}") from None

    def data_position(self, step: int) -> int:
        """Batches that the run had taken when the checkpoint was written; errors as `config`."""
        return self._metadata(step)["data"]["next_index"]

    def made_by(self, step: int) -> dict[str, Any]:
        """Hosts, mesh, versions and revision of the program that wrote it, as far as it said so."""
        return self._metadata(step)["made_by"]

    def scores(self, step: int) -> dict[str, float]:
        """What was measured of it when it was written; nothing of one that is damaged."""
        try:
            return self._metadata(step)["scores"]
        except DamagedCheckpoint:
            return {}

    def _metadata(self, step: int) -> dict[str, Any]:
        """What `save` noted beside the state."""
        try:
            found = self._checkpointer.metadata(step).custom_metadata or {}
            parts = {name: found[name] for name in ("config", "data")}
            return parts | {name: found.get(name, {}) for name in ("made_by", "scores")}
        except (ValueError, KeyError, OSError):
            raise self._damaged(step, "its metadata is missing or cannot be read") from None

    def _stored(self, step: int) -> Any:
        """Shapes and dtypes of the state."""
        with contextlib.suppress(ValueError, KeyError, OSError):
            if (stored := self._checkpointer.metadata(step).metadata) is not None:
                return stored
        raise self._damaged(step, "its arrays are missing or cannot be read")

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        error = DamagedCheckpoint(
            f"{self.folder / str(step)}: damaged checkpoint ({why}): remove this folder, and the "
            "checkpoint before it is taken"
        )
        error.why = why
        return error

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state, with the shapes, dtypes and shardings of `abstract_state`.

        Where a writer finds a checkpoint damaged, that is put aside and the one before it restored:
        `latest_step` says which.

        Raises:
          UserError: the checkpoint holds other arrays; it is damaged, and there is none before.
        """
        while True:
            try:
                state = self._load(step, abstract_state, "the state of this config")
            except DamagedCheckpoint as error:
                if self._keep is None:
                    raise
                self._put_aside(step, error.why)
                self._put_unreadable_aside()
                step = self.latest_step
                continue
            for line in saved.differences(self.made_by(step), saved.made_by()):
                hosts.say(f"changed since the checkpoint: {line}")
            return state

    def restore_part(self, step: int, abstract_part: dict[str, Any]) -> dict[str, Any]:
        """Some entries of the state, the rest left on disk; errors as `restore` of a reader."""
        stored = self._stored(step)
        placeholders = {
            name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
            for name, tree in stored.items()
            if name not in abstract_part
        }
        state = self._load(step, placeholders | abstract_part, "the weights of this config")
        return {name: state[name] for name in abstract_part}

    def _load(self, step: int, abstract: Any, what: str) -> Any:
        """What this host holds of a checkpoint, if all hosts could read theirs."""
        state, damaged, refused = None, "", ""
        try:
            state = self._load_here(step, abstract, what)
        except DamagedCheckpoint as error:
            damaged = error.why
        except UserError as error:
            refused = str(error)
        damaged, refused = (first_said(hosts.gather(text, _LONG)) for text in (damaged, refused))
        if damaged:
            raise self._damaged(step, damaged)
        if refused:
            raise UserError(refused)
        return state

    def _load_here(self, step: int, abstract: Any, what: str) -> Any:
        # Each host for itself: one that fails would leave the others waiting at Orbax's barrier.
        context = ocp.Context()
        context.multiprocessing_options.primary_host = hosts.index()
        context.multiprocessing_options.active_processes = {hosts.index()}
        try:
            with context:
                state = ocp.load_checkpointables(self.folder / str(step), {"state": abstract})
            return state["state"]
        except (ValueError, KeyError, OSError) as error:
            why, _ = first_cause(error), self._stored(step)
            if why.startswith(_DAMAGE):
                raise self._damaged(step, why) from error
            raise UserError(f"{self.folder / str(step)} does not hold {what}: {why}") from error


def _meet(*, key: str, timeout_ms: int) -> None:
    """The barrier of Orbax's threads; one whose save has failed goes by, on its way out."""
    failed = sys.exc_info()[1] is not None  # as in a `finally`
    if not failed or threading.current_thread() is threading.main_thread():
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _Options(ocp.options.AsyncOptions):
    """Orbax's, with a barrier of ours, for which its newer options have no name."""

    def v0(self) -> Any:
        return dataclasses.replace(super().v0(), barrier_sync_fn=_meet)


class _Lowest:
    """A policy of Orbax: what `Checkpoints.best_of` finds stays."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self._checkpoints.best_of(found.step for found in checkpoints)
        return [found.step == best for found in checkpoints]
