"""Keys of a YAML file, each taken by who knows it; what is left over is told."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ltx2_jax.errors import UserError


class Keys:
    """A mapping of a file, whose keys are taken one by one; `done` refuses those that are left."""

    def __init__(self, values: Any, path: str = ""):
        if not isinstance(values, Mapping):
            raise UserError(f"{path or 'the file'}: expected keys and values, not {values!r:.40}")
        self._left, self.path = dict(values), path
        self._known: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self._left.get(name) is not None

    def where(self, name: str) -> str:
        """The key with those that it stands under."""
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key as it stands; `default` where it is absent or null."""
        self._known.append(name)
        value = self._left.pop(name, None)
        return default if value is None else value

    def leave(self, name: str, value: Any) -> None:
        """Puts back what was taken: it has no meaning here after all."""
        self._left[name] = value

    def keys(self, name: str) -> "Keys":
        """The mapping under a key; empty if it is absent."""
        return Keys(self.take(name, {}), self.where(name))

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.where(name)}={value!r}: expected text")
        return value

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        value = self.take(name, default)
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in options else value
        if value not in options:
            raise UserError(f"{self.where(name)}={value!r}: use {', '.join(options)}")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number; YAML takes `1e-4`, which has no point, for text."""
        value = self.take(name, default)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self.where(name)}={value!r}: expected a number")
        return number

    def integer(self, name: str, default: int | None = None) -> int | None:
        value = self.number(name, default)
        if value is not None and value != int(value):
            raise UserError(f"{self.where(name)}={value!r}: expected a whole number")
        return None if value is None else int(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where(name)}={value!r}: expected true or false")
        return value

    def listed(self, name: str) -> list[Any]:
        value = self.take(name, [])
        if not isinstance(value, list):
            raise UserError(f"{self.where(name)}={value!r:.40}: expected a list")
        return value

    def done(self, idle: Mapping[str, str]) -> list[str]:
        """Keys that are left and have no meaning here; UserError for one that nobody knows."""
        ours = [name.rpartition(".")[2] for name in idle if name.rpartition(".")[0] == self.path]
        for name in self._left:
            if name not in ours:
                close = difflib.get_close_matches(str(name), self._known + ours, 1, 0.5)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(self._known)}"
                raise UserError(f"{self.where(name)}: no such key; {hint}")
        return [self.where(name) for name, value in self._left.items() if value]
