"""Golden cases of the latent upsamplers and of the duration head."""

from functools import cache

import jax
import numpy as np
from flax import nnx
from golden_case import Case, file_of, load

from ltx2_jax.models.codecs.upsampler import upsample_latents

load_network = cache(load)


def run_upsampler(case: Case) -> dict[str, np.ndarray]:
    network = load_network(case.folder / case.args["file"], "upsampler", dtype="float32")
    vae = load_network(file_of(case.folder, "video_vae"), "video_vae")
    mean, std = vae.statistics.mean[...], vae.statistics.std[...]
    latents = np.moveaxis(case.inputs()["latent"], 1, -1)

    @nnx.jit
    def both(network, x):
        return {"raw": network(x), "normalized_path": upsample_latents(network, x, mean, std)}

    outputs = both(network, latents)
    return {name: np.moveaxis(outputs[name], -1, 1) for name in case.spec["outputs"]}


def run_duration_head(case: Case) -> dict[str, jax.Array]:
    head = load_network(file_of(case.folder, "duration_head"), "duration_head")
    inputs = case.inputs()
    given = {"both": ("video", "audio"), "video_only": ("video",), "audio_only": ("audio",)}
    outputs = case.spec["outputs"]

    @nnx.jit
    def seconds(head, inputs):
        return {name: head(**{s: inputs[f"{s}_tokens"] for s in given[name]}) for name in outputs}

    return seconds(head, inputs)


RUNNERS = {"upsampler": run_upsampler, "duration_head": run_duration_head}
