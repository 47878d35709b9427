import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from ltx2_jax.data.loader import make_dataset, seek
from ltx2_jax.data.records import RecordWriter
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError


class Source:
    """`size` records in memory."""

    def __init__(self, size):
        self.size = size
        self.threads = set()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.threads.add(threading.current_thread())
        return {
            "id": np.int64(index),
            "video": np.full((3, 2, 2, 4), index, np.float32),
            "caption": f"clip {index}",
        }


def ids(dataset, count):
    return np.stack([batch["id"] for batch in itertools.islice(dataset, count)])


def test_elements_are_arrays_with_the_batch_first():
    batch = next(iter(make_dataset(Source(7), batch_size=4, seed=0)))
    assert sorted(batch) == ["id", "video"]
    assert {name: (v.shape, v.dtype.name) for name, v in batch.items()} == {
        "id": ((4,), "int64"),
        "video": ((4, 3, 2, 2, 4), "float32"),
    }
    np.testing.assert_array_equal(batch["video"][:, 0, 0, 0, 0], batch["id"])
    batch["video"][:] = 0  # writable: it is a copy


@pytest.mark.parametrize(
    "hosts",
    [
        [range(8)],
        [range(4), range(4, 8)],
        [(0, 2, 4, 6), (1, 3, 5, 7)],
        [(0, 5), (1, 4), (2,), (3, 6, 7)],
    ],
)
def test_the_global_batches_do_not_depend_on_the_hosts(hosts):
    whole = ids(make_dataset(Source(10), batch_size=8, seed=5), 20)
    for rows in hosts:
        part = ids(make_dataset(Source(10), batch_size=8, seed=5, rows=rows), 20)
        np.testing.assert_array_equal(part, whole[:, list(rows)])


def test_every_epoch_is_another_permutation():
    flat = ids(make_dataset(Source(10), batch_size=4, seed=1), 25).ravel()
    epochs = flat.reshape(10, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (10, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_the_seed_decides_the_order():
    first, same, other = (
        ids(make_dataset(Source(50), batch_size=5, seed=seed), 10) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_without_shuffle_the_records_keep_their_order():
    flat = ids(make_dataset(Source(10), batch_size=4, seed=1, shuffle=False), 5).ravel()
    np.testing.assert_array_equal(flat, np.tile(np.arange(10), 2))


def test_a_dataset_smaller_than_a_batch_fills_it_over_epochs():
    batches = ids(make_dataset(Source(3), batch_size=8, seed=0), 3)
    np.testing.assert_array_equal(np.bincount(batches.ravel()), [8, 8, 8])


def test_the_iterator_ends_after_num_steps():
    for rows in (None, [1]):
        dataset = make_dataset(Source(3), batch_size=2, seed=0, num_steps=7, rows=rows)
        assert len(list(dataset)) == 7


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_resuming_by_step_is_exact(threads):
    def iterator():
        return iter(make_dataset(Source(10), batch_size=4, seed=3, num_steps=12, threads=threads))

    whole = [batch["id"] for batch in iterator()]
    for step in (0, 1, 5, 11):
        resumed = iterator()
        seek(resumed, step)
        np.testing.assert_array_equal([batch["id"] for batch in resumed], whole[step:])
    # Backwards, in the middle of reading ahead.
    moved = iterator()
    next(moved), next(moved), next(moved)
    seek(moved, 1)
    np.testing.assert_array_equal([batch["id"] for batch in moved], whole[1:])


def test_state_is_the_number_of_batches_taken_on_any_number_of_hosts():
    for rows in (None, [0, 2]):
        iterator = iter(make_dataset(Source(10), batch_size=4, seed=3, rows=rows))
        for step in range(4):
            assert iterator.get_state() == {"next_index": step}
            next(iterator)
        seek(iterator, 9)
        assert iterator.get_state() == {"next_index": 9}


def test_threads_read_ahead_and_none_reads_in_place():
    source = Source(10)
    ids(make_dataset(source, batch_size=4, seed=3, threads=0), 3)
    assert source.threads == {threading.current_thread()}
    source.threads.clear()
    ids(make_dataset(source, batch_size=4, seed=3, threads=2), 3)
    assert threading.current_thread() not in source.threads


def test_an_error_while_reading_reaches_the_caller():
    class Broken(Source):
        def __getitem__(self, index):
            raise UserError("data-00000: damaged shard")

    with pytest.raises(UserError, match="damaged shard"):
        next(iter(make_dataset(Broken(3), batch_size=1, seed=0)))


def test_impossible_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="no records"):
        make_dataset(Source(0), batch_size=1, seed=0)
    with pytest.raises(UserError, match="no dataset here"):
        make_dataset(tmp_path, batch_size=1, seed=0)
    with pytest.raises(UserError, match="batch_size 0"):
        make_dataset(Source(10), batch_size=0, seed=0)
    for rows in ([], [1, 0], [0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="not ascending rows of a batch of 2"):
            make_dataset(Source(9), batch_size=2, seed=0, rows=rows)
    with pytest.raises(ValueError, match="step -1"):
        seek(iter(make_dataset(Source(9), batch_size=2, seed=0)), -1)


def test_a_folder_is_read_without_noise_on_the_terminal(tmp_path):
    record = Source(1)[0]
    schema = Schema(
        **dict.fromkeys(["release", "text", "text_release", "codec", "codec_hash"], ""),
        **dict.fromkeys(["text_encoder", "text_encoder_hash"], ""),
        **dict.fromkeys(["num_frames", "height", "width", "fps"], 1),
        fields={name: Field.of(value) for name, value in record.items()},
    )
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(schema)
        for i in range(6):
            writer.write(Source(6)[i])
    # In another process, for what is said at import and at exit.
    program = (
        "import sys; from ltx2_jax.data.loader import make_dataset;"
        "batches = iter(make_dataset(sys.argv[1], batch_size=3, seed=0));"
        "print(sorted([*next(batches)['id'], *next(batches)['id']]) == list(range(6)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "set")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")
