"""The rectified flow: noising, velocities, sigma draws, the loss.

`x_sigma = (1 - sigma) * x0 + sigma * noise`; the network predicts `velocity = noise - x0`; sigma
runs from 0 (clean) to 1 (noise). All conversions run in float32 whatever the activations are: near
sigma = 1 the clean signal is the small difference of two large numbers, which bfloat16 loses.

Sources: `ltx_core/utils.py`, `ltx_trainer/timestep_samplers.py`,
`ltx_trainer/training_strategies/flexible.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def align(values: Array | float, x: Array) -> Array:
    """`values` [], [B], [B, T] or [B, T, 1] in float32, axes appended to broadcast against x."""
    values = jnp.asarray(values, jnp.float32)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) if values.ndim else values


# ------------------------------------------------------------------------------------ conversions


def noised(x0: Array, noise: Array, sigma: Array | float) -> Array:
    """Clean latents at noise level sigma, in x0's shape and dtype; sigma as `align` takes it."""
    s = align(sigma, x0)
    mixed = (1.0 - s) * x0.astype(jnp.float32) + s * noise.astype(jnp.float32)
    return mixed.astype(x0.dtype)


def velocity_target(x0: Array, noise: Array) -> Array:
    """What the network should predict, in x0's shape and in the dtype that holds both.

    So it is float32 wherever the noise is, and bfloat16 where latents and noise both are.
    """
    difference = noise.astype(jnp.float32) - x0.astype(jnp.float32)
    return difference.astype(jnp.promote_types(noise.dtype, x0.dtype))


def to_x0(x: Array, velocity: Array, timesteps: Array | float) -> Array:
    """Clean estimate `x - velocity * sigma`, in x's dtype; timesteps is sigma per sample or token.

    Clean (conditioning) tokens have timestep 0 and come back unchanged.
    """
    t = align(timesteps, x)
    return (x.astype(jnp.float32) - velocity.astype(jnp.float32) * t).astype(x.dtype)


def to_velocity(x: Array, x0: Array, sigma: Array | float) -> Array:
    """Velocity behind a clean estimate, `(x - x0) / sigma`, in x's dtype; 0 where sigma is 0."""
    s = align(sigma, x)
    difference = x.astype(jnp.float32) - x0.astype(jnp.float32)
    # A product: XLA makes one of a quotient by a scalar in some programs, and the same clip would
    # have other bits on another mesh.
    inverse = jnp.where(s > 0, 1.0 / jnp.where(s > 0, s, 1.0), 0.0)
    return (difference * inverse).astype(x.dtype)


# ------------------------------------------------------------------------------------ sigma draws


def shift_mu(tokens, base_shift: float = 0.95, max_shift: float = 2.05):
    """Shift of log-odds(sigma) for a latent of `tokens` tokens: longer latents train at more noise.

    A line through base_shift at 1024 tokens and max_shift at 4096, extrapolated without limit on
    both sides. `tokens` may be a number or an array, traced or not.
    """
    slope = (max_shift - base_shift) / (4096 - 1024)
    return base_shift + slope * (tokens - 1024)


def shifted_logit_normal(
    normal: Array,  # n ~ N(0, 1)
    uniform: Array,  # U ~ U(0, 1)
    pick: Array,  # q ~ U(0, 1), of the same shape
    tokens: Array | float,
    *,
    std: float = 1.0,
    eps: float = 1e-3,
    uniform_prob: float = 0.1,
) -> Array:
    """Training sigmas in [0, 1] out of three draws, float32 of their shape.

    `tokens` is the stream's own count of target tokens, references not included; a number or an
    array that broadcasts against the draws, traced or not. The logit-normal is stretched so that
    its 0.5 % and 99.9 % quantiles land on 0 and 1, the overshoot below is reflected at `eps`, and a
    share `uniform_prob` of the draws is uniform on [eps, 1). Source:
    `ShiftedLogitNormalTimestepSampler`.
    """
    mu = shift_mu(jnp.asarray(tokens, jnp.float32))
    # In the complement 1 - u = sigmoid(-x): from ~50k tokens on (20 s at 720p) u and both quantiles
    # round to 1 in float32, and the quotient of their differences would be 0 / 0.
    x = jax.nn.sigmoid(-(std * normal + mu))
    at_zero = jax.nn.sigmoid(-(mu - 2.5758 * std))
    at_one = jax.nn.sigmoid(-(mu + 3.0902 * std))
    sigma = (at_zero - x) / (at_zero - at_one)
    sigma = jnp.clip(jnp.where(sigma < eps, 2 * eps - sigma, sigma), 0.0, 1.0)
    return jnp.where(pick > uniform_prob, sigma, (1.0 - eps) * uniform + eps)


