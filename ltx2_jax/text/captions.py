"""Captions to the text features that records store, by whichever encoder made the dataset.

    encoder = load_caption_encoder("data/clips/text_encoder.safetensors")
    caption_features(encoder, ["a red ball bounces once"])

A dataset is made with a released text encoder, or with a small Gemma with fixed random weights
(`ltx2_jax.demo.random_encoder`). Either kind writes one file beside the records.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from ltx2_jax import hosts
from ltx2_jax.demo.random_encoder import RandomEncoder
from ltx2_jax.errors import UserError
from ltx2_jax.text.cache import TextCache
from ltx2_jax.text.encoder import REFERENCE, TextEncoder
from ltx2_jax.weights import references
from ltx2_jax.weights.tensor_files import read_metadata


class FeatureEncoder(Protocol):
    """What encodes captions: a `TextEncoder`, a `TextCache` in its place, or a `RandomEncoder`."""

    release: str  # whose features these are
    length: int  # tokens a caption

    @property
    def shared(self) -> bool:
        """Whether audio receives the features of video."""

    def features(self, prompts: Sequence[str]) -> tuple[ArrayLike, ArrayLike, np.ndarray]:
        """Features of video [B, S, Dv], of audio [B, S, Da], and the mask bool [B, S]."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that `load_caption_encoder` reads."""


def caption_features(encoder: FeatureEncoder, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """What a record stores of each of n captions, and what the model reads of a prompt.

    Returns:
      {"video_text": [n, S, Dv], "audio_text": [n, S, Da], "text_mask": bool [n, S]}, padded on the
      left. Without "audio_text" where audio receives the features of video.

    Raises:
      UserError: no captions, or one that is not text (a NUL, half a surrogate pair).
    """
    video, audio, mask = encoder.features(captions)
    features = {"video_text": np.asarray(video), "text_mask": np.asarray(mask)}
    if not encoder.shared:
        features["audio_text"] = np.asarray(audio)
    return features


def read_prompts(path: str | os.PathLike, where: str) -> list[str]:
    """The lines of a file of prompts; blank ones at its end do not count.

    Raises:
      UserError: with `where`, the flag or field that names it: it cannot be read, or one is blank.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {path} cannot be read ({error})") from None
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{where}: line {number} of {path} is blank")
    return lines


def tell_cut(masks: Sequence[np.ndarray], what: str, flag: str) -> None:
    """Prints how many texts, of `text_mask`s bool [S], use all their tokens; nothing if none do."""
    if full := sum(bool(mask.all()) for mask in masks):
        tokens = len(masks[0])
        hosts.say(f"{what} that fill all {tokens} tokens: {full}; what is longer is cut ({flag})")


def load_caption_encoder(
    path: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    cache: str | os.PathLike | None = None,
) -> FeatureEncoder:
    """The text encoder of a dataset, from the file beside its records.

    Args:
      path: what `prepare` wrote: a random encoder, or the names of released files.
      mesh: where to put a released one; one device when None.
      cache: folder of features that a released one has computed; see `TextCache`.

    Raises:
      UserError: no such file or another one; released files that are gone or have changed.
    """
    path = Path(path)
    metadata = read_metadata(path)
    if metadata.get("kind") != REFERENCE:
        if cache is not None:
            raise UserError(f"--text-cache: {path} holds a random text encoder, not a released one")
        return RandomEncoder.load(path)
    references.follow(path, metadata)
    try:
        return released_encoder(
            metadata["checkpoint"],
            metadata["text_encoder"],
            cache=cache,
            mesh=mesh,
            dtype=metadata["dtype"],
            last_layer_only=metadata["last_layer_only"] == "True",
            length=int(metadata["length"]),
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error}); run prepare again") from error


def released_encoder(
    checkpoint: str | os.PathLike,
    text_encoder: str | os.PathLike,
    *,
    cache: str | os.PathLike | None = None,
    **settings: Any,
) -> FeatureEncoder:
    """A released text encoder for features alone, or the cache of them in the folder `cache`.

    `settings` are those of `TextEncoder.load`; so are the errors.
    """
    if cache is None:
        return TextEncoder.load(checkpoint, text_encoder, connect=False, **settings)
    return TextCache.load(cache, checkpoint, text_encoder, connect=False, **settings)
