"""Clips and captions to a dataset: table -> codec, text encoder -> records, in one folder."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ltx2_jax.blobs import content_hash
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.records import (
    EMPTY_CAPTION_NAME,
    INDEX_NAME,
    Records,
    RecordWriter,
)
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.demo.random_encoder import RandomEncoder
from ltx2_jax.diffusion.geometry import audio_latent_length, video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import Clip, check_even, read_clip
from ltx2_jax.text.captions import FeatureEncoder, caption_features, tell_cut

CODEC_NAME = "codec.safetensors"
TEXT_ENCODER_NAME = "text_encoder.safetensors"
CLIPS_NAME = "clips.json"  # {"files": name -> fingerprint, "notes": note -> number of clips}


# ---- reading clips -------------------------------------------------------------------------------


class OtherDataset(UserError):
    """The folder holds a dataset that was made with other settings."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to make of every clip.

    Attributes:
      num_frames, height, width: size in pixels; the codec's strides must fit.
      fps: frames per second to resample to; None keeps the rate of each file. All clips must have
        the same number of audio latents, so other rates than the first clip's are skipped then.
      text_length: tokens per caption; `prepare_dataset` asks the text encoder, if it gets one.
      release: whose latents these are, see `Schema`; `prepare_dataset` asks the codec.
      text_release: whose text features; it asks the text encoder.
      batch_size: clips encoded at once, fewer where they are large; no effect on the result.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None = None
    text_length: int = 32
    release: str = "linear"
    text_release: str = "random"
    batch_size: int = 16


