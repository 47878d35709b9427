"""LoRAs of a clip: how strong each is in a stage, in the video, the audio and between the two."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.weights.lora_files import Lora

# What a LoRA's modules belong to: each stream has a strength of its own.
STREAMS = {"cross": r"audio_to_video|video_to_audio|av_ca", "audio": r"\baudio_", "video": r""}
# The keys by which LoRAs say how they read a reference clip: of official files, older ones, others.
_REFERENCE = ("reference_spatial_scale_factor", "reference_downscale_factor",
              "ss_reference_downscale_factor")  # fmt: skip
_REFERENCE_TIME = "reference_temporal_scale_factor"


@dataclass(frozen=True)
class Strength:
    """How strong a LoRA is in the modules of the video, of the audio, and between the two."""

    video: float = 1.0
    audio: float = 1.0
    cross: float = 1.0


OFF = Strength(0, 0, 0)
Used = tuple[tuple[Lora, Strength], ...]  # LoRAs of a stage; equal if they are the same objects


def by_stream(lora: Lora, strength: Strength) -> list[tuple[Lora, float]]:
    """A LoRA in parts of one strength each; nothing where it is 0."""
    found: dict[str, dict[str, Any]] = {name: {} for name in STREAMS}
    for module, target in lora.targets.items():
        stream = next(name for name, known in STREAMS.items() if re.search(known, module))
        found[stream][module] = target
    strengths = dataclasses.asdict(strength)
    return [
        (dataclasses.replace(lora, targets=targets), strengths[name])
        for name, targets in found.items()
        if targets and strengths[name]
    ]


def even(strength: float) -> Strength:
    """The same everywhere."""
    return Strength(strength, strength, strength)


def parts(loras: Used) -> list[tuple[Lora, float]]:
    """Of all LoRAs, in parts of one strength each."""
    return [part for lora, strength in loras for part in by_stream(lora, strength)]


def same(a: Used, b: Used) -> bool:
    """Whether these are the same LoRAs with the same strengths."""
    return len(a) == len(b) and all(x is y and s == t for (x, s), (y, t) in zip(a, b, strict=True))


@dataclass(frozen=True)
class Adapter:
    """A LoRA and its strength in every stage; the last one holds for later stages, too."""

    lora: Lora
    strengths: tuple[Strength, ...]

    def at(self, stage: int) -> Strength:
        return self.strengths[min(stage, len(self.strengths) - 1)]

    @property
    def scales(self) -> tuple[int, int] | None:
        """How many times smaller, and of fewer frames, its reference clips are; None: has none."""
        data = self.lora.metadata
        found = [data[key] for key in _REFERENCE if key in data]
        if not found and _REFERENCE_TIME not in data:
            return None
        try:
            return int(float((found or ["1"])[0])), int(float(data.get(_REFERENCE_TIME, "1")))
        except ValueError:
            raise UserError(f"{self.lora.name}: reference factors {data} are no numbers") from None


def adapter(lora: Lora, strength: Any = 1.0) -> Adapter:
    """A LoRA with its strengths: see `Pipeline.from_pretrained`.

    An IC-LoRA, which reads a reference clip, is for the first stage alone unless it is told.
    """

    def one(value: Any) -> Strength:
        if isinstance(value, Strength):
            return value
        parts = value.split(",") if isinstance(value, str) else [value]
        numbers = [float(part) for part in parts]
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise ValueError
        return Strength(*(numbers * 3)[:3])

    if isinstance(strength, str):
        strength = strength.split("/") if "/" in strength else strength
    several = isinstance(strength, list | tuple)
    try:
        strengths = [one(s) for s in (strength if several else [strength])]
    except (ValueError, TypeError):
        raise UserError(
            f"{lora.name}: strength {strength!r} is not a number, VIDEO,AUDIO,CROSS, or some of "
            "those, one a stage, as in 1/0.5"
        ) from None
    found = Adapter(lora, tuple(strengths))
    if found.scales is not None and len(strengths) == 1:
        found = Adapter(lora, (*strengths, OFF))
    return found
