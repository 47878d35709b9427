"""Prompts to what the transformer attends to: tokenizer, language model, features, connectors.

    encoder = TextEncoder.load("ltx-2-19b-dev.safetensors", "gemma-3-12b-it/", mesh=make_mesh())
    video, audio, mask = encoder.encode(["a dog barks twice"])

The way has two halves. `features` is long and never trained: a dataset stores what it gives.
`connect` is short and runs on stored features, in training at every step.
Source: paper section 3; `ltx_core/text_encoders/gemma/embeddings_processor.py`.

Dims: B prompts, S text tokens, Dv and Da widths for video and audio.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from ltx2_jax.errors import UserError
from ltx2_jax.models.streamed import place
from ltx2_jax.models.text.model import TextModel
from ltx2_jax.sharding import batch_shards, make_mesh, pin, sharding_of
from ltx2_jax.tokenizer import Tokenizer
from ltx2_jax.weights import hub, references
from ltx2_jax.weights.names import text as text_weights
from ltx2_jax.weights.names.gemma import stored_dtype, weight_files
from ltx2_jax.weights.sources import open_release

LENGTH = 1024  # tokens a prompt, as the released models were trained
REFERENCE = "ltx2_jax.released_text_encoder.1"  # the number changes with the file's layout


class TextEncoder:
    """A text encoder on a mesh; call `encode`, or one of its halves, with a list of prompts.

    Attributes:
      tokenizer: the text encoder's.
      model: the networks. `model.connectors` is what a training step runs on stored features.
      length: tokens of every prompt, padding included.
      release: whose features these are: "2.0", "2.3", "2.5"; "" where no file says so.
    """

    release = ""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: TextModel,
        *,
        length: int = LENGTH,
        batch_size: int = 8,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """
        Args:
          tokenizer: ids for the language model of `model`.
          model: weights on `mesh`.
          length: tokens a prompt is padded or cut to.
          batch_size: prompts that run at a time, at most; rounded up to the data axis.
          mesh: where the weights are; one device when None.

        Raises:
          UserError: the parts do not fit each other.
        """
        config, connectors = model.text_features.cfg, model.connectors
        widths = config.video_dim, config.audio_dim or config.video_dim
        if connectors is not None:
            wanted = connectors.video.cfg.width, connectors.audio.cfg.width
            if widths != wanted:
                raise UserError(
                    f"the checkpoint's connectors read features of width {wanted[0]} (video) and "
                    f"{wanted[1]} (audio), its projections give {widths[0]} and {widths[1]}"
                )
        if tokenizer.vocab_size > model.gemma.cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the language model knows "
                f"{model.gemma.cfg.vocab_size}: they do not belong together"
            )
        self.tokenizer, self.model, self.length = tokenizer, model, length
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self.batch_size = batch_size
        self._files: tuple[Path, Path] | None = None
        self._graph, params = nnx.split(model)
        # Weights without a mesh join that of one device; on a mesh they stay where they are.
        self._params = params if mesh else jax.device_put(params, sharding_of(self.mesh))

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        text_encoder: str | os.PathLike,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str = "bfloat16",
        registers: int = 128,
        last_layer_only: bool = False,
        connect: bool = True,
        tokenizer: str | os.PathLike | None = None,
        quantize: str | None = None,
        offload: bool = False,
        **settings: Any,
    ) -> "TextEncoder":
        """The encoder of a released model. Nothing large is read before all that is small fits.

        Args:
          checkpoint: the file with the connectors. It holds the whole model, or its transformer
            where a release has a file for each part. Here and below, a path or a name on the
            Hugging Face Hub.
          text_encoder: a folder with Gemma, or that release's file for it.
          mesh: where to put it; one device when None.
          dtype: of activations and of the language model's matrices.
          registers: 128, or 0 to mask padding out instead; see `Connectors`.
          last_layer_only: features from the last hidden state alone.
          connect: False leaves the connectors on disk: then it has `features` only.
          tokenizer: where it is, if not with the text encoder; see `Tokenizer`.
          quantize: a form of `models.quantized` in which the language model's matrices are kept.
          offload: keeps them in the memory of the host; see `models.streamed`.
          settings: `length`, `batch_size`.

        Raises:
          UserError: a file is missing, damaged or does not fit its config, or the text encoder is
            not of the checkpoint's release.
        """
        checkpoint, text_encoder = hub.fetch(checkpoint), hub.fetch(text_encoder)
        tokenizer = Tokenizer(hub.fetch(tokenizer) if tokenizer else text_encoder)
        mesh = mesh or make_mesh(devices=jax.devices()[:1])
        with open_release(checkpoint) as release, open_release(text_encoder) as language:
            metadata = release.metadata("connectors")
            text_weights.check_text_encoder(metadata, language.section("gemma"), text_encoder)
            config = language.config("gemma", dtype=dtype, quantized=quantize)
            connectors = None
            if connect:
                connectors = text_weights.load_connectors(
                    release, mesh, dtype=dtype, registers=registers
                )
            features = text_weights.load_features(
                text_weights.holder(release, language),
                config,
                mesh,
                section=release.section("connectors"),
                dtype=dtype,
                last_layer_only=last_layer_only,
            )
            kept = {
                "param_dtype": stored_dtype(dtype),
                "then": partial(place, offload=True) if offload else None,
            }
            gemma = language.module("gemma", mesh, config=config, **kept)
            encoder = cls(tokenizer, TextModel(gemma, features, connectors), mesh=mesh, **settings)
            encoder.release = release.release_of("connectors")
        encoder._files = checkpoint.resolve(), text_encoder.resolve()
        return encoder

    @property
    def shared(self) -> bool:
        """Whether audio receives the features of video (2.0)."""
        return self.model.text_features.cfg.audio_dim is None

    def save(self, path: str | os.PathLike) -> None:
        """Writes a small file that names the released ones; `load_caption_encoder` follows it."""
        config = self.model.text_features.cfg
        write_reference(
            path,
            *self._files,
            length=self.length,
            dtype=config.dtype,
            last_layer_only=config.last_layer_only,
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Array, Array, Array | None]:
        """Prompts -> context of video [B, S, Dv], of audio [B, S, Da], and the mask for both.

        One compiled program from ids to context. The mask is None where registers fill the padding:
        then the transformer needs none; else it is bool [B, S], for its `context_mask`.

        Raises:
          UserError: no prompts, or one that is not text (a NUL, half a surrogate pair).
        """
        return self._by_batch(_encode, *self.tokens(prompts))

    def features(self, prompts: Sequence[str]) -> tuple[Array, Array, np.ndarray]:
        """Prompts -> features of video [B, S, Dv], of audio [B, S, Da], and the mask bool [B, S].

        They are in token order, padding on the left, as datasets store them.

        Raises:
          UserError: as `encode`.
        """
        tokens, mask = self.tokens(prompts)
        return *self._by_batch(_features, tokens, mask), mask

    def connect(
        self, video: ArrayLike, audio: ArrayLike, mask: ArrayLike
    ) -> tuple[Array, Array, Array | None]:
        """What `features` gives -> what `encode` gives."""
        return self._by_batch(_connect, video, audio, mask)

    def tokens(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> ids int32 [B, S] and mask bool [B, S], padded on the left."""
        if not len(prompts):
            raise UserError("no prompts to encode")
        return self.tokenizer.encode(prompts, self.length)

    def _by_batch(self, run: Callable, *inputs: ArrayLike) -> tuple[Array | None, ...]:
        """`run` on some rows of the inputs at a time, the last ones repeated to a full batch."""
        count, shards = len(inputs[0]), batch_shards(self.mesh)
        size = -(-min(self.batch_size, count) // shards) * shards
        parts = []
        with jax.set_mesh(self.mesh):
            for start in range(0, count, size):
                rows = np.minimum(np.arange(start, start + size), count - 1)
                parts.append(run(self._params, *(self._rows(x, rows) for x in inputs),
                                 graphdef=self._graph))  # fmt: skip
            return tuple(
                None if some[0] is None else _join(some, count) for some in zip(*parts, strict=True)
            )

    def _rows(self, x: ArrayLike, rows: np.ndarray) -> Array:
        names = ("batch", *[None] * (np.ndim(x) - 1))
        return jax.device_put(np.asarray(x)[rows], sharding_of(self.mesh, *names))


def write_reference(
    path: str | os.PathLike,
    checkpoint: str | os.PathLike,
    text_encoder: str | os.PathLike,
    *,
    length: int,
    dtype: str,
    last_layer_only: bool,
) -> None:
    """Writes a small file that names released ones and says how they are used."""
    encoder = Path(text_encoder).resolve()
    files = [Path(checkpoint).resolve(), *weight_files(encoder)]
    references.write(
        path,
        REFERENCE,
        files,
        checkpoint=str(files[0]),
        text_encoder=str(encoder),
        length=str(length),
        dtype=dtype,
        last_layer_only=str(last_layer_only),
    )


@partial(jax.jit, static_argnames="graphdef")
def _encode(params: Any, tokens: Array, mask: Array, *, graphdef: Any):
    return nnx.merge(graphdef, params)(tokens, mask)


@partial(jax.jit, static_argnames="graphdef")
def _features(params: Any, tokens: Array, mask: Array, *, graphdef: Any):
    return nnx.merge(graphdef, params).features(tokens, mask)


@partial(jax.jit, static_argnames="graphdef")
def _connect(params: Any, video: Array, audio: Array, mask: Array, *, graphdef: Any):
    return nnx.merge(graphdef, params).connectors(video, audio, mask)


def _join(parts: Sequence[Array], count: int) -> Array:
    """Batches of rows -> one array of the first `count` rows, split as they are if they are one."""
    if len(parts) == 1 and len(parts[0]) == count:
        return parts[0]
    whole = [pin(part, *[None] * part.ndim) for part in parts]
    return jnp.concatenate(whole)[:count]
