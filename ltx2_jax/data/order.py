"""Which records make the batch of a step: a function of the seed and the step alone.

Records of one size make batches; a *kind* is the records of one size of one dataset. Every kind is
an endless sequence, one permutation of its records after another, cut into its batches. A step
takes the next batch of one kind, and the kinds take turns by their shares: so a host that knows the
step knows the batch, whatever the number of hosts and wherever the run began.
"""

import dataclasses
import math
import threading
from collections.abc import Callable

import ml_dtypes  # noqa: F401  (names bfloat16 to numpy)
import numpy as np

from ltx2_jax.data.mixtures import Mixture, Source, name_of
from ltx2_jax.data.schema import BucketFields
from ltx2_jax.errors import UserError

BatchSize = int | Callable[[BucketFields], int]

# Multiples of the golden section of a turn, in 2**64ths of it, are spread evenly: any stretch of
# steps has every kind as often as its share says, give or take one or two.
_TURN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 4096  # steps whose kinds are counted at once


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """The records of one size of one dataset.

    Attributes:
      source: the dataset.
      records: int [n], their indices.
      batch_size: how many make a batch, over all hosts.
      bucket: what they hold; None if the dataset does not say.
    """

    source: Source
    records: np.ndarray
    batch_size: int
    bucket: BucketFields | None = None


class Order:
    """The batches of one or several datasets.

    Attributes:
      kinds: list of `Kind`.
      shares: float [kinds], of all steps.
    """

    def __init__(self, data: Source | Mixture, batch_size: BatchSize, seed: int, shuffle: bool):
        """
        Args:
          data: what to take batches of.
          batch_size: of every batch, or by the size of its clips.
          seed, shuffle: False keeps the order of the records within a kind.

        Raises:
          UserError: a dataset has no records; a batch has no clips.
        """
        if not isinstance(data, Mixture):
            data = Mixture([data], [1.0])
        self.kinds: list[Kind] = []
        steps = []
        for source, weight in zip(data.sources, data.weights, strict=True):
            if len(source) == 0:
                raise UserError(f"{name_of(source)}: the dataset has no records")
            for kind in _kinds(source, batch_size):
                self.kinds.append(kind)
                # A dataset's examples are shared by its sizes as its records are.
                steps.append(weight * len(kind.records) / len(source) / kind.batch_size)
        self.shares = np.array(steps) / np.sum(steps)
        self._seed, self._shuffle = seed, shuffle
        ends = np.cumsum(self.shares)[:-1]
        self._ends = np.array([min(int(end * 2**64), 2**64 - 1) for end in ends], np.uint64)
        self._phase = np.uint64(_draws(1, seed, 0)[0] * 2**64)
        self._counts = [np.zeros(len(self.kinds), np.int64)]  # before every block of steps
        self._block: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the kinds of the last one
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def batch(self, step: int) -> tuple[Kind, np.ndarray, np.ndarray]:
        """The batch of a step, of B rows: its kind, indices [B], and numbers in [0, 1) [B].

        The numbers decide what is random in a row, such as which of its captions is taken.
        """
        number, place = self._place(step)
        kind = self.kinds[number]
        size = kind.batch_size
        rows = self._rows(number, np.arange(place * size, (place + 1) * size))
        return kind, rows, _draws(size, self._seed, 1, step)

    def kind(self, step: int) -> Kind:
        """What the batch of a step is of."""
        return self.kinds[self._place(step)[0]]

    def _place(self, step: int) -> tuple[int, int]:
        """The kind of a step, and which of its batches it takes."""
        if len(self.kinds) == 1:
            return 0, step
        block, within = divmod(step, _BLOCK)
        with self._lock:
            while len(self._counts) <= block:
                kinds = self._kinds_of(len(self._counts) - 1)
                counted = np.bincount(kinds, minlength=len(self.kinds))
                self._counts.append(self._counts[-1] + counted)
            before, (held, kinds) = self._counts[block], self._block
        if held != block:
            kinds = self._kinds_of(block)
            with self._lock:
                self._block = block, kinds
        number = int(kinds[within])
        return number, int(before[number] + (kinds[:within] == number).sum())

    def _kinds_of(self, block: int) -> np.ndarray:  # [_BLOCK]
        steps = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
        return np.searchsorted(self._ends, steps * _TURN + self._phase, side="right")

    def _rows(self, number: int, places: np.ndarray) -> np.ndarray:
        """Indices of the records at some places, which ascend, of the sequence of a kind."""
        records = self.kinds[number].records
        if not self._shuffle:
            return records[places % len(records)]
        epochs = places // len(records)
        parts = [
            self._permutation(number, int(epoch))[places[epochs == epoch] % len(records)]
            for epoch in np.unique(epochs)
        ]
        return records[np.concatenate(parts)]

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        with self._lock:
            held = self._permutations.get(number)
        if held is None or held[0] != epoch:
            count = len(self.kinds[number].records)
            held = epoch, np.argsort(_draws(count, self._seed, 2, number, epoch), kind="stable")
            with self._lock:
                self._permutations[number] = held
        return held[1]


def _kinds(source: Source, batch_size: BatchSize) -> list[Kind]:
    """One for every size of a dataset that there are records of."""
    schema = getattr(source, "schema", None)
    if schema is None:
        parts = [(None, np.arange(len(source)))]
    else:
        numbers = np.asarray(source.buckets)
        parts = [(b, np.flatnonzero(numbers == i)) for i, b in enumerate(schema.buckets)]
    kinds = []
    for bucket, records in parts:
        if len(records):
            try:
                size = batch_size(bucket) if callable(batch_size) else batch_size
            except UserError as error:
                raise UserError(f"{name_of(source)}: {error}") from None
            if size < 1:
                raise UserError(f"{name_of(source)}: batch_size {size} is not above 0")
            kinds.append(Kind(source, records, size, bucket))
    return kinds


def _draws(count: int, seed: int, purpose: int, *place: int) -> np.ndarray:  # [count]
    """Numbers in [0, 1) that are a function of the other arguments.

    Of a generator that counts: no state, no order of calls, and the same in every version of numpy.
    """
    counter = [0, *place, *[0] * (3 - len(place))]
    generator = np.random.Philox(key=[seed % 2**64, purpose], counter=counter)
    return np.random.Generator(generator).random(count)


def latent_tokens(bucket: BucketFields) -> int:
    """Of the video and audio of a clip together; a training reads more, or less, in some modes."""
    video = bucket.fields["video"].shape[:3] if "video" in bucket.fields else (0,)
    audio = bucket.fields["audio"].shape[0] if "audio" in bucket.fields else 0
    return math.prod(video) + audio


def by_tokens(
    tokens: int, multiple: int = 1, count: Callable[[BucketFields], int] = latent_tokens
) -> Callable[[BucketFields], int]:
    """Batch sizes with so many tokens in every batch, or as few less as can be.

    Args:
      tokens: of a batch, at most.
      multiple: what batch sizes divide by. Where that does not depend on the mesh, such as a
        multiple of its data axis times the micro-batches, the batches do not either.
      count: tokens of a clip.

    The function that is returned raises UserError where so many tokens make no batch.
    """

    def size(bucket: BucketFields) -> int:
        least = multiple * count(bucket)
        if tokens < least:
            raise UserError(
                f"{multiple} clips of {bucket} have {least:,} tokens, a batch has {tokens:,}"
            )
        return tokens // least * multiple

    return size
