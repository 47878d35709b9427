"""Do sound and picture agree in time? Onsets of both, and the lags between them.

The detectors see only pixels and samples, never the caption or the family of a clip. They are made
for one object in front of a still scene, each row of which is plain apart from the object (as the
clips of `demo.synthetic` are), and they stand the blur and noise of generated clips.

What counts as a visual event:
  - the light of the object jumps (a flash). Its time is read from the decay after the jump;
  - the object turns from falling to rising (an impact). Its time is where the fall and the rise,
    extended with the curvature measured over the whole clip, meet.

The lag of an audio onset is the distance to the nearest visual onset of the same clip, an event in
the picture being where its frame is: a viewer sees nothing between frames, and detectors for any
footage resolve no more. At 12 frames per second perfectly aligned clips then have a median lag of
a quarter of a frame, 21 ms. The finer times that this file reads from the motion of scripted
events are reported beside it.

The same measure over clips whose sound tracks were exchanged is what chance gives, so a report
always has both: a detector that fires everywhere would lower both alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from ltx2_jax.media.media import Clip

# Audio
HOP_SECONDS = 0.0025
WINDOW_SECONDS = 0.010
RISE_SECONDS = 0.030  # an onset's level is compared with the lowest so shortly before it
SILENCE = 0.004  # RMS below which a track has no onsets: -48 dBFS
RISE_SHARE = 0.25  # of the clip's highest level
MIN_GAP_SECONDS = 0.12  # one event a clip at most within this, in sound and picture

# Picture
NOISE_LEVELS = (
    10.0  # 8-bit levels by which a pixel must differ from its row to belong to the object
)
JUMP_SHARE = 0.30  # of the clip's brightest frame, by which light must rise in two frames
FALL_SHARE = 0.12  # of the frame's height, by which an object must have fallen, and rise again
SEEN_SHARE = 0.35  # of the largest contrast, above which the place of an object is trusted
DECAY_RANGE = (0.05, 0.40)  # seconds to 1/e between which a flash's decay is believed
DECAY_DEFAULT = 0.15


@dataclasses.dataclass(frozen=True)
class SyncReport:
    """Audio-visual agreement of a set of clips; times in seconds.

    median_lag: median |audio onset - nearest visual onset|, visual onsets at frame times.
    interval: 95 % bootstrap interval of median_lag over the clips.
    shuffled_median_lag: the same with the sound tracks exchanged among the clips.
    subframe_median_lag: as median_lag, with visual onsets interpolated between frames. All are NaN
    without any audio onset, and the shuffled one for fewer than two clips. num_onsets: audio
    onsets, the number of lags behind a median.
    """

    median_lag: float
    interval: tuple[float, float]
    shuffled_median_lag: float
    subframe_median_lag: float
    num_onsets: int
    num_visual_onsets: int
    num_clips: int
    num_clips_without_audio_onset: int
    num_clips_without_visual_onset: int

    def __str__(self) -> str:
        if not self.num_onsets:
            return f"no onset is heard in {self.num_clips} clips"
        return (
            f"median |lag| {1000 * self.median_lag:.0f} ms "
            f"({1000 * self.interval[0]:.0f} to {1000 * self.interval[1]:.0f}), shuffled "
            f"{1000 * self.shuffled_median_lag:.0f} ms, between frames "
            f"{1000 * self.subframe_median_lag:.0f} ms ({self.num_onsets} audio and "
            f"{self.num_visual_onsets} visual onsets in {self.num_clips} clips; "
            f"{self.num_clips_without_audio_onset} clips without audio onset, "
            f"{self.num_clips_without_visual_onset} without visual onset)"
        )


# ---------------------------------------------------------------- lags


def onset_lags(clips: Iterable[Clip], *, subframe: bool = False) -> np.ndarray:
    """|audio onset - nearest visual onset| in seconds, float64 [all audio onsets of all clips].

    Visual onsets are at the time of a frame, or between frames with `subframe`.
    A clip without audio onsets contributes nothing (`SyncReport` counts such clips). In a clip
    without visual onsets every audio onset has the clip's duration as its lag: no onset found in
    the picture could be further away, so missing events in the picture never improve a result.
    """
    tracks = [_onsets(clip) for clip in clips]
    tracks = tracks if subframe else [track.at_frames() for track in tracks]
    return _lags([track.audio for track in tracks], tracks)


def sync_report(
    clips: Iterable[Clip],
    *,
    kinds: Sequence[Hashable] | None = None,
    num_shuffles: int = 8,
    seed: int = 0,
) -> SyncReport:
    """Measures clips (with sound) against the same clips with exchanged sound tracks.

    Each of the num_shuffles exchanges is a random cycle through the clips, so no clip keeps its own
    track; their lags are pooled before the median. Clips without visual onsets are treated as in
    `onset_lags`, alike in both measures.

    kinds: one per clip, what its caption tells of the events. Tracks are then exchanged between
    clips of one kind only (those alone of their kind, between each other): what captions say about
    number and tempo brings sound and picture closer than pure chance, and is no synchrony.
    """
    between = [_onsets(clip) for clip in clips]
    tracks = [track.at_frames() for track in between]
    sounds = [track.audio for track in tracks]
    lags = _lags(sounds, tracks)
    rng = np.random.default_rng(seed)
    groups = _groups(kinds if kinds is not None else [None] * len(tracks))
    shuffled = [np.zeros(0)]
    for group in groups * num_shuffles:
        takers = rng.permutation(group)
        givers = np.roll(takers, 1)
        shuffled.append(_lags([sounds[i] for i in givers], [tracks[i] for i in takers]))
    return SyncReport(
        median_lag=_median(lags),
        interval=_bootstrap([_lags([track.audio], [track]) for track in tracks], rng),
        shuffled_median_lag=_median(np.concatenate(shuffled)),
        subframe_median_lag=_median(_lags(sounds, between)),
        num_onsets=len(lags),
        num_visual_onsets=sum(len(track.visual) for track in tracks),
        num_clips=len(tracks),
        num_clips_without_audio_onset=sum(not len(track.audio) for track in tracks),
        num_clips_without_visual_onset=sum(not len(track.visual) for track in tracks),
    )


@dataclasses.dataclass(frozen=True)
class Events:
    """What is seen and heard in a set of clips, counted.

    matched: heard within 0.12 s of one that is seen. median_lag: seconds, as in `SyncReport`; None
    where nothing is heard.
    """

    seen: int
    heard: int
    matched: int
    median_lag: float | None


def events(clips: Iterable[Clip]) -> Events | None:
    """Those of the clips with sound whose pictures the detectors are made for: see `is_plain`.

    None: there are no such clips, or none in which anything is seen to happen.
    """
    tracks = [_onsets(c).at_frames() for c in clips if c.audio is not None and is_plain(c.video)]
    seen, lags = sum(len(x.visual) for x in tracks), _lags([x.audio for x in tracks], tracks)
    if not seen:
        return None
    matched = int((lags <= MIN_GAP_SECONDS).sum())
    return Events(seen, len(lags), matched, _median(lags) if len(lags) else None)


def is_plain(
    video: np.ndarray,  # uint8 [F, H, W, 3]
) -> bool:
    """Whether rows are plain but for an object, as the detectors of visual events need them.

    Generated clips of such scenes stay below the limit; noise and films of the world lie above.
    """
    some = video[:: max(1, len(video) // 8)]  # which of a long clip are enough
    return bool(len(some)) and float(np.median(_contrast(some))) <= NOISE_LEVELS


@dataclasses.dataclass(frozen=True)
class _Onsets:
    audio: np.ndarray
    visual: np.ndarray
    duration: float
    fps: float

    def at_frames(self) -> _Onsets:
        """The same with visual onsets at the nearest frame."""
        return dataclasses.replace(self, visual=np.round(self.visual * self.fps) / self.fps)


def _onsets(clip: Clip) -> _Onsets:
    audio = np.zeros(0) if clip.audio is None else audio_onsets(clip.audio, clip.sample_rate)
    return _Onsets(audio, visual_onsets(clip.video, clip.fps), clip.duration, clip.fps)


def _groups(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal kinds, two or more each; single ones together if there are several."""
    members: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    alone = [group[0] for group in members.values() if len(group) == 1]
    groups = [group for group in members.values() if len(group) > 1]
    return groups + ([alone] if len(alone) > 1 else [])


