"""Golden cases of the convolutional video VAE (all of `vae_timestep`, `vae` without tiling)."""

from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_case import Case, file_of, load

from ltx2_jax.models.codecs.video_vae import VideoVAE


@cache
def load_video_vae(folder: Path) -> VideoVAE:
    """The convolutional VAE of a golden folder, float32."""
    return load(file_of(folder, "video_vae"), "video_vae", dtype="float32")


@cache
def load_timestep_vae(folder: Path) -> VideoVAE:
    """The extra VAE whose decoder is conditioned on a timestep and adds noise, float32."""
    return load(folder / "vae_timestep.safetensors", "video_vae", dtype="float32")


def pixels_of(pixels_u8: np.ndarray) -> np.ndarray:
    """uint8 (B, 3, F, H, W) -> float32 [B, F, H, W, 3]."""
    return np.moveaxis(pixels_u8.astype(np.float32) / np.float32(127.5) - 1, 1, -1)


@cache
def _jitted(vae: VideoVAE):
    """encode(state, pixels), decode(state, latents, timestep, noise), and the state."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def encode(state, pixels):
        vae = nnx.merge(graphdef, state)
        legal = pixels.shape[1] - (pixels.shape[1] - 1) % vae.cfg.strides[0]
        return {"means": vae.encoder(pixels[:, :legal]), "latent": vae.encode(pixels)}

    @jax.jit
    def decode(state, latents, timestep, noise):
        return {"pixels": nnx.merge(graphdef, state).decode(latents, timestep, noise)}

    return partial(encode, state), partial(decode, state)


def _run(case: Case, vae: VideoVAE) -> dict[str, np.ndarray]:
    encode, decode = _jitted(vae)
    kind, inputs = case.name.split("/")[1].split("_")[0], case.inputs()
    if kind == "encode":
        outputs = encode(pixels_of(inputs["pixels_u8"]))
    elif kind == "decode":
        noise = inputs.get("noise")
        if noise is not None:  # of latents, and maps
            noise = [np.moveaxis(x, 1, -1) if x.ndim == 5 else x for x in noise]
        outputs = decode(np.moveaxis(inputs["latent"], 1, -1), case.args.get("timestep"), noise)
    else:
        raise KeyError(case.name)
    return {name: np.moveaxis(outputs[name], -1, 1) for name in case.spec["outputs"]}


def run_vae(case: Case) -> dict[str, np.ndarray]:
    return _run(case, load_video_vae(case.folder))


def run_vae_timestep(case: Case) -> dict[str, np.ndarray]:
    return _run(case, load_timestep_vae(case.folder))


RUNNERS = {"vae": run_vae, "vae_timestep": run_vae_timestep}
