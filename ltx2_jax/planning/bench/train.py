"""Training steps of the full-width model, at a depth that fits, as `train` runs them.

Random float32 weights, AdamW, clips of random latents. The first step, which compiles, is not
counted; the best of the others is. Model FLOPs are those of the blocks at this depth, forward and
backward, nothing recomputed.
"""

import argparse
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ltx2_jax.command import count
from ltx2_jax.config import MeshConfig
from ltx2_jax.models import flops
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.planning.bench.step import (
    add_model_arguments,
    config_of,
    line,
    matmul_rate,
    random_params,
    title,
)
from ltx2_jax.planning.bench.timing import best_of
from ltx2_jax.planning.programs import train_inputs, train_state
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training.state import state_of
from ltx2_jax.training.step import make_train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench train`."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--remat", choices=tuple(REMAT_POLICIES), default="attention", help="(%(default)s)")
    add("--calls", type=count, default=3, metavar="N", help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the time of a step, and its rate."""
    sizes = args.mesh or (-1, 1, 1)
    config, request = config_of(args, mesh=MeshConfig(*sizes))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=args.remat))
    mesh = make_mesh(*sizes)
    batch, null_text = train_inputs(config, request, mesh)
    with jax.set_mesh(mesh):
        rate = matmul_rate(args.calls)
        print(title("train", args, config, rate), flush=True)
        batch, null_text = jax.tree.map(_draw, (batch, null_text))
        params = random_params(train_state(config, mesh)["params"])
        around = partial(state_of, config=config)
        step = make_train_step(config, request.strides)
        kept = [jax.jit(around, donate_argnums=0)(params)]

        def call() -> Any:
            kept[0], metrics = step(kept[0], batch, null_text)
            return metrics["loss"]

        seconds, first = best_of(call, args.calls)
    tokens = batch["video"][0, ..., 0].size, request.audio_length, config.text.length
    print(line("step", seconds, args.batch * flops.train_flops(config.model, *tokens), rate))
    print(
        f"{args.batch * 60 / seconds:.4g} clips/min; first step {first:.1f} s, remat {args.remat}"
    )


def _draw(x: jax.ShapeDtypeStruct) -> Array:
    if x.dtype == jnp.bool:
        return jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
    if x.ndim == 1:  # frames per second
        return jax.device_put(jnp.full(x.shape, 24.0), x.sharding)
    return jax.device_put(jax.random.normal(jax.random.key(0), x.shape, x.dtype), x.sharding)
