"""From a row of a table to decoded clips: which parts of which files, at which size.

    row -> items (a part of a file and the bucket it is brought to) -> samples (pixels and sound)

A film gives one clip, its beginning, or with a stride as many as it holds; so does each of its
scenes where they are told apart. Which bucket a clip takes is the rule of `data.buckets`. A silent
film, sound alone and an image lack a stream: they are taken where the config says so, and refused
otherwise.
"""

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ltx2_jax.data.buckets import Bucket, choose_bucket, reference_frames, smaller_bucket
from ltx2_jax.data.table import Row
from ltx2_jax.diffusion.geometry import VIDEO_STRIDES, audio_latent_length
from ltx2_jax.errors import UserError
from ltx2_jax.files import is_passing
from ltx2_jax.media.media import Clip, FileSize, TooShort, file_size, read_clip, read_sound
from ltx2_jax.media.scenes import Film

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_FPS = 1.0  # as the official preprocessing has it
SOUND_FPS = 25.0  # of buckets, where sound alone is cut to their lengths


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to make of every clip.

    Attributes:
      num_frames, height, width: size in pixels; the codec's strides must fit.
      fps: frames per second to resample to; None keeps the rate of each file. All clips must have
        the same number of audio latents, so other rates than the first clip's are skipped then,
        unless there are `buckets`.
      text_length: tokens per caption; `prepare_dataset` asks the text encoder, if it gets one.
      release: whose latents these are, see `Schema`; `prepare_dataset` asks the codec.
      text_release: whose text features; it asks the text encoder.
      batch_size: clips encoded at once, fewer where they are large; no effect on the result.
      buckets: sizes to choose from for every clip, in place of the one above.
      stride: frames from one clip of a film to the next; None takes its beginning alone.
      scenes: takes every scene of a film for a film of its own, see `media.scenes`.
      incomplete: takes clips that lack a stream: silent films, sound alone, images.
      reference_downscale, reference_slowdown: how many times smaller, and slower, `reference_video`
        is than its clip.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None = None
    text_length: int = 32
    release: str = "linear"
    text_release: str = "random"
    batch_size: int = 16
    buckets: tuple[Bucket, ...] = ()
    stride: int | None = None
    scenes: bool = False
    incomplete: bool = False
    reference_downscale: int = 1
    reference_slowdown: int = 1

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets, or the one size."""
        return self.buckets or (Bucket(self.num_frames, self.height, self.width),)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the codec asks of clips: strides of video, samples per second and latent of sound."""

    sample_rate: int
    latents_per_second: float
    strides: tuple[int, int, int] = VIDEO_STRIDES


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip to be: a part of a row's file.

    Attributes:
      row: index into the table.
      window: which clip of its film.
      bucket: the size it is brought to; None for sound alone.
      start: seconds after the file's first picture.
      seconds: of sound alone.
    """

    row: int
    window: int
    bucket: Bucket | None
    start: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip, decoded; streams that it lacks are None.

    Attributes:
      item: which clip.
      video: uint8 [F, H, W, 3].
      audio: float32 [samples, 2], a whole number of latents long.
      fps: frames per second.
      notes: what the user should know of it, see `Clip`.
      reference_video: uint8 [F", H", W", 3]; reference_audio: as `audio`.
      video_mask: bool [F', H', W'], audio_mask: bool [A]: True where a latent is given.
    """

    item: Item
    video: np.ndarray | None
    audio: np.ndarray | None
    fps: float
    notes: tuple[str, ...] = ()
    reference_video: np.ndarray | None = None
    reference_audio: np.ndarray | None = None
    video_mask: np.ndarray | None = None
    audio_mask: np.ndarray | None = None

    @property
    def kind(self) -> tuple:
        """Samples of one kind are encoded together: equal shapes, the same things there."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self)[1:])
        return tuple(getattr(array, "shape", None) for array in arrays)

    @property
    def nbytes(self) -> int:
        """Of pixels and sound."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in IMAGES


def has_scenes(row: Row) -> bool:
    """Whether it is a film."""
    return not row.sound_alone and not is_image(row.path)


# ---- which clips a row holds ---------------------------------------------------------------------


