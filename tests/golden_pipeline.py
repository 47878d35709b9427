"""Golden cases of whole ways: a recipe from text context to latents, and latents to clips."""

import dataclasses
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import Case, file_of, load, release_of
from golden_sampling import channels_first, channels_last, direct, noises_of

from ltx2_jax.codecs import audio
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.diffusion.sampler import Latents
from ltx2_jax.models.codecs.audio_vae import AudioVAE
from ltx2_jax.models.codecs.upsampler import upsample_latents
from ltx2_jax.sampling import recipes, stages
from ltx2_jax.sampling.given import Encoded, Placed
from ltx2_jax.sampling.programs import make_sampler
from ltx2_jax.sampling.tasks import Task
from ltx2_jax.sharding import make_mesh


@cache
def codec_of(folder: Path):
    files = dict.fromkeys(file_of(folder, network) for network in ("video_vae", "audio_vae"))
    return load_codec(*files, dtype="float32", devices=jax.devices()[:1])


def in_parts(params, latents, *, graph):
    """As `audio._decode_audio`, which is one program; that of a vocoder's parts compiles sooner."""
    vae, vocoder = (nnx.merge(g, p) for g, p in zip(graph, params, strict=True))
    return vocoder(jax.jit(AudioVAE.decode)(vae, latents))


def run_decode(case: Case):
    x, codec = case.inputs(), codec_of(case.folder)
    assert codec.audio.output_sample_rate == case.args["sampling_rate"]
    frames = codec.video.decode(channels_last(x["v_latent"]))[0]
    samples = case.spec["shapes"]["outputs"]["waveform"][1]
    large = codec.audio.vocoder.extension is not None
    with mock.patch.object(audio, "_decode_audio", in_parts if large else audio._decode_audio):
        waveform = codec.audio.decode(channels_last(x["a_latent"]), samples)[0]
    return {"frames": (frames + 1) / 2, "waveform": waveform.T}


def stage(case: Case, number: int, encoded: Encoded, start, noises):
    """Latents of a stage of the distilled recipe, as `Pipeline` runs it."""
    x, args = case.inputs(), case.args
    graph, params = direct(case.folder)
    release = release_of(file_of(case.folder, "transformer")).release_of("transformer")
    sigmas = tuple(float(s) for s in x[f"sigmas_stage{number + 1}"])
    chosen = dataclasses.replace(recipes.distilled(release).stages[number], sigmas=sigmas)
    codec, growth = codec_of(case.folder), 32 * (number + 1)
    frames = (args["frames"] - 1) * 8 + 1
    height, width = args["height"] * growth, args["width"] * growth
    task = Task(frames, height, width, args["fps"])
    text = {name: np.repeat(x[f"{name[0]}_context"], 2, 0) for name in ("video_text", "audio_text")}
    text["text_mask"] = np.ones(text["video_text"].shape[:2])
    marked = "keyframes_abs_pos_embedding" in names_of(case.folder)
    program = stages.Program(make_sampler(), graph, make_mesh(devices=jax.devices()[:1]), marked)
    (found,) = stages.run(
        chosen, program, params, stages.Shapes.of(task, codec, height, width), task, encoded, text,
        [0], start, number=number, batch=1, noises=noises,
    )  # fmt: skip
    return found.video, found.audio


@cache
def names_of(folder: Path):
    return release_of(file_of(folder, "transformer")).networks["transformer"].tensors


def run_two_stage(case: Case):
    x, codec = case.inputs(), codec_of(case.folder)
    image = np.moveaxis(x["image_u8"], 1, -1)  # [1, 1, H, W, 3]
    _, _, height, width, _ = image.shape
    half = image.reshape(1, 1, height // 2, 2, width // 2, 2, 3).mean((3, 5)).round()
    images = [np.asarray(codec.video.encode(i.astype(np.uint8))) for i in (half, image)]
    encoded = [Encoded(images=(Placed(i[0], 0, 1.0),)) for i in images]
    first = noises_of({**x, "v_noise": x["v_noise_stage1"], "a_noise": x["a_noise_stage1"]})
    v, a = stage(case, 0, encoded[0], None, first)
    vae = load(file_of(case.folder, "video_vae"), "video_vae")
    network = load(case.folder / "upsampler_spatial.safetensors", "upsampler", dtype="float32")
    statistics = vae.statistics.mean[...], vae.statistics.std[...]
    larger = np.asarray(upsample_latents(network, jnp.asarray(v[None]), *statistics))[0]
    noise = Latents(jnp.asarray(x["v_noise_stage2"]), jnp.asarray(x["a_noise_stage2"]))
    last_v, last_a = stage(case, 1, encoded[1], [stages.Found(larger, a)], (noise, None))
    found = {
        "image_latent_stage1": images[0][0],
        "image_latent_stage2": images[1][0],
        "v_stage1": v,
        "a_stage1": a,
        "v_upsampled": larger,
        "v_latent": last_v,
        "a_latent": last_a,
    }
    return {name: channels_first(jnp.asarray(value)[None]) for name, value in found.items()}


def run_pipeline(case: Case):
    kind = case.name.split("/")[1]
    if kind.startswith("decode"):
        return run_decode(case)
    assert kind == "two_stage_distilled", f"unknown pipeline {kind!r}"
    return run_two_stage(case)


RUNNERS = {"pipeline": run_pipeline}
