"""Scripted audio-video clips with known event times: a bouncing ball, a flashing lamp.

They exist to measure whether generated sound and picture agree in time. The caption fixes what is
seen and heard (family, colour, pitch, number of events, tempo class) and says nothing about *when*:
the time of the first event is uniform over all that fits the clip, and the exact period is uniform
inside its tempo class. A model can therefore place its sounds on its pictures only by letting the
two streams tell each other the time; from the caption alone it is as good as a sound track taken
from another clip with the same caption.

Both families can be read more finely than the frame period. The ball is drawn antialiased where it
is at the very time k / fps of frame k, on parabolas that meet at the impacts. The lamp's brightness
is the mean over the exposure of frame k, (k - 1/2) / fps to (k + 1/2) / fps, of pulses that jump at
the flash and decay exponentially, so the frames around a flash tell its time without knowing its
strength. There are few degrees of freedom on purpose (a still camera, plain backgrounds, no
sideways motion, fixed pitches), so that a linear codec and a small model can learn a few hundred.
A third family, the ball by night with the lamp's beep, is made of what the two others show and say,
but is in neither: it is there for a fine-tuning to learn.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import tqdm

from ltx2_jax.demo.config import SyntheticConfig
from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing
from ltx2_jax.media import media

COLORS = {
    "red": (214, 40, 46),
    "green": (38, 160, 70),
    "blue": (44, 84, 214),
    "yellow": (240, 190, 20),
    "purple": (146, 52, 176),
}
PITCHES = {"low": 330.0, "middle": 660.0, "high": 1320.0}  # Hz
TEMPOS = {"fast": (0.33, 0.41), "medium": (0.50, 0.62), "slow": (0.75, 1.00)}  # period, seconds
COUNTS = {1: "once", 2: "twice", 3: "three times"}

SKY, FLOOR, FLOOR_EDGE = (222, 228, 234), (122, 108, 96), (74, 64, 58)
NIGHT, LAMP_OFF = (22, 24, 34), 0.30  # the unlit lamp shows this share of its colour
LAMP_DECAY = 0.15  # seconds to 1/e
TONE_ATTACK, TONE_DECAY, TONE_LEVEL = 0.0025, 0.05, 0.5

# First and last event keep this distance from the ends of the clip, so that the picture before and
# after them can be read; and a count and tempo is used only if this share of the clip's length is
# left to shift its events in.
MARGIN_SECONDS, MARGIN_SHARE = 0.2, 0.125
MIN_SLACK_SHARE = 0.2

# Part of what write_dataset stores: raise it when the same config would render other clips.
VERSION = 1

WORDINGS = {
    "bounce": {
        "many": (
            "a {color} ball bounces {count} at a {tempo} tempo, each impact a {pitch} note",
            "a {color} ball bouncing {count} on the floor, {tempo} tempo, a {pitch} note each time",
            "a {pitch} note on every impact of a {color} ball that bounces {count}, {tempo}",
        ),
        "one": (
            "a {color} ball bounces {count}, the impact a {pitch} note",
            "a {color} ball bouncing {count} on the floor with a {pitch} note",
            "a {pitch} note on the impact of a {color} ball that bounces {count}",
        ),
    },
    "flash": {
        "many": (
            "a {color} lamp flashes {count} at a {tempo} tempo, each flash a {pitch} beep",
            "a {color} lamp flashing {count} in the dark, {tempo} tempo, a {pitch} beep each time",
            "a {pitch} beep on every flash of a {color} lamp that flashes {count}, {tempo}",
        ),
        "one": (
            "a {color} lamp flashes {count}, the flash a {pitch} beep",
            "a {color} lamp flashing {count} in the dark with a {pitch} beep",
            "a {pitch} beep on the flash of a {color} lamp that flashes {count}",
        ),
    },
    "night": {
        "many": (
            "a {color} ball bounces {count} in the dark, {tempo} tempo, each impact a {pitch} beep",
            "a {color} ball bouncing {count} in the dark, {tempo} tempo, a {pitch} beep each time",
            "a {pitch} beep on each impact of a {color} ball bouncing {count} in the dark, {tempo}",
        ),
        "one": (
            "a {color} ball bounces {count} in the dark, the impact a {pitch} beep",
            "a {color} ball bouncing {count} in the dark with a {pitch} beep",
            "a {pitch} beep on the impact of a {color} ball in the dark that bounces {count}",
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class SyntheticClip:
    """A rendered clip with its caption and the event times, float64 seconds [n]."""

    clip: media.Clip
    caption: str
    family: str
    events: np.ndarray


def render(config: SyntheticConfig, index: int) -> SyntheticClip:
    """Clip number `index` of a dataset: a pure function of (config, index).

    Families alternate. Video uint8 [F, H, W, 3]; audio float32 [round(F / fps * rate), 2], the same
    in both channels, exactly zero before the first event.
    """
    rng = np.random.default_rng([config.seed, 0, index])
    family = config.families[index % len(config.families)]
    scene = _draw_scene(rng, config, family)
    low, high = TEMPOS[scene["tempo"]]
    period = rng.uniform(low, high)
    margin = _margin(config)
    span = (scene["count"] - 1) * period
    first = rng.uniform(margin, config.duration - margin - span)
    events = first + period * np.arange(scene["count"])
    color = COLORS[scene["color"]]
    if family == "flash":
        video = _draw_flash(config, color, events)
    else:
        video = _draw_bounce(config, color, events, period, by_night=family == "night")
    clip = media.Clip(
        video=video,
        fps=config.fps,
        audio=_tones(config, PITCHES[scene["pitch"]], events, family),
        sample_rate=config.sample_rate,
    )
    return SyntheticClip(clip, _caption(rng, family, scene), family, events)


def captions(config: SyntheticConfig, num: int, seed: int) -> list[str]:
    """Fresh captions of the grammar of `config`'s clips, families alternating, for sampling."""
    result = []
    for index in range(num):
        rng = np.random.default_rng([seed, 1, index])
        family = config.families[index % len(config.families)]
        result.append(_caption(rng, family, _draw_scene(rng, config, family)))
    return result


