"""The connectors and the transformer as one model: what is trained, and what sampling runs.

Text features -> connectors -> context of both streams -> transformer -> velocities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models import streamed
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.lora import attach
from ltx2_jax.models.quantized import check_form, quantize, stored
from ltx2_jax.models.text.connectors import ConnectorConfig, Connectors
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.sharding import abstract_state, is_resident, resident_weights

# What the model reads of a text: features [B, S, Dv], [B, S, Da] (absent where audio receives those
# of video), and True where there is a token [B, S].
TEXT_FIELDS = ("video_text", "audio_text", "text_mask")


@dataclass(frozen=True)
class LTX2Config:
    """The configs of all networks that are trained as one."""

    transformer: TransformerConfig
    video_connector: ConnectorConfig
    audio_connector: ConnectorConfig
    quantized: str | None = None  # a form of `models.quantized`: of all blocks, for sampling

    def __post_init__(self):
        check_form(self.quantized)


class LTX2(nnx.Module):
    """The connectors, which read text features, and the transformer."""

    def __init__(self, config: LTX2Config, *, rngs: Rngs):
        self.connectors = Connectors(config.video_connector, config.audio_connector, rngs=rngs)
        self.transformer = LTX2Transformer(config.transformer, rngs=rngs)
        quantize(self.connectors, stored(config.quantized))  # which run once a clip
        quantize(self.transformer, config.quantized)

    def context(self, text: Mapping[str, Array]) -> tuple[Array, Array, Array | None]:
        """`TEXT_FIELDS` -> context of video [B, S, Dv], of audio [B, S, Da], and its mask.

        The mask is None where registers fill the padding.
        """
        video = text["video_text"]
        return self.connectors(video, text.get("audio_text", video), text["text_mask"])


def graph(config: LTX2Config, adapters: Mapping[str, Any] | None = None) -> Any:
    """The static half of the model: `nnx.merge(graph(config), params)` is callable.

    Call it under the mesh that the model runs on, which decides whether heads are split. `adapters`
    are those beside the transformer's weights (`lora.attach`), of which the shapes alone count.
    """
    if not adapters:
        return _graph(config, jax.sharding.get_abstract_mesh())

    def create() -> LTX2:
        model = LTX2(config, rngs=Rngs(0))
        attach(model.transformer, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), adapters))
        return model

    return nnx.graphdef(jax.eval_shape(create))


@lru_cache(64)  # by the mesh in context too: it decides what is split
def _graph(config: LTX2Config, _mesh: Any) -> Any:
    return nnx.graphdef(jax.eval_shape(lambda: LTX2(config, rngs=Rngs(0))))


def init_params(key: Array, config: LTX2Config) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict, born on their shards."""
    return _init_params(key, config, is_resident())


# Jitted so that a network is traced once, not at every use on paper. JAX knows the mesh in context
# by itself, but not whether weights are resident.
@partial(jax.jit, static_argnums=(1, 2))
def _init_params(key: Array, config: LTX2Config, _resident: bool) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.split(LTX2(config, rngs=Rngs(key)), nnx.Param)[1])


def abstract_params(
    config: LTX2Config,
    mesh: jax.sharding.Mesh,
    *,
    for_sampling: bool = False,
    offload: bool = False,
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `init_params` on `mesh`.

    With `for_sampling` they are those that a sampler keeps: resident (`sharding.resident_weights`),
    and already in the dtype of the activations if they are cast to it before they are used. With
    `offload` the blocks of the transformer lie in the memory of the host (`models.streamed`). The
    sampler computes the same numbers.
    """
    create, key = partial(init_params, config=config), jax.eval_shape(jax.random.key, 0)
    if not for_sampling:
        return abstract_state(create, key, mesh=mesh)
    with resident_weights():
        params = as_used(config, abstract_state(create, key, mesh=mesh))
    placed = streamed.abstract_placed(params["transformer"], offload=offload)
    return {**params, "transformer": placed}


def as_used(config: LTX2Config, params: dict[str, Any]) -> dict[str, Any]:
    """Abstract parameters in the dtypes to which they are cast before they are used."""
    dtypes = {
        ("transformer",): config.transformer.dtype,
        ("connectors", "video"): config.video_connector.dtype,
        ("connectors", "audio"): config.audio_connector.dtype,
    }

    def cast(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(entry.key for entry in path)
        dtype = dtypes.get(names[:1]) or dtypes[names[:2]]
        used = names[-1] in ("weight", "bias") and leaf.dtype == jnp.float32  # not quantised
        dtype = dtype if used else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(cast, params)
