"""Golden cases of the diffusion video decoder, and of the encoder stored beside it."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import Case, file_of, load, release_of
from golden_video_vae import pixels_of

from ltx2_jax.models.codecs import tiling
from ltx2_jax.models.codecs.diffusion_decoder import DiffusionDecoder
from ltx2_jax.models.codecs.diffusion_tiling import decode_chunks
from ltx2_jax.models.codecs.video_vae import VideoVAE
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import diffusion_decoder


@cache
def load_decoder(folder: Path, prediction: str | None, steps: int | None) -> DiffusionDecoder:
    """The decoder of a golden folder, float32; a case may ask for another output and more steps."""
    release = release_of(file_of(folder, "diffusion_decoder"))
    asked = {"prediction": prediction, "num_steps": steps, "dtype": "float32"}
    overrides = {key: value for key, value in asked.items() if value is not None}
    cfg, params = release.load("diffusion_decoder", **overrides)
    # In the dtype of the file, as upstream rounds them.
    params = diffusion_decoder.fold_gates(params, cfg)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return mapping.build(partial(diffusion_decoder.create, cfg), params)


@cache
def load_encoder(folder: Path) -> VideoVAE:
    """The encoder and the statistics of the latents of the same file, float32."""
    return load(file_of(folder, "diffusion_decoder"), "video_vae", dtype="float32")


def formula_noise(shape: tuple[int, ...], draw: int) -> np.ndarray:
    """Draw number `draw` of the data's README: float32 (B, 3, F, H, W)."""
    i = np.arange(np.prod(shape), dtype=np.uint64)
    u = (i * 2654435761 + draw * 40503 + 12345) % 2**32 / 2**32
    return ((2 * u - 1) * np.sqrt(3)).astype(np.float32).reshape(shape)


def _drawing(case: Case) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Gives the noise of the case, and checks that its shapes are asked for in its order."""
    shapes = iter(enumerate(case.args["noise_draws"]))

    def draw(shape):
        number, official = next(shapes)
        assert [shape[0], shape[4], *shape[1:4]] == official, f"draw {number}"
        return np.moveaxis(formula_noise(official, number), 1, -1)

    return draw


def _latents(case: Case) -> jax.Array:
    latents = np.moveaxis(case.inputs()["latent"], 1, -1)
    return load_encoder(case.folder).statistics.unnormalize(latents)


def run_decode(case: Case, decoder: DiffusionDecoder) -> dict[str, np.ndarray]:
    assert list(decoder.cfg.min_latents) == case.args.get(
        "min_latent_size", list(decoder.cfg.min_latents)
    )
    sizes = {axis: tuple(case.args[axis]) for axis in tiling.AXES if axis in case.args}
    by = tiling.TileCounts if "count" in case.name else tiling.TileSizes
    chunks = list(
        decode_chunks(decoder, _latents(case), _drawing(case), by(**sizes) if sizes else None)
    )
    if "chunk_frames" in case.args:
        assert [chunk.shape[1] for chunk in chunks] == case.args["chunk_frames"]
    pixels = np.concatenate(chunks, axis=1)
    outputs = {
        "pixels": np.moveaxis(pixels, -1, 1),
        "frames": np.clip((pixels[0] + 1) / 2, 0, 1),
    }
    return {name: outputs[name] for name in case.spec["outputs"]}


def run_block(case: Case, decoder: DiffusionDecoder) -> dict[str, jax.Array]:
    @nnx.jit
    def run(block, x):
        attended = block.attention(x, lambda frame: frame)
        return {"attn": block.attention_out(attended), "y": block(x)}

    return run(decoder.stages[0].blocks[0], case.inputs()["x"])


def run_video_vae_diffusion(case: Case) -> dict[str, np.ndarray | jax.Array]:
    kind = case.name.split("/")[1]
    if kind.startswith("encode"):
        pixels = pixels_of(case.inputs()["pixels_u8"])
        latents = nnx.jit(VideoVAE.encode)(load_encoder(case.folder), pixels)
        return {"latent": np.moveaxis(latents, -1, 1)}
    steps = case.args.get("steps")
    decoder = load_decoder(case.folder, case.args.get("model_output_type"), steps)
    if kind.startswith(("decode", "tiled_decode")):
        return run_decode(case, decoder)
    if kind.startswith("stages_1_to_3"):
        return {"features": nnx.jit(DiffusionDecoder.first_stages)(decoder, _latents(case))}
    if kind.startswith("neighborhood_block"):
        return run_block(case, decoder)
    raise KeyError(case.name)


RUNNERS = {"video_vae_diffusion": run_video_vae_diffusion}
