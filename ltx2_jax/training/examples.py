"""Which examples the steps of a run take: how many, of which size, and which are of this host."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.data.fetching import local_dataset
from ltx2_jax.data.mixtures import Dataset, name_of
from ltx2_jax.data.order import BatchSize, Kind, Order, by_tokens
from ltx2_jax.data.schema import BucketFields
from ltx2_jax.errors import UserError
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.sharding import sharding_of
from ltx2_jax.training import films, objective


def with_data_here(config: Config) -> Config:
    """The config, its datasets in buckets copied to this host and named as they are here.

    So are those that are made of films, without their latents.
    """

    def fetched(folder: str | None) -> str | None:
        if folder is not None and films.are_films(folder):
            return films.dataset(folder, config)
        return None if folder is None else local_dataset(folder, config.data.cache)

    def fetch() -> Config:
        films.check(config)
        mixture = tuple((fetched(folder), share) for folder, share in config.data.mixture)
        data = dataclasses.replace(config.data, path=fetched(config.data.path), mixture=mixture)
        held_out = dataclasses.replace(config.validation, path=fetched(config.validation.path))
        return dataclasses.replace(config, data=data, validation=held_out)

    hosts.progress("fetch", seconds=config.watchdog.long_seconds)
    return hosts.agree(fetch, config.watchdog.long_seconds, "the dataset is copied to all hosts")


def clip_tokens(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Tokens of video and audio that the model reads of a clip with fields of these shapes."""
    count = dict.fromkeys(("video", "audio"), 0)
    flow = objective.flow_of(config.flow, shapes)
    for name in flow.streams:
        read = [f"{name}_reference" for x in flow.conditions(name) if x.kind == "reference"]
        for field in (name, *read):
            count[name] += math.prod(shapes[field][: 3 if name == "video" else 1])
    return count


def batch_size(config: Config) -> BatchSize:
    """Of a run: a number, or one for every size of clips, which does not depend on the mesh."""
    data = config.data
    if data.batch_tokens is None:
        return data.batch_size

    def tokens(bucket: BucketFields) -> int:
        shapes = {name: field.shape for name, field in bucket.fields.items()}
        return sum(clip_tokens(config, shapes).values())

    size = by_tokens(data.batch_tokens, data.batch_size, tokens)

    def named(bucket: BucketFields) -> int:
        try:
            return size(bucket)
        except UserError as error:
            raise UserError(
                f"data.batch_tokens={data.batch_tokens}: data.batch_size={error}; give more "
                "tokens, or a smaller data.batch_size, which batches are multiples of"
            ) from None

    return named


@dataclasses.dataclass(frozen=True)
class Share:
    """Of the batch of a step, what it is of, and what this host has of it.

    Attributes:
      numbers: rows of the global batch.
      size: of the global batch.
      labels: names of its size and of its dataset, where a run has several.
    """

    numbers: tuple[int, ...]
    size: int
    labels: Mapping[str, str]


class Examples:
    """The batches of a run, before any is read.

    Attributes:
      kinds: what they are of, list of `Kind`.
    """

    def __init__(self, config: Config, records: Dataset, mesh: jax.sharding.Mesh):
        """
        Raises:
          UserError: there are no records, or clips so large that `data.batch_tokens` has none.
        """
        self._order = Order(records, batch_size(config), config.seed, shuffle=True)
        self.kinds = self._order.kinds
        sharding = sharding_of(mesh, "batch")
        rows = {size: rows_of_host(sharding, size) for size in {k.batch_size for k in self.kinds}}
        self._shares = {
            kind: Share(rows[kind.batch_size], kind.batch_size, labels)
            for kind, labels in zip(self.kinds, labels_of(self.kinds), strict=True)
        }

    def share(self, position: int) -> Share:
        """Of the batch that comes after so many others."""
        return self._shares[self._order.kind(position)]


def labels_of(kinds: Sequence[Kind]) -> list[dict[str, str]]:
    """What tells the kinds of batches apart where metrics are read; nothing if there is one."""
    if len(kinds) == 1:
        return [{}]
    names = names_of([kind.bucket for kind in kinds])
    labels = [{"bucket": names[kind.bucket.key]} for kind in kinds]
    if len({id(kind.source) for kind in kinds}) == 1:
        return labels
    return [
        {"dataset": name_of(kind.source)} | label for kind, label in zip(kinds, labels, strict=True)
    ]


def names_of(buckets: Sequence[BucketFields]) -> dict[tuple, str]:
    """A name for the key of every size: "768x512x121", "768x512x121-silent", "sound-126"."""
    found: dict[tuple, BucketFields] = {}
    for bucket in buckets:
        found.setdefault(bucket.key, bucket)
    names = {key: _name(bucket) for key, bucket in found.items()}
    count = Counter(names.values())
    # The same picture with more or less sound: of another rate.
    names = {
        key: f"{name}-{found[key].fps:g}fps" if count[name] > 1 else name
        for key, name in names.items()
    }
    seen: Counter[str] = Counter()
    for key, name in names.items():
        seen[name] += 1
        if seen[name] > 1:
            names[key] = f"{name}-{seen[name]}"
    return names


def _name(bucket: BucketFields) -> str:
    if not bucket.num_frames:
        return f"sound-{bucket.fields['audio'].shape[0]}"
    return str(bucket) + ("" if "audio" in bucket.fields else "-silent")
