"""Weights in our own layout: a folder with an Orbax checkpoint for each network.

    weights/
      weights.json        names, dtypes and shapes of the official tensors, and their metadata
      transformer/ ...    Orbax: our path -> array, as it lies in memory, for every network
      rest.safetensors    tensors that belong to no network

It restores onto any mesh, each host reading what its devices need, and opens as a `Release`: what
takes official files takes such a folder. `Export.save` writes one.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.training import checkpoint
from ltx2_jax.weights import mapping
from ltx2_jax.weights.loading import Source, dtype_for
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.tensor_files import DTYPES, Stored, TensorFile

INDEX, REST = "weights.json", "rest.safetensors"
KIND = "ltx2_jax.weights.1"  # the number changes with the layout


@dataclass
class Listing:
    """What an official file would have in its header; its tensors are elsewhere."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Stored]

    def read(self, name: str, *_: Any) -> Any:
        raise UserError(f"{self.path}: {name} is not stored as in an official file; make it one")

    def close(self) -> None:
        pass


class WeightsFolder(Release):
    """An open folder of weights; see `Release`."""

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
          UserError: no such folder, or a damaged one.
        """
        self.path = Path(path)
        listing = _read_index(self.path)
        rest = self.path / REST
        self._rest = TensorFile(rest) if rest.is_file() else None
        super().__init__([listing], str(path))
        groups = [self.beside, *(held.unread for held in self.networks.values())]
        wanted = {source.name for group in groups for source in group.values()}
        if missing := wanted.difference(self._rest.tensors if self._rest else ()):
            self.close()
            names = ", ".join(mapping.in_short(sorted(missing)))
            raise UserError(f"{rest}: {INDEX} names tensors that are not there: {names}")
        for group in groups:
            group.update({n: Source(self._rest, source.name) for n, source in group.items()})

    def stream(
        self,
        network: str,
        wanted: Sequence[mapping.Parameter],
        param_dtype: Any = None,
        *,
        progress: str | None = None,
    ) -> Iterator[tuple[mapping.Parameter, jax.Array]]:
        """As of `Release`; Orbax restores the network as a whole."""
        folder = self.path / network
        stored = checkpoint.describe_arrays(folder)
        abstract = {}
        for parameter in wanted:
            name = name_of(parameter)
            if name not in stored or stored[name].shape != parameter.leaf.shape:
                raise UserError(f"{folder}: does not hold {name} {parameter.leaf.shape}")
            dtype = dtype_for(parameter, param_dtype)
            where = parameter.leaf.sharding
            where = where or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract[name] = jax.ShapeDtypeStruct(
                parameter.leaf.shape, dtype or stored[name].dtype, sharding=where
            )
        try:
            arrays = checkpoint.load_arrays(folder, abstract)
        except UserError:
            raise
        except Exception as error:  # which Orbax raises as such where its data is damaged
            raise UserError(f"{folder}: cannot be read ({reason(error):.200})") from None
        for parameter in wanted:
            yield parameter, arrays.pop(name_of(parameter))

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()


def _read_index(folder: Path) -> Listing:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["kind"] != KIND:
            raise UserError(f"{path}: kind {index['kind']}, this version reads {KIND}")
        tensors = {
            name: Stored(DTYPES[dtype], tuple(shape), 0)
            for name, (dtype, shape) in index["tensors"].items()
        }
        return Listing(folder, dict(index["metadata"]), tensors)
    except FileNotFoundError:
        raise UserError(f"{folder}: is no folder of weights (it has no {INDEX})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error})") from None


def name_of(parameter: mapping.Parameter) -> str:
    """What a parameter is called in the checkpoint of its network."""
    return ".".join(map(str, parameter.path))
