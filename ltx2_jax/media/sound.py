"""Sound in memory: any layout to stereo, and decoded pieces to one track by their timestamps."""

from __future__ import annotations

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.media.timing import HOLE_SECONDS

SIDE_GAIN = 0.707  # -3 dB, of centre and surround channels in a down-mix
# Timestamps of some containers are rounded to milliseconds. Audio frames follow one another without
# a seam unless their stamps disagree by more than this, which only a real gap does.
GAP_SECONDS = 0.02
# Pieces overlap a little where a recorder corrects its clock. More is another recording.
OVERLAP_SECONDS = 0.1
SILENCE = 10 ** (-70 / 20)  # peak of what nobody hears: 70 dB below full scale
SILENT = "with a sound track that is silent"
PARTLY_SILENT = "with sound for a part of the picture's time"


def to_stereo(
    audio: np.ndarray,  # [samples, channels]
    layout: str = "",
) -> np.ndarray:
    """Any channel layout to two channels: float32 [samples, 2].

    Mono is duplicated. 5.1 and 7.1 (libav's order L R C LFE and then pairs of surrounds) keep left
    and right, add centre and the surrounds of their side at 0.707, drop the low-frequency channel
    and are divided by the sum of gains, 2.414 and 3.121. Six or eight channels that the file does
    not name are taken to be these. Every other layout is averaged into both channels. The same
    rules as the official trainer's audio preprocessing, which goes by the number alone.
    """
    channels = audio.shape[1]
    family = layout.partition("(")[0]
    if channels == 2:
        return audio.astype(np.float32)
    surround = {6: "5.1", 8: "7.1"}.get(channels)
    if surround and family in (surround, "", f"{channels} channels"):
        sides = [audio[:, side::2][:, 2:].sum(axis=1) for side in (0, 1)]
        centre = audio[:, 2]
        norm = 1.0 + SIDE_GAIN * (channels // 2 - 1)
        mixed = [(audio[:, i] + SIDE_GAIN * (centre + sides[i])) / norm for i in (0, 1)]
        return np.stack(mixed, axis=1).astype(np.float32)
    return np.repeat(audio.mean(axis=1, keepdims=True), 2, axis=1).astype(np.float32)


class SoundTrack:
    """The sound of a clip, put together from decoded pieces; zeros where there are none.

    Attributes:
      samples: float32 [round(duration * rate) + 256, 2]. The resampler's filter looks ahead; the
        few more samples keep the end as it is in the file.
    """

    def __init__(self, rate: int, duration: float):
        """Takes Hz, and the seconds that the picture lasts."""
        self._rate = rate
        self._wanted = round(duration * rate)
        self.samples = np.zeros((self._wanted + 256, 2), np.float32)
        self._position: int | None = None
        self._dated = False
        self._first = self._end = 0

    @property
    def full(self) -> bool:
        """Whether what comes next lies after the clip."""
        return self._position is not None and self._position >= len(self.samples)

    def place(
        self,
        piece: np.ndarray,  # [samples, 2]
        time: float | None,  # seconds since the first picture; None follows the piece before
    ) -> None:
        """Adds the next piece. Raises UserError where stamps run backwards or sound is missing."""
        if time is not None:
            stamped = round(time * self._rate)
            if not self._dated:
                self._position, self._dated = stamped, True
            elif abs(stamped - self._position) > GAP_SECONDS * self._rate:
                self._position = self._jump(self._position, stamped)
        position = self._position or 0
        begin, end = max(position, 0), min(position + len(piece), len(self.samples))
        if begin < end:
            self.samples[begin:end] = piece[begin - position : end - position]
            self._first = self._first if self._end else begin
            self._end = max(self._end, end)
        self._position = position + len(piece)

    @property
    def note(self) -> str | None:
        """What the user is told about it, if anything."""
        if np.abs(self.samples[: self._wanted]).max(initial=0) < SILENCE:
            return SILENT
        lacking = max(self._first, self._wanted - self._end)
        return PARTLY_SILENT if lacking > HOLE_SECONDS * self._rate else None

    def _jump(self, old: int, new: int) -> int:
        """The position after stamps went from `old` to `new`, in samples."""
        most = HOLE_SECONDS * self._rate
        seconds = [max(position, 0) / self._rate for position in (old, min(new, self._wanted))]
        if new < old - OVERLAP_SECONDS * self._rate:
            if self._wanted - old <= most:
                return len(self.samples)  # of another recording, but this clip is complete
            raise UserError(
                f"the timestamps of its sound run backwards, from {seconds[0]:.2f} to "
                f"{seconds[1]:.2f} s, as where two recordings were joined; split it there"
            )
        if min(new, self._wanted) - max(old, 0) > most:
            raise UserError(
                f"sound is missing between {seconds[0]:.2f} and {seconds[1]:.2f} s; "
                "cut the clip there"
            )
        return new