def items_of(
    index: int, row: Row, config: PrepareConfig, film: Film | None = None
) -> list["Item | Failure"]:
    """The clips of a row, and why a part of it gives none; at least one of both.

    `film` is what `watch` found, where scenes are told apart.

    Raises:
      UserError: it holds none, without the path.
    """
    if row.sound_alone:
        return [_sound_item(index, row, config)]
    image = is_image(row.path)
    whole = row.start is None and row.end is None and film is None
    if len(config.sizes) == 1 and config.stride is None and whole and not image:
        return [Item(index, 0, config.sizes[0])]  # the file need not be looked at
    size = file_size(row.path)
    if not size.num_frames:
        raise UserError("has sound and no picture; a table names it in the column 'audio'")
    if image:
        if min(bucket.num_frames for bucket in config.sizes) > 1:
            raise UserError("an image; there is no bucket of one frame")
        return [Item(index, 0, choose_bucket(config.sizes, 1, size.height, size.width))]
    return _windows(index, row, config, size, film or Film((), math.inf))


def _windows(
    index: int, row: Row, config: PrepareConfig, size: FileSize, film: Film
) -> list["Item | Failure"]:
    """The clips of a film: of each of its scenes one, or with a stride as many as it holds."""
    if not film.end:
        return [Failure(index, film.fault, passing=film.passing)]
    rate = config.fps or size.fps
    if not rate:
        raise UserError("the file does not say its frame rate; convert it to mp4 first")
    start = row.start or 0.0
    there = size.seconds if row.end is None else min(row.end, size.seconds)
    end = min(there, film.end) if film.fault else there
    if int((end - start) * rate + 1e-3) < 1:
        if end < there:
            return [Failure(index, film.fault, start, film.passing)]
        raise UserError(f"it ends at {size.seconds:.2f} s, before start={start:g}")
    items, short = [], []
    scenes = list(film.scenes(start, end, size.fps or rate, rate))
    for begin, frames in scenes:
        try:
            bucket = choose_bucket(config.sizes, frames, size.height, size.width)
        except UserError as error:
            short.append(error)
            continue
        firsts = range(0, frames - bucket.num_frames + 1, config.stride or frames)
        items += [
            Item(index, len(items) + n, bucket, begin + first / rate)
            for n, first in enumerate(firsts)
        ]
    if short and len(scenes) == 1:
        raise short[0]
    if short:
        least = min(bucket.num_frames for bucket in config.sizes)
        text = f"of its {len(scenes)} scenes {len(short)} have less than {least} frames"
        items.append(Failure(index, text))
    if end < there:
        items.append(Failure(index, film.fault, end, film.passing))
    return items


def _sound_item(index: int, row: Row, config: PrepareConfig) -> Item:
    """Sound alone: as long as the longest bucket that it fills."""
    if not config.incomplete:
        raise UserError("sound without picture; --incomplete takes it")
    size, start = file_size(row.path), row.start or 0.0
    there = (size.seconds if row.end is None else min(row.end, size.seconds)) - start
    lengths = [bucket.num_frames / (config.fps or SOUND_FPS) for bucket in config.sizes]
    fitting = [seconds for seconds in lengths if seconds <= there + 1e-3]
    if not size.has_sound or not fitting:
        raise UserError(f"has {max(there, 0):.2f} s of sound; the shortest bucket {min(lengths):g}")
    return Item(index, 0, None, start, max(fitting))


# ---- decoding ------------------------------------------------------------------------------------


def read_item(item: Item, row: Row, config: PrepareConfig, rates: Rates) -> Sample:
    """Decodes one clip.

    Raises:
      UserError: it cannot be used.
    """
    if item.bucket is None:
        sound, notes = read_sound(
            row.path, seconds=item.seconds, sample_rate=rates.sample_rate, start=item.start
        )
        latents = round(item.seconds * rates.latents_per_second)
        sound = _whole_latents(sound, latents, rates)
        extra = _beside(item, row, item.seconds, latents, config, rates)
        return Sample(item, None, sound, config.fps or SOUND_FPS, notes, **extra)
    clip = _clip(row.path, item.bucket, item.start, config, rates)
    image = is_image(row.path)
    seconds = 0.0 if image else item.bucket.num_frames / clip.fps
    if "audio" in row.others and not image:
        sound, notes = read_sound(
            row.others["audio"], seconds=seconds, sample_rate=rates.sample_rate, start=item.start
        )
        clip = dataclasses.replace(clip, audio=sound, notes=(*clip.notes, *notes))
    if image:
        clip = dataclasses.replace(clip, fps=IMAGE_FPS, audio=None)
    if (clip.audio is None or clip.audio.size == 0) and not config.incomplete:
        raise UserError("an image; --incomplete takes it" if image else "no sound")
    audio, latents = None, 0
    if clip.audio is not None and clip.audio.size:
        latents = audio_latent_length(item.bucket.num_frames, clip.fps, rates.latents_per_second)
        audio = _whole_latents(clip.audio, latents, rates)
    extra = _beside(item, row, seconds, latents, config, rates)
    return Sample(item, clip.video, audio, clip.fps, clip.notes, **extra)


