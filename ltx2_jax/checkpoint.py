"""Checkpoints: the only file that imports Orbax.

A checkpoint is the train state, the position in the data and the config, written asynchronously and
atomically under `<workdir>/checkpoints/<step>`. It restores onto any mesh.
"""

import json
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ltx2_jax import training
from ltx2_jax.config import Config, from_json, to_json
from ltx2_jax.errors import UserError

FOLDER = "checkpoints"


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

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, config: Config) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices."""
        self._open_for_writing()
        metadata = {"config": json.loads(to_json(config)), "data": {"next_index": step}}
        self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata)

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
        """The config stored with a checkpoint."""
        return from_json(Config, json.dumps(self._metadata(step)["config"]))

    def data_position(self, step: int) -> int:
        """Batches that the run had taken when the checkpoint was written."""
        return self._metadata(step)["data"]["next_index"]

    def _metadata(self, step: int) -> dict[str, Any]:
        return self._checkpointer.metadata(step).custom_metadata

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state, with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
          UserError: the checkpoint holds other arrays.
        """
        return self._load(step, abstract_state, "the state of this config")

    def restore_part(self, step: int, abstract_part: dict[str, Any]) -> dict[str, Any]:
        """Some entries of the state, the rest left on disk; errors as `restore`."""
        stored = self._checkpointer.metadata(step).metadata
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
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self.folder / str(step)} does not hold {what}: {_first_line(error)}"
            ) from error


def weights_of_run(
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    average: bool = True,
    for_sampling: bool = False,
) -> tuple[Config, dict[str, Any], int]:
    """Config, weights on `mesh` and step of a training run: averaged weights if it averaged.

    Args:
      workdir: of the run.
      mesh: where the weights go.
      step: of the checkpoint; the newest when None.
      average: False takes the last weights even if there are averaged ones.
      for_sampling: on the mesh and in the dtypes in which a sampler keeps them, not a train state.

    Raises:
      UserError: no workdir, no checkpoint there, or none of `step`.
    """
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None or not (checkpoints.folder / str(step)).is_dir():
            raise UserError(f"{workdir}: no checkpoint{'' if step is None else f' {step}'} there")
        config = checkpoints.config(step)
        name = "ema" if average and config.optim.ema_decay is not None else "params"
        abstract = training.abstract_params(config, mesh, for_sampling=for_sampling)
        return config, checkpoints.restore_part(step, {name: abstract})[name], step


# ---------------------------------------------------------------------------------- weights by name


def save_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
    """Writes arrays by name into a folder that does not exist; an OSError is the disk's."""
    ocp.save(folder.resolve(), arrays)


def describe_arrays(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of what `save_arrays` wrote.

    Raises:
      UserError: no such folder, or another one.
    """
    try:
        stored = ocp.metadata(folder.resolve()).metadata
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise UserError(f"{folder}: is no checkpoint of arrays ({_first_line(error)})") from None


def load_arrays(folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays with the dtypes and shardings of `abstract`, which names all or some of them.

    Raises:
      UserError: the folder holds others, or cannot be read.
    """
    names = describe_arrays(folder)
    wanted = {name: abstract.get(name, ocp.PLACEHOLDER) for name in names}
    try:
        arrays = ocp.load(folder.resolve(), wanted)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder}: cannot be read ({_first_line(error)})") from error
    return {name: arrays[name] for name in abstract}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
