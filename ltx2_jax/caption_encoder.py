"""Captions to the text features that records store, and the file that says which encoder made them.

    encoder = load_caption_encoder("data/clips/text_encoder.safetensors")
    caption_features(encoder, ["a red ball bounces once"])

A dataset is made with a released text encoder, or with a small Gemma with fixed random weights and
a tokenizer trained on its captions (`RandomEncoder`): features that tell captions apart, which is
all that a model trained from nothing needs. Either kind writes one file beside the records.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save

from ltx2_jax.demo.config import RandomEncoderConfig
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.files import replacing
from ltx2_jax.models.gemma import Gemma
from ltx2_jax.models.text_features import TextFeatures, TextFeaturesConfig
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.text_cache import TextCache
from ltx2_jax.text_encoder import REFERENCE, TextEncoder, TextModel
from ltx2_jax.tokenizer import ASSET, Tokenizer
from ltx2_jax.tokenizer import train as train_tokenizer
from ltx2_jax.weights import mapping, references
from ltx2_jax.weights.tensor_files import read_metadata

KIND = "ltx2_jax.random_text_encoder.1"  # the number changes with the file's layout


def caption_features(
    encoder: TextEncoder | TextCache, captions: Sequence[str]
) -> dict[str, np.ndarray]:
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


def tell_cut(masks: Sequence[np.ndarray], what: str, flag: str) -> None:
    """Prints how many texts, of `text_mask`s bool [S], use all their tokens; nothing if none do."""
    if full := sum(bool(mask.all()) for mask in masks):
        print(f"{full} {what} fill all {len(masks[0])} tokens: what is longer is cut ({flag})")


class RandomEncoder(TextEncoder):
    """A small Gemma and a projection of its hidden states, with weights that are never trained.

    It runs on one device, whatever the mesh of the model: it is small, and any host can use it.
    """

    generation = "random"

    @classmethod
    def make(
        cls,
        path: str | os.PathLike,
        config: RandomEncoderConfig,
        captions: Sequence[str],
        length: int,
    ) -> "RandomEncoder":
        """Draws the weights, trains a tokenizer on the captions and writes both to one file.

        Raises:
          UserError: as `tokenizer.train`.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "tokenizer.model"
            train_tokenizer(captions, model, config.gemma.vocab_size)
            tokens = np.frombuffer(model.read_bytes(), np.uint8)
        with jax.set_mesh(_one_device()):
            params = _draw(config)
        tensors = {name: np.asarray(value) for name, value in _named(params)}
        metadata = {
            "kind": KIND,
            "config": to_json(config),
            "length": str(length),
        }
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors | {f"{ASSET}tokenizer.model": tokens}, metadata))
        return cls.load(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RandomEncoder":
        """Reads what `make` wrote.

        Raises:
          UserError: the file is missing, unreadable, or not a random encoder of this version.
        """
        metadata = read_metadata(path)
        if (kind := metadata.get("kind")) != KIND:
            raise UserError(f"{path}: kind {kind}, not {KIND}; expected a file that prepare wrote")
        try:
            config = from_json(RandomEncoderConfig, metadata["config"])
            length, tensors = int(metadata["length"]), load_file(path)
            abstract = nnx.eval_shape(lambda: _create(config))
            shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
            values = [_fitting(tensors[name], leaf) for name, leaf in _named(shapes)]
        except (KeyError, ValueError, UserError) as error:
            raise UserError(
                f"{path}: damaged random text encoder ({error}); run prepare again"
            ) from error
        params = jax.tree.unflatten(jax.tree.structure(shapes), values)
        mesh = _one_device()
        with jax.set_mesh(mesh):
            params = jax.device_put(params, sharding_of(mesh))
            model = mapping.build(lambda: _create(config), params)
        encoder = cls(Tokenizer(path), model, length=length, batch_size=64, mesh=mesh)
        encoder._path = Path(path)
        return encoder

    def save(self, path: str | os.PathLike) -> None:
        """Copies the file that it was loaded from."""
        with replacing(path) as temporary:
            shutil.copyfile(self._path, temporary)


def load_caption_encoder(
    path: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    cache: str | os.PathLike | None = None,
) -> TextEncoder | TextCache:
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
) -> TextEncoder | TextCache:
    """A released text encoder for features alone, or the cache of them in the folder `cache`.

    `settings` are those of `TextEncoder.load`; so are the errors.
    """
    if cache is None:
        return TextEncoder.load(checkpoint, text_encoder, connect=False, **settings)
    return TextCache.load(cache, checkpoint, text_encoder, connect=False, **settings)


def _create(config: RandomEncoderConfig) -> TextModel:
    gemma, rngs = config.gemma, nnx.Rngs(config.seed)
    features = TextFeaturesConfig(
        width=gemma.width,
        num_states=gemma.num_layers + 1,
        norm="rms",
        video_dim=config.video_dim,
        audio_dim=config.audio_dim,
        last_layer_only=config.last_layer_only,
        dtype=gemma.dtype,
    )
    return TextModel(Gemma(gemma, rngs=rngs), TextFeatures(features, rngs=rngs), None)


@partial(jax.jit, static_argnames="config")
def _draw(config: RandomEncoderConfig) -> Any:
    return nnx.to_pure_dict(nnx.state(_create(config), nnx.Param))


def _one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.local_devices()[:1])


def _named(params: Any) -> list[tuple[str, Any]]:
    """Leaves of a parameter tree under dotted names, in the order of the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(".".join(str(entry.key) for entry in path), leaf) for path, leaf in leaves]


def _fitting(value: np.ndarray, leaf: Any) -> np.ndarray:
    if value.shape != leaf.shape:
        raise ValueError(f"a tensor has shape {value.shape}, not {leaf.shape}")
    return value
