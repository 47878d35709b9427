"""What the records of a dataset hold, and what made them: stored in `dataset.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
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
class BucketFields:
    """Records of one size: the same fields, of the same shapes, so that they make batches.

    Attributes:
      num_frames, height, width: the clips' size in pixels.
      fps: frames per second of the first clip; records carry their own.
      fields: name to `Field`, for every field of a record.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    fields: Mapping[str, Field]

    def __str__(self) -> str:
        if not self.num_frames:
            return "sound alone"
        return f"{self.width}x{self.height}x{self.num_frames}"

    @property
    def key(self) -> tuple:
        """Equal where records make batches together; the rate is that of the first alone."""
        fields = sorted((k, f.dtype, f.shape) for k, f in self.fields.items())
        return self.num_frames, self.height, self.width, tuple(fields)

    @property
    def largest_first(self) -> tuple:
        """Sorts buckets: by their pixels, then by their sound."""
        audio = self.fields["audio"].shape[0] if "audio" in self.fields else 0
        return -self.num_frames * self.height * self.width, -audio, self.key

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {**vars(self), "fields": fields_to_json(self.fields)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BucketFields":
        """The reverse of `to_json`. Raises TypeError, KeyError or ValueError for anything else."""
        return cls(**{**values, "fields": fields_from_json(values["fields"])})


def fields_to_json(fields: Mapping[str, Field]) -> dict[str, Any]:
    """A JSON object that `fields_from_json` reads back."""
    return {name: dataclasses.asdict(field) for name, field in fields.items()}


def fields_from_json(values: Mapping[str, Any]) -> dict[str, Field]:
    """The reverse of `fields_to_json`. Raises TypeError or KeyError for anything else."""
    return {name: Field(field["dtype"], tuple(field["shape"])) for name, field in values.items()}


_SIZES = tuple(field.name for field in dataclasses.fields(BucketFields))


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a dataset holds and what made it.

    A dataset may hold clips of several sizes. The size and the fields of its first, the largest,
    are here; those of all are in `buckets`.

    Attributes:
      release: whose latents these are: "linear" (the quickstart's codec), "2.0", "2.3" or "2.5".
      text: what stands for the caption: "features".
      text_release: whose features these are: "random" (a small text encoder with random
        weights), "2.0", "2.3" or "2.5". Features of different releases are incompatible (the
        official format does not store this).
      num_frames, height, width, fps, fields: see `BucketFields`.
      codec: file name of the codec in the folder.
      codec_hash: `content_hash` of that file.
      text_encoder: file name of the text encoder in the folder.
      text_encoder_hash: `content_hash` of that file.
      others: the sizes after the first.
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
    others: tuple[BucketFields, ...] = ()

    @property
    def buckets(self) -> tuple[BucketFields, ...]:
        """All sizes, largest first."""
        first = BucketFields(**{name: getattr(self, name) for name in _SIZES})
        return first, *self.others

    @classmethod
    def of_buckets(cls, buckets: Sequence[BucketFields], **values: Any) -> "Schema":
        """The schema of these sizes, in this order; `values` are the other attributes."""
        first, *others = buckets
        return cls(**vars(first), **values, others=tuple(others))

    def check(self, record: Mapping[str, Any], where: str, bucket: int = 0) -> None:
        """Raises UserError, naming `where` and the field, unless `record` fits a bucket."""
        fields = self.buckets[bucket].fields if bucket else self.fields
        for name in sorted(fields.keys() | record.keys()):
            ours = fields.get(name)
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
        attributes = {field.name for field in dataclasses.fields(self)} - {"fields", "others"}
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
        values = {k: v for k, v in vars(self).items() if k not in (*_SIZES, "others")}
        return values | {"buckets": [bucket.to_json() for bucket in self.buckets]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schema":
        """The reverse of `to_json`; also reads version 2, of one size.

        Raises TypeError, KeyError or ValueError for anything else.
        """
        values = renamed(values)
        buckets = values.pop("buckets", None)
        if buckets is None:
            buckets = [{name: values.pop(name) for name in _SIZES}]
        return cls.of_buckets([BucketFields.from_json(bucket) for bucket in buckets], **values)
