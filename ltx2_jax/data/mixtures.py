"""Several datasets as one: how often each is seen, and what is true of all of them."""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltx2_jax.data.records import INDEX_NAME, VERSION, Linked, Records, open_records
from ltx2_jax.data.schema import Schema
from ltx2_jax.errors import UserError

Source = Sequence[dict[str, Any]]  # records, such as `data.records.Records`

# What all parts of a mixture must have alike, and for which makers if not for all.
_SAME = {
    "release": None,
    "text_release": None,
    "codec_hash": ("release", "linear"),
    "text_encoder_hash": ("text_release", "random"),
}


@dataclasses.dataclass(frozen=True)
class Mixture(Sequence):
    """Several datasets, and the share of the examples that comes from each.

    As a sequence, the records of one dataset after those of another. What makes latents and text
    features is alike in all; files of the first stand for it.

    Attributes:
      sources: the datasets.
      weights: of each, above 0; only their ratios count.
    """

    sources: Sequence[Source]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.sources) != len(self.weights) or not self.sources:
            raise UserError(f"{len(self.weights)} weights for {len(self.sources)} datasets")
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not 0 < weight < float("inf"):
                raise UserError(f"{name_of(source)}: its weight {weight} is not above 0")
        known = [source for source in self.sources if getattr(source, "schema", None) is not None]
        for source in known[1:]:
            _check_alike(source, known[0])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number][index - self._ends[number] + len(self.sources[number])]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(source) for source in self.sources))

    @cached_property
    def schema(self) -> Schema:
        """That of the first, with the sizes of all, largest first."""
        return merged([source.schema for source in self.sources])

    @cached_property
    def buckets(self) -> np.ndarray:
        """int [n], of each record, its entry of `schema.buckets`."""
        places = {bucket.key: place for place, bucket in enumerate(self.schema.buckets)}
        parts = [
            np.array([places[bucket.key] for bucket in source.schema.buckets])[source.buckets]
            for source in self.sources
        ]
        return np.concatenate(parts)

    @property
    def folder(self) -> Path:
        """Of the first dataset: where codec, text encoder and empty caption are."""
        return self.sources[0].folder

    @property
    def codec_path(self) -> Path:
        """As `Records` has it."""
        return self.sources[0].codec_path

    @property
    def text_encoder_path(self) -> Path:
        """As `Records` has it."""
        return self.sources[0].text_encoder_path

    def empty_caption(self) -> dict[str, np.ndarray]:
        """As `Records` has it."""
        return self.sources[0].empty_caption()

    def require(self, **expected: Any) -> None:
        """As `Records` has it."""
        self.sources[0].require(**expected)


Dataset = Records | Linked | Mixture


def open_datasets(parts: Sequence[tuple[str, float]]) -> Dataset:
    """The dataset in a folder, or the mixture of several: folders, and the share of each.

    Raises:
      UserError: `open_records` refuses a folder, or what is in them cannot be mixed.
    """
    opened = [open_records(folder) for folder, _ in parts]
    return opened[0] if len(opened) == 1 else Mixture(opened, [share for _, share in parts])


def sources_of(data: Dataset) -> Sequence[Dataset]:
    """The datasets of a mixture, or the one."""
    return data.sources if isinstance(data, Mixture) else [data]


def index_of(data: Dataset) -> bytes:
    """What dataset.json says of a dataset, or of all in a mixture."""
    if not isinstance(data, Mixture):
        return (Path(data.folder) / INDEX_NAME).read_bytes()
    parts = [
        {
            "folder": str(source.folder),
            "weight": weight,
            "num_records": len(source),
            "settings": source.settings,
        }
        for source, weight in zip(data.sources, data.weights, strict=True)
    ]
    contents = {"version": VERSION, "num_records": len(data), "schema": data.schema.to_json()}
    return json.dumps(contents | {"mixture": parts}, indent=1, ensure_ascii=False).encode()


def name_of(source: Source) -> str:
    """A dataset's folder, or whatever it is."""
    return str(getattr(source, "folder", None) or repr(source))


def merged(schemas: Sequence[Schema]) -> Schema:
    """The schema of datasets that can be mixed: what made the first, the sizes of all."""
    found = {bucket.key: bucket for schema in reversed(schemas) for bucket in schema.buckets}
    first, *others = sorted(found.values(), key=lambda bucket: bucket.largest_first)
    return dataclasses.replace(schemas[0], **vars(first), others=tuple(others))


def _check_alike(source: Source, first: Source) -> None:
    """UserError unless a model can be trained on both."""
    ours, theirs = source.schema, first.schema
    pairs = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name, made in _SAME.items()
        # A file that names released ones says where they lie: that may differ.
        if made is None or getattr(ours, made[0]) == made[1]
    }
    mine, its = _sizes(source), _sizes(first)
    pairs |= {name: (mine[name], its[name]) for name in sorted(mine.keys() & its.keys())}
    for name, (found, other) in pairs.items():
        if found != other:
            raise UserError(
                f"{name_of(source)}: its {name} is {found!r}, that of {name_of(first)} is "
                f"{other!r}: they cannot be mixed"
            )


def _sizes(source: Source) -> dict[str, Any]:
    """Shapes of the text fields, and channels of the latents, of all sizes of a dataset."""
    found = {}
    for bucket in source.schema.buckets:
        for name, field in bucket.fields.items():
            if "text" in name:
                found[name] = field.shape
            elif name in ("video", "audio"):
                found[f"channels of {name}"] = field.shape[3 if name == "video" else 1 :]
    return found
