"""Records to batches: the only file that imports Grain.

    order (`data.order`) -> rows of this host -> records -> batch -> threads

The order is what makes training reproducible: the records of a batch are a function of the seed
and the step, so the same batches come out on any number of hosts and for any order of their
devices, and continuing at step N is asking for batch N.

An element is a dict of numpy arrays, the fields of `data.records` stacked over the B rows of this
host; the strings of a record are dropped. All clips of a batch have one size.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from ltx2_jax.data.mixtures import Mixture, Source
from ltx2_jax.data.order import BatchSize, Order
from ltx2_jax.data.records import open_records


def make_dataset(
    source: str | os.PathLike | Source | Mixture,
    *,
    batch_size: BatchSize,
    seed: int,
    num_steps: int | None = None,
    shuffle: bool = True,
    rows: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
    threads: int = 4,
) -> grain.IterDataset:
    """Batches of a dataset, without end or for `num_steps` steps.

    Each epoch is another permutation of the records of a size. Epochs follow one another without a
    gap, so a batch may span two, and a dataset smaller than a batch works. A host gets the B rows
    of every global batch that its devices hold: `hosts.rows_of_host`.

    Its iterators have `get_state()` -> {"next_index": batches taken} and `set_state`; see `seek`.

    Args:
      source: a dataset folder, an object with len and [i] -> record, or a mixture of such objects.
      batch_size: examples per step, over all hosts; or of a size of clips, see `order.by_tokens`.
      seed: of the shuffles, and of the choice among captions.
      num_steps: batches until the iterator ends; None never ends.
      shuffle: False keeps the order of the records of a size, in every epoch.
      rows: which rows of every batch to load, in ascending order; or those of a batch of so many.
        None loads all.
      threads: that read ahead; 0 reads in the caller's thread.

    Raises:
      UserError: `open_records` refuses the folder, it is empty, or a batch has no clips.
    """
    records = open_records(source) if isinstance(source, str | os.PathLike) else source
    order = Order(records, batch_size, seed, shuffle)
    batches = grain.MapDataset.source(_Batches(order, rows, num_steps))
    # Two batches per thread: what waits is whole batches, and Grain's default is 500.
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )


class _Batches:
    """The batches of an order, or some rows of each."""

    def __init__(
        self,
        order: Order,
        rows: Sequence[int] | Callable[[int], Sequence[int]] | None,
        num_steps: int | None,
    ):
        self._order = order
        self._length = sys.maxsize if num_steps is None else num_steps
        rows = range if rows is None else rows
        self._rows = {
            size: _checked(rows(size) if callable(rows) else rows, size)
            for size in {kind.batch_size for kind in order.kinds}
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        kind, indices, draws = self._order.batch(step)
        rows = self._rows[kind.batch_size]
        records = [_arrays(kind.source, int(indices[row]), float(draws[row])) for row in rows]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _checked(rows: Sequence[int], size: int) -> tuple[int, ...]:
    rows = tuple(rows)
    if not rows or sorted(set(rows)) != list(rows) or rows[0] < 0 or rows[-1] >= size:
        raise ValueError(f"rows {rows} are not ascending rows of a batch of {size}")
    return rows


def _arrays(source: Source, index: int, draw: float) -> dict[str, np.ndarray]:
    several = getattr(source, "with_caption", None)
    record: dict[str, Any] = source[index] if several is None else several(index, draw)
    return {name: np.asarray(v) for name, v in record.items() if not isinstance(v, str)}


def seek(iterator: grain.DatasetIterator, step: int) -> None:
    """Moves an iterator of `make_dataset` to batch `step`, as if `step` batches had been taken.

    Needs no saved state: the number of hosts may have changed. The kinds of the batches before are
    counted, some 10 million of them a second.
    """
    if step < 0:
        raise ValueError(f"step {step} must not be negative")
    iterator.set_state({"next_index": step})
