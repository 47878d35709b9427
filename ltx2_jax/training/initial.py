"""Weights for a training run to start from (`config.init_from`)."""

from typing import Any

import jax

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference
from ltx2_jax.weights.opening import open_release
from ltx2_jax.weights.release import Release

# In the metadata of what was trained here: whose text features it reads.
TEXT_GENERATION = "text_generation"
# Fields of ours that released configs do not have.
FREE = ("dtype", "remat", "attention")


def check(config: Config) -> None:
    """UserError unless the weights of `config.init_from` are those of its networks.

    Reads nothing but headers; does nothing without `init_from`.
    """
    if config.init_from is None:
        return
    with open_release(config.init_from) as release:
        check_same(config, release)
        metadata = release.metadata("transformer")
        generation = metadata.get(TEXT_GENERATION) or release.generation("transformer")
        if config.text.generation != generation:
            raise UserError(
                f"init_from={config.init_from} reads text features of {generation!r}, but "
                f"text.generation={config.text.generation!r}"
            )
        for network in ("transformer", "connectors"):
            release.parameters(network, release.config(network))


def check_same(config: Config, release: Release) -> None:
    """UserError unless a run's transformer and connectors are those of a release."""
    pairs = {"model": (release.config("transformer"), config.model)}
    if "connectors" in release.networks:
        video, audio = release.config("connectors")
        pairs["text.video_connector"] = (video, config.text.video_connector)
        pairs["text.audio_connector"] = (audio, config.text.audio_connector)
    lines = [
        line
        for name, (theirs, ours) in pairs.items()
        for line in difference(theirs, ours, f"{name}.")
        if line.partition(":")[0].rpartition(".")[2] not in FREE
    ]
    if lines:
        raise UserError(f"{release.name}: is another network ({'; '.join(lines)})")


def load(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The trained networks' weights, float32, on their shards; see `check` for errors."""
    with open_release(config.init_from) as release:
        return {
            network: release.load(network, mesh, param_dtype="float32", progress=True)[1]
            for network in ("connectors", "transformer")
        }
