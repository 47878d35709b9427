"""Between a run and released weights: what a run starts from, and the file that it becomes.

Training starts from `config.init_from`; `convert` makes an official file of what it has trained.
"""

from collections.abc import Mapping
from typing import Any

import jax

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference
from ltx2_jax.weights import export
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.sources import open_release

# In the metadata of what was trained here: whose text features it reads, and whose latents.
TEXT, LATENTS = "text_release", "latents_release"
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
        # Files of the version before say "generation".
        own = metadata.get(TEXT, metadata.get("text_generation"))
        text = own or release.release_of("transformer")
        if config.text.release != text:
            raise UserError(
                f"init_from={config.init_from} reads text features of {text!r}, but "
                f"text.release={config.text.release!r}"
            )
        # A file of ours from before this was noted says only whose text features it reads.
        latents = metadata.get(LATENTS, config.data.release if own else text)
        if config.data.release != latents:
            raise UserError(
                f"init_from={config.init_from} is for latents of {latents!r}, but "
                f"data.release={config.data.release!r}"
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


def as_export(
    config: Config,
    params: Mapping[str, Any],
    *,
    base: Release | None = None,
    param_dtype: Any = None,
) -> export.Export:
    """The official file of a run's weights, with all other networks from `base`.

    Args:
      config: of the run.
      params: its weights, {"transformer": .., "connectors": ..}.
      base: a release with the other networks; its transformer and connectors are replaced.
      param_dtype: of the tensors; None takes those of `base`, or keeps what is given.

    Raises:
      UserError: a config that no official network has, or another one than `base`.

    Warns:
      UserWarning: what the official code would read differently.
    """
    if base is not None:
        check_same(config, base)
    networks = {
        "transformer": config.model,
        "connectors": (config.text.video_connector, config.text.audio_connector),
    }
    return export.of_params(
        networks,
        params,
        base=base,
        param_dtype=param_dtype,
        metadata={TEXT: config.text.release, LATENTS: config.data.release},
    )
