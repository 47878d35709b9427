"""What a dataset holds, whether it is sound, and what one would hold: for `prepare` to print."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ltx2_jax.data.clips import Failure, Item, PrepareConfig, Rates, has_scenes, items_of
from ltx2_jax.data.records import Linked, Records
from ltx2_jax.data.schema import BucketFields
from ltx2_jax.data.table import Row
from ltx2_jax.diffusion.geometry import video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket
from ltx2_jax.media.scenes import watch_all

Dataset = Records | Linked
SHOWN_REASONS = 10
LOOKED_AT = 100  # captions, for their lengths


def describe(records: Dataset) -> Iterator[str]:
    """Lines about a dataset: its sizes, hours, streams, captions, and what was left out."""
    schema = records.schema
    counts = np.bincount(records.buckets, minlength=len(schema.buckets))
    seconds = sum(n * _seconds(b) for n, b in zip(counts, schema.buckets, strict=True))
    yield f"{len(records)} records, {seconds / 3600:.2f} hours"
    yield f"latents of {schema.release!r}, text features of {schema.text_release!r}"
    for count, bucket in zip(counts, schema.buckets, strict=True):
        yield f"  {count} x {_name(bucket)}"
        for name, field in bucket.fields.items():
            if field.shape:
                yield f"    {name:<15} {field}"
    for stream in ("video", "audio"):
        lacking = sum(
            n for n, b in zip(counts, schema.buckets, strict=True) if stream not in b.fields
        )
        if lacking:
            yield f"{lacking} records without {stream}"
    if (trigger := records.settings.get("trigger")) is not None:
        yield f"every caption begins with {trigger!r}"
    lengths = _text_lengths(records)
    if len(lengths):
        low, middle, high = (int(np.percentile(lengths, p)) for p in (0, 50, 100))
        yield f"captions of {low} to {high} tokens, half of them up to {middle}"
    reasons = Counter(clip["reason"] for clip in records.skipped)
    for reason, count in reasons.most_common(SHOWN_REASONS):
        yield f"{count} left out: {reason}"
    if len(reasons) > SHOWN_REASONS:
        yield f"and {sum(reasons.values())} in all, for {len(reasons)} reasons"


def _name(bucket: BucketFields) -> str:
    return str(bucket) + ("" if "audio" in bucket.fields else ", without sound")


def _seconds(bucket: BucketFields) -> float:
    """Of one clip; images last no time."""
    if bucket.num_frames:
        return bucket.num_frames / bucket.fps if bucket.num_frames > 1 else 0.0
    return bucket.fields["audio"].shape[0] / 25


def _text_lengths(records: Dataset) -> np.ndarray:
    """Tokens of some captions; none of a dataset in a bucket, whose records are not here."""
    if "text_mask" not in records.schema.fields or in_bucket(records.folder):
        return np.zeros(0)
    lengths = []
    for index in range(0, len(records), max(1, len(records) // LOOKED_AT)):
        with contextlib.suppress(UserError):  # a damaged record: `verify` names all of them
            lengths.append(records[index]["text_mask"].sum())
    return np.array(lengths)


def verify(records: Dataset) -> Iterator[str]:
    """Reads every record: a line for each that is damaged, of another shape, or not finite."""

    def fault(index: int) -> str | None:
        try:
            record = records[index]
            where = f"record {index} ({record['source']})"
            records.schema.check(record, where, int(records.buckets[index]))
            for name, value in record.items():
                numbers = not isinstance(value, str) and value.dtype.kind not in "biu"
                if numbers and not np.isfinite(value.astype(np.float32)).all():
                    return f"{where}: {name} is not finite"
            return None if record["fps"] > 0 else f"{where}: fps is {record['fps']}"
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(records), 1024):
            part = range(start, min(start + 1024, len(records)))
            yield from filter(None, pool.map(fault, part))


def foresee(
    rows: Sequence[Row], config: PrepareConfig, rates: Rates, channels: int
) -> Iterator[str]:
    """What `prepare_dataset` would make of a table, by what its files say of themselves.

    Where scenes are told apart, films are decoded for it; each of them once.
    """
    paths = dict.fromkeys(row.path for row in rows if config.scenes and has_scenes(row))
    films = dict(zip(paths, watch_all(paths), strict=True))

    def look(index: int) -> list[Item | Failure]:
        row = rows[index]
        try:
            return items_of(index, row, config, films.get(row.path))
        except UserError as error:
            return [Failure(index, str(error).removeprefix(f"{row.path}: "))]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, range(len(rows))))
    clips = [[item for item in row if isinstance(item, Item)] for row in found]
    if config.scenes or config.stride is not None:
        for row, own in zip(rows, clips, strict=True):
            yield f"{row.name}: {len(own)} clip{'s' * (len(own) != 1)}"
    sizes = Counter(item.bucket for own in clips for item in own)
    total = 0
    for bucket in sorted(filter(None, sizes), key=lambda b: -math.prod(b)):
        latents = math.prod(video_latent_shape(*bucket, rates.strides)) * channels
        total += 4 * latents * sizes[bucket]
        yield f"{sizes[bucket]} clips of {bucket}"
    if sizes[None]:
        yield f"{sizes[None]} of sound alone"
    count = sum(sizes.values())
    yield f"{count} clips of {len(rows)} rows; their video latents take {total / 1e9:.3g} GB"
    reasons = Counter(item.reason for row in found for item in row if isinstance(item, Failure))
    for reason, number in reasons.most_common():
        yield f"{number} left out: {reason}"