def _clip(path: Path, bucket: Bucket, start: float, config: PrepareConfig, rates: Rates) -> Clip:
    return read_clip(
        path,
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        fps=None if is_image(path) else config.fps,
        sample_rate=rates.sample_rate,
        start=start,
    )


def _whole_latents(audio: np.ndarray, latents: int, rates: Rates) -> np.ndarray:  # [samples, 2]
    """Cut, or padded with silence, to so many latents."""
    if not np.isfinite(audio).all():
        raise UserError("sound has NaN or infinite samples")
    if latents == 0:
        raise UserError("too short for one audio latent")
    samples = round(latents / rates.latents_per_second * rates.sample_rate)
    whole = np.zeros((samples, 2), np.float32)
    whole[: len(audio)] = audio[:samples]
    return whole


def _beside(
    item: Item, row: Row, seconds: float, latents: int, config: PrepareConfig, rates: Rates
) -> dict[str, np.ndarray]:
    """References and masks of a clip that has so many audio latents."""
    made, bucket = {}, item.bucket
    if bucket is not None and "reference_video" in row.others:
        smaller = smaller_bucket(bucket, config.reference_downscale, rates.strides)
        video = _other(row, "reference_video", smaller, item.start, config, rates).video
        made["reference_video"] = video[
            list(reference_frames(bucket.num_frames, config.reference_slowdown))
        ]
    if bucket is not None and "video_mask" in row.others:
        still = is_image(row.others["video_mask"])
        shape = bucket._replace(num_frames=1) if still else bucket
        grey = _other(row, "video_mask", shape, 0.0 if still else item.start, config, rates).video
        frames = np.broadcast_to(grey, (bucket.num_frames, *grey.shape[1:]))
        made["video_mask"] = latent_mask(frames.mean(axis=-1) / 255, rates.strides)
    if latents and "reference_audio" in row.others:
        sound = _other_sound(row, "reference_audio", seconds, item.start, rates)
        made["reference_audio"] = _whole_latents(sound, latents, rates)
    if latents and "audio_mask" in row.others:
        sound = np.abs(_other_sound(row, "audio_mask", seconds, item.start, rates)).mean(axis=1)
        nearest = (np.arange(latents) * len(sound) / latents).astype(int)
        made["audio_mask"] = sound[nearest] > 0.5
    return made


def _other(
    row: Row, column: str, bucket: Bucket, start: float, config: PrepareConfig, rates: Rates
) -> Clip:
    try:
        return _clip(row.others[column], bucket, start, config, rates)
    except UserError as error:
        raise UserError(f"{column} {error}") from error


def _other_sound(row: Row, column: str, seconds: float, start: float, rates: Rates) -> np.ndarray:
    try:
        path, rate = row.others[column], rates.sample_rate
        return read_sound(path, seconds=seconds, sample_rate=rate, start=start)[0]
    except UserError as error:
        raise UserError(f"{column} {error}") from error


