"""The denoising loop: from noise to clean latents of both streams, in one `lax.scan`.

The loop knows nothing of networks. It is given `predict`, which returns clean estimates of both
streams, guidance included; `unguided` and `guided` build one from a velocity network.
Source: paper section 4; `ltx_pipelines/utils/{samplers,denoisers}.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ltx2_jax.diffusion import flow, guidance, steppers
from ltx2_jax.sharding import Names, axis_size, pin, spec


class Latents(NamedTuple):
    """Tokens of both streams."""

    video: Array  # [B, T, C]
    audio: Array  # [B, A, C]


# Logical names of the axes of both after the batch.
TOKENS: tuple[Names, Names] = ("video_tokens", None), ("audio_tokens", None)

Predict = Callable[[Latents, Array], Latents]  # (latents, sigma []) -> clean estimates
Velocity = Callable[[Latents, Array], Latents]  # (latents, sigma [B]) -> velocities
# Conditions, a tree of arrays with a leading batch axis -> the velocity under them. This call comes
# before the loop, so it computes what no step changes.
Network = Callable[[Any], Velocity]


def denoise(predict: Predict, noise: Latents, sigmas: Array) -> Latents:
    """Clean latents from noise (at sigmas[0] = 1), by Euler steps through sigmas [n + 1]."""

    def step(x: Latents, pair: tuple[Array, Array]) -> tuple[Latents, None]:
        sigma, sigma_next = pair
        x0 = predict(x, sigma)
        video = steppers.euler(x.video, x0.video, sigma, sigma_next)
        audio = steppers.euler(x.audio, x0.audio, sigma, sigma_next)
        return Latents(video, audio), None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


def unguided(network: Network, conditions: Any) -> Predict:
    """One pass: the clean estimate under `conditions`."""
    velocity = network(conditions)

    def predict(x: Latents, sigma: Array) -> Latents:
        rows = x.video.shape[0]
        sigmas = jnp.full(rows, sigma, out_sharding=spec(rows_axis(rows)))
        found = velocity(x, sigmas)
        return Latents(
            flow.to_x0(x.video, found.video, sigmas), flow.to_x0(x.audio, found.audio, sigmas)
        )

    return predict


def in_passes(
    network: Network, conditions: Sequence[Any], combine: Callable[..., Latents]
) -> Predict:
    """`combine` of the clean estimates under each of `conditions`, given in their order.

    The passes are entries of one batch, so that they run side by side on the data axis of a mesh,
    whose size must divide the batch.
    """
    count = len(conditions)

    def interleaved(*leaves: Array) -> Array:
        return _interleave(leaves, (None,) * (leaves[0].ndim - 1))

    predict_all = unguided(network, jax.tree.map(interleaved, *conditions))

    def predict(x: Latents, sigma: Array) -> Latents:
        inputs = (_interleave([a] * count, names) for a, names in zip(x, TOKENS, strict=True))
        x0 = predict_all(Latents(*inputs), sigma)
        parts = (_split(a, count, names) for a, names in zip(x0, TOKENS, strict=True))
        return combine(*map(Latents, *parts))

    return predict


def guided(
    network: Network,
    conditions: Sequence[Any],
    strengths: Sequence[tuple[Array | float, Array | float]],
) -> Predict:
    """The estimate under the first condition, moved away from those under the others.

    `strengths` are pairs (video, audio), one for each of the others; see `guidance.moved_away`.
    """

    def combine(cond: Latents, *others: Latents) -> Latents:
        streams = zip(cond, zip(*others, strict=True), zip(*strengths, strict=True), strict=True)
        return Latents(*(guidance.moved_away(*stream) for stream in streams))

    return in_passes(network, conditions, combine)


def rows_axis(rows: int) -> str | None:
    """The logical axis of so many clips: too few for the data axis are whole on every shard."""
    return "batch" if rows % axis_size("batch") == 0 else None


def _interleave(rows: Sequence[Array], names: Names) -> Array:
    """Rows a0, b0, a1, b1, ... of arrays [B, ...], one a pass -> [B passes, ...].

    The passes of one sample stay on one shard if there are enough samples.
    """
    size, *rest = rows[0].shape
    lead = rows_axis(size)
    x = jnp.stack([pin(a, lead, *names) for a in rows], axis=1)
    shape = (size * len(rows), *rest)
    return pin(jnp.reshape(x, shape, out_sharding=spec(lead, *names)), "batch", *names)


def _split(x: Array, count: int, names: Names) -> list[Array]:
    """The reverse of `_interleave`: [B count, ...] -> `count` arrays [B, ...]."""
    size = x.shape[0] // count
    lead = rows_axis(size)
    shape, where = (size, count, *x.shape[1:]), spec(lead, None, *names)
    x = jnp.reshape(pin(x, lead, *names), shape, out_sharding=where)
    return [x[:, i] for i in range(count)]