def event_kind(caption: str) -> tuple[str, ...]:
    """What a caption tells of its events: family, number and tempo, as far as it does."""
    words = ("ball", "lamp", *COUNTS.values(), *TEMPOS)
    return tuple(word for word in words if word in caption)


def is_scripted(caption: str) -> bool:
    """Whether a caption is of these clips, for which the measure of sync is made."""
    words = event_kind(caption)
    return bool({"ball", "lamp"} & set(words)) and bool(set(COUNTS.values()) & set(words))


def write_dataset(folder: str | os.PathLike, config: SyntheticConfig) -> Path:
    """Renders `config.num_clips` clips to files: H.264 + AAC in clips/*.mp4, then captions.csv.

    The table has the columns video (relative to the table), caption, family and events (seconds,
    joined by ";"). It is written last, so its presence means that the clips are complete. Files
    appear whole or not at all; calling again keeps those that exist and goes on, and a larger
    num_clips extends a dataset. What a folder holds is noted in synthetic.json. Returns the path of
    captions.csv. Raises UserError if the folder holds clips of another config, or for an odd height
    or width, which H.264 in yuv420p lacks.
    """
    folder = Path(folder)
    _claim(folder, config)

    def row(index: int) -> tuple[str, ...]:
        name = f"clips/{index:06d}.mp4"
        made = render(config, index)
        if not (folder / name).exists():
            media.write_mp4(folder / name, made.clip)
        return name, made.caption, made.family, ";".join(f"{time:.4f}" for time in made.events)

    count, threads = config.num_clips, min(8, os.cpu_count() or 1)
    # Closed, so that whoever interrupts it does not wait for the rest.
    with ThreadPoolExecutor(threads) as pool, closing(pool.map(row, range(count))) as coming:
        rows = list(tqdm.tqdm(coming, total=count, desc="clips", disable=None))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("video", "caption", "family", "events"))
    writer.writerows(rows)
    with replacing(folder / "captions.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    return folder / "captions.csv"


# ---------------------------------------------------------------- the script of a clip


def _margin(config: SyntheticConfig) -> float:
    return min(MARGIN_SECONDS, MARGIN_SHARE * config.duration)


def _combinations(config: SyntheticConfig) -> dict[int, list[str]]:
    """The tempos that fit the clip with room to shift, by number of events."""
    room = config.duration - 2 * _margin(config) - MIN_SLACK_SHARE * config.duration
    fitting = {1: list(TEMPOS)}  # one event has no tempo; its class only sets how fast a ball falls
    for count in COUNTS:
        tempos = [tempo for tempo, (_, high) in TEMPOS.items() if (count - 1) * high <= room]
        if count > 1 and tempos:
            fitting[count] = tempos
    return fitting


def _draw_scene(rng: np.random.Generator, config: SyntheticConfig, family: str) -> dict:
    """What the caption tells, drawn uniformly; the same draws for every family."""
    fitting = _combinations(config)
    count = int(rng.choice(list(fitting)))
    return {
        "count": count,
        "tempo": str(rng.choice(fitting[count])),
        "color": str(rng.choice(list(COLORS))),
        "pitch": str(rng.choice(list(PITCHES))),
    }


def _caption(rng: np.random.Generator, family: str, scene: dict) -> str:
    wordings = WORDINGS[family]["one" if scene["count"] == 1 else "many"]
    wording = wordings[rng.integers(len(wordings))]
    return wording.format(**(scene | {"count": COUNTS[scene["count"]]}))


# ---------------------------------------------------------------- picture


def _pixels(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows [H, 1] and columns [1, W] of pixel centres from the middle of the frame, and the side.

    In units of pixels; the side is that of the largest square of the frame.
    """
    rows = np.arange(config.height)[:, None] + 0.5 - config.height / 2
    columns = np.arange(config.width)[None, :] + 0.5 - config.width / 2
    return rows, columns, float(min(config.height, config.width))


def _cover(distance: np.ndarray) -> np.ndarray:
    """How much of a pixel lies inside a shape whose edge is `distance` pixels further out."""
    return np.clip(distance + 0.5, 0, 1)


def _blend(
    background: np.ndarray,  # [..., 3]
    color: tuple[int, int, int],
    alpha: np.ndarray,  # [...]
) -> np.ndarray:
    return background + (np.asarray(color, float) - background) * alpha[..., None]


def _draw_bounce(
    config: SyntheticConfig,
    color: tuple[int, int, int],
    events: np.ndarray,
    period: float,
    by_night: bool,
) -> np.ndarray:
    """A ball held at the top, dropped so that it meets the floor at every event, caught at the top.

    The arcs between impacts are parabolas over `period`; the fall and the last rise are half arcs.
    By night the floor is not seen.
    """
    rows, columns, side = _pixels(config)
    radius, floor = 0.15 * side, 0.36 * side
    apex = 0.48 * side  # of the ball's lowest point, over the floor
    sky = np.asarray(NIGHT if by_night else SKY, float)
    scene = np.broadcast_to(sky, (config.height, config.width, 3))
    if not by_night:
        scene = _blend(scene, FLOOR_EDGE, _cover(rows - floor) + 0 * columns)
        scene = _blend(scene, FLOOR, _cover(rows - floor - 0.06 * side) + 0 * columns)
    time = np.arange(config.num_frames) / config.fps
    phase = np.clip((time - events[0]) / period, -0.5, len(events) - 0.5) % 1.0
    height = 4 * apex * phase * (1 - phase)  # [F]
    centre = floor - radius - height[:, None, None]
    distance = np.sqrt((rows - centre) ** 2 + columns**2)  # [F, H, W]
    video = _blend(scene, color, _cover(radius - distance))
    return np.round(video).astype(np.uint8)


def _draw_flash(
    config: SyntheticConfig, color: tuple[int, int, int], events: np.ndarray
) -> np.ndarray:
    """A square lamp with a halo, both following the same brightness over a dim body."""
    rows, columns, side = _pixels(config)
    night, hue = np.asarray(NIGHT, float), np.asarray(color, float)
    distance = np.maximum(np.abs(rows), np.abs(columns)) - 0.2 * side  # to the edge of the square
    inside = _cover(-distance)
    dark = night + (LAMP_OFF * hue - 0.5 * night) * inside[..., None]
    # Lit, the lamp shows its colour, brightened towards white; the halo falls off around it.
    bright = 0.8 * hue + 0.2 * 255 + 10
    halo = 0.45 * np.exp(-np.maximum(distance, 0) / (0.10 * side)) * (1 - inside)
    glow = (bright - LAMP_OFF * hue) * inside[..., None] + hue * halo[..., None]
    brightness = _exposed_pulses(config, events)  # [F]
    video = dark + glow * brightness[:, None, None, None]
    return np.round(np.clip(video, 0, 255)).astype(np.uint8)


def _exposed_pulses(config: SyntheticConfig, events: np.ndarray) -> np.ndarray:
    """Mean over each frame's exposure of exp(-(t - event) / LAMP_DECAY) after each event: [F]."""
    opening = (np.arange(config.num_frames + 1) - 0.5) / config.fps
    since = np.maximum(opening[:, None] - events, 0)  # [F + 1, n]
    light = LAMP_DECAY * (1 - np.exp(-since / LAMP_DECAY)).sum(axis=1)
    return np.diff(light) * config.fps


# ---------------------------------------------------------------- sound


def _tones(config: SyntheticConfig, pitch: float, events: np.ndarray, family: str) -> np.ndarray:
    """float32 [samples, 2]: at every event a tone with a soft attack and an exponential decay.

    The ball's note has a second partial, the lamp's beep is pure. Later tones replace what is left
    of earlier ones, so the level never exceeds TONE_LEVEL.
    """
    samples = round(config.duration * config.sample_rate)
    time = np.arange(samples) / config.sample_rate
    since = time - events[np.maximum(np.searchsorted(events, time, side="right") - 1, 0)]
    envelope = np.minimum(since / TONE_ATTACK, 1) * np.exp(-since / TONE_DECAY)
    angle = 2 * np.pi * pitch * since
    overtone = 0.3 if family == "bounce" else 0.0
    wave = (np.sin(angle) + overtone * np.sin(2 * angle)) / (1 + overtone)
    mono = np.where(since >= 0, TONE_LEVEL * envelope * wave, 0.0).astype(np.float32)
    return np.repeat(mono[:, None], 2, axis=1)


# ---------------------------------------------------------------- files


def _claim(folder: Path, config: SyntheticConfig) -> None:
    """Notes in the folder what it holds; refuses a folder that holds something else."""
    facts = json.loads(json.dumps(dataclasses.asdict(config)))
    del facts["num_clips"]  # extending a dataset changes none of its clips
    facts["version"] = VERSION
    note = folder / "synthetic.json"
    if note.exists():
        try:
            held = json.loads(note.read_text())
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise UserError(f"{note}: not readable; remove the folder and write it anew")
        keys = sorted({*held, *facts})
        changed = [key for key in keys if held.get(key) != facts.get(key)]
        if changed:
            raise UserError(
                f"{folder}: holds clips of another config (different: {', '.join(changed)}); "
                "choose another folder or remove this one"
            )
    elif (folder / "clips").exists() or (folder / "captions.csv").exists():
        raise UserError(f"{folder}: holds clips of unknown origin; choose another folder")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
