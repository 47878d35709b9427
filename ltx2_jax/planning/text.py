"""What a text encoder needs on a TPU slice; `python -m ltx2_jax.plan --what=text` prints it.

The program is that of `TextEncoder.encode`: token ids to the context of both streams.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax import text_flops, units
from ltx2_jax.accounting.compiled import describe as describe_program
from ltx2_jax.accounting.compiled import program_facts
from ltx2_jax.accounting.memory import (
    compile_or_overflow,
    describe_memory,
    describe_overflow,
    memory_facts,
)
from ltx2_jax.models.connectors import (
    AUDIO_CONNECTOR_2_3,
    CONNECTOR_2_0,
    FF_MULT,
    VIDEO_CONNECTOR_2_3,
    ConnectorConfig,
    Connectors,
)
from ltx2_jax.models.gemma import GEMMA_3_12B, GEMMA_4_12B, Gemma
from ltx2_jax.models.gemma_layers import GemmaConfig
from ltx2_jax.models.text_features import (
    FEATURES_2_0,
    FEATURES_2_3,
    TextFeatures,
    TextFeaturesConfig,
)
from ltx2_jax.models.text_model import TextModel
from ltx2_jax.sharding import abstract_state, make_mesh, replicated, sharding_of
from ltx2_jax.text_encoder import LENGTH
from ltx2_jax.topology import describe_counts, tpu_devices

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
    config: TextConfig, batch: int, topology: str, *, length: int = LENGTH
) -> dict[str, Any]:
    """What encoding `batch` prompts of `length` tokens at once needs on a slice.

    Raises:
      UserError: no such slice, no TPU compiler.
    """
    devices = tpu_devices(topology)
    mesh = text_mesh(config, devices)
    # As `TextEncoder` does: rows are repeated until the data axis divides them.
    rows = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
    graphdef, params = _abstract(config, mesh)
    started = time.perf_counter()
    compiled = compile_or_overflow(_lower(graphdef, params, rows, length, mesh))
    seconds = time.perf_counter() - started
    flops = rows * forward_flops(config, length)
    facts = {
        "program": f"encode {batch} prompt{'s'[: batch > 1]} of {length} tokens",
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "rows": rows,
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "whole_on_every_chip": replicated(params, WHOLE) if len(devices) > 1 else [],
        "flops_of_batch": flops,
    }
    if isinstance(compiled, dict):
        return facts | compiled
    return {
        **facts,
        **memory_facts(compiled, devices[0].device_kind),
        **program_facts(compiled, mesh, model_flops=flops),
        "compile_seconds": round(seconds, 1),
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


def forward_flops(config: TextConfig, tokens: int) -> float:
    """FLOPs of one prompt of `tokens` tokens, padding included; conventions of `text_flops.py`."""
    features = config.features
    width = features.video_dim + (features.audio_dim or 0)
    projection = 2.0 * tokens * features.num_states * features.width * width
    return (
        sum(text_flops.forward_flops(config.gemma, tokens).values())
        + projection
        + connector_flops(config.video, tokens)
        + connector_flops(config.audio, tokens)
    )


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    if "message" in facts:
        return describe_overflow(facts)
    return (
        f"{facts['program']} on {facts['topology']} ({facts['devices']} x {facts['device_kind']})\n"
        f"  split          {facts['rows']} rows over {describe_counts(facts['split'])}\n"
        f"  parameters     {units.parameters(facts['parameters'])}; whole on every chip: "
        f"{', '.join(facts['whole_on_every_chip']) or 'none'}\n"
        + describe_memory(facts, "weights", "contexts")
        + f"  FLOPs          {units.flops(facts['flops_of_batch'])} for the batch\n"
        f"{describe_program(facts, 'a batch')}\n"
        f"  compiled in    {facts['compile_seconds']:.0f} s"
    )


def _create(config: TextConfig) -> TextModel:
    rngs = nnx.Rngs(0)
    return TextModel(
        Gemma(config.gemma, rngs=rngs),
        TextFeatures(config.features, rngs=rngs),
        Connectors(config.video, config.audio, rngs=rngs),
    )


def _abstract(config: TextConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Structure of the networks, and their weights as shapes on `mesh`, in the loaders' dtypes."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: _create(config)))

    def weights() -> Any:
        return nnx.to_pure_dict(nnx.state(_create(config), nnx.Param))

    def stored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Gemma's norms and scalars stay float32; released checkpoints hold the rest in bfloat16.
        kept = path[0].key == "gemma" and path[-1].key in ("weight", "scalar")
        dtype = leaf.dtype if kept else jnp.bfloat16
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    params = abstract_state(weights, mesh=mesh)
    return graphdef, jax.tree_util.tree_map_with_path(stored, params)


def _lower(
    graphdef: Any, params: Any, rows: int, length: int, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    where = sharding_of(mesh, "batch", None)
    tokens, mask = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
        for dtype in (jnp.int32, jnp.bool)
    )
    with jax.set_mesh(mesh):
        return _encode.lower(params, tokens, mask, graphdef=graphdef)


@partial(jax.jit, static_argnames="graphdef")
def _encode(params: Any, tokens: Array, mask: Array, *, graphdef: Any) -> tuple[Array | None, ...]:
    return nnx.merge(graphdef, params)(tokens, mask)


def connector_flops(cfg: ConnectorConfig, tokens: int) -> float:
    gates = cfg.width * cfg.num_heads if cfg.gated_attention else 0
    matrices = (4 + 2 * FF_MULT) * cfg.width**2 + gates
    return cfg.num_layers * (2.0 * tokens * matrices + 4.0 * tokens**2 * cfg.width)
