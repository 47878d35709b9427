"""The fields of frozen dataclasses: changed by flags, compared, checked, to JSON and back."""

import ast
import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ltx2_jax.errors import UserError


def check_least(config: Any, **least: int) -> None:
    """UserError unless every named field of `config` is at least so much."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"{name}={getattr(config, name)} must be at least {value}")


def check_one_of(config: Any, **choices: tuple[str, ...]) -> None:
    """UserError unless every named field of `config` is one of its choices."""
    for name, valid in choices.items():
        if (value := getattr(config, name)) not in valid:
            *most, last = valid
            raise UserError(f"{name}={value!r}: use {', '.join(most)} or {last}")


def check_share(config: Any, *names: str) -> None:
    """UserError unless every named field of `config` is from 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name}={getattr(config, name)} is not from 0 to 1")


def check_seed(config: Any, where: str = "") -> None:
    """UserError unless `config.seed` is what all generators of random numbers take."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"{where}seed={config.seed} is not from 0 to {2**32 - 1}")


def replaced(node: Any, changes: dict[str, str], prefix: str = "--config") -> Any:
    """`node` with all changes made at once: a class may check its fields against one another."""
    hints = typing.get_type_hints(type(node))
    grouped: dict[str, dict[str, str]] = {}
    for path, text in changes.items():
        name, _, rest = path.partition(".")
        if name not in hints:
            raise UserError(f"{prefix}.{path}: no field {name!r}; valid: {', '.join(hints)}")
        grouped.setdefault(name, {})[rest] = text
    new = {}
    for name, inner in grouped.items():
        value, where = getattr(node, name), f"{prefix}.{name}"
        if not dataclasses.is_dataclass(value):
            if list(inner) != [""]:
                raise UserError(f"{where} has no fields")
            new[name] = _parse(inner[""], hints[name], where)
        elif "" in inner:
            raise UserError(f"{where}: set its fields: {', '.join(vars(value))}")
        else:
            new[name] = replaced(value, inner, where)
    try:
        return dataclasses.replace(node, **new)
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from error


def _parse(text: str, hint: Any, where: str) -> Any:
    readings: list[Any] = [text]  # as it stands last: a folder may be called 2024
    if hint is not str:
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            readings.insert(0, ast.literal_eval(text))
    for reading in readings:
        with contextlib.suppress(TypeError):
            return _coerce(reading, hint)
    raise UserError(f"{where}={text}: expected {_type_name(hint)}")


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` says (ints pass as floats, lists as tuples); TypeError otherwise."""
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value)
    mismatch = TypeError(f"expected {_type_name(hint)}, not {value!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            with contextlib.suppress(TypeError):
                return _coerce(value, option)
        raise mismatch
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise mismatch
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise mismatch
        return tuple(_coerce(v, h) for v, h in zip(value, items, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise mismatch
    return value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


# ------------------------------------------------------------------------------------------- JSON


def to_json(config: Any) -> str:
    """A config dataclass as JSON text, for checkpoints and dataset files."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type, text: str) -> Any:
    """The inverse of `to_json`.

    Raises:
      UserError: not JSON, or fields or values that `kind` does not have.
    """
    try:
        return _from_dict(kind, json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"not a {kind.__name__} of this version: {error}") from error


def _from_dict(kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} needs fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise TypeError(f"{kind.__name__} has no field {name}")
        try:
            fields[name] = _coerce(value, hints[name])
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    return kind(**fields)


def difference(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Fields in which two configs differ, as `path: a -> b` lines."""
    lines = []
    for f in dataclasses.fields(a):
        x, y, name = getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            lines += difference(x, y, name + ".")
        elif x != y:
            lines.append(f"{name}: {x!r} -> {y!r}")
    return lines


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
