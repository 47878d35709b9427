"""What a sample is given and need not generate, told to the network token by token."""

import jax.numpy as jnp
from jax import Array

from ltx2_jax.sharding import pin


def first_frame_mask(shape: tuple[int, int, int, int]) -> Array:
    """[B, T], 1 on latent frame 0: a keyframe to models that have the embedding.

    Official inference sets it, but `ltx_trainer/training_strategies/flexible.py` never does. Here
    both do.
    """
    batch, frames, height, width = shape
    first = jnp.arange(frames * height * width) < height * width
    return pin(jnp.tile(first.astype(jnp.float32), (batch, 1)), "batch", "video_tokens")
