import pytest

from ltx2_jax.data.buckets import (
    Bucket,
    choose_bucket,
    parse_buckets,
    reference_frames,
    smaller_bucket,
)
from ltx2_jax.errors import UserError


def test_buckets_are_written_width_height_frames():
    assert parse_buckets("768x512x121; 512x768x121") == (
        Bucket(121, 512, 768),
        Bucket(121, 768, 512),
    )
    assert parse_buckets("64x32x9,32x32x1") == parse_buckets("64x32x9;32x32x1")
    assert str(Bucket(121, 512, 768)) == "768x512x121"
    assert parse_buckets("24x16x5", (4, 8, 8)) == (Bucket(5, 16, 24),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bucket '': not width x height x frames as 768x512x121"),
        ("768x512", "bucket '768x512': not"),
        ("768x512x49;", "bucket '': not"),
        ("768X512x49", "not width"),
        ("-768x512x49", "not width"),
        ("\u0667\u0666\u0668x512x49", "not width"),
        ("99999999x512x49", "not width"),
        ("64x64x9;100x64x9", "bucket 100x64x9: width=100 is not a multiple of 32: use 96 or 128"),
        ("64x64x8", r"bucket 64x64x8: num_frames=8 is not 8\*k\+1: use 1 or 9"),
        ("64x0x9", "bucket 64x0x9: height=0"),
        ("64x64x9;64x64x9", "bucket 64x64x9 is there twice"),
    ],
)
def test_a_bucket_that_cannot_be_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_buckets(text)


def test_aspect_comes_before_length_and_length_before_size():
    buckets = parse_buckets("64x64x9;128x128x9;128x128x1;128x64x25")
    assert choose_bucket(buckets, 40, 100, 100) == Bucket(9, 128, 128)
    assert choose_bucket(buckets, 40, 100, 200) == Bucket(25, 64, 128)
    assert choose_bucket(buckets, 24, 100, 200) == Bucket(9, 128, 128)
    with pytest.raises(UserError, match="has only 8 frames; the shortest bucket has 9"):
        choose_bucket(buckets[:2], 8, 100, 100)


def test_references_are_smaller_and_slower():
    assert smaller_bucket(Bucket(9, 128, 64), 2) == Bucket(9, 64, 32)
    with pytest.raises(UserError, match="bucket 64x128x9: a reference 4 times smaller has no size"):
        smaller_bucket(Bucket(9, 128, 64), 4)
    assert reference_frames(9, 4) == (0, 1, 5)
    with pytest.raises(UserError, match="the factor must be at least 1"):
        reference_frames(9, 0)
