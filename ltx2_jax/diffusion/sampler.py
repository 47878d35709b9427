"""The denoising loop: from noise to clean latents of both streams, in one `lax.scan`.

The loop knows nothing of networks. It is given `predict`, which returns clean estimates of both
streams, guidance included; `unguided` and `guided` build one from a velocity function.
Source: paper section 4; `ltx_pipelines/utils/{samplers,denoisers}.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ltx2_jax.diffusion import flow, guidance, steppers
from ltx2_jax.sharding import spec


class Latents(NamedTuple):
    """Tokens of both streams."""

    video: Array  # [B, T, C]
    audio: Array  # [B, A, C]


Predict = Callable[[Latents, Array], Latents]  # (latents, sigma []) -> clean estimates
Velocity = Callable[[Latents, Array, Any], Latents]  # (latents, sigma [B], text) -> velocities


def denoise(predict: Predict, noise: Latents, sigmas: Array) -> Latents:
    """Clean latents from noise (at sigmas[0] = 1), by Euler steps through sigmas [n + 1]."""

    def step(x: Latents, pair: tuple[Array, Array]) -> tuple[Latents, None]:
        sigma, sigma_next = pair
        x0 = predict(x, sigma)
        video = steppers.euler(x.video, x0.video, sigma, sigma_next)
        audio = steppers.euler(x.audio, x0.audio, sigma, sigma_next)
        return Latents(video, audio), None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


def unguided(velocity: Velocity, text: Any) -> Predict:
    """One pass: the clean estimate for `text`, a tree of arrays with a leading batch axis."""

    def predict(x: Latents, sigma: Array) -> Latents:
        sigmas = jnp.full(x.video.shape[0], sigma, out_sharding=spec("batch"))
        v = velocity(x, sigmas, text)
        return Latents(flow.to_x0(x.video, v.video, sigmas), flow.to_x0(x.audio, v.audio, sigmas))

    return predict


def guided(
    velocity: Velocity, text: Any, null_text: Any, scales: tuple[Array | float, Array | float]
) -> Predict:
    """Classifier-free guidance with one scale for video and one for audio.

    The two passes are entries of one batch, so that they run side by side on the data axis of a
    mesh.
    """
    both = jax.tree.map(_interleave, text, null_text)
    predict_both = unguided(velocity, both)

    def predict(x: Latents, sigma: Array) -> Latents:
        x0 = predict_both(Latents(*(_interleave(a, a) for a in x)), sigma)
        passes = zip(x0, scales, strict=True)
        return Latents(*(guidance.cfg(a[0::2], a[1::2], scale) for a, scale in passes))

    return predict


def _interleave(a: Array, b: Array) -> Array:
    """Rows a0, b0, a1, b1, ...: the passes of one sample stay on one shard of the batch axis."""
    stacked = jnp.stack([a, b], axis=1)
    shape = (2 * a.shape[0], *a.shape[1:])
    if (where := spec("batch")) is None:
        return stacked.reshape(shape)
    tail = jax.typeof(a).sharding.spec[1:]
    return jnp.reshape(stacked, shape, out_sharding=jax.sharding.PartitionSpec(*where, *tail))
