"""One denoising step of a clip and the parts of its blocks, as the sampler runs them.

Full width, random weights in bfloat16. The protocol of the paper's table 1 is the default: 121
frames of 1280x704, one Euler step, one pass (guidance scale 1), text 1024 tokens, batch 1. A part
is timed alone, in a scan over all blocks. The first call, which compiles, is not counted; the best
of the others is. Rates are beside those of a large bfloat16 matrix product on the same device.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ltx2_jax import chips
from ltx2_jax.chips import compiler_options
from ltx2_jax.command import count, mesh_flag
from ltx2_jax.config import Config, DataConfig, TextConfig
from ltx2_jax.diffusion.sampler import Latents, denoise, rows_axis, unguided
from ltx2_jax.errors import UserError
from ltx2_jax.models import flops, ltx2
from ltx2_jax.models.transformer.config import PRESETS
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.models.transformer.transformer import Block
from ltx2_jax.planning.bench.timing import best_of
from ltx2_jax.planning.programs import (
    DEFAULT_SIZE,
    check,
    check_passes,
    request_of,
)
from ltx2_jax.planning.text import TEXT_ENCODERS
from ltx2_jax.sampling import programs
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import make_mesh, pin, spec
from ltx2_jax.training.batch import abstract_text

STEPS = 4  # timed at once
PAPER = 49.18  # steps per minute on one H100 (arXiv 2601.03233, table 1)
MODELS = {
    version: (PRESETS[version], TEXT_ENCODERS[version].video, TEXT_ENCODERS[version].audio)
    for version in ("2.0", "2.3")
}
# Of a part: the step of `Block` that it is, and what its terms in `flops.forward_flops` contain.
PARTS = {
    "self-attention": (Block.self_attention, "self-attention"),
    "text": (Block.text_attention, " text "),
    "cross-modal": (Block.cross_modal, "-to-"),
    "feed-forward": (Block.feed_forward, "feed-forward"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench step`."""
    add_model_arguments(parser)
    parser.add_argument("--calls", type=count, default=5, metavar="N", help="(%(default)s)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what clips, on which devices."""
    add = parser.add_argument
    add("--release", choices=tuple(MODELS), default="2.0", help="(%(default)s)")
    add("--layers", type=count, metavar="N", help="blocks (default: all)")
    add("--frames", type=count, default=DEFAULT_SIZE.num_frames, metavar="N", help="(%(default)s)")
    add("--height", type=count, default=DEFAULT_SIZE.height, metavar="PIXELS", help="(%(default)s)")
    add("--width", type=count, default=DEFAULT_SIZE.width, metavar="PIXELS", help="(%(default)s)")
    add("--batch", type=count, default=1, metavar="N", help="clips (%(default)s)")
    add("--mesh", type=mesh_flag, metavar="D,M,S", help="(default: all devices in data)")


def config_of(args: argparse.Namespace, **changes: Any) -> tuple[Config, Request]:
    """The released model of `args`, and its clips."""
    model, video, audio = MODELS[args.release]
    model = dataclasses.replace(model, num_layers=args.layers or model.num_layers)
    config = Config(
        workdir="",
        model=model,
        text=TextConfig(release=args.release, video_connector=video, audio_connector=audio),
        data=DataConfig(path="none: random latents", batch_size=args.batch),
        **changes,
    )
    request = request_of(config, num_frames=args.frames, height=args.height, width=args.width)
    return config, request


def run(args: argparse.Namespace) -> None:
    """Prints a line per part as it is measured, then the step."""
    config, request = config_of(args)
    mesh = make_mesh(*(args.mesh or (-1, 1, 1)))
    check(config, request, mesh)
    check_passes(args.batch, 1, mesh)
    with jax.set_mesh(mesh):
        params = random_params(ltx2.abstract_params(config.networks, mesh, for_sampling=True))
        rate = matmul_rate(args.calls)
        print(title("step", args, config, rate), flush=True)
        terms = terms_of_a_step(config, request)
        for name, call in parts(config, request, params, args.batch):
            word = PARTS[name][1] if name in PARTS else "timestep"
            work = args.batch * sum(value for term, value in terms.items() if word in term)
            print(line(name, best_of(call, args.calls)[0], work, rate), flush=True)
        # The difference of two lengths: what comes before the loop does not count.
        one, more = (
            best_of(steps(config, request, params, args.batch, n), args.calls)[0]
            for n in (1, 1 + STEPS)
        )
    seconds = (more - one) / STEPS
    if seconds <= 0:
        raise UserError(f"{1 + STEPS} steps took no longer than one: raise --calls, or the size")
    print(line("step", seconds, args.batch * sum(terms.values()), rate))
    print(line("before the loop", one - seconds, 0, rate))
    full = MODELS[args.release][0].num_layers
    layers = config.model.num_layers
    depth = "" if layers == full else f" with {layers} of {full} blocks"
    print(
        f"{60 / seconds:.4g} steps/min{depth}; the paper, one H100: {PAPER} (19B, 121 frames of "
        "1280x704, batch 1)"
    )


def terms_of_a_step(config: Config, request: Request) -> dict[str, float]:
    """`flops.forward_flops` without what is computed before the loop."""
    tokens = math.prod(request.video_shape), request.audio_length, config.text.length
    terms = flops.forward_flops(config.model, *tokens)
    if config.model.modulated_text_attention and config.model.prompt_adaln:
        return terms
    before = ("text keys and values", "caption projection")
    return {name: value for name, value in terms.items() if not name.endswith(before)}


def title(what: str, args: argparse.Namespace, config: Config, rate: float) -> str:
    """Two lines above a table."""
    device, layers = jax.devices()[0], config.model.num_layers
    return (
        f"{what} of {args.release}, {layers} block{'s'[: layers > 1]}: {args.batch} clip"
        f"{'s'[: args.batch > 1]} of {args.frames} frames of {args.width}x{args.height} on "
        f"{jax.device_count()} {device.device_kind}; matrix products {rate / 1e12:.3g} TFLOP/s\n"
        f"{'':16}{'ms':>10}{'TFLOP':>9}{'TFLOP/s':>9}{'of products':>13}{'of peak':>9}"
    )


def line(name: str, seconds: float, work: float, rate: float) -> str:
    """A line of the table; `rate` is the measured FLOP/s of one device."""
    if not work:
        return f"{name:16}{seconds * 1e3:10.2f}"
    speed = work / seconds / jax.device_count()
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    share = f"{speed / peak:9.1%}" if peak else f"{'-':>9}"
    return (
        f"{name:16}{seconds * 1e3:10.2f}{work / 1e12:9.3f}{speed / 1e12:9.3f}"
        f"{speed / rate:13.1%}{share}"
    )


# ------------------------------------------------------------------------------------ what is timed


def parts(
    config: Config, request: Request, params: Any, batch: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of every part; a call runs it in all blocks."""
    graphdef, options = ltx2.graph(config.networks), compiler_options(training=False)
    text, x = inputs(config, request, batch)

    def prepare(params, text):
        model = nnx.merge(graphdef, params)
        return model.transformer.prepare(*programs.modalities(model, request, text))

    def embed(params, prepared, x):
        """Tokens and conditioning, as the sampler makes them in every step."""
        given = {"positions": None, "context": None}
        level = jnp.full(batch, 0.5, out_sharding=spec("batch"))
        streams = [
            Modality(latent=tokens, sigma=level, timesteps=level[:, None], **given) for tokens in x
        ]
        return nnx.merge(graphdef, params).transformer.embed(*streams, prepared)

    def part(params, v, a, video_cond, audio_cond, *, step):
        transformer = nnx.merge(graphdef, params).transformer
        return transformer.run_blocks(v, a, video_cond, audio_cond, Keep(), step=step)

    jitted = jax.jit(embed, compiler_options=options)
    given = params, jax.jit(prepare, compiler_options=options)(params, text), x
    yield "AdaLN", partial(jitted, *given)
    embedded = jitted(*given)
    jitted = jax.jit(part, static_argnames="step", compiler_options=options)
    for name, (step, _) in PARTS.items():
        yield name, partial(jitted, params, *embedded, step=step)


def steps(
    config: Config, request: Request, params: Any, batch: int, count: int
) -> Callable[[], Any]:
    """So many Euler steps of one pass, and what comes before their loop."""
    graphdef = ltx2.graph(config.networks)

    def run(params, text, x, sigmas):
        model = nnx.merge(graphdef, params)
        return denoise(unguided(partial(programs.network, model, request), text), x, sigmas)

    jitted = jax.jit(run, compiler_options=compiler_options(training=False))
    sigmas = jnp.linspace(1.0, 0.5, count + 1)
    return partial(jitted, params, *inputs(config, request, batch), sigmas)


def inputs(config: Config, request: Request, batch: int) -> tuple[dict[str, Array], Latents]:
    """Text fields and noise of a batch."""
    model, key = config.model, jax.random.key(0)
    text = {
        name: jnp.ones(x.shape, x.dtype)
        if x.dtype == jnp.bool
        else jax.random.normal(key, x.shape, x.dtype)
        for name, x in abstract_text(config, batch).items()
    }
    video = (batch, math.prod(request.video_shape), model.in_channels)
    audio = (batch, request.audio_length, model.audio_in_channels)
    lead = rows_axis(batch)
    return text, Latents(
        pin(jax.random.normal(key, video), lead, "video_tokens", None),
        pin(jax.random.normal(key, audio), lead, "audio_tokens", None),
    )


def random_params(abstract: Any) -> Any:
    """Weights that keep activations finite: matrices of unit gain, the rest ones."""
    leaves, tree = jax.tree.flatten(abstract)
    kinds = [(x.shape, x.dtype, x.sharding.spec) for x in leaves]

    def draw(key: Array) -> list[Array]:
        def values(shape: tuple[int, ...], dtype: Any, spec: Any) -> Array:
            if len(shape) == 1:
                return jnp.ones(shape, dtype, out_sharding=spec)
            drawn = jax.random.normal(key, shape, dtype, out_sharding=spec)
            return drawn / math.sqrt(shape[-1])

        # The same numbers in all of one kind: as good for this, and soon compiled.
        made = {kind: values(*kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    return tree.unflatten(jax.jit(draw)(jax.random.key(0)))


def matmul_rate(calls: int, size: int = 8192) -> float:
    """FLOP/s of a large bfloat16 matrix product on one device."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.bfloat16), device)
    with jax.set_mesh(make_mesh(1, 1, 1, devices=[device])):
        return 2 * size**3 / best_of(partial(jax.jit(jnp.matmul), x, x), calls)[0]