def _bootstrap(lags: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the median over clips drawn with replacement; lags: one array per clip."""
    draws = rng.integers(len(lags), size=(400, len(lags)))
    medians = [_median(np.concatenate([lags[i] for i in draw])) for draw in draws]
    low, high = np.nanpercentile(medians, [2.5, 97.5]) if any(map(len, lags)) else (math.nan,) * 2
    return float(low), float(high)


def _lags(sounds: Sequence[np.ndarray], tracks: Sequence[_Onsets]) -> np.ndarray:
    lags = [np.zeros(0)]
    for sound, track in zip(sounds, tracks, strict=True):
        if len(track.visual):
            lags.append(np.abs(sound[:, None] - track.visual).min(axis=1, initial=np.inf))
        else:
            lags.append(np.full(len(sound), track.duration))
    return np.concatenate(lags)


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


# ---------------------------------------------------------------- sound


def audio_onsets(
    audio: np.ndarray,  # float [samples, channels], in [-1, 1]
    sample_rate: int,
) -> np.ndarray:
    """Times at which the sound's level jumps: float64 seconds [n], ascending.

    The level is the RMS over 10 ms, every 2.5 ms. An onset is a rise within 30 ms by at least a
    quarter of the clip's highest level and well over its noise; its time is where half of the rise
    is done, which for a soft attack of a few milliseconds is within about 2 ms of the beginning.
    Onsets less than 0.12 s after one before are part of it. Silence has none.
    """
    level = _level(np.asarray(audio, np.float64), sample_rate)
    hop = max(1, round(HOP_SECONDS * sample_rate)) / sample_rate
    reach = max(1, round(RISE_SECONDS / hop))
    if len(level) <= reach or level.max() < SILENCE:
        return np.zeros(0)
    # A track that begins with a sound rises from silence.
    padded = np.pad(level, (reach, 0))
    before = np.lib.stride_tricks.sliding_window_view(padded, reach + 1).min(axis=1)
    rise = level - before
    threshold = max(RISE_SHARE * level.max(), 3 * float(np.median(level)), SILENCE)
    onsets: list[float] = []
    for begin, end in _runs(rise > threshold):
        top = begin + int(np.argmax(rise[begin : end + 1]))
        half = level[top] - rise[top] / 2
        below = top
        while below > 0 and level[below - 1] >= half:
            below -= 1
        if below == 0:
            time = 0.0
        else:
            part = (half - level[below - 1]) / (level[below] - level[below - 1])
            time = (below - 1 + part) * hop
        if not onsets or time - onsets[-1] >= MIN_GAP_SECONDS:
            onsets.append(time)
    return np.array(onsets, np.float64)


def _level(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """RMS of the mean channel around every hop: [samples / hop + 1]."""
    hop = max(1, round(HOP_SECONDS * sample_rate))
    half = max(1, round(WINDOW_SECONDS * sample_rate / 2))
    mono = audio.mean(axis=1) if audio.ndim == 2 else audio
    if not len(mono):
        return np.zeros(0)
    energy = np.concatenate([[0.0], np.cumsum(mono * mono)])
    centre = np.arange(0, len(mono) + 1, hop)
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half, len(mono))
    return np.sqrt(np.maximum(energy[high] - energy[low], 0) / (2 * half))


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of True."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1, strict=True))


# ---------------------------------------------------------------- picture


def visual_onsets(
    video: np.ndarray,  # uint8 [F, H, W, 3]
    fps: float,
) -> np.ndarray:
    """Times of flashes and impacts, finer than the frame period: float64 seconds [n], ascending.

    Frame k is taken to show the time k / fps. Fewer than five frames have no onsets.
    """
    if len(video) < 5:
        return np.zeros(0)
    frames, contrast = np.asarray(video, np.float32), _contrast(video)
    noise = max(NOISE_LEVELS, 4 * float(np.median(contrast)))
    contrast = np.maximum(contrast - noise, 0)
    found = np.sort(np.concatenate([_flashes(frames, contrast, fps), _impacts(contrast, fps)]))
    onsets: list[float] = []
    for time in found:
        if not onsets or time - onsets[-1] >= MIN_GAP_SECONDS:
            onsets.append(float(time))
    return np.array(onsets, np.float64)


def _contrast(video: np.ndarray) -> np.ndarray:
    """How far pixels are from the median of their row: float32 [F, H, W]."""
    frames = np.asarray(video, np.float32)
    return np.abs(frames - np.median(frames, axis=2, keepdims=True)).mean(axis=3)


def _flashes(
    frames: np.ndarray,  # [F, H, W, 3]
    contrast: np.ndarray,  # [F, H, W]
    fps: float,
) -> np.ndarray:
    """Times of jumps of the object's light, read from how the light decays after them.

    With light that jumps at time s and decays by q = exp(-1 / (fps tau)) a frame, the frame after
    the peak holds only decay, and what the two frames before it collected since s, divided by what
    it holds, is (q^-g - 1) / (1 - q), where g is the time from s to the beginning of its exposure,
    in frames. So g follows without knowing the strength of the flash.
    """
    mass = contrast.sum(axis=(1, 2))
    if mass.max() <= 0:
        return np.zeros(0)
    # The mass tells that the light jumped; how much of it a frame holds is read linearly, as the
    # projection of its pixels onto the brightest change.
    change = frames - frames[np.argmin(mass)]
    pattern = change[np.argmax(mass)]
    light = np.tensordot(change, pattern, axes=3) / max(float((pattern**2).sum()), 1e-6)
    light -= light.min()
    count, peaks = len(mass), []
    for index in range(count):
        here = mass[index]
        later = mass[index + 1] if index + 1 < count else 0.0
        earlier = mass[max(index - 2, 0) : index]
        if len(earlier) and here > later and here >= earlier[-1]:
            if here - earlier.min() > JUMP_SHARE * mass.max():
                peaks.append(index)
    if not peaks:
        return np.zeros(0)
    decay = _decay_per_frame(light, peaks, fps)
    times = []
    for peak in peaks:
        base = light[peak - 2] if peak >= 2 else 0.0
        collected = sum(
            max(light[peak - 1 + step] - base * decay ** (1 + step), 0.0) for step in (0, 1)
        )
        full = light[peak + 1] - base * decay**3 if peak + 1 < count else 0.0
        full = max(full, decay * (light[peak] - base * decay**2) * 0.5, 1e-6)
        gap = math.log1p(collected / full * (1 - decay)) / -math.log(decay)
        times.append((peak + 0.5 - min(gap, 2.0)) / fps)
    return np.array(times)


def _decay_per_frame(light: np.ndarray, peaks: Sequence[int], fps: float) -> float:
    """Median ratio of successive frames that hold nothing but decay, within what is believable."""
    ratios = []
    for peak, following in zip(peaks, [*peaks[1:], len(light) + 1], strict=True):
        tail = light[peak + 1 : following - 1]
        tail = tail[: max(2, round(0.2 * fps))]
        ratios.extend(b / a for a, b in itertools.pairwise(tail) if a > 0.05)
    low, high = (math.exp(-1 / (fps * tau)) for tau in DECAY_RANGE)
    ratio = float(np.median(ratios)) if ratios else math.exp(-1 / (fps * DECAY_DEFAULT))
    return min(max(ratio, low), high)


def _impacts(contrast: np.ndarray, fps: float) -> np.ndarray:
    """Times at which the object's centre turns from falling to rising."""
    count, rows, _ = contrast.shape
    weight = contrast.sum(axis=2)  # [F, H]
    mass = weight.sum(axis=1)
    seen = mass > SEEN_SHARE * mass.max()
    if seen.sum() < 5:
        return np.zeros(0)
    centre = (weight * np.arange(rows)).sum(axis=1) / np.maximum(mass, 1e-6)  # [F], downwards
    centre = np.interp(np.arange(count), np.flatnonzero(seen), centre[seen])
    if np.ptp(centre) < 2 * FALL_SHARE * rows:
        return np.zeros(0)
    turns = _lowest_points(centre, FALL_SHARE * rows)
    gravity = _curvature(centre, turns)
    times = [_meeting(centre, turn, gravity) for turn in turns]
    return np.array(times) / fps


def _lowest_points(centre: np.ndarray, swing: float) -> list[int]:
    """Frames that are local maxima of `centre`, at least `swing` below what surrounds them."""
    turns = []
    for index in range(1, len(centre) - 1):
        value = centre[index]
        if not (centre[index - 1] < value >= centre[index + 1]):
            continue
        deeper = np.flatnonzero(centre > value)
        first = max(deeper[deeper < index], default=-1) + 1
        last = min(deeper[deeper > index], default=len(centre))
        if value - max(centre[first:index].min(), centre[index:last].min()) >= swing:
            turns.append(index)
    return turns


def _curvature(centre: np.ndarray, turns: Sequence[int]) -> float:
    """Acceleration in rows a frame squared: the median second difference of the free flights."""
    second = np.diff(centre, 2)  # of frames k, k + 1, k + 2
    clear = [
        second[k]
        for k in range(len(second))
        if min((abs(k + 1 - turn) for turn in turns), default=9) in (2, 3)
    ]
    return max(float(np.median(clear)), 0.0) if clear else 0.0


def _meeting(centre: np.ndarray, turn: int, gravity: float) -> float:
    """The time, in frames, at which the fall before and the rise after `turn` meet.

    The frame at the turn lies on the fall or on the rise. Both readings are tried, each flight
    being a parabola of the known curvature through its two nearest frames, and judged by whether
    they meet on their own side of the frame. The wrong reading meets at the frame itself, so of two
    possible ones the further is right.
    """
    time = np.arange(len(centre), dtype=np.float64) - turn
    flat = centre - gravity / 2 * time**2  # free flight becomes a line of time

    def line(first: int) -> tuple[float, float]:
        slope = flat[first + 1] - flat[first]
        return slope, flat[first] - slope * time[first]

    candidates = []
    for last_of_fall in (turn, turn - 1):
        first, second = last_of_fall - 1, last_of_fall + 1
        if first < 0 or second + 1 >= len(centre):
            continue
        (fall, at_fall), (rise, at_rise) = line(first), line(second)
        if fall - rise > 1e-3:
            meeting = (at_rise - at_fall) / (fall - rise)
            outside = max(last_of_fall - turn - meeting, meeting - (last_of_fall + 1 - turn), 0.0)
            candidates.append((max(outside - 0.1, 0.0), -abs(meeting), meeting))
    if not candidates:
        return float(turn)
    return turn + float(np.clip(min(candidates)[2], -1, 1))
