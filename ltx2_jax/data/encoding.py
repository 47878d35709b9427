"""Films and captions to a dataset: table -> codec, text encoder -> records, in one folder.

The work is cut into shards of rows and of captions (`data.staging`), which may be done by several
processes and in several runs; the folder appears when all are done.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ltx2_jax.blobs import content_hash, serialize
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.clips import ClipReader, Failure, PrepareConfig, Rates
from ltx2_jax.data.latents import bucket_of, encode_captions, encode_samples
from ltx2_jax.data.records import EMPTY_CAPTION_NAME, INDEX_NAME, VERSION, Records
from ltx2_jax.data.schema import BucketFields, Field, Schema
from ltx2_jax.data.shards import TABLE_NAME
from ltx2_jax.data.staging import CAPTIONS, CLIPS, READY, Staging
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.demo.random_encoder import RandomEncoder
from ltx2_jax.diffusion.geometry import video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import Clip, check_even
from ltx2_jax.text.captions import FeatureEncoder, caption_features, load_caption_encoder, tell_cut

CODEC_NAME = "codec.safetensors"
TEXT_ENCODER_NAME = "text_encoder.safetensors"
CLIPS_NAME = "clips.json"  # {"files": name -> fingerprint, "notes": note -> number of clips}
MADE_NAME = "prepare.json"  # the shards, so that clips that come later can be added
SHARD_ROWS = 64
SHARD_CAPTIONS = 256


class OtherDataset(UserError):
    """The folder holds a dataset that was made with other settings."""


def prepare_dataset(
    table: str | os.PathLike,
    out: str | os.PathLike,
    config: PrepareConfig,
    *,
    codec: Codec | LinearCodecConfig | None = None,
    text_encoder: FeatureEncoder | RandomEncoderConfig | None = None,
    overwrite: bool = False,
    process: int = 0,
    processes: int = 1,
) -> Records | None:
    """Makes a dataset of the clips and captions in `table`, in one folder, all or nothing.

    What was done when it is interrupted is kept beside the folder, and the same call goes on with
    it. A dataset that is there already and was made with the same settings is returned as it is,
    but for clips that could not be used then and may be now: those that are there by now, or have
    changed, are added. The settings include the table's rows; clips that were used must not have
    changed under their names since, and those that are gone do not matter.

    Args:
      table: see `read_table`.
      out: the folder to make.
      config: sizes of the clips, text and batch.
      codec: any codec of `ltx2_jax.codecs`, or a `LinearCodecConfig` to fit a linear one on these
        clips; None fits one with the defaults. The dataset takes its release from it.
      text_encoder: of a release or of another dataset, or a `RandomEncoderConfig` to make one for
        these captions; None makes one with the defaults.
      overwrite: replace a dataset made with other settings.
      process, processes: which of how many are at work on it; all are called alike, on one disk.

    Returns:
      The dataset; None for processes other than the first, when their part is done.

    Raises:
      UserError: what `read_table` raises; a size that the codec's strides do not fit; no usable
        clip; `out` holds something else, or another call is at work on it. `OtherDataset` if that
        is one made with other settings or of other clips.
    """
    codec = LinearCodecConfig() if codec is None else codec
    text_encoder = RandomEncoderConfig() if text_encoder is None else text_encoder
    config = _resolved(config, codec, text_encoder)
    rows = read_table(table)
    settings = _settings(rows, config, codec, text_encoder)
    made = None
    if (Path(out) / INDEX_NAME).exists() and not overwrite:
        made = Records(out)
        _check_settings(made, settings)
        if not _check_clips(made, rows):
            if process == 0:
                print(f"{out}: {len(made)} records are there already, made with the same settings")
            return made
    work = _Work(rows, config, codec, text_encoder, process, processes)
    with Staging(out, settings, process=process, overwrite=overwrite) as staging:
        try:
            if process == 0 and made is not None and staging.read_json(READY) is None:
                _adopt(staging, made)
            work.make(staging)
            if process > 0:
                return None
            work.wait_for_all(staging)
            _finish(staging, work, settings, overwrite or made is not None)
        except UserError:
            if process == 0 and made is None and not _has_records(staging, work):
                staging.remove()
            raise
    return Records(out)


class _Work:
    """What is to be done, and the makers that do it."""

    def __init__(
        self,
        rows: Sequence[Row],
        config: PrepareConfig,
        codec: Codec | LinearCodecConfig,
        text_encoder: FeatureEncoder | RandomEncoderConfig,
        process: int,
        processes: int,
    ):
        self.rows, self.config = rows, config
        self.captions = list(dict.fromkeys(text for row in rows for text, _ in row.captions))
        self._codec, self._encoder = codec, text_encoder
        self._process, self._processes = process, processes
        self._waited = 0.0  # seconds, for decoded clips
        fits = isinstance(codec, LinearCodecConfig)
        self.rates = rates_of(codec)
        self.reader = ClipReader(rows, config, self.rates, cache_bytes=2**31 if fits else 0)

    def shards(self, kind: str) -> int:
        """Number of shards of rows or of captions."""
        of, size = (self.rows, SHARD_ROWS) if kind == CLIPS else (self.captions, SHARD_CAPTIONS)
        return -(-len(of) // size)

    def make(self, staging: Staging) -> None:
        """Does this process's part of what is not done."""
        if self._process == 0:
            self._make_makers(staging)
        staging.wait(lambda: staging.read_json(READY) is not None, "makes codec and text encoder")
        self.reader.audio_samples = staging.read_json(READY)["audio_samples"]
        self._make_captions(staging)
        self._make_clips(staging)

    def wait_for_all(self, staging: Staging) -> None:
        """Until the other processes have done theirs."""
        for kind in (CAPTIONS, CLIPS):
            for shard in range(self.shards(kind)):
                staging.wait(lambda k=kind, s=shard: staging.done(k, s) is not None, "finishes")

    def _mine(self, staging: Staging, kind: str) -> list[int]:
        shards = range(self._process, self.shards(kind), self._processes)
        return [shard for shard in shards if staging.done(kind, shard) is None]

    # ---- codec and text encoder

    def _make_makers(self, staging: Staging) -> None:
        if staging.read_json(READY) is None:
            path = staging.folder / TEXT_ENCODER_NAME
            if isinstance(self._encoder, RandomEncoderConfig):
                length = self.config.text_length
                self._encoder = RandomEncoder.make(path, self._encoder, self.captions, length)
            else:
                self._encoder.save(path)
            write_empty_caption(staging.folder, self._encoder)
            if isinstance(self._codec, LinearCodecConfig):
                self._codec = LinearCodec.fit(self._codec, self._clips_to_fit())
            self._codec.save(staging.folder / CODEC_NAME)
            samples = self._first_length() if self.reader.one_length else None
            staging.write_json(READY, {"audio_samples": samples})
        for shard in range(self.shards(CLIPS)):
            about = staging.done(CLIPS, shard)
            if about is not None and may_succeed_now(about["failures"], self.rows):
                staging.undo(CLIPS, shard)

    def _clips_to_fit(self) -> Iterator[Clip]:
        count = 0
        for sample in tqdm(self.reader, "fitting the codec", unit="clip", disable=None):
            if sample.video is not None:
                count += 1
                yield Clip(sample.video, sample.fps, sample.audio, self.rates.sample_rate)
        if not count:
            raise self.none_usable(list(self.reader.failures.values()))

    def _first_length(self) -> int | None:
        """Samples of sound of the first usable clip."""
        for row in range(len(self.rows)):
            if self.reader.audio_samples is None:
                next(self.reader.read([row]), None)
        return self.reader.audio_samples

    def none_usable(self, failures: Sequence[Failure]) -> UserError:
        """What to say when there is no record."""
        first = min(failures, key=lambda failure: failure.row)
        return UserError(
            f"none of the {len(self.rows)} clips can be used; the first: "
            f"{self.rows[first.row].name}: {first.reason}"
        )

    # ---- shards

    def _make_captions(self, staging: Staging) -> None:
        shards = self._mine(staging, CAPTIONS)
        if not shards:
            return
        if isinstance(self._encoder, RandomEncoderConfig):
            self._encoder = load_caption_encoder(staging.folder / TEXT_ENCODER_NAME)
        with tqdm(
            desc="encoding captions", total=len(shards) * SHARD_CAPTIONS, disable=None
        ) as bar:
            for shard in shards:
                part = self.captions[shard * SHARD_CAPTIONS : (shard + 1) * SHARD_CAPTIONS]
                records = list(encode_captions(part, self._encoder, self.config.batch_size))
                full = sum(bool(record["text_mask"].all()) for record in records)
                about = {
                    "full": full,
                    "fields": {k: dataclasses.asdict(Field.of(v)) for k, v in records[0].items()},
                }
                staging.finish(CAPTIONS, shard, map(serialize, records), about)
                bar.update(SHARD_CAPTIONS)

    def _make_clips(self, staging: Staging) -> None:
        shards = self._mine(staging, CLIPS)
        if not shards:
            return
        if isinstance(self._codec, LinearCodecConfig):
            self._codec = load_codec(staging.folder / CODEC_NAME)
        total = sum(len(self._rows_of(shard)) for shard in shards)
        began = time.perf_counter()
        with tqdm(desc="encoding clips", total=total, unit="row", disable=None) as bar:
            for shard in shards:
                rows = self._rows_of(shard)
                self._make_shard(staging, shard, rows)
                bar.update(len(rows))
                seconds = time.perf_counter() - began
                bar.set_postfix_str(f"{self._waited / seconds:.0%} of the time waits for decoding")

    def _rows_of(self, shard: int) -> range:
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(self.rows)))

    def _make_shard(self, staging: Staging, shard: int, rows: range) -> None:
        # Before they are read, so that a change while they are is seen next time.
        prints = fingerprints(self.rows[row].path for row in rows)
        notes: dict[tuple[int, int], tuple[str, ...]] = {}

        def noted() -> Iterator:
            began = time.perf_counter()
            for sample in self.reader.read(rows):
                notes[sample.item.row, sample.item.window] = sample.notes
                self._waited += time.perf_counter() - began
                yield sample
                began = time.perf_counter()

        made, failures = {}, {}
        for item, record in encode_samples(noted(), self.rows, self._codec, self.config):
            place = item.row, item.window
            if isinstance(record, Failure):
                failures[place] = record
            else:
                made[place] = bucket_of(record, item.bucket or (0, 0, 0)), serialize(record)
        failures |= {k: f for k, f in self.reader.failures.items() if f.row in rows}
        buckets = list(dict.fromkeys(map(_key, (bucket for bucket, _ in made.values()))))
        places = sorted(made)
        firsts = {_key(made[place][0]): made[place][0] for place in reversed(places)}
        about = {
            "records": [[row, buckets.index(_key(made[row, n][0]))] for row, n in places],
            "buckets": [firsts[key].to_json() for key in buckets],
            "seconds": sum(_seconds(made[place][0], self.rates) for place in places),
            "failures": [
                dataclasses.asdict(failures[place])
                | {"file": prints[failures[place].row - rows[0]]}
                for place in sorted(failures)
            ],
            "files": {
                self.rows[row].name: print_ for row, print_ in zip(rows, prints, strict=True)
            },
            "notes": Counter(note for place in places for note in notes[place]),
        }
        staging.finish(CLIPS, shard, (made[place][1] for place in places), about)


