"""The work that makes a dataset, shard by shard: scenes, makers, captions, then clips."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ltx2_jax.blobs import serialize
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.clips import ClipReader, Failure, PrepareConfig, Rates, has_scenes
from ltx2_jax.data.latents import bucket_of, encode_captions, encode_samples, rates_of
from ltx2_jax.data.records import EMPTY_CAPTION_NAME
from ltx2_jax.data.schema import BucketFields, Field, fields_to_json
from ltx2_jax.data.shards import Waiting
from ltx2_jax.data.staging import BEGUN, CAPTIONS, CLIPS, READY, SCENES, Staging
from ltx2_jax.data.table import Row
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.demo.random_encoder import RandomEncoder
from ltx2_jax.errors import UserError
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import Clip
from ltx2_jax.media.scenes import Film, watch_all
from ltx2_jax.text.captions import FeatureEncoder, caption_features, load_caption_encoder

CODEC_NAME = "codec.safetensors"
TEXT_ENCODER_NAME = "text_encoder.safetensors"
SHARD_ROWS = 64
SHARD_CAPTIONS = 256
SHARD_FILMS = 16


class NoneUsableError(UserError):
    """No clip of a table can be used."""


class Work:
    """What is to be done for a dataset, and the makers that do it.

    Attributes:
      rows: the table.
      config: what to make of every clip.
      captions: the distinct ones, in the order of the table.
      films: the distinct ones whose scenes are told apart, in that order.
      rates: what the codec asks of clips.
    """

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
        films = dict.fromkeys(row.path for row in rows if config.scenes and has_scenes(row))
        self.films = list(films)
        self._codec, self._encoder = codec, text_encoder
        self._process, self._processes = process, processes
        self._waited = 0.0  # seconds, for decoded clips
        self._again: dict[str, list[int]] = {SCENES: [], CAPTIONS: [], CLIPS: []}
        fits = isinstance(codec, LinearCodecConfig)
        self.rates = rates_of(codec)
        self.reader = ClipReader(rows, config, self.rates, cache_bytes=2**31 if fits else 0)

    def shards(self, kind: str) -> int:
        """Number of shards of rows, of captions, or of films."""
        of, size = {
            CLIPS: (self.rows, SHARD_ROWS),
            CAPTIONS: (self.captions, SHARD_CAPTIONS),
            SCENES: (self.films, SHARD_FILMS),
        }[kind]
        return -(-len(of) // size)

    def make(self, staging: Staging) -> None:
        """Does this process's part of what is not done."""
        self._find_scenes(staging)
        if self._process == 0:
            self._make_makers(staging)
        staging.wait(lambda: staging.read_json(READY) is not None, "makes codec and text encoder")
        if staging.published:
            return
        self.reader.audio_samples = staging.read_json(READY)["audio_samples"]
        self._make_captions(staging)
        self._make_clips(staging)

    def index(self, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What dataset.json says of clips besides, of the shards that are done."""
        return {}

    def wait_for_all(self, staging: Staging) -> None:
        """Until the other processes have done theirs."""
        for kind in (SCENES, CAPTIONS, CLIPS):
            for shard in range(self.shards(kind)):
                staging.wait(lambda k=kind, s=shard: staging.done(k, s) is not None, "finishes")

    def _mine(self, staging: Staging, kind: str) -> list[int]:
        shards = {*range(self._process, self.shards(kind), self._processes), *self._again[kind]}
        todo = [shard for shard in sorted(shards) if staging.done(kind, shard) is None]
        return [] if staging.published else todo

    def _undo(self, staging: Staging, kind: str, stale: Callable[[dict, int], bool]) -> None:
        """Makes some shards again: this process does, as others may have looked already."""
        for shard in range(self.shards(kind)):
            about = staging.done(kind, shard)
            if about is not None and stale(about, shard):
                staging.undo(kind, shard)
                self._again[kind].append(shard)

    # ---- scenes

    def _find_scenes(self, staging: Staging) -> None:
        """Where the films are cut: by this process's part, and then known for all."""
        if not self.films:
            return
        if self._process == 0:  # what a finished dataset knows is there by now
            self._undo(
                staging,
                SCENES,
                lambda about, shard: may_be_seen_otherwise(about, self._films_of(shard)),
            )
            staging.write_json(BEGUN, True)
        staging.wait(lambda: staging.read_json(BEGUN), "begins")
        shards = self._mine(staging, SCENES)
        total = sum(len(self._films_of(shard)) for shard in shards)
        with tqdm(desc="finding scenes", total=total, unit="film", disable=None) as bar:
            for shard in shards:
                paths, films = self._films_of(shard), []
                prints = fingerprints(paths)
                for film in watch_all(paths, staging.alive):
                    films.append(dataclasses.asdict(film))
                    bar.update()
                staging.finish(SCENES, shard, (), {"films": films, "files": prints})
        for shard in range(self.shards(SCENES)):
            staging.wait(lambda s=shard: staging.done(SCENES, s) is not None, "finds scenes")
        numbers = {path: number for number, path in enumerate(self.films)}

        def film(path: Path) -> Film | None:
            if path not in numbers:
                return None
            shard, place = divmod(numbers[path], SHARD_FILMS)
            found: list[dict] = []  # not there while it is found again

            def there() -> bool:
                found.append(staging.done(SCENES, shard))
                return found[-1] is not None

            staging.wait(there, "finds scenes")
            if not found or found[-1] is None:
                raise UserError("another process has finished the dataset")
            return Film(**found[-1]["films"][place])

        self.reader.film = film

    def _films_of(self, shard: int) -> list[Path]:
        return self.films[shard * SHARD_FILMS : (shard + 1) * SHARD_FILMS]

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
            staging.keep(TEXT_ENCODER_NAME, EMPTY_CAPTION_NAME, CODEC_NAME)
            samples = self._first_length() if self.reader.one_length else None
            staging.write_json(READY, {"audio_samples": samples})
        self._undo(
            staging, CLIPS, lambda about, shard: may_succeed_now(about["failures"], self.rows)
        )

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

    def none_usable(self, failures: Sequence[Failure]) -> NoneUsableError:
        """What to say when there is no record."""
        first = min(failures, key=lambda failure: failure.row)
        return NoneUsableError(
            f"none of the {len(self.rows)} clips can be used; the first: "
            f"{self.rows[first.row].name}: {first.reason}"
        )

    # ---- shards

    def _make_captions(self, staging: Staging) -> None:
        shards = self._mine(staging, CAPTIONS)
        if not shards:
            return
        if isinstance(self._encoder, RandomEncoderConfig):
            self._encoder = load_caption_encoder(staging.file(TEXT_ENCODER_NAME))
        with tqdm(
            desc="encoding captions", total=len(shards) * SHARD_CAPTIONS, disable=None
        ) as bar:
            for shard in shards:
                part = self.captions[shard * SHARD_CAPTIONS : (shard + 1) * SHARD_CAPTIONS]
                records = list(encode_captions(part, self._encoder, self.config.batch_size))
                full = sum(bool(record["text_mask"].all()) for record in records)
                about = {
                    "full": full,
                    "fields": fields_to_json({k: Field.of(v) for k, v in records[0].items()}),
                }
                staging.finish(CAPTIONS, shard, map(serialize, records), about)
                bar.update(SHARD_CAPTIONS)

    def _make_clips(self, staging: Staging) -> None:
        shards = self._mine(staging, CLIPS)
        if not shards:
            return
        if isinstance(self._codec, LinearCodecConfig):
            self._codec = load_codec(staging.file(CODEC_NAME))
        total = sum(len(self.rows_of(shard)) for shard in shards)
        began = time.perf_counter()
        with tqdm(desc="encoding clips", total=total, unit="row", disable=None) as bar:
            for shard in shards:
                rows = self.rows_of(shard)
                self._make_shard(staging, shard, rows)
                bar.update(len(rows))
                seconds = time.perf_counter() - began
                bar.set_postfix_str(f"{self._waited / seconds:.0%} of the time waits for decoding")

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
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
        with Waiting(staging.folder) as waiting:
            for item, record in encode_samples(noted(), self.rows, self._codec, self.config):
                staging.alive()
                place = item.row, item.window
                if isinstance(record, Failure):
                    failures[place] = record
                else:
                    bucket = bucket_of(record, item.bucket or (0, 0, 0))
                    made[place] = bucket, waiting.put(serialize(record))
            failures |= {k: f for k, f in self.reader.failures.items() if f.row in rows}
            places = sorted(made)
            about = self._about(rows, prints, {place: made[place][0] for place in places}, failures)
            about["notes"] = Counter(note for place in places for note in notes[place])
            staging.finish(CLIPS, shard, (waiting.get(made[p][1]) for p in places), about)

    def _about(
        self,
        rows: range,
        prints: Sequence[str | None],
        made: Mapping[tuple[int, int], BucketFields],
        failures: Mapping[tuple[int, int], Failure],
    ) -> dict[str, Any]:
        """What a shard of rows says: `made` and `failures` are by row and window."""
        places = sorted(made)
        return {
            **_of_records(places, [made[place] for place in places], self.rates),
            "failures": [
                dataclasses.asdict(failures[place])
                | {"file": prints[failures[place].row - rows[0]]}
                for place in sorted(failures)
            ],
            "files": {
                self.rows[row].name: print_ for row, print_ in zip(rows, prints, strict=True)
            },
            "notes": {},
        }


def _of_records(
    places: Sequence[tuple[int, int]], buckets: Sequence[BucketFields], rates: Rates
) -> dict[str, Any]:
    """What a shard says of its records, whose rows and windows are `places`."""
    firsts = {bucket.key: bucket for bucket in reversed(buckets)}
    numbers = {key: number for number, key in enumerate(firsts)}
    return {
        "records": [
            [row, numbers[bucket.key]] for (row, _), bucket in zip(places, buckets, strict=True)
        ],
        "buckets": [bucket.to_json() for bucket in firsts.values()],
        "seconds": sum(_seconds(bucket, rates) for bucket in buckets),
    }


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


def may_be_seen_otherwise(about: dict[str, Any], films: Sequence[Path]) -> bool:
    """Whether scenes are worth another look: the disk was at fault, or a film has changed."""
    if any(film["passing"] for film in about["films"]):
        return True
    pairs = zip(fingerprints(films), about["files"], strict=True)
    return any(now is not None and now != then for now, then in pairs)


def write_empty_caption(folder: Path, encoder: FeatureEncoder) -> dict[str, np.ndarray]:
    """The text fields of the empty caption, of which one file goes into a dataset's folder."""
    empty = {name: value[0] for name, value in caption_features(encoder, [""]).items()}
    (folder / EMPTY_CAPTION_NAME).write_bytes(safetensors.numpy.save(empty))
    return empty