class ClipReader:
    """The usable clips of a table, decoded by threads; can be iterated several times.

    Yields (index of the row, clip) in the table's order. Clips have exactly `num_frames` frames,
    finite stereo sound, and sound for a whole number of audio latents: cut or padded with silence.
    Decoded clips stay in memory until `cache_bytes` are used up; the others are decoded again.

    Attributes:
      rows: the table.
      bad: index to reason, for the clips found unusable so far.
      notes: index to what the user should know of a clip, see `Clip`, for those read so far.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: PrepareConfig,
        *,
        sample_rate: int,
        latents_per_second: float,
        cache_bytes: int = 2 * 2**30,
    ):
        """Takes what the audio codec needs: Hz and latents per second."""
        self.rows = rows
        self.bad: dict[int, str] = {}
        self.notes: dict[int, tuple[str, ...]] = {}
        self._config = config
        self._sample_rate = sample_rate
        self._latents_per_second = latents_per_second
        self._cache: dict[int, Clip] = {}
        self._room = cache_bytes
        self._samples: int | None = None

    def __iter__(self) -> Iterator[tuple[int, Clip]]:
        # Decoding releases the GIL. The window bounds the number of decoded clips that wait.
        threads = min(8, os.cpu_count() or 1)
        waiting: deque[tuple[int, Future]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for index in [i for i in range(len(self.rows)) if i not in self.bad]:
                waiting.append((index, pool.submit(self._load, index)))
                if len(waiting) > _fitting(2 * threads, self._config):
                    yield from self._take(*waiting.popleft())
            while waiting:
                yield from self._take(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)  # who is interrupted does not wait for all of them
        if len(self.bad) == len(self.rows):
            first = f"{self.rows[0].name}: {self.bad[0]}"
            raise UserError(f"none of the {len(self.rows)} clips can be used; the first: {first}")

    def _take(self, index: int, future: Future) -> Iterator[tuple[int, Clip]]:
        try:
            clip = future.result()
            self._same_length(clip)
        except UserError as error:
            # Listed under the name the table gives it; the path once more would only be noise.
            self.bad[index] = str(error).removeprefix(f"{self.rows[index].path}: ")
            return
        self.notes[index] = clip.notes
        size = clip.video.nbytes + clip.audio.nbytes
        if index not in self._cache and size <= self._room:
            self._room -= size
            self._cache[index] = clip
        yield index, clip

    def _load(self, index: int) -> Clip:
        if index in self._cache:
            return self._cache[index]
        config = self._config
        clip = read_clip(
            self.rows[index].path,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            sample_rate=self._sample_rate,
        )
        return dataclasses.replace(clip, audio=self._whole_latents(clip))

    def _whole_latents(self, clip: Clip) -> np.ndarray:  # [samples, 2]
        if clip.audio is None or clip.audio.size == 0:
            raise UserError("no sound")
        if not np.isfinite(clip.audio).all():
            raise UserError("sound has NaN or infinite samples")
        latents = audio_latent_length(self._config.num_frames, clip.fps, self._latents_per_second)
        if latents == 0:
            raise UserError("too short for one audio latent")
        samples = round(latents / self._latents_per_second * self._sample_rate)
        audio = np.zeros((samples, 2), np.float32)
        audio[: len(clip.audio)] = clip.audio[:samples]
        return audio

    def _same_length(self, clip: Clip) -> None:
        if self._samples is None:
            self._samples = len(clip.audio)
        if len(clip.audio) != self._samples:
            ours, theirs = (
                round(n / self._sample_rate, 3) for n in (len(clip.audio), self._samples)
            )
            raise UserError(
                f"at {clip.fps:g} frames per second its sound lasts {ours:.2f} s, that of the "
                f"first clip {theirs:.2f} s; give one frame rate for all (--fps)"
            )


# ---- encoding ------------------------------------------------------------------------------------


def encode_clips(
    clips: ClipReader,
    *,
    codec: Codec,
    encoder: FeatureEncoder,
    config: PrepareConfig,
    writer: RecordWriter,
) -> None:
    """Encodes every usable clip and its caption, and writes one record each.

    The codec and the text encoder are in `writer.staging` already, as CODEC_NAME and
    TEXT_ENCODER_NAME. Clips that cannot be used go to `writer.skip` with the reason.

    Args:
      clips: the clips; see `ClipReader`.
      codec: any codec, see `ltx2_jax.codecs.codec`.
      encoder: for the captions.
      config: sizes, text length, release.
      writer: entered, not started.

    Raises:
      UserError: no clip can be used.
    """
    schema, masks = None, []
    usable = len(clips.rows) - len(clips.bad)
    with tqdm(desc="encoding clips", total=usable, unit="clip", disable=None) as bar:
        for batch in _batches(iter(clips), _fitting(config.batch_size, config)):
            for record in _encode(batch, clips.rows, codec, encoder):
                if not all(np.isfinite(record[name]).all() for name in ("video", "audio")):
                    clips.bad[int(record["id"])] = "its latents are not finite"
                    continue
                if schema is None:
                    schema = _schema(record, writer.staging, config)
                    writer.start(schema)
                writer.write(record)
                masks.append(record["text_mask"])
            bar.update(len(batch))
    tell_cut(masks, "captions", "--text-length of prepare, text.length of train")
    for index, reason in sorted(clips.bad.items()):
        writer.skip(clips.rows[index].name, reason)
    if schema is None:
        raise UserError(f"none of the {len(clips.rows)} clips has finite latents")


def _fitting(count: int, config: PrepareConfig, limit: int = 2**29) -> int:
    """At most `count` clips whose pixels together stay within `limit` bytes; at least one."""
    clip = config.num_frames * config.height * config.width * 3
    return max(1, min(count, limit // clip))


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(
    batch: list, rows: Sequence[Row], codec: Codec, encoder: FeatureEncoder
) -> Iterator[dict[str, Any]]:
    pixels = np.stack([clip.video for _, clip in batch])  # uint8 [B, F, H, W, 3]
    video = np.asarray(codec.video.encode(pixels))  # [B, F', H', W', C]
    audio = np.asarray(codec.audio.encode(np.stack([clip.audio for _, clip in batch])))  # [B,A,M,C]
    captions = [rows[index].caption for index, _ in batch]
    text = caption_features(encoder, captions)
    for i, (index, clip) in enumerate(batch):
        yield {
            "id": np.int64(index),
            "video": video[i],
            "audio": audio[i],
            **{name: value[i] for name, value in text.items()},
            "fps": np.float32(clip.fps),
            "caption": captions[i],
            "source": rows[index].name,
        }


def _schema(record: dict[str, Any], folder: Path, config: PrepareConfig) -> Schema:
    return Schema(
        release=config.release,
        text="features",
        text_release=config.text_release,
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        fps=float(record["fps"]),
        codec=CODEC_NAME,
        codec_hash=content_hash(folder / CODEC_NAME),
        text_encoder=TEXT_ENCODER_NAME,
        text_encoder_hash=content_hash(folder / TEXT_ENCODER_NAME),
        fields={name: Field.of(value) for name, value in record.items()},
    )


# ---- all of it -----------------------------------------------------------------------------------


def prepare_dataset(
    table: str | os.PathLike,
    out: str | os.PathLike,
    config: PrepareConfig,
    *,
    codec: Codec | LinearCodecConfig | None = None,
    text_encoder: FeatureEncoder | RandomEncoderConfig | None = None,
    overwrite: bool = False,
) -> Records:
    """Makes a dataset of the clips and captions in `table`, in one folder, all or nothing.

    A dataset that is there already and was made with the same settings is returned as it is. The
    settings include the table's rows, and the clips must not have changed under their names since;
    those that are gone since do not matter.

    Args:
      table: see `read_table`.
      out: the folder to make.
      config: sizes of the clips, text and batch.
      codec: any codec of `ltx2_jax.codecs`, or a `LinearCodecConfig` to fit a linear one on these
        clips; None fits one with the defaults. The dataset takes its release from it.
      text_encoder: of a release or of another dataset, or a `RandomEncoderConfig` to make one for
        these captions; None makes one with the defaults.
      overwrite: replace a dataset made with other settings.

    Raises:
      UserError: what `read_table` raises; a size that the codec's strides do not fit; no usable
        clip; `out` holds something else. `OtherDataset` if that is one made with other settings or
        of other clips.
    """
    codec = LinearCodecConfig() if codec is None else codec
    fits = isinstance(codec, LinearCodecConfig)
    config = dataclasses.replace(config, release="linear" if fits else codec.release)
    text_encoder = RandomEncoderConfig() if text_encoder is None else text_encoder
    given = not isinstance(text_encoder, RandomEncoderConfig)
    if given:
        config = dataclasses.replace(
            config, text_length=text_encoder.length, text_release=text_encoder.release
        )
    _check_sizes(config, codec.video_strides if fits else codec.video.strides)
    rows = read_table(table)
    settings = _settings(rows, config, codec, text_encoder)
    if (Path(out) / INDEX_NAME).exists() and not overwrite:
        records = Records(out)
        _check_settings(records, settings)
        _check_clips(records, rows)
        print(f"{out}: {len(records)} records are there already, made with the same settings")
        return records

    if fits:
        mel = codec.mel
        rates = mel.sample_rate, mel.sample_rate / mel.hop / codec.mel_frames_per_latent
    else:
        rates = codec.audio.sample_rate, codec.audio.latents_per_second
    # Before they are read, so that a change while they are is seen next time.
    names = [row.name for row in rows]
    files = dict(zip(names, fingerprints(row.path for row in rows), strict=True))
    clips = ClipReader(rows, config, sample_rate=rates[0], latents_per_second=rates[1])
    with RecordWriter(out, settings=settings, overwrite=overwrite) as writer:
        encoder_path = writer.staging / TEXT_ENCODER_NAME
        if given:
            text_encoder.save(encoder_path)
        else:
            captions = [row.caption for row in rows]
            length = config.text_length
            text_encoder = RandomEncoder.make(encoder_path, text_encoder, captions, length)
        write_empty_caption(writer.staging, text_encoder)
        if fits:
            bar = tqdm(clips, "fitting the codec", total=len(rows), unit="clip", disable=None)
            codec = LinearCodec.fit(codec, (clip for _, clip in bar))
        codec.save(writer.staging / CODEC_NAME)
        encode_clips(clips, codec=codec, encoder=text_encoder, config=config, writer=writer)
        _write_clips(writer.staging / CLIPS_NAME, files, clips)
    return Records(out)


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


def _write_clips(path: Path, files: dict[str, str | None], clips: ClipReader) -> None:
    notes = Counter(n for i, of in clips.notes.items() if i not in clips.bad for n in of)
    contents = json.dumps({"files": files, "notes": notes}, indent=1)
    path.write_text(contents + "\n", encoding="utf-8")


def _clips_of(records: Records) -> dict[str, dict]:
    try:
        return json.loads((Path(records.folder) / CLIPS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"files": {}, "notes": {}}


def _check_sizes(config: PrepareConfig, strides: tuple[int, int, int]) -> None:
    video_latent_shape(config.num_frames, config.height, config.width, strides)
    check_even(config.height, config.width)
    if config.fps is not None and not 0 < config.fps < float("inf"):
        raise UserError(f"fps {config.fps} must be above 0")
    for name in ("text_length", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} must be at least 1")


def _settings(
    rows: Sequence[Row],
    config: PrepareConfig,
    codec: Codec | LinearCodecConfig,
    text_encoder: FeatureEncoder | RandomEncoderConfig,
) -> dict[str, Any]:
    """What a dataset's contents depend on, as JSON values."""
    names_and_captions = json.dumps([[row.name, row.caption] for row in rows])
    settings = {
        "table": hashlib.sha256(names_and_captions.encode()).hexdigest()[:16],
        **dataclasses.asdict(config),
        "codec": _identity(codec),
        "text_encoder": _identity(text_encoder),
    }
    del settings["batch_size"]
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


def _check_clips(records: Records, rows: Sequence[Row]) -> None:
    """OtherDataset for a clip that is another file now, or was not there when it was made."""
    then = _clips_of(records)["files"]
    for row, now in zip(rows, fingerprints(row.path for row in rows), strict=True):
        if now is None or row.name not in then or now == then[row.name]:
            continue
        changed = "was not there" if then[row.name] is None else "was another file"
        raise OtherDataset(
            f"{records.folder}: {row.name} {changed} when this dataset was made; "
            "choose another folder or make it anew (--overwrite)"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