def latent_mask(pixels: np.ndarray, strides: tuple[int, int, int]) -> np.ndarray:
    """Which latents are given, bool [F', H', W'], of a mask in [0, 1], [F, H, W].

    A latent is given where more than half of its pixels are, in any of its frames. The frames of a
    latent are those that the codec puts into it: the first alone, then `strides[0]` each. (The
    official script counts from frame 0, up to seven frames early.)
    """
    time, rows, columns = strides
    F, H, W = pixels.shape
    blocks = pixels.reshape(F, H // rows, rows, W // columns, columns).mean(axis=(2, 4))
    later = blocks[1:].reshape(-1, time, *blocks.shape[1:]).max(axis=1)
    return np.concatenate([blocks[:1], later]) > 0.5


# ---- many of them --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a clip is left out.

    Attributes:
      row, start: which clip.
      reason: in one line, without its path.
      passing: whether the reason may be gone the next time: the disk's, not the file's.
    """

    row: int
    reason: str
    start: float = 0.0
    passing: bool = False


class ClipReader:
    """The usable clips of a table, decoded by threads; can be iterated several times.

    Yields samples in the table's order. Decoded clips stay in memory until `cache_bytes` are used
    up; the others are decoded again.

    Attributes:
      rows: the table.
      failures: the clips found unusable so far, by row and window.
      audio_samples: of every clip, where all must have the same number; None: the first decides.
      film: what `watch` found of a file, where scenes are told apart.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: PrepareConfig,
        rates: Rates,
        *,
        cache_bytes: int = 2 * 2**30,
    ):
        self.rows = rows
        self.failures: dict[tuple[int, int], Failure] = {}
        self._config, self._rates = config, rates
        self._cache: dict[Item, Sample] = {}
        self._room = cache_bytes
        self._items: dict[int, list[Item | Failure]] = {}
        self.audio_samples: int | None = None
        self.film: Callable[[Path], Film | None] = lambda path: None

    @property
    def one_length(self) -> bool:
        """Whether all clips must have as much sound."""
        return not self._config.buckets and self._config.fps is None

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(len(self.rows)))

    def read(self, rows: Sequence[int]) -> Iterator[Sample]:
        """The samples of some rows."""
        # Decoding releases the GIL. The window bounds the number of decoded clips that wait.
        threads = min(8, os.cpu_count() or 1)
        most = fitting(2 * threads, self._config.sizes)
        waiting: deque[tuple[Item, Future]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for item in self._planned(rows, pool):
                if (item.row, item.window) in self.failures:
                    continue
                waiting.append((item, pool.submit(self._load, item)))
                if len(waiting) > most:
                    yield from self._take(*waiting.popleft())
            while waiting:
                yield from self._take(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)  # who is interrupted does not wait for all of them

    def _planned(self, rows: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[Item]:
        """The items of some rows; files are looked at a little ahead."""
        ahead: deque[tuple[int, Future]] = deque()
        for row in [*rows, *[None] * 8]:
            if row is not None:
                ahead.append((row, pool.submit(self._items_of, row)))
            if ahead and (row is None or len(ahead) > 8):
                index, future = ahead.popleft()
                try:
                    found = future.result()
                except UserError as error:
                    self._fail(index, 0, 0.0, error)
                    continue
                for place, item in enumerate(found):
                    if isinstance(item, Failure):
                        self.failures[index, place] = item
                    else:
                        yield item

    def _items_of(self, index: int) -> list["Item | Failure"]:
        if index not in self._items:
            row = self.rows[index]
            self._items[index] = items_of(index, row, self._config, self.film(row.path))
        return self._items[index]

    def _take(self, item: Item, future: Future) -> Iterator[Sample]:
        try:
            sample = future.result()
            self._check_length(sample)
        except UserError as error:
            self._fail(item.row, item.window, item.start, error)
            return
        if item not in self._cache and sample.nbytes <= self._room:
            self._room -= sample.nbytes
            self._cache[item] = sample
        yield sample

    def _check_length(self, sample: Sample) -> None:
        if not self.one_length or sample.audio is None or sample.item.bucket is None:
            return
        if self.audio_samples is None:
            self.audio_samples = len(sample.audio)
        if len(sample.audio) != self.audio_samples:
            rate = self._rates.sample_rate
            ours, theirs = (n / rate for n in (len(sample.audio), self.audio_samples))
            raise UserError(
                f"at {sample.fps:g} frames per second its sound lasts {ours:.2f} s, that of the "
                f"first clip {theirs:.2f} s; give one frame rate for all (--fps)"
            )

    def _fail(self, row: int, window: int, start: float, error: UserError) -> None:
        # Listed under the name the table gives it; the path once more would only be noise.
        reason = str(error).removeprefix(f"{self.rows[row].path}: ")
        self.failures[row, window] = Failure(row, reason, start, is_passing(error))

    def _load(self, item: Item) -> Sample:
        if item in self._cache:
            return self._cache[item]
        row = self.rows[item.row]
        try:
            return read_item(item, row, self._config, self._rates)
        except TooShort as error:  # fewer frames than the file says: another bucket may do
            if item.window or len(self._config.sizes) == 1 or not error.frames:
                raise
            size = file_size(row.path)
            bucket = choose_bucket(self._config.sizes, error.frames, size.height, size.width)
            other = dataclasses.replace(item, bucket=bucket)
            return read_item(other, row, self._config, self._rates)


def fitting(count: int, sizes: Sequence[Bucket], limit: int = 2**29) -> int:
    """At most `count` clips whose pixels together stay within `limit` bytes; at least one."""
    clip = max(bucket.num_frames * bucket.height * bucket.width * 3 for bucket in sizes)
    return max(1, min(count, limit // clip))