def _key(bucket: BucketFields) -> tuple:
    """Equal for buckets of equal records."""
    size = bucket.num_frames, bucket.height, bucket.width
    return *size, tuple(sorted((k, f.dtype, f.shape) for k, f in bucket.fields.items()))


def _seconds(bucket: BucketFields, rates: Rates) -> float:
    if bucket.num_frames:
        return bucket.num_frames / bucket.fps if bucket.num_frames > 1 else 0.0
    return bucket.fields["audio"].shape[0] / rates.latents_per_second


def may_succeed_now(failures: Sequence[dict[str, Any]], rows: Sequence[Row]) -> bool:
    """Whether a clip that failed is worth another try: the disk was at fault, or it has changed."""
    if any(failure["passing"] for failure in failures):
        return True
    now = fingerprints(rows[failure["row"]].path for failure in failures)
    return any(
        file is not None and file != failure["file"]
        for file, failure in zip(now, failures, strict=True)
    )


# ---- the end -------------------------------------------------------------------------------------


def _has_records(staging: Staging, work: _Work) -> bool:
    abouts = [staging.done(CLIPS, shard) for shard in range(work.shards(CLIPS))]
    return any(about and about["count"] for about in abouts)


def _finish(staging: Staging, work: _Work, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes one dataset of all shards."""
    clips = [staging.done(CLIPS, shard) for shard in range(work.shards(CLIPS))]
    captions = [staging.done(CAPTIONS, shard) for shard in range(work.shards(CAPTIONS))]
    failures = [failure for about in clips for failure in about["failures"]]
    if not any(about["count"] for about in clips):
        raise work.none_usable(
            [Failure(f["row"], f["reason"], f["start"], f["passing"]) for f in failures]
        )
    full = sum(about["full"] for about in captions)
    tell_cut([np.ones(work.config.text_length, bool)] * full, "captions", _CUT)
    shards = {CLIPS: _named(staging, "data", CLIPS, clips)}
    shards[CAPTIONS] = _named(staging, "captions", CAPTIONS, captions)
    schema = _schema(staging.folder, work.config, clips, captions[0]["fields"])
    _write_table(staging.folder, work, clips, schema)
    files = {name: file for about in clips for name, file in about["files"].items()}
    notes = sum((Counter(about["notes"]) for about in clips), Counter())
    staging.write_json(CLIPS_NAME, {"files": files, "notes": notes})
    parts = [{"kind": CLIPS, "about": about} for about in clips]
    parts += [{"kind": CAPTIONS, "about": about} for about in captions]
    staging.write_json(MADE_NAME, {"rows": SHARD_ROWS, "parts": parts})
    index = {
        "version": VERSION,
        "num_records": sum(about["count"] for about in clips),
        "seconds": sum(about["seconds"] for about in clips),
        "schema": schema.to_json(),
        "shards": shards[CLIPS],
        "captions": shards[CAPTIONS],
        "skipped": [{"source": work.rows[f["row"]].name, "reason": _reason(f)} for f in failures],
        "settings": settings,
    }
    staging.publish(index, overwrite)


_CUT = "--text-length of prepare, text.length of train"


def _reason(failure: dict[str, Any]) -> str:
    return f"from {failure['start']:g} s: " * bool(failure["start"]) + failure["reason"]


def _named(staging: Staging, name: str, kind: str, abouts: list[dict]) -> list[dict[str, Any]]:
    """Gives the files of shards with records their names in the dataset: {file, records, bytes}."""
    there = [shard for shard, about in enumerate(abouts) if about["count"]]
    shards = []
    for number, shard in enumerate(there):
        about = abouts[shard]
        about["file"] = f"{name}-{number:05d}-of-{len(there):05d}.arrayrecord"
        # Under both names, until the folder is published: a crash here costs nothing.
        target = staging.folder / about["file"]
        target.unlink(missing_ok=True)
        os.link(staging.path(kind, shard), target)
        shards.append({"file": about["file"], "records": about["count"], "bytes": about["bytes"]})
    return shards


def _schema(folder: Path, config: PrepareConfig, clips: list[dict], text: dict) -> Schema:
    """All sizes, largest first; `text` are the fields of a caption."""
    found: dict[tuple, BucketFields] = {}
    for values in (bucket for about in clips for bucket in about["buckets"]):
        fields = {k: Field(v["dtype"], tuple(v["shape"])) for k, v in values["fields"].items()}
        bucket = BucketFields(**{**values, "fields": fields})
        found.setdefault(_key(bucket), bucket)
    captions = {k: Field(v["dtype"], tuple(v["shape"])) for k, v in text.items()}
    buckets = [
        dataclasses.replace(bucket, fields=bucket.fields | captions)
        for _, bucket in sorted(found.items(), key=lambda entry: _largest_first(entry[1]))
    ]
    return Schema.of_buckets(
        buckets,
        release=config.release,
        text="features",
        text_release=config.text_release,
        codec=CODEC_NAME,
        codec_hash=content_hash(folder / CODEC_NAME),
        text_encoder=TEXT_ENCODER_NAME,
        text_encoder_hash=content_hash(folder / TEXT_ENCODER_NAME),
    )


def _largest_first(bucket: BucketFields) -> tuple:
    pixels = bucket.num_frames * bucket.height * bucket.width
    audio = bucket.fields["audio"].shape if "audio" in bucket.fields else (0,)
    return -pixels, -audio[0], _key(bucket)


def _write_table(folder: Path, work: _Work, clips: list[dict], schema: Schema) -> None:
    text = {"video_text", "audio_text", "text_mask", "caption"}
    order = {
        _key(dataclasses.replace(b, fields={k: f for k, f in b.fields.items() if k not in text})): i
        for i, b in enumerate(schema.buckets)
    }
    number = {caption: i for i, caption in enumerate(work.captions)}
    buckets, starts, ids, weights = [], [0], [], []
    for about in clips:
        keys = []
        for values in about["buckets"]:
            fields = {k: Field(v["dtype"], tuple(v["shape"])) for k, v in values["fields"].items()}
            keys.append(_key(BucketFields(**{**values, "fields": fields})))
        for row, bucket in about["records"]:
            buckets.append(order[keys[bucket]])
            captions = work.rows[row].captions
            ids += [number[text] for text, _ in captions]
            weights += [weight for _, weight in captions]
            starts.append(len(ids))
    table = {
        "bucket": np.array(buckets, np.int32),
        "caption_start": np.array(starts, np.int64),
        "caption": np.array(ids, np.int32),
        "weight": np.array(weights, np.float32),
    }
    (folder / TABLE_NAME).write_bytes(serialize(table))


def _adopt(staging: Staging, made: Records) -> None:
    """Takes what a finished dataset holds, to add to it."""
    parts = _made_of(made)
    if parts is None:
        return
    numbers: Counter[str] = Counter()
    taken = []
    for part in parts:
        kind, about = part["kind"], part["about"]
        taken.append((kind, numbers[kind], about.get("file"), about))
        numbers[kind] += 1
    staging.adopt(Path(made.folder), taken)
    for name in (CODEC_NAME, TEXT_ENCODER_NAME, EMPTY_CAPTION_NAME):
        (staging.folder / name).write_bytes((Path(made.folder) / name).read_bytes())
    staging.write_json(READY, {"audio_samples": None})


def _made_of(records: Records) -> list[dict[str, Any]] | None:
    """The shards of a dataset; None if another version made it, which cannot be added to."""
    try:
        values = json.loads((Path(records.folder) / MADE_NAME).read_text(encoding="utf-8"))
        return values["parts"] if values["rows"] == SHARD_ROWS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_empty_caption(folder: Path, encoder: FeatureEncoder) -> dict[str, np.ndarray]:
    """The text fields of the empty caption, of which one file goes into a dataset's folder."""
    empty = {name: value[0] for name, value in caption_features(encoder, [""]).items()}
    (folder / EMPTY_CAPTION_NAME).write_bytes(safetensors.numpy.save(empty))
    return empty


def clip_notes(records: Records) -> dict[str, int]:
    """What a user should know of the clips a dataset was made of: how many each thing is true of.

    Empty for a dataset of a version that did not note it.
    """
    return _clips_of(records)["notes"]


def _clips_of(records: Records) -> dict[str, dict]:
    try:
        return json.loads((Path(records.folder) / CLIPS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"files": {}, "notes": {}}


# ---- settings ------------------------------------------------------------------------------------


def _resolved(
    config: PrepareConfig,
    codec: Codec | LinearCodecConfig,
    text_encoder: FeatureEncoder | RandomEncoderConfig,
) -> PrepareConfig:
    """With what codec and text encoder decide, checked."""
    if not isinstance(text_encoder, RandomEncoderConfig):
        config = dataclasses.replace(
            config, text_length=text_encoder.length, text_release=text_encoder.release
        )
    return checked(config, codec)


def checked(config: PrepareConfig, codec: Codec | LinearCodecConfig) -> PrepareConfig:
    """With the release of the codec; UserError for what it cannot encode."""
    fits = isinstance(codec, LinearCodecConfig)
    config = dataclasses.replace(config, release="linear" if fits else codec.release)
    strides = codec.video_strides if fits else codec.video.strides
    for bucket in config.sizes:
        video_latent_shape(*bucket, strides)
        check_even(bucket.height, bucket.width)
    if config.fps is not None and not 0 < config.fps < float("inf"):
        raise UserError(f"fps {config.fps} must be above 0")
    for name in ("text_length", "batch_size", "reference_downscale", "reference_slowdown"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} must be at least 1")
    if config.stride is not None and config.stride < 1:
        raise UserError(f"stride {config.stride} must be at least 1")
    return config


def rates_of(codec: Codec | LinearCodecConfig) -> Rates:
    """What a codec asks of clips."""
    if isinstance(codec, LinearCodecConfig):
        mel = codec.mel
        per_second = mel.sample_rate / mel.hop / codec.mel_frames_per_latent
        return Rates(mel.sample_rate, per_second, codec.video_strides)
    return Rates(codec.audio.sample_rate, codec.audio.latents_per_second, codec.video.strides)


_ONCE = {"buckets": (), "stride": None, "incomplete": False,
         "reference_downscale": 1, "reference_slowdown": 1}  # fmt: skip


def _settings(
    rows: Sequence[Row],
    config: PrepareConfig,
    codec: Codec | LinearCodecConfig,
    text_encoder: FeatureEncoder | RandomEncoderConfig,
) -> dict[str, Any]:
    """What a dataset's contents depend on, as JSON values."""
    plain = [[row.name, row.caption] for row in rows]
    more = [str(dataclasses.replace(row, path=Path())) for row in rows if row.has_more]
    names_and_captions = json.dumps(plain + more)
    settings = {
        "table": hashlib.sha256(names_and_captions.encode()).hexdigest()[:16],
        **dataclasses.asdict(config),
        "codec": _identity(codec),
        "text_encoder": _identity(text_encoder),
    }
    del settings["batch_size"]
    for name, neutral in _ONCE.items():  # as datasets of version 2 have them: not at all
        if settings[name] == neutral:
            del settings[name]
    return json.loads(json.dumps(settings))  # Tuples become lists, as in the file.


def _identity(maker: Any) -> Any:
    """Of a codec or text encoder: the hash of its file, or the config that one is made from."""
    if dataclasses.is_dataclass(maker):
        return dataclasses.asdict(maker)
    with tempfile.TemporaryDirectory() as folder:
        maker.save(Path(folder) / "maker.safetensors")
        return content_hash(Path(folder) / "maker.safetensors")


def _check_settings(records: Records, settings: dict[str, Any]) -> None:
    found, settings = _flat(records.settings), _flat(settings)
    for name in sorted(found.keys() | settings.keys()):
        ours, theirs = settings.get(name), found.get(name)
        if ours == theirs:
            continue
        # Of the table and of makers that are files, only hashes are known.
        hashes = name in ("table", "codec", "text_encoder")
        held = f"another {name}" if hashes else f"{name} {theirs!r}, not {ours!r}"
        raise OtherDataset(
            f"{records.folder}: holds a dataset with {held}; "
            "choose another folder or overwrite it (--overwrite)"
        )


def _check_clips(records: Records, rows: Sequence[Row]) -> bool:
    """Whether clips that could not be used may be now.

    Raises:
      OtherDataset: a clip that was used is another file now.
    """
    then, parts = _clips_of(records)["files"], _made_of(records) or []
    failures = [f for part in parts for f in part["about"].get("failures", [])]
    failed = {rows[f["row"]].name for f in failures}
    for row, now in zip(rows, fingerprints(row.path for row in rows), strict=True):
        if now is None or row.name in failed or row.name not in then or now == then[row.name]:
            continue
        raise OtherDataset(
            f"{records.folder}: {row.name} was another file when this dataset was made; "
            "choose another folder or make it anew (--overwrite)"
        )
    return may_succeed_now(failures, rows)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
