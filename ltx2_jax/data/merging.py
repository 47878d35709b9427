"""The end of a dataset's making: all shards become one folder, and a folder shards again."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ltx2_jax.blobs import content_hash, serialize
from ltx2_jax.data.clips import Failure, PrepareConfig
from ltx2_jax.data.records import EMPTY_CAPTION_NAME, VERSION, Records
from ltx2_jax.data.schema import BucketFields, Schema, fields_from_json
from ltx2_jax.data.shards import TABLE_NAME
from ltx2_jax.data.staging import CAPTIONS, CLIPS, READY, SCENES, Staging
from ltx2_jax.data.work import CODEC_NAME, TEXT_ENCODER_NAME, Work
from ltx2_jax.files import read_bytes
from ltx2_jax.text.captions import tell_cut

CLIPS_NAME = "clips.json"  # {"files": name -> fingerprint, "notes": note -> number of clips}
MADE_NAME = "prepare.json"  # the shards, so that clips that come later can be added


def finish(staging: Staging, work: Work, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes one dataset of all shards."""
    clips = [staging.done(CLIPS, shard) for shard in range(work.shards(CLIPS))]
    captions = [staging.done(CAPTIONS, shard) for shard in range(work.shards(CAPTIONS))]
    failures = [failure for about in clips for failure in about["failures"]]
    if not any(about["records"] for about in clips):
        raise work.none_usable(
            [Failure(f["row"], f["reason"], f["start"], f["passing"]) for f in failures]
        )
    full = sum(about["full"] for about in captions)
    tell_cut([np.ones(work.config.text_length, bool)] * full, "captions", _CUT)
    shards = {CLIPS: _named(staging, "data", CLIPS, clips)}
    shards[CAPTIONS] = _named(staging, "captions", CAPTIONS, captions)
    text = captions[0]["fields"]
    schema = _schema(staging, work.config, clips, text)
    _write_table(staging.folder, work, clips, schema, text)
    staging.keep(TABLE_NAME)
    files = {name: file for about in clips for name, file in about["files"].items()}
    notes = sum((Counter(about["notes"]) for about in clips), Counter())
    staging.write_json(CLIPS_NAME, {"files": files, "notes": notes})
    parts = [{"kind": CLIPS, "about": about} for about in clips]
    parts += [{"kind": CAPTIONS, "about": about} for about in captions]
    scenes = (staging.done(SCENES, shard) for shard in range(work.shards(SCENES)))
    parts += [{"kind": SCENES, "about": about} for about in scenes]
    ready = staging.read_json(READY)
    staging.write_json(MADE_NAME, {"rows": len(work.rows_of(0)), "parts": parts, READY: ready})
    index = {
        "version": VERSION,
        "num_records": sum(len(about["records"]) for about in clips),
        "seconds": sum(about["seconds"] for about in clips),
        "schema": schema.to_json(),
        "shards": shards[CLIPS],
        "captions": shards[CAPTIONS],
        "skipped": [{"source": work.rows[f["row"]].name, "reason": _reason(f)} for f in failures],
        "settings": settings,
        **work.index(clips),
    }
    staging.publish(index, overwrite)


_CUT = "--text-length of prepare, text.length of train"


def _reason(failure: dict[str, Any]) -> str:
    return f"from {failure['start']:g} s: " * bool(failure["start"]) + failure["reason"]


def _named(staging: Staging, name: str, kind: str, abouts: list[dict]) -> list[dict[str, Any]]:
    """Gives the files of shards with records their names in the dataset: {file, records, bytes}."""
    there = [shard for shard, about in enumerate(abouts) if about["count"]]
    for path in staging.folder.glob(f"{name}-*-of-*"):
        path.unlink()  # of a run that was killed here, and may have had other shards
    shards = []
    for number, shard in enumerate(there):
        about = abouts[shard]
        about["file"] = f"{name}-{number:05d}-of-{len(there):05d}.arrayrecord"
        staging.name_shard(kind, shard, about["file"])
        shards.append({"file": about["file"], "records": about["count"], "bytes": about["bytes"]})
    return shards


def _schema(staging: Staging, config: PrepareConfig, clips: list[dict], text: dict) -> Schema:
    """All sizes, largest first; `text` are the fields of a caption."""
    found = {}
    for values in (bucket for about in clips for bucket in about["buckets"]):
        bucket = BucketFields.from_json(values)
        found.setdefault(bucket.key, bucket)
    buckets = [
        dataclasses.replace(bucket, fields=bucket.fields | fields_from_json(text))
        for bucket in sorted(found.values(), key=lambda bucket: bucket.largest_first)
    ]
    return Schema.of_buckets(
        buckets,
        release=config.release,
        text="features",
        text_release=config.text_release,
        codec=CODEC_NAME,
        codec_hash=content_hash(staging.file(CODEC_NAME)),
        text_encoder=TEXT_ENCODER_NAME,
        text_encoder_hash=content_hash(staging.file(TEXT_ENCODER_NAME)),
    )


def _write_table(folder: Path, work: Work, clips: list[dict], schema: Schema, text: dict) -> None:
    """Which size and which captions every record has."""
    order = {}
    for place, bucket in enumerate(schema.buckets):
        own = {name: field for name, field in bucket.fields.items() if name not in text}
        order[dataclasses.replace(bucket, fields=own).key] = place
    number = {caption: i for i, caption in enumerate(work.captions)}
    buckets, starts, ids, weights = [], [0], [], []
    for about in clips:
        places = [order[BucketFields.from_json(values).key] for values in about["buckets"]]
        for row, bucket in about["records"]:
            buckets.append(places[bucket])
            captions = work.rows[row].captions
            ids += [number[caption] for caption, _ in captions]
            weights += [weight for _, weight in captions]
            starts.append(len(ids))
    table = {
        "bucket": np.array(buckets, np.int32),
        "caption_start": np.array(starts, np.int64),
        "caption": np.array(ids, np.int32),
        "weight": np.array(weights, np.float32),
    }
    (folder / TABLE_NAME).write_bytes(serialize(table))


def adopt(staging: Staging, made: Records) -> None:
    """Takes what a finished dataset holds, to add to it."""
    about = made_of(made)
    if about is None:
        return
    numbers: Counter[str] = Counter()
    taken = []
    for part in about["parts"]:
        kind, held = part["kind"], part["about"]
        taken.append((kind, numbers[kind], held.get("file"), held))
        numbers[kind] += 1
    staging.adopt(taken, (CODEC_NAME, TEXT_ENCODER_NAME, EMPTY_CAPTION_NAME))
    staging.write_json(READY, about[READY])


def made_of(records: Records) -> dict[str, Any] | None:
    """The shards of a dataset; None if another version made it, which cannot be added to."""
    try:
        values = json.loads(read_bytes(records.folder / MADE_NAME).decode())
        return values if {"rows", "parts", READY} <= values.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
