"""Between our parameter trees and official tensors: which is which, and how they are turned.

A network's table is data: our path -> official name, with `{}` for every number in either, in the
same order, as in `"blocks.{}.conv.kernel": "blocks.{}.conv.conv.weight"`. Where our blocks are
stacked on a leading layer axis, the official name has the one number more that ours lacks.
`parameters` spells a table out for one network; what reads and writes files works on its result.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.sharding import abstract_state

Table = Mapping[str, str]

# How the axes of an official tensor become ours.
SAME = "same"
KERNEL = "kernel"  # [out, in, *window] -> [*window, in, out]; transposed convolutions likewise
STATES = "states"  # [out, D * states], a state being the fast index -> [states, D, out]


@dataclass(frozen=True)
class Parameter:
    """One of our parameters and the official tensors that it is made of."""

    path: tuple[str | int, ...]  # in our tree
    names: tuple[str, ...]  # official, without prefix: one, or one for every layer if stacked
    leaf: jax.ShapeDtypeStruct  # ours; with a sharding, if it is known where it goes
    stacked: bool = False  # has a leading layer axis
    layout: str = SAME
    optional: bool = False  # zeros where a file lacks it
    form: str | None = None  # of `models.quantized`: it is loaded as values and a scale

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Ours, without the layer axis."""
        return tuple(self.leaf.shape[self.stacked :])

    @property
    def official_shape(self) -> tuple[int, ...]:
        """Of every one of `names`."""
        shape = self.inner_shape
        if self.layout == KERNEL:
            return (shape[-1], shape[-2], *shape[:-2])
        if self.layout == STATES:
            return (shape[2], shape[1] * shape[0])
        return shape

    def at(self, homes: Mapping[Any, Any], form: str | None) -> "Parameter":
        """To be loaded to what `homes`, path -> leaf, has of it: in `form` if that has a scale."""
        rounded = self.path[-1] == "weight" and (*self.path[:-1], "scale") in homes
        return replace(self, leaf=homes[self.path], form=form if rounded else None)

    def to_ours(self, value: Any) -> Any:
        """[*lead, *official] -> [*lead, *inner], numpy or jax."""
        if self.layout == SAME:
            return value
        lead = value.ndim - len(self.official_shape)
        if self.layout == KERNEL:
            return _moveaxis(value, (lead, lead + 1), (-1, -2))
        states, width, out = self.inner_shape
        value = value.reshape(*value.shape[:lead], out, width, states)
        return _moveaxis(value, (lead, lead + 2), (-1, lead))

    def to_official(self, value: Any) -> Any:
        """The inverse of `to_ours`."""
        if self.layout == SAME:
            return value
        lead = value.ndim - len(self.inner_shape)
        if self.layout == KERNEL:
            return _moveaxis(value, (-1, -2), (lead, lead + 1))
        value = _moveaxis(value, (-1, lead), (lead, lead + 2))
        return value.reshape(*value.shape[:lead], *self.official_shape)


def _moveaxis(value: Any, source: tuple[int, ...], target: tuple[int, ...]) -> Any:
    """`np.moveaxis` for numpy and jax alike, which under an explicit mesh is a transpose."""
    axes = [axis for axis in range(value.ndim) if axis not in {s % value.ndim for s in source}]
    for to, axis in sorted(zip((t % value.ndim for t in target), source, strict=True)):
        axes.insert(to, axis % value.ndim)
    return value.transpose(axes)


# ------------------------------------------------------------------------------------------ tables


def inside(ours: str, official: str, rows: Table) -> dict[str, str]:
    """The rows of a module, from those of what is inside it."""
    return {f"{ours}.{path}": f"{official}.{name}" for path, name in rows.items()}


def parameters(
    create: Callable[[], nnx.Module],
    table: Table,
    where: Any = None,
    *,
    optional: Iterable[str] = (),
) -> list[Parameter]:
    """A `Parameter` for everything that the module of `create` learns; a KeyError lacks a row.

    Args:
      create: builds the module; only its shapes are used.
      table: our path -> official name; rows that the module does not have are fine.
      where: see `abstract_params`.
      optional: official names that files may lack.
    """
    return [
        _parameter(path, leaf, table, optional)
        for path, leaf in abstract_params(create, where).items()
    ]


def _parameter(
    path: tuple[str | int, ...], leaf: jax.ShapeDtypeStruct, table: Table, optional: Iterable[str]
) -> Parameter:
    numbers = [part for part in path if isinstance(part, int)]
    row = ".".join("{}" if isinstance(part, int) else part for part in path)
    official = table[row]
    stacked = official.count("{}") > len(numbers)
    layers = range(leaf.shape[0]) if stacked else (None,)
    names = tuple(official.format(*([] if i is None else [i]), *numbers) for i in layers)
    kernel = str(path[-1]).endswith("kernel") and leaf.ndim - stacked > 1
    return Parameter(path, names, leaf, stacked, KERNEL if kernel else SAME, names[0] in optional)


