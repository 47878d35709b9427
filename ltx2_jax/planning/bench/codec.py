"""Encoding and decoding of one clip, picture and sound, as a pipeline does it.

In tiles, spread over all devices, from host memory and back to it, with random weights of the
released sizes. The first call, which compiles, is not counted; the best of the others is.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx2_jax.chips import peak_flops
from ltx2_jax.codecs.audio import AudioCodec
from ltx2_jax.codecs.video import VideoCodec
from ltx2_jax.command import count, positive
from ltx2_jax.diffusion.geometry import audio_latent_length
from ltx2_jax.models import flops
from ltx2_jax.models.codecs.audio_vae import AUDIO_VAE
from ltx2_jax.models.codecs.video_vae import VIDEO_VAE_2_0, VIDEO_VAE_2_3
from ltx2_jax.models.codecs.vocoder import VOCODER_2_0, VOCODER_2_3
from ltx2_jax.planning.bench.timing import best_of
from ltx2_jax.planning.vae import check_size
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import audio_vae as audio_weights
from ltx2_jax.weights.names import video_vae as video_weights
from ltx2_jax.weights.names import vocoder as vocoder_weights

VAES = {
    "2.0": (VIDEO_VAE_2_0, VOCODER_2_0),
    "2.3": (VIDEO_VAE_2_3, VOCODER_2_3),
    "2.5": (VIDEO_VAE_2_3, VOCODER_2_3),
}


# A line of the table: name, seconds of the best call, seconds of the first, FLOPs, bytes.
Measurement = tuple[str, float, float, int, int]


def run(args: argparse.Namespace) -> None:
    """Prints a line per network and direction as it is measured."""
    video, vocoder = VAES[args.release]
    size = (args.frames, args.height, args.width)
    check_size(video, size)
    device = jax.devices()[0]
    print(
        f"codec of {args.release}: {args.frames} frames of {args.width}x{args.height} at "
        f"{args.fps:g} fps on {jax.device_count()} {device.device_kind}\n"
        f"{'':14}{'seconds':>9}{'first':>9}{'frames/s':>10}{'TFLOP':>9}{'TFLOP/s':>9}"
        f"{'of peak':>9}{'peak GiB':>10}"
    )
    measured = itertools.chain(measure_video(video, size, args.calls), measure_audio(vocoder, args))
    for name, seconds, first, work, peak_bytes in measured:
        rate = work / seconds
        peak = peak_flops(device.device_kind)
        share = f"{rate / peak / jax.device_count():9.1%}" if peak else f"{'-':>9}"
        print(
            f"{name:14}{seconds:9.3f}{first:9.2f}{args.frames / seconds:10.1f}"
            f"{work / 1e12:9.3f}{rate / 1e12:9.3f}{share}{peak_bytes / 2**30:10.2f}",
            flush=True,
        )


def measure_video(config: Any, size: tuple[int, int, int], calls: int) -> Iterator[Measurement]:
    """Encoding and decoding of (frames, height, width) pixels."""
    create = partial(video_weights.create, config)
    codec = VideoCodec(config, lambda where: jax.device_put(random_weights(create), where))
    work = flops.video_vae_flops(config, *size)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    st, sh, sw = config.strides
    grid = ((size[0] - 1) // st + 1, size[1] // sh, size[2] // sw)
    latents = np.random.default_rng(0).normal(size=(1, *grid, config.latent_channels))
    halves = {
        "encode": lambda: codec.encode(pixels),
        "decode": lambda: [None for _ in codec.decode_chunks(latents)],
    }
    for half, call in halves.items():
        seconds, first = best_of(call, calls)
        peak = measured_peak() or compiled_peak(codec.lower(half, pixels.shape))
        yield f"{half} video", seconds, first, work[half], peak


def measure_audio(vocoder: Any, args: argparse.Namespace) -> Iterator[Measurement]:
    """Encoding and decoding of the clip's sound, on one device."""
    create = partial(audio_weights.create, AUDIO_VAE), partial(vocoder_weights.create, vocoder)

    def draw(where: Any) -> Any:
        return jax.device_put(tuple(random_weights(c) for c in create), where)

    codec = AudioCodec(AUDIO_VAE, vocoder, draw)
    length = audio_latent_length(args.frames, args.fps, codec.latents_per_second)
    samples = round(length / codec.latents_per_second * codec.sample_rate)
    audio = np.random.default_rng(0).uniform(-1, 1, (1, samples, 2)).astype(np.float32)
    latents = np.zeros((1, length, codec.bins, codec.channels), np.float32)
    for half, call in (
        ("encode", lambda: codec.encode(audio)),
        ("decode", lambda: codec.decode(latents)),
    ):
        seconds, first = best_of(call, args.calls)
        program, *given = codec.program(half, audio.shape if half == "encode" else latents.shape)
        peak = measured_peak() or compiled_peak(program.func.lower(*given, **program.keywords))
        plain = partial(program.func.__wrapped__, **program.keywords)  # which others can contain
        yield f"{half} audio", seconds, first, flops.count(plain, *given), peak


def random_weights(create: Callable[[], nnx.Module], seed: int = 0) -> Any:
    """Weights that keep activations finite: matrices of unit gain, vectors of ones."""
    leaves, tree = jax.tree.flatten(mapping.nested(mapping.abstract_params(create)))
    largest = max(leaf.size for leaf in leaves)

    @jax.jit
    def draw() -> list[jax.Array]:
        # The same numbers in every matrix: as good for this, and drawn in no time.
        noise = jax.random.normal(jax.random.key(seed), largest, jnp.bfloat16)
        return [
            noise[: leaf.size].reshape(leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
            if leaf.ndim > 1
            else jnp.ones(leaf.shape)
            for leaf in leaves
        ]

    return tree.unflatten(draw())


def measured_peak() -> int:
    """The most bytes that one device has held so far; 0 where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def compiled_peak(lowered: jax.stages.Lowered) -> int:
    """Bytes per device of a program: arguments, results and temporaries."""
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bench codec`."""
    add = parser.add_argument
    add("--release", choices=tuple(VAES), default="2.3", help="(default: %(default)s)")
    add("--frames", type=count, default=121, metavar="N", help="(default: %(default)s)")
    add("--height", type=count, default=704, metavar="PIXELS", help="(default: %(default)s)")
    add("--width", type=count, default=1280, metavar="PIXELS", help="(default: %(default)s)")
    add("--fps", type=positive, default=24.0, help="decides the sound's length (%(default)s)")
    add("--calls", type=count, default=3, metavar="N", help="of which the best counts (3)")
