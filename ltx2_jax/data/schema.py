"""What the records of a dataset hold, and what made them: stored in `dataset.json`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltx2_jax.errors import UserError


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object of dataset.json with today's names; before, it said "generation"."""
    return {
        name.replace("text_generation", "text_release").replace("generation", "release"): value
        for name, value in values.items()
    }


@dataclasses.dataclass(frozen=True)
class Field:
    """Type and shape of one field, the same in every record.

    Attributes:
      dtype: a numpy name ("float32", "bfloat16", ...) or "str".
      shape: () for scalars and strings.
    """

    dtype: str
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: Any) -> "Field":
        """The field that holds `value`, a string or something numpy can hold."""
        if isinstance(value, str):
            return cls("str")
        array = np.asarray(value)
        return cls(array.dtype.name, array.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" if self.dtype != "str" else "str"


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a dataset holds and what made it.

    Attributes:
      release: whose latents these are: "linear" (the quickstart's codec), "2.0", "2.3" or "2.5".
      text: what stands for the caption: "features".
      text_release: whose features these are: "random" (a small text encoder with random
        weights), "2.0", "2.3" or "2.5". Features of different releases are incompatible (the
        official format does not store this).
      num_frames, height, width: the clips' size in pixels.
      fps: frames per second of the first clip; records carry their own.
      codec: file name of the codec in the folder.
      codec_hash: `content_hash` of that file.
      text_encoder: file name of the text encoder in the folder.
      text_encoder_hash: `content_hash` of that file.
      fields: name to `Field`, for every field of a record.
    """

    release: str
    text: str
    text_release: str
    num_frames: int
    height: int
    width: int
    fps: float
    codec: str
    codec_hash: str
    text_encoder: str
    text_encoder_hash: str
    fields: Mapping[str, Field]

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Raises UserError, naming `where` and the field, unless `record` has these fields."""
        for name in sorted(self.fields.keys() | record.keys()):
            ours = self.fields.get(name)
            theirs = Field.of(record[name]) if name in record else None
            if ours != theirs:
                raise UserError(
                    f"{where}: field {name!r} is {theirs or 'missing'}, "
                    f"the dataset's is {ours or 'missing'}"
                )

    def require(self, folder: Path, **expected: Any) -> None:
        """Refuses the dataset in `folder` if it is not what the caller needs.

        Args:
          **expected: an attribute (`release="2.3"`, `codec_hash=...`) or a field of the records
            and its shape, None standing for any size (`video=(None, None, None, 128)`).

        Raises:
          UserError: the first mismatch, with dataset, name and both values.
        """
        attributes = {field.name for field in dataclasses.fields(self)} - {"fields"}
        for name, value in expected.items():
            if name in attributes:
                found = getattr(self, name)
                same = found == value
            elif name in self.fields:
                found = self.fields[name].shape
                value = tuple(value)
                same = len(found) == len(value) and all(
                    want is None or size == want for size, want in zip(found, value, strict=True)
                )
            else:
                there = ", ".join(self.fields)
                raise UserError(f"{folder}: no field {name!r}; its records hold {there}")
            if not same:
                raise UserError(f"{folder}: {name} is {found!r}, {value!r} is needed")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["fields"] = {name: dataclasses.asdict(f) for name, f in self.fields.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schema":
        """The reverse of `to_json`. Raises TypeError or KeyError for anything else."""
        values = renamed(values)
        fields = {k: Field(v["dtype"], tuple(v["shape"])) for k, v in values["fields"].items()}
        return cls(**{**values, "fields": fields})
