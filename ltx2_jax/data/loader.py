"""Records to batches: the only file that imports Grain.

    source -> seed -> shuffle -> repeat -> (random ops) -> batch -> host slice -> threads

The order is what makes training reproducible: everything up to the host slice is a function of
the position in one global sequence of examples, so the same batches come out on any number of
hosts, and continuing at step N is asking for batch N.

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
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> grain.IterDataset:
    """Batches of a dataset, without end or for `num_steps` steps.

    Each epoch is another permutation of the records. Epochs follow one another without a gap, so a
    batch may span two, and a dataset smaller than a batch works. A host gets B = batch_size /
    process_count rows; those of all hosts, in order of `process_index`, are the global batch.

    Its iterators have `get_state()` -> {"next_index": batches taken} and `set_state`; see `seek`.

    Args:
      source: a dataset folder, or an object with len and [i] -> record.
      batch_size: examples per step, over all processes.
      seed: of the shuffles.
      num_steps: batches until the iterator ends; None never ends.
      shuffle: False keeps the order of the records, in every epoch.
      process_index: which part of every batch to load; not the process's rank where several
        processes load the same part.
      process_count: number of parts.
      threads: that read ahead; 0 reads in the caller's thread.

    Raises:
      UserError: `open_records` refuses the folder, it is empty, or the batch does not divide.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} is not a positive multiple of the {process_count} processes "
            "that load it"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    records = open_records(source) if isinstance(source, str | os.PathLike) else source
    if len(records) == 0:
        raise UserError(f"{source}: the dataset has no records")

    examples = grain.MapDataset.source(records).seed(seed)
    if shuffle:
        examples = examples.shuffle()
    examples = examples.repeat().map(_arrays)
    # Random ops on single examples (random_map) belong here: after the host slice they would draw
    # other numbers for other host counts.

    # An endless sequence has no remainder; without the option Grain overflows at one row each.
    parts = examples.batch(batch_size // process_count, drop_remainder=True)
    # Part p of global batch k is part k * process_count + p. Slicing parts and not examples keeps
    # the rows of the global batch in the same order on any number of hosts.
    parts = parts[process_index::process_count]
    if num_steps is not None:
        parts = parts[:num_steps]
    # Two batches per thread: what waits is whole batches, and Grain's default is 500.
    return parts.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )


def seek(iterator: grain.DatasetIterator, step: int) -> None:
    """Moves an iterator of `make_dataset` to batch `step`, as if `step` batches had been taken.

    Costs the same for every step, and needs no saved state: the number of hosts may have changed.
    """
    if step < 0:
        raise ValueError(f"step {step} must not be negative")
    iterator.set_state({"next_index": step})


def _arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(v) for name, v in record.items() if not isinstance(v, str)}
