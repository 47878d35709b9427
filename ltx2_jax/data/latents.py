"""Decoded clips and captions to the fields of records: codec and text encoder at work."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.clips import Failure, Item, PrepareConfig, Rates, Sample, fitting
from ltx2_jax.data.schema import BucketFields, Field
from ltx2_jax.data.table import Row
from ltx2_jax.demo.config import LinearCodecConfig
from ltx2_jax.errors import UserError
from ltx2_jax.text.captions import FeatureEncoder, caption_features

WAITING_BYTES = 2**31  # of clips that wait for others of their size

Record = dict[str, Any]


def rates_of(codec: Codec | LinearCodecConfig) -> Rates:
    """What a codec asks of clips."""
    if isinstance(codec, LinearCodecConfig):
        mel = codec.mel
        per_second = mel.sample_rate / mel.hop / codec.mel_frames_per_latent
        return Rates(mel.sample_rate, per_second, codec.video_strides)
    return Rates(codec.audio.sample_rate, codec.audio.latents_per_second, codec.video.strides)


def encode_samples(
    samples: Iterable[Sample], rows: Sequence[Row], codec: Codec, config: PrepareConfig
) -> Iterator[tuple[Item, Record | Failure]]:
    """Every clip as the fields of its record but for its text, or why it has none.

    Clips of one size are encoded together, and come when their batch is full, in no order. Batches
    are filled up with copies: there is one program for a size, and a clip's numbers do not depend
    on which others it is encoded with.
    """
    waiting: dict[tuple, list[Sample]] = {}
    held = 0
    for sample in samples:
        batch = waiting.setdefault(sample.kind, [])
        batch.append(sample)
        held += sample.nbytes
        full = len(batch) >= _batch_size(sample, config)
        if full or held > WAITING_BYTES:
            chosen = sample.kind if full else max(waiting, key=lambda k: _nbytes(waiting[k]))
            batch = waiting.pop(chosen)
            held -= _nbytes(batch)
            yield from _encode(batch, rows, codec, config)
    for batch in waiting.values():
        yield from _encode(batch, rows, codec, config)


def _nbytes(batch: list[Sample]) -> int:
    return sum(sample.nbytes for sample in batch)


def _batch_size(sample: Sample, config: PrepareConfig) -> int:
    sizes = config.sizes if sample.item.bucket is None else (sample.item.bucket,)
    return fitting(config.batch_size, sizes)


def _encode(
    batch: list[Sample], rows: Sequence[Row], codec: Codec, config: PrepareConfig
) -> Iterator[tuple[Item, Record | Failure]]:
    size = _batch_size(batch[0], config)
    encoded = {}
    for field, (attribute, half) in {
        "video": ("video", codec.video),
        "audio": ("audio", codec.audio),
        "video_reference": ("reference_video", codec.video),
        "audio_reference": ("reference_audio", codec.audio),
    }.items():
        arrays = [getattr(sample, attribute) for sample in batch]
        if arrays[0] is not None:
            # What a codec does in calls of its own needs no more copies than fill the last one.
            once = half.at_once((size, *arrays[0].shape)) if hasattr(half, "at_once") else size
            count = min(size, -(-len(arrays) // once) * once)
            filled = np.stack(arrays + arrays[-1:] * (count - len(arrays)))
            encoded[field] = np.asarray(half.encode(filled))
    for row, sample in enumerate(batch):
        item = sample.item
        record = {"id": np.int64(item.row), "fps": np.float32(sample.fps)}
        record |= {name: values[row] for name, values in encoded.items()}
        if "video_reference" in record:
            slower = sample.fps / config.reference_slowdown
            record["video_reference_fps"] = np.float32(slower)
        for mask in ("video_mask", "audio_mask"):
            if getattr(sample, mask) is not None:
                record[mask] = getattr(sample, mask)
        if all(np.isfinite(record[name]).all() for name in encoded):
            yield item, record | {"source": rows[item.row].name}
        else:
            yield item, Failure(item.row, "its latents are not finite", item.start)


def bucket_of(record: Record, sample_size: tuple[int, int, int]) -> BucketFields:
    """The size that a record has; frames, height and width in pixels."""
    fields = {name: Field.of(value) for name, value in record.items()}
    return BucketFields(*sample_size, fps=float(record["fps"]), fields=fields)


def encode_captions(
    captions: Sequence[str], encoder: FeatureEncoder, batch_size: int
) -> Iterator[Record]:
    """Every caption with its text fields, in order, in batches that are filled up."""
    for first in range(0, len(captions), batch_size):
        batch = list(captions[first : first + batch_size])
        features = caption_features(encoder, batch + batch[-1:] * (batch_size - len(batch)))
        for row, caption in enumerate(batch):
            record = {name: np.asarray(value[row]) for name, value in features.items()}
            if not all(np.isfinite(v.astype(np.float32)).all() for v in record.values()):
                raise UserError(f"the text features of {caption!r:.60} are not finite")
            yield record | {"caption": caption}
