"""The train step, jitted: gradients of the objective, AdamW, the average of the weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from ltx2_jax.chips import compiler_options
from ltx2_jax.config import Config
from ltx2_jax.diffusion.geometry import AUDIO_CLOCK, AudioClock
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import gradients_reduced_in
from ltx2_jax.training.batch import Batch
from ltx2_jax.training.objective import draw, loss
from ltx2_jax.training.state import State, learning_rate, optimizer


def make_train_step(
    config: Config,
    strides: tuple[int, int, int],
    clock: AudioClock = AUDIO_CLOCK,
    *,
    donate: bool = True,
) -> Callable[[State, Batch, Batch], tuple[State, dict[str, Array]]]:
    """The jitted step: (state, batch, null_text) -> (state, metrics); the state is donated, or not.

    `strides` are the video codec's, `clock` is the audio codec's, `null_text` holds the text fields
    [S, ...] of the empty caption.
    Metrics: loss, video_loss, audio_loss, both by quarter of sigma ([4], nan where no sample
    fell), gradient norm, learning rate. A step whose loss or gradient norm is not finite counts,
    and changes nothing else.
    """
    graphdef, tx = ltx2.graph(config.networks), optimizer(config)
    chunks = config.optim.accumulate_steps
    schedule = learning_rate(config)

    def train_step(state: State, batch: Batch, null_text: Batch) -> tuple[State, dict[str, Array]]:
        def loss_of(params, batch, drawn):
            with gradients_reduced_in(config.optim.reduce_dtype):
                return loss(nnx.merge(graphdef, params), batch, drawn, null_text, config)

        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        drawn = draw(key, batch, config, strides, clock)
        (value, sums), grads = gradients(loss_of, state["params"], batch, drawn, chunks)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
            "step": state["step"] + 1,
        }
        if config.optim.ema_decay is not None:
            decay = ema_decay(config.optim.ema_decay, state["step"])
            new["ema"] = jax.tree.map(
                lambda e, p: decay * e + (1 - decay) * p, state["ema"], new["params"]
            )
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        # Here, and not by who reads the metrics: all devices decide alike, before it is too late.
        kept = jax.tree.map(partial(jax.lax.select, good), new, state)
        new = kept | {"step": new["step"]}
        size = batch["video"].shape[0]
        metrics = {
            "loss": value,
            "video_loss": sums["video_loss"] / size,
            "audio_loss": sums["audio_loss"] / size,
            "video_loss_quarters": sums["video_quarter"] / sums["video_count"],
            "audio_loss_quarters": sums["audio_quarter"] / sums["audio_count"],
            "grad_norm": norm,
            "learning_rate": schedule(state["step"]),
        }
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnames="state" if donate else None,
        compiler_options=compiler_options(training=True),
    )


def gradients(
    loss_of: Callable[..., Any], params: Any, batch: Batch, drawn: dict[str, Any], chunks: int
) -> tuple[tuple[Array, dict[str, Array]], Any]:
    """((mean loss, summed log values), mean gradients) over `chunks` micro-batches, one by one."""
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if chunks == 1:
        return value_and_grad(params, batch, drawn)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    parts = jax.tree.map(lambda x: _split(x, batch["video"].shape[0], chunks), (batch, drawn))
    like = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding), like)
    ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)
    return (value / chunks, sums), jax.tree.map(lambda g: g / chunks, grads)


def ema_decay(decay: float, step: Array) -> Array:
    """The decay after `step` updates: young averages forget the random start faster."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def _split(x: Array, batch: int, chunks: int) -> Array:
    """[B, ...] -> [chunks, B / chunks, ...], every chunk spread over all shards of the batch.

    What is shared by the batch (leading axis 1) is repeated.
    """
    if x.shape[0] != batch:
        return jnp.broadcast_to(x, (chunks, *x.shape))
    return x.reshape(batch // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)