def abstract_params(
    create: Callable[[], nnx.Module], where: Any = None
) -> dict[tuple[str | int, ...], jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of every parameter of the module that `create` builds.

    `where` is a mesh on which the module places its parameters itself, or one sharding for all, or
    None.
    """
    found = _on_paper(create, where)[1]
    if isinstance(where, jax.sharding.Mesh):
        return dict(found)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for path, leaf in found.items()
    }


def graph(create: Callable[[], nnx.Module], where: Any = None) -> Any:
    """The static half of the module that `create` builds: `nnx.merge(graph, params)` is it."""
    return _on_paper(create, where)[0]


def _on_paper(create: Callable[[], nnx.Module], where: Any) -> tuple[Any, dict[Any, Any]]:
    """The static half of a module, and path -> shape, dtype and, on a mesh, sharding."""
    mesh = where if isinstance(where, jax.sharding.Mesh) else jax.sharding.get_abstract_mesh()
    if isinstance(create, functools.partial) and not create.keywords:  # of a config, as a rule
        return _traced(mesh, create.func, *create.args)
    return _traced.__wrapped__(mesh, create)


@functools.lru_cache(256)  # to build a network, if only on paper, takes up to a second
def _traced(mesh: Any, create: Callable[..., nnx.Module], *args: Any) -> tuple[Any, dict[Any, Any]]:
    create, placed = functools.partial(create, *args), isinstance(mesh, jax.sharding.Mesh)
    module = abstract_state(create, mesh=mesh) if placed else jax.eval_shape(create)
    graphdef, params = nnx.split(module, nnx.Param)
    return graphdef, leaves(nnx.to_pure_dict(params))


def leaves(tree: Mapping[Any, Any]) -> dict[tuple[str | int, ...], Any]:
    """Path -> leaf of a nested dict."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(entry.key for entry in path): leaf for path, leaf in found}


def tree(found: Iterable[tuple[Parameter, Any]]) -> dict[Any, Any]:
    """Parameters and their values -> the nested dict of the values."""
    return nested({parameter.path: value for parameter, value in found})


def nested(values: Mapping[tuple[str | int, ...], Any]) -> dict[Any, Any]:
    """The inverse of `leaves`."""
    tree: dict[Any, Any] = {}
    for path, value in values.items():
        insert(tree, path, value)
    return tree


def insert(tree: dict[Any, Any], path: Iterable[str | int], value: Any) -> None:
    """Puts a value at a path into a nested dict."""
    *parents, last = path
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def build(
    create: Callable[[], nnx.Module], params: Mapping[Any, Any], where: Any = None
) -> nnx.Module:
    """The module that `create` builds, with `params` as its weights; `where` as for them."""
    return nnx.merge(graph(create, where), params)


# ---------------------------------------------------------------------------------------- checking


def problems(wanted: Iterable[Parameter], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unknown or misshapen in `shapes`, official name -> shape."""
    found: list[str] = []
    known: set[str] = set()
    for parameter in wanted:
        known.update(parameter.names)
        for name in parameter.names:
            if name not in shapes:
                found += [] if parameter.optional else [f"missing {name}"]
            elif tuple(shapes[name]) != parameter.official_shape:
                found.append(f"{name} has {tuple(shapes[name])}, not {parameter.official_shape}")
    return found + [f"unknown {name}" for name in shapes if name not in known]


def refuse(problems: list[str], component: str) -> None:
    """UserError if there are problems, with all of them, the blocks of a stack in one entry."""
    if problems:
        listed = "; ".join(in_short(problems))
        raise UserError(f"{component} weights do not fit the config: {listed}")


def in_short(names: Iterable[str]) -> list[str]:
    """Names that differ in one number only become one: "blocks.{0-47}.to_q.weight"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(.*?\.)(\d+)(\..*)|(.*)", name).groups()[:3]
        key = (name, "") if number is None else (before, after)
        groups.setdefault(key, []).append(-1 if number is None else int(number))
    return [
        before if numbers == [-1] else f"{before}{_ranges(numbers)}{after}"
        for (before, after), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return "{" + ",".join("-".join(map(str, part)) for part in parts) + "}"


# ---------------------------------------------------------------------------- whole, in host memory


def from_official(
    tensors: Mapping[str, np.ndarray], wanted: list[Parameter], component: str
) -> dict[Any, Any]:
    """Official tensors, prefix removed -> our parameter tree of numpy arrays, for small networks.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    shapes = {name: value.shape for name, value in tensors.items()}
    refuse(problems(wanted, shapes), component)
    values = {}
    for parameter in wanted:
        parts = [
            parameter.to_ours(tensors[name])
            if name in tensors
            else np.zeros(parameter.inner_shape, np.float32)
            for name in parameter.names
        ]
        values[parameter.path] = np.stack(parts) if parameter.stacked else parts[0]
    return nested(values)


def to_official(params: Mapping[Any, Any], wanted: Iterable[Parameter]) -> dict[str, np.ndarray]:
    """Our parameter tree -> official tensors, without prefix; the inverse of `from_official`."""
    values, tensors = leaves(params), {}
    for parameter in wanted:
        value = np.asarray(values[parameter.path])
        for i, name in enumerate(parameter.names):
            part = parameter.to_official(value[i] if parameter.stacked else value)
            tensors[name] = np.ascontiguousarray(part)
    return tensors


def count(wanted: Iterable[Parameter]) -> int:
    """Numbers in all of `wanted`."""
    return sum(math.prod(parameter.leaf.shape) for parameter in wanted)
