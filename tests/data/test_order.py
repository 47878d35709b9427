"""Batches of several sizes and datasets: their shares, their order, and what hosts see of them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ltx2_jax.data.loader import make_dataset, seek
from ltx2_jax.data.mixtures import Mixture
from ltx2_jax.data.order import Order, by_tokens
from ltx2_jax.data.schema import BucketFields, Field
from ltx2_jax.errors import UserError


class Sizes:
    """Records in memory: clips of `lengths[i]` latent frames, those of a length a bucket."""

    def __init__(self, lengths, first=0):
        self.lengths, self.first = lengths, first
        sizes = sorted(set(lengths), reverse=True)
        self.buckets = np.array([sizes.index(length) for length in lengths])
        self.schema = SimpleNamespace(
            **dict.fromkeys(["release", "codec_hash", "text_release", "text_encoder_hash"], ""),
            buckets=[
                BucketFields(8 * n, 32, 32, 24.0, {"video": Field("float32", (n, 4, 5, 1))})
                for n in sizes
            ],
        )

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        video = np.zeros((self.lengths[index], 1))
        return {"id": np.int64(self.first + index), "video": video, "caption": "x"}


MIXED = Sizes([1] * 40 + [2] * 25 + [3] * 7)
SIZE = by_tokens(120, multiple=2)  # 6, 2 and 2 clips


def batches(count, source=MIXED, batch_size=SIZE, seed=0, start=0, **options):
    iterator = iter(make_dataset(source, batch_size=batch_size, seed=seed, threads=0, **options))
    seek(iterator, start)
    return list(itertools.islice(iterator, count))


def test_a_batch_has_clips_of_one_size_as_many_as_its_tokens_allow():
    found = {(len(b["video"]), b["video"].shape[1]) for b in batches(60)}
    assert found == {(6, 1), (2, 2), (2, 3)}
    # A batch of the largest clips is as large as it may be, or cannot be.
    assert [by_tokens(480, 8)(bucket) for bucket in MIXED.schema.buckets] == [8, 8, 24]
    assert by_tokens(60)(MIXED.schema.buckets[0]) == 1
    with pytest.raises(UserError, match="8 clips of 32x32x24 have 480 tokens, a batch has 479"):
        by_tokens(479, 8)(MIXED.schema.buckets[0])


def test_what_batches_hold_is_known_before_the_first():
    kinds = Order(MIXED, SIZE, seed=0, shuffle=True).kinds
    shapes = {(kind.batch_size, *kind.bucket.fields["video"].shape) for kind in kinds}
    assert shapes == {(6, 1, 4, 5, 1), (2, 2, 4, 5, 1), (2, 3, 4, 5, 1)}


def test_another_seed_has_another_order_of_sizes():
    orders = [[batch["video"].shape[1] for batch in batches(30, seed=seed)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_datasets_of_one_size_have_orders_of_their_own():
    order = Order(Mixture([Sizes([1] * 30)] * 2, [1.0, 1.0]), 30, seed=0, shuffle=True)
    firsts = {}
    for step in range(8):
        kind, rows, _ = order.batch(step)
        firsts.setdefault(order.kinds.index(kind), rows.tolist())
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(30))
    assert firsts[0] != firsts[1]


def test_every_record_is_seen_as_often_as_any_other():
    ids = np.concatenate([batch["id"] for batch in batches(600)])
    counts = np.bincount(ids, minlength=72)
    assert counts.min() > 0.9 * counts.mean()
    assert counts.max() < 1.1 * counts.mean()
    # Within a size, exactly: no record comes again before all have come.
    for size in range(3):
        members = np.flatnonzero(MIXED.buckets == size)
        seen = ids[np.isin(ids, members)]
        whole = seen[: len(seen) // len(members) * len(members)].reshape(-1, len(members))
        np.testing.assert_array_equal(np.sort(whole), np.tile(members, (len(whole), 1)))


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 1_000_003])
def test_any_step_is_found_at_once_and_by_every_host(start):
    whole = batches(40, seed=3, start=start)
    for step in (0, 1, 39):
        (again,) = batches(1, seed=3, start=start + step)
        np.testing.assert_array_equal(again["id"], whole[step]["id"])
    hosts = (lambda size: range(size // 2), lambda size: range(size // 2, size))
    parts = [batches(40, seed=3, start=start, rows=rows) for rows in hosts]
    for batch, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch["id"], np.concatenate([s["id"] for s in shares]))


SOURCES = {
    "one": MIXED,
    "two": Mixture([MIXED, Sizes([1, 2, 2], first=100)], [0.3, 0.7]),
    "three": Mixture([MIXED, Sizes([4] * 5, first=100), Sizes([1], first=200)], [0.6, 0.3, 0.1]),
}


@pytest.mark.parametrize("size", [8, by_tokens(640, multiple=8)], ids=["clips", "tokens"])
@pytest.mark.parametrize("source", SOURCES)
def test_one_two_and_four_hosts_take_the_same_batches_and_go_on_with_each_others(source, size):
    """Hosts whose rows lie together, and apart; in mid-epoch another number of them goes on."""
    whole = [batch["id"].tolist() for batch in batches(24, SOURCES[source], size, seed=5)]
    assert len({len(ids) for ids in whole}) > 1 or size == 8

    def parts(hosts, apart, start, count):
        found = []
        for host in range(hosts):

            def rows(size, host=host):
                each = size // hosts
                return range(host, size, hosts) if apart else range(host * each, (host + 1) * each)

            read = batches(count, SOURCES[source], size, seed=5, start=start, rows=rows)
            found.append([batch["id"].tolist() for batch in read])
        order = zip if apart else (lambda *x: x)
        return [list(itertools.chain(*order(*step))) for step in zip(*found, strict=True)]

    for hosts, apart in ((1, False), (2, False), (4, True)):
        assert parts(hosts, apart, 0, 11) == whole[:11]
    for hosts, apart in ((4, False), (2, True), (1, False)):
        assert parts(hosts, apart, 11, 13) == whole[11:]


def test_the_steps_before_a_step_count_for_its_place():
    """The place of a batch in its kind, against counting all steps before it one by one."""
    order = Order(MIXED, SIZE, seed=9, shuffle=False)
    seen = {}
    for step in range(4500):
        kind, rows, _ = order.batch(step)
        key = id(kind)
        before = seen.get(key, 0)
        expected = kind.records[np.arange(before, before + kind.batch_size) % len(kind.records)]
        np.testing.assert_array_equal(rows, expected)
        seen[key] = before + kind.batch_size
    for kind, share in zip(order.kinds, order.shares, strict=True):
        assert abs(seen[id(kind)] / kind.batch_size - 4500 * share) < 5


def test_a_mixture_has_the_shares_it_was_given_whatever_the_sizes_of_its_parts():
    mixture = Mixture([MIXED, Sizes([1, 2], first=1000)], [3.0, 1.0])
    ids = np.concatenate([batch["id"] for batch in batches(1500, mixture)])
    assert (ids >= 1000).mean() == pytest.approx(0.25, abs=0.01)
    first = ids[ids < 1000]
    assert (first < 40).mean() == pytest.approx(40 / 72, abs=0.01)


def test_seeds_give_other_orders_and_stretches_keep_the_shares():
    first, second = ([b["id"].tolist() for b in batches(50, seed=seed)] for seed in (1, 2))
    assert first != second
    order = Order(MIXED, SIZE, seed=1, shuffle=True)
    for start in range(0, 5000, 500):
        kinds = [order.kinds.index(order.batch(step)[0]) for step in range(start, start + 100)]
        share = np.bincount(kinds, minlength=3) / 100
        np.testing.assert_allclose(share, order.shares, atol=0.04)


def test_which_caption_is_taken_is_a_function_of_seed_and_step():
    class Captions(Sizes):
        schema = None

        def with_caption(self, index, draw):
            return {"id": np.int64(index), "draw": np.float64(draw)}

    source = Captions([1] * 10)
    source.schema = None
    drawn = [b["draw"] for b in batches(30, source, batch_size=8)]
    again = [b["draw"] for b in batches(5, source, batch_size=8, start=25)]
    np.testing.assert_array_equal(drawn[25:], again)
    part = [b["draw"] for b in batches(30, source, batch_size=8, rows=[1, 6])]
    np.testing.assert_array_equal(np.array(drawn)[:, [1, 6]], part)
    values = np.concatenate(drawn)
    assert len(np.unique(values)) == 240
    assert np.histogram(values, 4, (0, 1))[0].min() > 40


def test_datasets_of_other_makers_are_not_mixed():
    first, second = Sizes([1, 2]), Sizes([1, 2], first=10)
    for source in (first, second):
        vars(source.schema).update(release="linear", codec_hash="c")
        vars(source.schema).update(text_release="random", text_encoder_hash="t")
    assert len(Order(Mixture([first, second], [1, 1]), 2, seed=0, shuffle=True).kinds) == 4
    for name in ("release", "codec_hash", "text_release", "text_encoder_hash"):
        held = getattr(second.schema, name)
        setattr(second.schema, name, "other")
        with pytest.raises(UserError, match=f"its {name} is 'other', .* they cannot be mixed"):
            Mixture([first, second], [1, 1])
        setattr(second.schema, name, held)
    for source, place in ((first, "a"), (second, "b")):
        vars(source.schema).update(release="2.3", codec_hash=place)
        vars(source.schema).update(text_release="2.3", text_encoder_hash=place)
    Mixture([first, second], [1, 1])  # released ones may lie elsewhere


def test_impossible_mixtures_are_refused():
    with pytest.raises(UserError, match="1 weights for 2 datasets"):
        Mixture([MIXED, MIXED], [1.0])
    with pytest.raises(UserError, match="its weight 0 is not above 0"):
        Mixture([MIXED, MIXED], [1.0, 0])
    with pytest.raises(UserError, match="the dataset has no records"):
        make_dataset(Mixture([MIXED, []], [1, 1]), batch_size=2, seed=0)
    with pytest.raises(UserError, match="batch_size 0 is not above 0"):
        make_dataset(MIXED, batch_size=lambda bucket: 0, seed=0)
    with pytest.raises(ValueError, match="not ascending rows of a batch of 2"):
        make_dataset(MIXED, batch_size=SIZE, seed=0, rows=range(3))
