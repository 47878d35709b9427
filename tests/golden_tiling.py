"""Golden cases of tiled encoding and decoding with the convolutional video VAE."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_case import Case
from golden_video_vae import load_video_vae

from ltx2_jax.models.codecs import tiling
from ltx2_jax.models.codecs.video_vae import VideoVAE

AXES = ("frames", "height", "width")


@cache
def _jitted(folder: Path):
    """The VAE, and its two halves as jitted functions of one tile."""
    vae = load_video_vae(folder)
    graphdef, state = nnx.split(vae)

    def method(name):
        run = jax.jit(lambda state, x: getattr(VideoVAE, name)(nnx.merge(graphdef, state), x))
        return lambda x: run(state, x)

    return vae, method("encode"), method("decode")


def run_tiled(case: Case) -> dict[str, np.ndarray]:
    """`vae/tiled_encode_*` and `vae/tiled_decode_*`; "count" in the name: tiled by number."""
    kind = case.name.split("/")[1]
    vae, encode, decode = _jitted(case.folder)
    by = tiling.TileCounts if "count" in kind else tiling.TileSizes
    tiles = by(**{axis: tuple(case.args[axis]) for axis in AXES})
    if kind.startswith("tiled_encode"):
        pixels = np.moveaxis(case.inputs()["pixels_u8"], 1, -1)
        plan = tiling.plan_encode(pixels.shape[1:4], vae.cfg.strides, tiles)
        latents = tiling.tiled_encode(
            lambda tile: encode(tile.astype(np.float32) / np.float32(127.5) - 1), pixels, plan
        )
        return {"latent": np.moveaxis(latents, -1, 1)}
    if kind.startswith("tiled_decode"):
        latents = np.moveaxis(case.inputs()["latent"], 1, -1)
        plan = tiling.plan_decode(latents.shape[1:4], vae.cfg.strides, tiles)
        chunks = list(tiling.tiled_decode(decode, latents, plan))
        if "chunk_frames" in case.args:
            assert plan.chunk_frames == case.args["chunk_frames"]
            # Upstream yields the empty first chunk, we do not.
            yielded = [n for n in case.args["chunk_frames"] if n]
            assert [chunk.shape[1] for chunk in chunks] == yielded
        return {"pixels": np.moveaxis(np.concatenate(chunks, axis=1), -1, 1)}
    raise KeyError(case.name)
