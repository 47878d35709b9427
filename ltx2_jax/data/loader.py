"""Records to batches: the only file that imports Grain.

    source -> seed -> shuffle -> repeat -> (random ops) -> rows of this host -> batch -> threads

The order is what makes training reproducible: everything up to the rows of a host is a function of
the position in one global sequence of examples, so the same batches come out on any number of
hosts and for any order of their devices, and continuing at step N is asking for batch N.

An element is a dict of numpy arrays, the fields of `data.records` stacked over the B rows of this
host; the strings of a record are dropped.
"""

import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from ltx2_jax.data.records import open_records
from ltx2_jax.errors import UserError


def make_dataset(
    source: str | os.PathLike | Sequence[dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    num_steps: int | None = None,
    shuffle: bool = True,
    rows: Sequence[int] | None = None,
    threads: int = 4,
) -> grain.IterDataset:
    """Batches of a dataset, without end or for `num_steps` steps.

    Each epoch is another permutation of the records. Epochs follow one another without a gap, so a
    batch may span two, and a dataset smaller than a batch works. A host gets the B rows of every
    global batch that its devices hold: `hosts.rows_of_host`.

    Its iterators have `get_state()` -> {"next_index": batches taken} and `set_state`; see `seek`.

    Args:
      source: a dataset folder, or an object with len and [i] -> record.
      batch_size: examples per step, over all hosts.
      seed: of the shuffles.
      num_steps: batches until the iterator ends; None never ends.
      shuffle: False keeps the order of the records, in every epoch.
      rows: which rows of every batch to load, in ascending order; None loads all.
      threads: that read ahead; 0 reads in the caller's thread.

    Raises:
      UserError: `open_records` refuses the folder, it is empty, or the batch does not divide.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not above 0")
    rows = tuple(range(batch_size)) if rows is None else tuple(rows)
    if not rows or sorted(set(rows)) != list(rows) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows {rows} are not ascending rows of a batch of {batch_size}")
    records = open_records(source) if isinstance(source, str | os.PathLike) else source
    if len(records) == 0:
        raise UserError(f"{source}: the dataset has no records")

    examples = grain.MapDataset.source(records).seed(seed)
    if shuffle:
        examples = examples.shuffle()
    examples = examples.repeat().map(_arrays)
    # Random ops on single examples (random_map) belong here: after the rows are chosen they would
    # draw other numbers for other host counts.
    if len(rows) < batch_size:
        examples = grain.MapDataset.source(_Rows(examples, rows, batch_size))
    # An endless sequence has no remainder; without the option Grain overflows at one row each.
    parts = examples.batch(len(rows), drop_remainder=True)
    if num_steps is not None:
        parts = parts[:num_steps]
    # Two batches per thread: what waits is whole batches, and Grain's default is 500.
    return parts.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )


class _Rows:
    """Of a sequence of examples, those in some rows of its batches, in order."""

    def __init__(self, examples: grain.MapDataset, rows: tuple[int, ...], batch_size: int):
        self._examples, self._rows, self._batch_size = examples, rows, batch_size

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, len(self._rows))
        return self._examples[batch * self._batch_size + self._rows[row]]


def seek(iterator: grain.DatasetIterator, step: int) -> None:
    """Moves an iterator of `make_dataset` to batch `step`, as if `step` batches had been taken.

    Costs the same for every step, and needs no saved state: the number of hosts may have changed.
    """
    if step < 0:
        raise ValueError(f"step {step} must not be negative")
    iterator.set_state({"next_index": step})


def _arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(v) for name, v in record.items() if not isinstance(v, str)}