def sample_sigmas(
    key: Array,
    shape: tuple[int, ...],
    tokens: Array | float,
    *,
    std: float = 1.0,
    eps: float = 1e-3,
    uniform_prob: float = 0.1,
) -> Array:
    """Training sigmas of `shape` by `shifted_logit_normal`, which says what its arguments are."""
    normal_key, pick_key, uniform_key = jax.random.split(key, 3)
    return shifted_logit_normal(
        jax.random.normal(normal_key, shape, jnp.float32),
        jax.random.uniform(uniform_key, shape, jnp.float32),
        jax.random.uniform(pick_key, shape, jnp.float32),
        tokens,
        std=std,
        eps=eps,
        uniform_prob=uniform_prob,
    )


def uniform_sigmas(
    key: Array, shape: tuple[int, ...], min_value: float = 0.0, max_value: float = 1.0
) -> Array:
    """Training sigmas uniform on [min_value, max_value): float32 of `shape`."""
    return between(jax.random.uniform(key, shape, jnp.float32), min_value, max_value)


def between(uniform: Array, min_value: float, max_value: float) -> Array:
    """Draws from [0, 1) moved to [min_value, max_value)."""
    return min_value + (max_value - min_value) * uniform


Sampler = Callable[[Array, tuple[int, ...], Array | float], Array]  # key, shape, tokens -> sigmas


def draw_sigmas(
    key: Array,
    batch: int,
    video_tokens: Array | float,
    audio_tokens: Array | float,
    *,
    shared_prob: float,
    sampler: Sampler = sample_sigmas,
) -> tuple[Array, Array]:
    """Training sigmas of the two streams, each float32 [B]: `(video_sigma, audio_sigma)`.

    Each stream draws its own, shifted by its own token count, so the network learns every corner
    of the (video, audio) noise square: audio from clean video, video from clean audio. Sampling
    both together walks the square's diagonal, which independent draws hit with probability zero,
    so a share `shared_prob` of the samples uses one sigma for both. That sigma is the video's
    draw: the sampling schedule is shifted by the video token count too. A token count may be [B].
    """
    video_key, audio_key, shared_key = jax.random.split(key, 3)
    video_sigma = sampler(video_key, (batch,), video_tokens)
    audio_sigma = sampler(audio_key, (batch,), audio_tokens)
    shared = jax.random.uniform(shared_key, (batch,), jnp.float32) < shared_prob
    return video_sigma, jnp.where(shared, video_sigma, audio_sigma)


# --------------------------------------------------------------------------------------- the loss


def masked_loss(
    prediction: Array,  # [B, T, C]
    target: Array,  # [B, T, C]
    mask: Array,  # [B, T], 1 where the token is to be learned
) -> Array:
    """Mean squared error over each sample's unmasked tokens: float32 [B].

    Dividing by the mean of the mask makes a sample's loss independent of how many of its tokens
    are masked; a sample without any contributes 0.
    """
    mask = mask.astype(jnp.float32)
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    per_token = jnp.mean(jnp.square(error), axis=-1)  # [B, T]
    return jnp.mean(mask * per_token, axis=1) / jnp.maximum(jnp.mean(mask, axis=1), 1e-8)


def sigma_quarters(
    loss: Array,  # [B]
    sigma: Array,  # [B], in [0, 1]
    counted: Array | None = None,  # bool [B]; None: all
) -> tuple[Array, Array]:
    """Sums of `loss` and counts of samples by quarter of sigma: float32 [4], [4].

    The loss at sigma 0.1 and at 0.9 differ by far more than training moves either, so only the
    quarters show progress. Sums and counts, not means, so that they add up over steps.
    """
    quarter = jnp.clip(jnp.floor(sigma * 4), 0, 3)
    member = (quarter[:, None] == jnp.arange(4)).astype(jnp.float32)  # [B, 4]
    if counted is not None:
        member = member * counted[:, None]
    return jnp.sum(member * loss.astype(jnp.float32)[:, None], axis=0), jnp.sum(member, axis=0)
