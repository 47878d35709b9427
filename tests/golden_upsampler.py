"""Golden cases of the latent upsamplers and of the duration head."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import Case, component, component_of

from ltx2_jax.models.duration_head import DurationHead
from ltx2_jax.models.upsampler import LatentUpsampler, upsample_latents
from ltx2_jax.weights import duration_head, mapping, upsampler


def build(weights, tensors: dict[str, np.ndarray], config) -> nnx.Module:
    """The float32 network of one of our modules of weights."""
    params = weights.from_official(tensors, config)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return mapping.build(partial(weights.create, config), params)


@cache
def load_upsampler(path: Path) -> LatentUpsampler:
    metadata, tensors = component_of(path, "upsampler")
    config = upsampler.upsampler_config(metadata, dtype="float32")
    return build(upsampler, tensors, config)


@cache
def load_duration_head(folder: Path) -> DurationHead:
    metadata, tensors = component(folder, "duration_head")
    return build(duration_head, tensors, duration_head.duration_head_config(metadata, tensors))


def run_upsampler(case: Case) -> dict[str, jax.Array]:
    network = load_upsampler(case.folder / case.args["file"])
    _, vae = component(case.folder, "video_vae")
    mean, std = (
        np.asarray(vae[f"per_channel_statistics.{name}-of-means"], np.float32)
        for name in ("mean", "std")
    )
    latents = jnp.moveaxis(jnp.asarray(case.inputs()["latent"]), 1, -1)

    @nnx.jit
    def both(network, x):
        return {"raw": network(x), "normalized_path": upsample_latents(network, x, mean, std)}

    outputs = both(network, latents)
    return {name: jnp.moveaxis(outputs[name], -1, 1) for name in case.spec["outputs"]}


def run_duration_head(case: Case) -> dict[str, jax.Array]:
    head = load_duration_head(case.folder)
    inputs = {name: jnp.asarray(value) for name, value in case.inputs().items()}
    given = {"both": ("video", "audio"), "video_only": ("video",), "audio_only": ("audio",)}
    outputs = case.spec["outputs"]

    @nnx.jit
    def seconds(head, inputs):
        return {name: head(**{s: inputs[f"{s}_tokens"] for s in given[name]}) for name in outputs}

    return seconds(head, inputs)


RUNNERS = {"upsampler": run_upsampler, "duration_head": run_duration_head}
