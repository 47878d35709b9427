"""Tiny Gemma decoders with drawn weights: eight heads, every feature of either release."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.models.text.gemma_layers import GemmaConfig, LayerKind
from ltx2_jax.sharding import abstract_state

SIZES = {"vocab_size": 24, "width": 24, "mlp": 16, "num_heads": 8, "dtype": "float32"}
GEMMA_3 = GemmaConfig(
    **SIZES,
    layers=("sliding", "sliding", "full", "sliding", "sliding", "full", "sliding"),
    sliding=LayerKind(head_dim=4, kv_heads=4, window=3),
    full=LayerKind(head_dim=4, kv_heads=4, rope_theta=1e6, rope_factor=8.0),
    attention_scale=6**-0.5,
)
# Keys and values of the full layers cannot be split over a model axis of 2 or more.
GEMMA_4 = GemmaConfig(
    **SIZES,
    layers=("sliding", "full", "sliding", "full"),
    sliding=LayerKind(head_dim=4, kv_heads=2, window=3),
    full=LayerKind(
        head_dim=8, kv_heads=1, rope_theta=1e6, rotary_fraction=0.25, keys_are_values=True
    ),
    attention_scale=1.0,
    norm_offset=0.0,
    value_norm=True,
    layer_scalar=True,
    logit_cap=5.0,
)


def build(cfg: GemmaConfig, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> Gemma:
    """The decoder with the same drawn weights on any mesh."""

    def create():
        return nnx.state(Gemma(cfg, rngs=Rngs(0)), nnx.Param)

    rng = np.random.default_rng(seed)

    def fill(leaf):
        value = rng.normal(size=leaf.shape)
        if leaf.shape == (cfg.vocab_size, cfg.width):
            # Small, or the tied logits of every token would be highest for the token itself.
            value *= 0.1
        elif leaf.ndim > 2:
            value *= leaf.shape[-1] ** -0.5
        else:  # weights of norms, and the numbers that scale layers
            value = 0.3 * value + (1 - cfg.norm_offset)
        value = jnp.asarray(np.float32(value))  # not by a program for every shape
        return value if mesh is None else jax.device_put(value, leaf.sharding)

    if mesh is None:
        abstract = jax.eval_shape(create)
    else:
        abstract = abstract_state(create, mesh=mesh)
    graphdef = nnx.graphdef(jax.eval_shape(lambda: Gemma(cfg, rngs=Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(fill, abstract))


def prompts(lengths: tuple[int, ...] = (3, 8, 6, 8), width: int = 8, seed: int = 1):
    """Left-padded random tokens [B, width] and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    return np.where(mask, rng.integers(2, SIZES["vocab_size"], mask.shape), 0), mask


def hidden_states(model: Gemma, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All hidden states, with full-precision products."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_forward(*nnx.split(model), jnp.asarray(tokens), jnp.asarray(mask)))


@partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, params, tokens, mask):
    return nnx.merge(graphdef, params).hidden_states(tokens, mask)
