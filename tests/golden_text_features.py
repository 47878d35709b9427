"""Golden cases of the tokenizer, the text features and the connectors."""

import importlib.util
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_case import Case, load, release_of

from ltx2_jax.models.text.connectors import Connectors
from ltx2_jax.models.text.features import TextFeatures
from ltx2_jax.text.encoder import TextEncoder
from ltx2_jax.tokenizer import Tokenizer
from ltx2_jax.weights.names.text import holder, text_features_config

LENGTH = 1024


def checkpoint_of(folder: Path) -> Path:
    path = folder / "checkpoint.safetensors"
    return path if path.exists() else folder / "split" / "transformer.safetensors"


def text_encoder_of(folder: Path) -> Path:
    """What carries the text encoder: the packed file of 2.5, or a Hugging Face folder."""
    packed = folder / "split" / "text_encoder.safetensors"
    return packed if packed.exists() else folder / "gemma"


@cache
def connectors_of(folder: Path) -> Connectors:
    return load(checkpoint_of(folder), "connectors", dtype="float32")


@cache
def features_of(folder: Path, width: int, num_layers: int) -> TextFeatures:
    releases = release_of(checkpoint_of(folder)), release_of(text_encoder_of(folder))
    section = releases[0].section("connectors")
    config = text_features_config(section, width=width, num_layers=num_layers, dtype="float32")
    return holder(*releases).module("text_projection", config=config, param_dtype="float32")


@cache
def encoder_of(folder: Path) -> TextEncoder:
    files = checkpoint_of(folder), text_encoder_of(folder)
    # The packed file has a tokenizer too, but one that needs an extra package.
    return TextEncoder.load(*files, tokenizer=folder / "gemma", length=LENGTH, dtype="float32")


@cache
def tokenizers_of(folder: Path) -> list[Tokenizer]:
    """From tokenizer.model and, where the library for it is installed, every tokenizer.json."""
    sources = [folder / "gemma"]
    if importlib.util.find_spec("tokenizers"):
        sources += [folder / "gemma" / "tokenizer.json"]
        sources += (folder / "split").glob("text_encoder.safetensors")
    return [Tokenizer(source) for source in sources]


@partial(jax.jit, static_argnames="graphdef")
def project(graphdef, params, hidden_states, mask):
    features = nnx.merge(graphdef, params)
    carry = features.init(*mask.shape)
    for index, hidden in enumerate(hidden_states):
        carry = features.add(carry, hidden, index, mask)
    return features.finish(carry)


@partial(jax.jit, static_argnames="graphdef")
def connect(graphdef, params, video, audio, mask):
    return nnx.merge(graphdef, params)(video, audio, mask)


def run_tokenize(case: Case) -> dict:
    """Compares by itself: ids are exact, and one prompt gives as many rows as there are readers."""
    length = case.args["max_length"]
    for tokenizer in tokenizers_of(case.folder):
        ids, mask = tokenizer.encode([entry["prompt"] for entry in case.data], length)
        for entry, row, valid in zip(case.data, ids, mask, strict=True):
            want = entry["ids"]
            count = entry.get("pad_count", length - len(want))
            assert not valid[:count].any(), entry["prompt"]
            assert valid[count:].all(), entry["prompt"]
            np.testing.assert_array_equal(row[:count], tokenizer.pad_id)
            np.testing.assert_array_equal(row[count:], want, err_msg=entry["prompt"])
    return {}


def run_features_connectors(case: Case) -> dict:
    inputs = case.inputs()
    mask = inputs["attention_mask"]
    states = inputs["hidden_states_valid"]  # the last rows; those before are padding
    front = mask.shape[1] - states.shape[2]
    states = np.pad(states, [(0, 0), (0, 0), (front, 0), (0, 0)])
    features = features_of(case.folder, states.shape[-1], states.shape[0] - 1)
    video, audio = project(*nnx.split(features), states, mask)
    connectors = connectors_of(case.folder)
    video_context, audio_context, left = connect(*nnx.split(connectors), video, audio, mask)
    outputs = {
        "video_features": video,
        "audio_features": audio,
        "video_encoding": video_context,
        "audio_encoding": audio_context,
        "mask": np.ones_like(mask) if left is None else left,
    }
    return {name: outputs[name] for name in case.expected()}


def run_video_connector(case: Case) -> dict:
    features = case.inputs()["features"]
    (length,) = {shape[1] for shape in case.spec["shapes"]["outputs"].values()}
    valid = case.args["valid"]
    features = np.pad(features, [(0, 0), (0, length - features.shape[1]), (0, 0)])
    mask = np.broadcast_to(np.arange(length) < valid, features.shape[:2])
    connectors = connectors_of(case.folder)
    audio = np.zeros((*mask.shape, connectors.audio.cfg.width), np.float32)
    return {"encoding": connect(*nnx.split(connectors), features, audio, mask)[0]}


def run_prompt(case: Case) -> dict:
    encoder, prompts = encoder_of(case.folder), [case.args["prompt"]]
    assert encoder.tokens(prompts)[1].sum() == case.args["valid_tokens"]
    video, audio, mask = encoder.encode(prompts)
    assert mask is None
    rows = np.asarray(case.args["rows"])
    return {"video_context": video[:, rows], "audio_context": audio[:, rows]}


KINDS = {
    "tokenize": run_tokenize,
    "tokenize_literal_specials": run_tokenize,
    "features_connectors": run_features_connectors,
    "video_connector": run_video_connector,
}


def run_text_features(case: Case) -> dict:
    kind = case.name.split("/")[1]
    return run_prompt(case) if kind.startswith("prompt_") else KINDS[kind](case)
