"""Text features on disk: every prompt is encoded once, and often no text encoder is needed at all.

    cache = TextCache.load("features/", "ltx-2-19b-dev.safetensors", "gemma-3-12b-it/")
    video, audio, mask = cache.features(["a dog barks twice"])  # loads 12B weights, or a small file
    cache.free()                                                # frees them, before what follows

A prompt is one safetensors file, `<release>/<hash>.safetensors`, that says what it was made
from. The hash is of the prompt, the release, the length and what encodes it; files made with
another text encoder, projection or tokenizer are never found, and nothing needs to be deleted.
"""

import gc
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax.blobs import deserialize, serialize
from ltx2_jax.errors import UserError
from ltx2_jax.files import reason, replacing
from ltx2_jax.text.encoder import LENGTH, TextEncoder, write_reference
from ltx2_jax.tokenizer import FILES, check_text
from ltx2_jax.weights import hub
from ltx2_jax.weights.names import text as text_weights
from ltx2_jax.weights.references import fingerprint
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release

VERSION = 1  # of a file's layout

Record = dict[str, Any]


class TextCache:
    """A folder of features, in the place of a `TextEncoder` wherever only `features` is called.

    Opened by `load`, it is one wherever captions are encoded: `shared`, `release`, `length` and
    `save` are the encoder's.

    Several processes may use one folder at once: a file appears whole or not at all. A damaged one
    is a warning, not an error: what it held is computed again.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        build: Callable[[], TextEncoder],
        *,
        encoder: str,
        release: str,
        length: int = LENGTH,
    ):
        """
        Args:
          folder: where the files are and go; it is created with the first one.
          build: gives the text encoder; called when a prompt is missing, and again if one is after
            `free`. Its weights must lie on devices of this process.
          encoder: what tells this encoder from others, see `encoder_fingerprint`.
          release: "2.0", "2.3" or "2.5".
          length: tokens a prompt, the encoder's.
        """
        self.folder, self.length = Path(folder), length
        self._identity = {"encoder": encoder, "generation": release}  # as files have it
        self._build = build
        self._encoder: TextEncoder | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        checkpoint: str | os.PathLike,
        text_encoder: str | os.PathLike,
        *,
        length: int = LENGTH,
        dtype: str = "bfloat16",
        last_layer_only: bool = False,
        tokenizer: str | os.PathLike | None = None,
        quantize: str | None = None,
        **settings: Any,
    ) -> "TextCache":
        """The cache of a released model, whose weights are read when a prompt is missing.

        All but `folder` is as in `TextEncoder.load`.

        Raises:
          UserError: a file is missing or damaged, or its config does not fit.
        """
        files = hub.fetch(checkpoint), hub.fetch(text_encoder)
        decides = {"dtype": dtype, "last_layer_only": last_layer_only}
        model = {**decides, "tokenizer": tokenizer, "quantize": quantize}
        with open_release(files[0]) as release:
            whose, section = release.release_of("connectors"), release.section("connectors")
        cache = cls(
            folder,
            partial(TextEncoder.load, *files, length=length, **model, **settings),
            encoder=encoder_fingerprint(*files, **model),
            release=whose or "unknown",
            length=length,
        )
        features = text_weights.text_features_config(section, width=1, num_layers=1)
        cache.shared = features.audio_dim is None
        given = dict(zip(("checkpoint", "text_encoder"), files, strict=True))
        cache.save = partial(write_reference, **given, length=length, **decides)
        return cache

    @property
    def release(self) -> str:
        """Whose features these are."""
        return self._identity["generation"]

    def features(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `TextEncoder.features` gives, bit for bit, in host memory.

        Prompts that differ only in the space around them are one prompt, as for the tokenizer.

        Returns:
          Features of video [B, S, Dv], of audio [B, S, Da], and the mask bool [B, S].

        Raises:
          UserError: no prompts, one that is not text (a NUL, half a surrogate pair), a folder that
            cannot be written, or what building the encoder raises.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a sequence of strings, not one string")
        if not len(prompts):
            raise UserError("no prompts to encode")
        for row, prompt in enumerate(prompts):
            check_text(prompt, row)
        prompts = [prompt.strip() for prompt in prompts]
        found = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, record in found.items() if record is None]
        found |= self._encode(missing, len(prompts))
        video, audio, mask = zip(*(self._whole(found[prompt]) for prompt in prompts), strict=True)
        return np.stack(video), np.stack(audio), np.stack(mask)

    def free(self) -> None:
        """Frees the encoder's device memory, connectors included, if it was built.

        Whoever shares its arrays loses them. The cache stays usable.
        """
        if self._encoder is None:
            return
        for leaf in jax.tree.leaves(nnx.state(self._encoder.model)):
            leaf.delete()
        self._encoder = None
        gc.collect()  # What the encoder copied is in cycles of its modules.

    def path(self, prompt: str) -> Path:
        """The file of a prompt, whether it is there or not."""
        about = json.dumps([VERSION, *self._about(prompt).values()])
        name = hashlib.sha256(about.encode()).hexdigest()[:32]
        return self.folder / self.release / f"{name}.safetensors"

    def _about(self, prompt: str) -> dict[str, str]:
        return {"prompt": prompt.strip(), **self._identity, "length": str(self.length)}

    def _encode(self, prompts: list[str], asked: int) -> dict[str, Record]:
        """Features of prompts that are not there, each stored as soon as its batch is computed.

        In batches as the encoder would make of all that were `asked` for: other sizes of batches
        have other programs, and last bits.
        """
        found: dict[str, Record] = {}
        if not prompts:
            return found
        if self._encoder is None:
            self._encoder = self._build()
        encoder = self._encoder
        if encoder.length != self.length:
            raise ValueError(f"the encoder's length is {encoder.length}, not {self.length}")
        if encoder.mesh.is_multi_process:
            raise UserError(
                "the text cache needs a text encoder on devices of one process: build it on a mesh "
                "of jax.local_devices()"
            )
        size = min(encoder.batch_size, asked)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            # Full batches only: another size is another program to compile.
            full = batch + batch[-1:] * (size - len(batch))
            video, audio, mask = map(np.asarray, encoder.features(full))
            for prompt, *row in zip(batch, video, audio, mask, strict=False):
                found[prompt] = _record(*row)
                self._write(prompt, found[prompt])
        return found

    def _write(self, prompt: str, record: Record) -> None:
        record = record | self._about(prompt)
        record["digest"] = _digest(record)
        with replacing(self.path(prompt)) as temporary:
            temporary.write_bytes(serialize(record))

    def _read(self, prompt: str) -> Record | None:
        """The record of a prompt; None, with a warning if it is damaged, where there is none."""
        path = self.path(prompt)
        try:
            record = deserialize(path.read_bytes())
            digest = record.pop("digest")
            if digest != _digest(record):
                raise ValueError("its content is not what was written")
            if not self._about(prompt).items() <= record.items():
                raise ValueError("it was made from something else")
        except FileNotFoundError:
            return None
        # A damaged header can be any JSON, or none.
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{path}: damaged ({reason(error)}): its prompt is encoded again", stacklevel=3
            )
            return None
        return record

    def _whole(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features and mask as the encoder gave them, [S, Dv], [S, Da] and [S]."""
        video = _expand(record["video"], self.length)
        audio = _expand(record["audio"], self.length) if "audio" in record else video
        return video, audio, np.arange(self.length) >= self.length - record["tokens"]


