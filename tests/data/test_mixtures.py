"""Several datasets as one: what is true of all, and what keeps them apart."""

import dataclasses
import json

import numpy as np
import pytest

from ltx2_jax.data.mixtures import Mixture, index_of, merged, open_datasets
from ltx2_jax.data.order import Order, by_tokens, latent_tokens
from ltx2_jax.data.records import EMPTY_CAPTION_NAME, INDEX_NAME, RecordWriter, read_schema
from ltx2_jax.data.schema import BucketFields, Field, Schema
from ltx2_jax.errors import UserError

TEXT = {"video_text": Field("float32", (4, 6)), "text_mask": Field("bool", (4,))}
TEXT |= {"id": Field("int64"), "fps": Field("float32")}


def bucket(frames, sound=3, **text):
    """Clips of some latent frames, of 2 x 3 latents of 5 channels, with or without sound."""
    fields = {"video": Field("float32", (frames, 2, 3, 5))} | TEXT
    fields |= {name: dataclasses.replace(TEXT[name], shape=shape) for name, shape in text.items()}
    if sound:
        fields["audio"] = Field("float32", (sound, 1, 7))
    return BucketFields(8 * frames + 1, 64, 96, 24.0, fields)


def other_channels(stream, count):
    """As `bucket`, of another codec."""
    size, shape = bucket(1), bucket(1).fields[stream].shape
    other = {stream: Field("float32", (*shape[:-1], count))}
    return dataclasses.replace(size, fields={**size.fields, **other})


MADE = {
    "release": "linear", "text": "features", "text_release": "random", "codec": "codec",
    "codec_hash": "c", "text_encoder": "encoder", "text_encoder_hash": "t",
}  # fmt: skip


def write(folder, buckets, counts, **made):
    """A dataset of zeros: so many records of every size."""
    schema = Schema.of_buckets(buckets, **(MADE | made))
    with RecordWriter(folder, settings={"fps": 24}) as writer:
        (writer.staging / EMPTY_CAPTION_NAME).write_bytes(b"")
        writer.start(schema)
        for place, count in enumerate(counts):
            for _ in range(count):
                fields = schema.buckets[place].fields
                record = {name: np.zeros(f.shape, f.dtype) for name, f in fields.items()}
                writer.write(record | {"id": np.int64(writer.num_records)}, place)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two datasets that share a size."""
    folder = tmp_path_factory.mktemp("sets")
    first = write(folder / "first", [bucket(3), bucket(1)], [4, 8])
    second = write(folder / "second", [bucket(4, sound=None), bucket(1)], [2, 1])
    return first, second


def test_a_mixture_has_the_sizes_of_all_and_the_records_one_after_the_other(pair):
    mixed = open_datasets([(pair[0], 0.5), (pair[1], 0.5)])
    frames = [b.fields["video"].shape[0] for b in mixed.schema.buckets]
    assert frames == [4, 3, 1]
    assert len(mixed) == 15
    for index in (0, 11, 12, 14, -1):
        record = mixed[index]
        mixed.schema.check(record, "it", int(mixed.buckets[index]))
    assert [int(mixed[i]["id"]) for i in (11, 12, 13, -1)] == [11, 0, 1, 2]
    np.testing.assert_array_equal(mixed.buckets, [1] * 4 + [2] * 8 + [0] * 2 + [2])
    assert mixed.codec_path.parent == mixed.folder
    assert str(mixed.folder) == pair[0]
    with pytest.raises(IndexError):
        mixed[15]


def test_of_sizes_with_equal_pictures_the_one_with_the_most_sound_comes_first():
    sizes = [bucket(2, sound=None), bucket(2, sound=3), bucket(2, sound=5), bucket(3, sound=None)]
    ordered = sorted(sizes, key=lambda size: size.largest_first)
    assert ordered == [sizes[3], sizes[2], sizes[1], sizes[0]]


def test_a_size_of_several_datasets_has_the_rate_of_the_first():
    schemas = [
        Schema.of_buckets([dataclasses.replace(bucket(1), fps=fps)], **MADE) for fps in (24.0, 30.0)
    ]
    assert merged(schemas) == schemas[0]


def test_the_shares_of_a_mixture_are_those_of_clips_whatever_the_sizes_of_batches(pair):
    """Counted over 4000 steps, against the shares that were asked for."""
    mixed = open_datasets([(pair[0], 0.8), (pair[1], 0.2)])
    order = Order(mixed, by_tokens(210, 2), seed=3, shuffle=True)
    clips = {}
    for step in range(4000):
        kind = order.kind(step)
        assert kind is order.batch(step)[0]
        key = str(kind.source.folder), latent_tokens(kind.bucket)
        clips[key] = clips.get(key, 0) + kind.batch_size
    assert {kind.batch_size for kind in order.kinds} == {8, 10, 22}
    shares = {key: count / sum(clips.values()) for key, count in clips.items()}
    expected = {
        (pair[0], 21): 0.8 / 3, (pair[0], 9): 0.8 * 2 / 3, (pair[1], 24): 0.2 * 2 / 3,
        (pair[1], 9): 0.2 / 3,
    }  # fmt: skip
    assert shares.keys() == expected.keys()
    for key, share in expected.items():
        assert shares[key] == pytest.approx(share, abs=0.003)


def test_one_dataset_is_itself_and_what_a_mixture_is_can_be_written(pair, tmp_path):
    assert not isinstance(open_datasets([(pair[0], 1.0)]), Mixture)
    mixed = open_datasets([(pair[0], 0.5), (pair[1], 0.5)])
    (tmp_path / INDEX_NAME).write_bytes(index_of(mixed))
    assert read_schema(tmp_path) == mixed.schema
    said = json.loads(index_of(mixed))["mixture"]
    assert [(part["folder"], part["num_records"]) for part in said] == [(pair[0], 12), (pair[1], 3)]
    other = open_datasets([(pair[0], 0.4), (pair[1], 0.6)])
    assert index_of(other) != index_of(mixed)


@pytest.mark.parametrize(
    ("made", "sizes", "message"),
    [
        ({"release": "2.3"}, bucket(1), "its release is '2.3', that of .*first is 'linear'"),
        ({"codec_hash": "d"}, bucket(1), "its codec_hash is 'd', that of .*first is 'c'"),
        ({"text_release": "2.0"}, bucket(1), "its text_release is '2.0', that of .* is 'random'"),
        ({"text_encoder_hash": "u"}, bucket(1), "its text_encoder_hash is 'u', that of .* is 't'"),
        ({}, bucket(1, text_mask=(9,)), r"its text_mask is \(9,\), that of .*first is \(4,\)"),
        ({}, bucket(1, video_text=(4, 9)), r"its video_text is \(4, 9\), that of .* is \(4, 6\)"),
        ({}, other_channels("video", 8), r"its channels of video is \(8,\), that of .* \(5,\)"),
        ({}, other_channels("audio", 9), r"its channels of audio is \(1, 9\), that of .* \(1, 7\)"),
    ],
)
def test_datasets_that_no_model_learns_together_are_named(pair, tmp_path, made, sizes, message):
    other = write(tmp_path / "other", [sizes], [1], **made)
    with pytest.raises(UserError, match=f"/other: {message}: they cannot be mixed"):
        open_datasets([(pair[0], 0.5), (other, 0.5)])
