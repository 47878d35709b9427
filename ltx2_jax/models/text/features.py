"""Hidden states of a language model to text features: normalised, concatenated, projected.

The released models read every hidden state of Gemma, [B, S, D] each. Stacked they are the largest
array of the whole encoder, so they never are: a projection of a concatenation is a sum of
projections, and each state adds its part as soon as it exists (`init`, `add` a state, `finish`).
Source: paper section 3; `ltx_core/text_encoders/gemma/feature_extractor.py`.

Dims: B batch, S text tokens, D width of the language model, L hidden states, O feature width.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax.models.layers import Rngs, parameter, rms_norm
from ltx2_jax.sharding import pin, spec

EPS = 1e-6
LEAD = ("batch", "text_tokens")


@dataclass(frozen=True)
class TextFeaturesConfig:
    """The features of one model release; the defaults are those of LTX-2 2.0 (V1)."""

    width: int = 3840  # of the language model
    num_states: int = 49  # embeddings, and the output of every layer
    norm: str = "range"  # per sample and layer, or "rms": per token and layer (2.3, 2.5)
    video_dim: int = 3840
    audio_dim: int | None = None  # None: audio receives the features of video (2.0)
    bias: bool = False
    last_layer_only: bool = False  # features of the last state alone, to measure what others give
    dtype: str = "bfloat16"  # of the products; statistics and sums are float32

    def __post_init__(self):
        for field, allowed in {"norm": ("range", "rms"), "dtype": ("bfloat16", "float32")}.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")


FEATURES_2_0 = TextFeaturesConfig()
FEATURES_2_3 = TextFeaturesConfig(norm="rms", video_dim=4096, audio_dim=2048, bias=True)


class LayerProjection(nnx.Module):
    """One matrix [D, O] for each hidden state that is used, and one bias."""

    def __init__(self, cfg: TextFeaturesConfig, out: int, *, rngs: Rngs):
        layers = 1 if cfg.last_layer_only else cfg.num_states
        shape, std = (layers, cfg.width, out), 1 / math.sqrt(layers * cfg.width)
        self.kernel = parameter(rngs, shape, (None, "fsdp", "heads"), std=std)
        self.bias = parameter(rngs, (out,), ("heads",)) if cfg.bias else None
        # After RMS normalisation a feature has the scale of the width it will have, not of D.
        self.scale = math.sqrt(out / cfg.width) if cfg.norm == "rms" else 1.0

    def init(self, batch: int, length: int) -> Array:
        shape = (batch, length, self.kernel.shape[-1])
        return jnp.zeros(shape, jnp.float32, out_sharding=spec(*LEAD, "heads"))

    def add(self, total: Array, x: Array, index: Array | int) -> Array:
        """x [B, S, D] of state `index`, added to total [B, S, O]."""
        kernel = jax.lax.dynamic_index_in_dim(self.kernel[...], index, keepdims=False)
        kernel = pin(kernel.astype(x.dtype), None, "heads")
        return total + jnp.einsum(
            "bsd,do->bso",
            x,
            kernel,
            preferred_element_type=jnp.float32,
            out_sharding=spec(*LEAD, "heads"),
        )

    def finish(self, total: Array, dtype: jnp.dtype) -> Array:
        total = total * self.scale
        if self.bias is not None:
            total = total + self.bias[...].astype(jnp.float32)
        return pin(total.astype(dtype), *LEAD, None)


class TextFeatures(nnx.Module):
    """The features that datasets store: what the connectors read, before they run.

    carry = features.init(B, S)
    for index, hidden in enumerate(hidden_states):
        carry = features.add(carry, hidden, index, mask)
    video, audio = features.finish(carry)
    """

    def __init__(self, cfg: TextFeaturesConfig, *, rngs: Rngs):
        self.cfg = cfg
        self.video = LayerProjection(cfg, cfg.video_dim, rngs=rngs)
        self.audio = LayerProjection(cfg, cfg.audio_dim, rngs=rngs) if cfg.audio_dim else None

    def init(self, batch: int, length: int) -> tuple[Array, ...]:
        """The empty sum: float32 [B, S, O] for video and, where it differs, for audio."""
        return tuple(part.init(batch, length) for part in self._parts())

    def add(
        self,
        carry: tuple[Array, ...],
        hidden: Array,  # [B, S, D]
        index: Array | int,  # 0 for the embeddings ... L - 1 for the last state
        mask: Array,  # [B, S]; 0 for padding
    ) -> tuple[Array, ...]:
        """Adds one hidden state. Any order of states gives the same sum."""
        if self.cfg.last_layer_only:
            return jax.lax.cond(
                jnp.asarray(index) == self.cfg.num_states - 1,
                lambda totals, x: self._add(totals, x, 0, mask),
                lambda totals, x: totals,
                carry,
                hidden,
            )
        return self._add(carry, hidden, index, mask)

    def finish(self, carry: tuple[Array, ...]) -> tuple[Array, Array]:
        """The features [B, S, O] of video and of audio; a padded row holds the bias, or zero."""
        dtype = jnp.dtype(self.cfg.dtype)
        features = [
            part.finish(total, dtype) for part, total in zip(self._parts(), carry, strict=True)
        ]
        return features[0], features[-1]

    def _parts(self) -> list[LayerProjection]:
        return [part for part in (self.video, self.audio) if part is not None]

    def _add(self, carry, hidden, index, mask):
        mask = mask[..., None] > 0
        x = hidden.astype(jnp.float32)
        x = rms_norm(x, EPS) if self.cfg.norm == "rms" else _range_norm(x, mask)
        x = jnp.where(mask, x, 0).astype(jnp.dtype(self.cfg.dtype))
        return tuple(
            part.add(total, x, index) for part, total in zip(self._parts(), carry, strict=True)
        )


def _range_norm(x: Array, mask: Array) -> Array:
    """8 (x - mean) / (max - min) with one mean and range for each sample, over its valid tokens.

    x float32 [B, S, D], mask bool [B, S, 1].
    """
    axes = (1, 2)
    count = jnp.sum(mask, axis=axes, keepdims=True) * x.shape[-1]
    mean = jnp.sum(jnp.where(mask, x, 0), axis=axes, keepdims=True) / (count + EPS)
    low = jnp.min(jnp.where(mask, x, jnp.inf), axis=axes, keepdims=True)
    high = jnp.max(jnp.where(mask, x, -jnp.inf), axis=axes, keepdims=True)
    return 8 * (x - mean) / (high - low + EPS)
