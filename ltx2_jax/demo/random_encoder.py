"""A small Gemma with fixed random weights: features that tell captions apart.

That is all that a model trained from nothing needs. Its tokenizer is trained on the captions.
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
from jax import Array
from safetensors.numpy import load_file, save

from ltx2_jax.demo.config import RandomEncoderConfig
from ltx2_jax.errors import UserError
from ltx2_jax.fields import from_json, to_json
from ltx2_jax.files import replacing
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.features import TextFeatures, TextFeaturesConfig
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.models.text.model import TextModel
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.tokenizer import ASSET, Tokenizer
from ltx2_jax.tokenizer import train as train_tokenizer
from ltx2_jax.weights import mapping
from ltx2_jax.weights.tensor_files import read_metadata

KIND = "ltx2_jax.random_text_encoder.1"  # the number changes with the file's layout


class RandomEncoder:
    """A small Gemma and a projection of its hidden states, with weights that are never trained.

    It runs on one device, whatever the mesh of the model: it is small, and any host can use it.
    """

    release = "random"
    batch_size = 8  # captions that run at a time, always: another number is another program

    def __init__(self, path: Path, tokenizer: Tokenizer, model: TextModel, length: int):
        self.path, self.tokenizer, self.length = path, tokenizer, length
        self.shared = model.text_features.cfg.audio_dim is None
        self._graph, self._params = nnx.split(model)

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
            create = partial(_create, config)
            shapes = mapping.nested(mapping.abstract_params(create))
            values = [_fitting(tensors[name], leaf) for name, leaf in _named(shapes)]
        except (KeyError, ValueError, UserError) as error:
            raise UserError(
                f"{path}: damaged random text encoder ({error}); run prepare again"
            ) from error
        params = jax.tree.unflatten(jax.tree.structure(shapes), values)
        mesh = _one_device()
        with jax.set_mesh(mesh):
            params = jax.device_put(params, sharding_of(mesh))
            model = mapping.build(create, params)
        return cls(Path(path), Tokenizer(path), model, length)

    def features(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Captions -> features of video [B, S, Dv], of audio [B, S, Da], and the mask bool [B, S].

        Raises:
          UserError: no captions, or one that is not text (a NUL, half a surrogate pair).
        """
        if not len(prompts):
            raise UserError("no prompts to encode")
        tokens, mask = self.tokenizer.encode(prompts, self.length)
        count, size, parts = len(tokens), self.batch_size, []
        with jax.set_mesh(_one_device()):
            for start in range(0, count, size):
                rows = np.minimum(np.arange(start, start + size), count - 1)
                parts.append(_features(self._params, tokens[rows], mask[rows], graph=self._graph))
        video, audio = (np.concatenate(some)[:count] for some in zip(*parts, strict=True))
        return video, audio, mask

    def save(self, path: str | os.PathLike) -> None:
        """Copies the file that it was loaded from."""
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)


def _create(config: RandomEncoderConfig) -> TextModel:
    gemma, rngs = config.gemma, Rngs(config.seed)
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


@partial(jax.jit, static_argnames="graph")
def _features(params: Any, tokens: Array, mask: Array, *, graph: Any) -> tuple[Array, Array]:
    return nnx.merge(graph, params).features(tokens, mask)


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
