"""What every codec is to its callers: two halves, of which they use nothing else.

Dims: B batch, F frames, H, W pixels, F', H', W' the latent grid, A audio latents, M mel-latent
bins, C channels.
"""

import os
from collections.abc import Iterator
from typing import Protocol

from jax.typing import ArrayLike

from ltx2_jax.diffusion.geometry import AudioClock


class VideoHalf(Protocol):
    """Pixels to latents and back."""

    strides: tuple[int, int, int]  # pixel frames, rows and columns behind a latent
    channels: int  # C

    def encode(self, video: ArrayLike) -> ArrayLike:
        """uint8, or float in [-1, 1], [B, F, H, W, 3] -> [B, F', H', W', C]."""

    def decode(self, latents: ArrayLike) -> ArrayLike:
        """[B, F', H', W', C] -> float32 [B, F, H, W, 3] in [-1, 1]."""

    def decode_chunks(self, latents: ArrayLike) -> Iterator[ArrayLike]:
        """What `decode` gives, in pieces of whole frames in time order."""


class AudioHalf(Protocol):
    """Sound to latents and back."""

    sample_rate: int  # Hz, of what is encoded
    output_sample_rate: int  # Hz, of what is decoded
    bins: int  # M
    channels: int  # C
    clock: AudioClock  # when each latent is

    @property
    def latents_per_second(self) -> float:
        """That of the clock."""

    def encode(self, audio: ArrayLike) -> ArrayLike:
        """[B, samples, 2] -> [B, A, M, C]."""

    def decode(self, latents: ArrayLike, num_samples: int | None = None) -> ArrayLike:
        """[B, A, M, C] -> [B, num_samples, 2]."""


class Codec(Protocol):
    """Both halves, and whose latents these are: "linear", "2.0", "2.3" or "2.5"."""

    video: VideoHalf
    audio: AudioHalf
    release: str

    def save(self, path: str | os.PathLike) -> None:
        """Writes one file that `load_codec` reads."""
