"""Checkpoints: the only file that imports Orbax.

A checkpoint is the train state, the position in the data and the config, written asynchronously and
atomically under `<workdir>/checkpoints/<step>`. It restores onto any mesh.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import sharding_of
from ltx2_jax.training import initial

# In a workdir: train states, and codec, text encoder and schema of the dataset.
FOLDER, ASSETS = "checkpoints", "assets"
# How TensorStore begins to say that a file is not what it wrote.
_DAMAGE = ("OUT_OF_RANGE: ", "DATA_LOSS: ", "NOT_FOUND: ", "FAILED_PRECONDITION: ")


class Checkpoints:
    """The checkpoints of one run; closing the context waits for pending writes."""

    def __init__(self, workdir: str | Path, *, keep: int | None = None):
        """Opens `<workdir>/checkpoints`; a writer gives `keep`, how many of the newest stay.

        Raises:
          UserError: a reader's folder does not exist.
        """
        self.folder = Path(workdir).resolve() / FOLDER
        if keep is None and not self.folder.is_dir():
            raise UserError(f"{workdir}: no checkpoints there (train writes {FOLDER}/)")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{workdir}: cannot be a workdir ({error.strerror})") from None
        self._keep = keep
        self._checkpointer = ocp.training.Checkpointer(self.folder)
        self._writes = False
        self._pending: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._writing():
            self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, config: Config) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices.

        Raises:
          UserError: the disk did not take this checkpoint or the one before.
        """
        metadata = {"config": json.loads(to_json(config)), "data": {"next_index": step}}
        with self._writing():
            self._open_for_writing()
            self._pending = self._checkpointer.save_async(
                step, state, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Returns when the checkpoint of the last `save` is on disk; errors as `save`."""
        if self._pending is not None:
            with self._writing():
                self._pending.result()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong while writing is the disk's; what it left unfinished is removed."""
        try:
            yield
        except (ValueError, OSError) as error:  # a full disk is a ValueError of TensorStore
            if self._writes:
                for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({_reason(error)})"
            ) from error

    def _open_for_writing(self) -> None:
        """Before the first write only: what follows removes files, and an early exit must not.

        Orbax removes what a killed run left half-written in a thread of its own, for which it waits
        when it saves, but not when it closes.
        """
        if self._writes:
            return
        self._checkpointer.close()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )
        self._writes = True

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

    def _metadata(self, step: int) -> dict[str, Any]:
        """What `save` noted beside the state."""
        try:
            found = self._checkpointer.metadata(step).custom_metadata or {}
            return {name: found[name] for name in ("config", "data")}
        except (ValueError, KeyError, OSError):
            raise self._damaged(step, "its metadata is missing or cannot be read") from None

    def _stored(self, step: int) -> Any:
        """Shapes and dtypes of the state."""
        with contextlib.suppress(ValueError, KeyError, OSError):
            if (stored := self._checkpointer.metadata(step).metadata) is not None:
                return stored
        raise self._damaged(step, "its arrays are missing or cannot be read")

    def _damaged(self, step: int, how: str) -> UserError:
        return UserError(
            f"{self.folder / str(step)}: damaged checkpoint ({how}): remove this folder, and the "
            "checkpoint before it is taken"
        )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state, with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
          UserError: the checkpoint holds other arrays, or is damaged.
        """
        return self._load(step, abstract_state, "the state of this config")

    def restore_part(self, step: int, abstract_part: dict[str, Any]) -> dict[str, Any]:
        """Some entries of the state, the rest left on disk; errors as `restore`."""
        stored = self._stored(step)
        placeholders = {
            name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
            for name, tree in stored.items()
            if name not in abstract_part
        }
        state = self._load(step, placeholders | abstract_part, "the weights of this config")
        return {name: state[name] for name in abstract_part}

    def _load(self, step: int, abstract: Any, what: str) -> Any:
        try:
            return self._checkpointer.load(step, abstract)
        except (ValueError, KeyError, OSError) as error:
            why, _ = _reason(error), self._stored(step)
            if why.startswith(_DAMAGE):
                raise self._damaged(step, why) from error
            raise UserError(f"{self.folder / str(step)} does not hold {what}: {why}") from error


def stored_config(workdir: str | Path) -> Config | None:
    """The config in the newest checkpoint of a workdir; None where there is no checkpoint yet.

    Raises:
      UserError: the checkpoint is damaged, or of another version.
    """
    if not (Path(workdir) / FOLDER).is_dir():
        return None
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step
        return None if step is None else checkpoints.config(step)


def weights_of_run(
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    average: bool = True,
    for_sampling: bool = False,
    adapters: bool = False,
) -> tuple[Config, dict[str, Any], int]:
    """Config, weights on `mesh` and step of a training run: averaged weights if it averaged.

    Of a run that tuned a part of its weights they are all, its adapters merged.

    Args:
      workdir: of the run.
      mesh: where the weights go.
      step: of the checkpoint; the newest when None.
      average: False takes the last weights even if there are averaged ones.
      for_sampling: on the mesh and in the dtypes in which a sampler keeps them, not a train state.
      adapters: of a run that trains adapters, only these.

    Raises:
      UserError: no workdir, no checkpoint there, or none of `step`; of a run that tuned, the
        weights that it began from are not there, or are others.
    """
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None or not (checkpoints.folder / str(step)).is_dir():
            raise UserError(f"{workdir}: no checkpoint{'' if step is None else f' {step}'} there")
        config = checkpoints.config(step)
        name = "ema" if average and config.optim.ema_decay is not None else "params"
        if config.tune is None:
            abstract = ltx2.abstract_params(config.networks, mesh, for_sampling=for_sampling)
            return config, checkpoints.restore_part(step, {name: abstract})[name], step
        homes = initial.trained_homes(config, mesh, for_sampling=for_sampling)
        base = jax.ShapeDtypeStruct((2,), "uint32", sharding=sharding_of(mesh))
        found = checkpoints.restore_part(step, {name: homes, "base": base})
    trained, base = found[name], found["base"]
    if adapters:
        return config, trained, step
    whole = initial.whole(config, trained, base, mesh, for_sampling=for_sampling)
    return config, whole, step


def _reason(error: BaseException) -> str:
    """In one line, what went wrong first: Orbax reports it in the words of every layer above."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r" \[\w+='.*", "", line)[:400]  # TensorStore ends with all its settings
