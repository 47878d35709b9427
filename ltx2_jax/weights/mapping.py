"""Between our parameter trees and official tensors, for networks whose blocks are not stacked.

A component's mapping is a table from our path to the official name, with `{}` for every number in
either, in the same order: `"blocks.{}.conv.kernel": "blocks.{}.conv.conv.weight"`. Kernels change
their axis order: linear and convolution weights are [out, in, *window] officially and
[*window, in, out] here (a transposed convolution [in, out, *window] and [*window, out, in]).
Everything else is stored as it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax.errors import UserError

Table = Mapping[str, str]


def abstract_params(create: Callable[[], nnx.Module]) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter of the module that `create` builds."""
    state = nnx.split(nnx.eval_shape(create), nnx.Param)[1]
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    return {".".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def official_name(path: str, table: Table) -> str:
    """The official name of one of our paths; a KeyError means that `table` lacks a row."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
    return table[re.sub(r"(?<=\.)\d+(?=\.)", "{}", path)].format(*numbers)


def from_official(
    tensors: Mapping[str, np.ndarray],
    create: Callable[[], nnx.Module],
    table: Table,
    *,
    component: str,
) -> dict[str, Any]:
    """Official tensors, prefix and unread keys removed -> our parameter tree of numpy arrays.

    Args:
      tensors: name -> array, exactly those that the component has.
      create: builds the module; only its shapes are used.
      table: our path -> official name.
      component: what to call it in an error.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    tree: dict[str, Any] = {}
    problems, known = [], set()
    for path, leaf in abstract_params(create).items():
        name = official_name(path, table)
        known.add(name)
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        value = _ours(path, tensors[name])
        if value.shape != leaf.shape:
            wanted = _official(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
            problems.append(f"{name} has {tuple(tensors[name].shape)}, not {wanted}")
            continue
        insert(tree, path, value)
    problems += [f"unknown {name}" for name in tensors if name not in known]
    if problems:
        raise UserError(f"{component} weights do not fit the config: {'; '.join(problems)}")
    return tree


def to_official(params: Mapping[Any, Any], table: Table) -> dict[str, np.ndarray]:
    """Our parameter tree -> official tensors, without prefix; the inverse of `from_official`."""
    tensors = {}
    for entries, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = ".".join(str(entry.key) for entry in entries)
        tensors[official_name(path, table)] = np.ascontiguousarray(_official(path, value))
    return tensors


def build(create: Callable[[], nnx.Module], params: Mapping[Any, Any]) -> nnx.Module:
    """The module that `create` builds, with `params` as its weights."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(create)), params)


def _ours(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("kernel") and value.ndim >= 2:
        return np.moveaxis(value, (0, 1), (-1, -2))
    return value


def _official(path: str, value: np.ndarray) -> np.ndarray:
    value = np.asarray(value)
    return np.moveaxis(value, (-1, -2), (0, 1)) if path.endswith("kernel") else value


def insert(tree: dict[Any, Any], path: str, value: np.ndarray) -> None:
    """Puts a value at a path such as "blocks.0.kernel" into a nested dict."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value
