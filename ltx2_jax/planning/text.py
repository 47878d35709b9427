"""What a text encoder needs on a TPU slice.

The program is that of `TextEncoder.encode`: token ids to the context of both streams.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ltx2_jax.models import flops
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.streamed import abstract_placed
from ltx2_jax.models.text.connectors import (
    AUDIO_CONNECTOR_2_3,
    CONNECTOR_2_0,
    VIDEO_CONNECTOR_2_3,
    ConnectorConfig,
    Connectors,
)
from ltx2_jax.models.text.features import (
    FEATURES_2_0,
    FEATURES_2_3,
    TextFeatures,
    TextFeaturesConfig,
)
from ltx2_jax.models.text.gemma import GEMMA_3_12B, GEMMA_4_12B, Gemma
from ltx2_jax.models.text.gemma_layers import GemmaConfig
from ltx2_jax.models.text.model import TextModel
from ltx2_jax.planning.reports import compile_facts, counted
from ltx2_jax.planning.topology import one_slice, tpu_devices
from ltx2_jax.sharding import make_mesh, replicated, sharding_of
from ltx2_jax.text.encoder import LENGTH
from ltx2_jax.weights import mapping

WHOLE = 2**24  # bytes above which a weight that no chip shares with another is worth a line


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The networks of one text encoder."""

    gemma: GemmaConfig
    features: TextFeaturesConfig
    video: ConnectorConfig
    audio: ConnectorConfig


TEXT_ENCODERS = {
    "2.0": TextConfig(GEMMA_3_12B, FEATURES_2_0, CONNECTOR_2_0, CONNECTOR_2_0),
    "2.3": TextConfig(GEMMA_3_12B, FEATURES_2_3, VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3),
    "2.5": TextConfig(GEMMA_4_12B, FEATURES_2_3, VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3),
}


def plan_text(
    config: TextConfig,
    batch: int,
    topology: str,
    *,
    length: int = LENGTH,
    mesh: jax.sharding.Mesh | None = None,
    connect: bool = True,
    offload: bool = False,
) -> dict[str, Any]:
    """What encoding `batch` prompts of `length` tokens at once needs on a slice.

    `mesh` is one of the slice's devices; None takes `text_mesh`. Without `connect` it ends at the
    features, as the text encoder of a `Pipeline` does: there the sampler has the connectors. With
    `offload` the layers of the language model wait in the host's memory.

    Raises:
      UserError: no such slice, no TPU compiler.
    """
    devices = tpu_devices(one_slice(topology, "text").name)
    mesh = mesh or text_mesh(config, devices)
    # As `TextEncoder` does: rows are repeated until the data axis divides them.
    rows = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
    graphdef, params = _abstract(config, mesh, connect)
    if offload:
        params = {**params, "gemma": abstract_placed(params["gemma"], offload=True)}

    def encode(params: Any, *inputs: jax.Array) -> tuple[jax.Array | None, ...]:
        return _run(nnx.merge(graphdef, params), *inputs)

    where = sharding_of(mesh, "batch", None)
    tokens, mask = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
        for dtype in (jnp.int32, jnp.bool)
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(encode).lower(params, tokens, mask)
    work = rows * forward_flops(config, length, connect=connect)
    return {
        "what": "text",
        "program": f"encode {counted(batch, 'prompt')} of {length} tokens",
        "topology": topology,
        "devices": len(devices),
        "rows": rows,
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "whole_on_every_chip": replicated(params, WHOLE) if len(devices) > 1 else [],
        "flops_of_batch": work,
        **compile_facts(lowered, mesh, work),
    }


def text_mesh(config: TextConfig, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The model axis as long as it divides all that it splits, the rest of the devices in data."""
    split = (
        config.gemma.num_heads,
        config.gemma.mlp,
        config.features.video_dim,
        config.features.audio_dim or config.features.video_dim,
        config.video.num_heads,
        config.audio.num_heads,
    )
    count = len(devices)
    model = max(n for n in range(1, count + 1) if not any(size % n for size in (count, *split)))
    return make_mesh(-1, model, devices=devices)


def forward_flops(config: TextConfig, tokens: int, *, connect: bool = True) -> float:
    """FLOPs of one prompt of `tokens` tokens, padding included."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: _create(config, connect)))
    given = (jax.ShapeDtypeStruct((1, tokens), dtype) for dtype in (jnp.int32, jnp.bool))
    return flops.count(lambda params, *x: _run(nnx.merge(graphdef, params), *x), params, *given)


def _create(config: TextConfig, connect: bool = True) -> TextModel:
    rngs = Rngs(0)
    return TextModel(
        Gemma(config.gemma, rngs=rngs),
        TextFeatures(config.features, rngs=rngs),
        Connectors(config.video, config.audio, rngs=rngs) if connect else None,
    )


def _run(model: TextModel, *inputs: jax.Array) -> tuple[jax.Array | None, ...]:
    return model.features(*inputs) if model.connectors is None else model(*inputs)


def _abstract(config: TextConfig, mesh: jax.sharding.Mesh, connect: bool) -> tuple[Any, Any]:
    """Structure of the networks, and their weights as shapes on `mesh`, in the loaders' dtypes."""

    def stored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Gemma's norms and scalars stay float32, and what is quantised as it is; released
        # checkpoints hold the rest in bfloat16.
        vector = leaf.ndim < 3 and path[-1].key in ("weight", "scalar")
        kept = path[0].key == "gemma" and (vector or path[-1].key == "scale")
        dtype = leaf.dtype if kept or leaf.dtype != jnp.float32 else jnp.bfloat16
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    create = partial(_create, config, connect)
    params = mapping.nested(mapping.abstract_params(create, mesh))
    return mapping.graph(create, mesh), jax.tree_util.tree_map_with_path(stored, params)
