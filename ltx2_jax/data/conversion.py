"""Datasets of the official trainer to ours, and ours to its."""

import contextlib
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ltx2_jax.blobs import content_hash
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.precomputed import Precomputed, PrecomputedWriter, sample_name
from ltx2_jax.data.records import INDEX_NAME, Linked, Records, RecordWriter, open_records
from ltx2_jax.data.schema import Schema
from ltx2_jax.data.work import CODEC_NAME, TEXT_ENCODER_NAME, write_empty_caption
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.ltx2 import TEXT_FIELDS
from ltx2_jax.text.captions import FeatureEncoder


def from_precomputed(
    folder: str | os.PathLike,
    out: str | os.PathLike | None,
    *,
    codec: Codec,
    text_encoder: FeatureEncoder,
    sources: Sequence[str] | None = None,
    incomplete: bool = False,
    overwrite: bool = False,
) -> Records | Linked:
    """Makes a dataset of what the official scripts prepared, in its place or as a copy.

    Latents and features are taken as they are. The official format does not say what made them:
    `codec` and `text_encoder` do, and are what sampling decodes and prompts with.

    Args:
      folder: a `.precomputed`, or the folder that holds it.
      out: the folder to make, all or nothing; None copies nothing: what made the files is written
        beside them, and they are the records.
      codec, text_encoder: those of the release that made it.
      sources, incomplete: see `Precomputed`.
      overwrite: replace a dataset that is there.

    Raises:
      UserError: what `Precomputed` raises; latents or features that are not of these makers' sizes.
    """
    samples = Precomputed(
        folder,
        sources,
        incomplete=incomplete,
        release=codec.release,
        text_release=text_encoder.release,
        strides=codec.video.strides,
    )
    settings = {"precomputed": str(samples.precomputed), "sources": list(samples.sources)}
    settings |= {"incomplete": incomplete}
    with contextlib.ExitStack() as stack:
        if out is None:
            target = stack.enter_context(_beside(samples.precomputed))
        else:
            target = out
        writer = stack.enter_context(RecordWriter(target, settings=settings, overwrite=overwrite))
        codec.save(writer.staging / CODEC_NAME)
        text_encoder.save(writer.staging / TEXT_ENCODER_NAME)
        empty = write_empty_caption(writer.staging, text_encoder)
        _check_makers(samples, codec, {name: value.shape for name, value in empty.items()})
        writer.start(_made_by(samples.schema, writer.staging))
        if out is None:
            writer.link(samples)
        else:
            for index in tqdm(range(len(samples)), desc="converting", unit="clip", disable=None):
                writer.write(samples[index], int(samples.buckets[index]))
        for clip in samples.skipped:
            writer.skip(clip["source"], clip["reason"])
    return open_records(samples.precomputed if out is None else out)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder, for the block to make; its files go into `folder` then, the index last."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as temporary:
            yield Path(temporary) / "made"
            files = list((Path(temporary) / "made").iterdir())
            for path in sorted(files, key=lambda path: path.name == INDEX_NAME):
                path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({reason(error)})") from None


def _made_by(schema: Schema, staging: Path) -> Schema:
    return dataclasses.replace(
        schema,
        codec=CODEC_NAME,
        codec_hash=content_hash(staging / CODEC_NAME),
        text_encoder=TEXT_ENCODER_NAME,
        text_encoder_hash=content_hash(staging / TEXT_ENCODER_NAME),
    )


def _check_makers(samples: Precomputed, codec: Codec, text: dict[str, tuple[int, ...]]) -> None:
    """UserError for what this codec and text encoder could not have made."""
    for bucket in samples.schema.buckets:
        found = {name: field.shape for name, field in bucket.fields.items()}
        wanted: dict[str, tuple[int, ...] | None] = {}
        if "video" in found:
            wanted["video"] = (*found["video"][:3], codec.video.channels)
        if "audio" in found:
            wanted["audio"] = (found["audio"][0], codec.audio.bins, codec.audio.channels)
        if "video_text" in found:
            wanted |= {name: text.get(name) for name in TEXT_FIELDS}
        for name, shape in wanted.items():
            if found.get(name) != shape:
                flag = "--text-encoder" if name in TEXT_FIELDS else "--codec"
                raise UserError(
                    f"{samples.precomputed}: {name} is {_shape(found.get(name))}, but {flag} makes "
                    f"{_shape(shape)}: give the release that made these files"
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def to_precomputed(records: Records, out: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes a dataset as the official trainer reads it: `out/.precomputed`, or `out` if so named.

    Every file appears whole or not at all. Clips of one name are numbered.

    Raises:
      UserError: the latents are those of a linear codec; the folder holds files and `overwrite` is
        not set; the disk does not take it.
    """
    if records.schema.release == LinearCodec.release:
        raise UserError(
            f"{records.folder}: its latents are those of a linear codec, which the official "
            "trainer does not know; prepare it with a released one (--codec)"
        )
    writer = PrecomputedWriter(out)
    if not overwrite and writer.folder.is_dir() and any(writer.folder.iterdir()):
        raise UserError(f"{writer.folder}: holds files; choose another folder or --overwrite")
    seen: Counter[Path] = Counter()
    for record in tqdm(records, desc="converting", unit="clip", disable=None):
        name = sample_name(record["source"])
        number, seen[name] = seen[name], seen[name] + 1
        writer.write(record, name.with_stem(f"{name.stem}_{number}") if number else name)
    return writer.folder