def encoder_fingerprint(
    checkpoint: str | os.PathLike,
    text_encoder: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    last_layer_only: bool = False,
    tokenizer: str | os.PathLike | None = None,
    quantize: str | None = None,
) -> str:
    """16 hex digits for all that decides features; reads little of the large files.

    The connectors are no part of it: they run on features. So checkpoints that share the text
    projection (a base model and its distilled or fine-tuned forms) share a cache.

    Args:
      checkpoint, text_encoder, dtype, last_layer_only, tokenizer, quantize: as in
        `TextEncoder.load`.

    Raises:
      UserError: a file is missing or damaged, or its config does not fit.
    """
    with open_release(checkpoint) as release, open_release(text_encoder) as language:
        config = language.config("gemma", dtype=dtype, quantized=quantize)
        projection = text_weights.text_features_config(
            release.section("connectors"),
            width=config.width,
            num_layers=config.num_layers,
            dtype=dtype,
            last_layer_only=last_layer_only,
        )
        weights = [file.path for file in language.files]
        digest = hashlib.sha256(f"{config} {projection}".encode())
        digest.update(_projection_sample(text_weights.holder(release, language)))
    words = Path(tokenizer or text_encoder)
    files = [words / name for name in FILES] if words.is_dir() else [words]
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(f"{words}: no tokenizer there")
    for path in (*weights, *files):
        digest.update(fingerprint(path).encode())
    return digest.hexdigest()[:16]


def _projection_sample(release: Release) -> bytes:
    """A hash of three rows of each text projection in a release; they are 1.4 GB in whole."""
    digest = hashlib.sha256()
    for name, (file, full) in sorted(release.networks["text_projection"].tensors.items()):
        stored = file.tensors[full]
        digest.update(f"{name} {stored.shape} {stored.dtype}".encode())
        count = stored.shape[0]
        for row in (0, count // 2, count - 1):
            digest.update(file.read(full, slice(row, row + 1)).tobytes())
    return digest.digest()


def _record(video: np.ndarray, audio: np.ndarray, mask: np.ndarray) -> Record:
    """What is stored of features [S, Dv] and [S, Da] with a left-padded mask [S]."""
    record = {"video": _shrink(video), "tokens": np.int64(mask.sum())}
    # The features of 2.0 are the same for both.
    return record if _same_bits(video, audio) else record | {"audio": _shrink(audio)}


def _shrink(rows: np.ndarray) -> np.ndarray:
    """Rows [S, D] with the first one kept once of all that equal it bit by bit at the start.

    Those are the padding, which holds the bias of the projection, or zeros without one.
    """
    equal = (_bits(rows) == _bits(rows[:1])).all(axis=1)
    return rows[(len(rows) if equal.all() else int(equal.argmin())) - 1 :]


def _expand(rows: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([np.repeat(rows[:1], length - len(rows), axis=0), rows])


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _bits(rows: np.ndarray) -> np.ndarray:
    """Rows as bytes: numbers would take -0 for 0, and NaN for different from itself."""
    return np.ascontiguousarray(rows).view(np.uint8)


def _digest(record: Record) -> str:
    return hashlib.sha256(serialize(dict(sorted(record.items())))).hexdigest()
