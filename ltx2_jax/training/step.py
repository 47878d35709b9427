"""The train step, jitted: gradients of the objective, AdamW, the average of the weights."""

import dataclasses
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
from ltx2_jax.sharding import axis_size, gradients_reduced_in, summed_over_slices
from ltx2_jax.training import trainable
from ltx2_jax.training.batch import Batch
from ltx2_jax.training.objective import averages, draw, flow_of, loss
from ltx2_jax.training.state import State, learning_rate, optimizer


def make_train_step(
    config: Config,
    strides: tuple[int, int, int],
    clock: AudioClock = AUDIO_CLOCK,
    *,
    donate: bool = True,
    checked: bool = False,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The jitted step: (state, batch, null_text, frozen) -> (state, metrics).

    A stream that a batch lacks is absent from the step, its loss too.
    The state is donated, or not; `checked` is of `chips.compiler_options`. `frozen` are the weights
    that are not trained; left out, there are none.

    `strides` are the video codec's, `clock` is the audio codec's, `null_text` holds the text fields
    [S, ...] of the empty caption.
    Metrics: loss, that of each stream that is learned, also by quarter of sigma ([4], nan where no
    sample fell), gradient norm, learning rate. A step whose loss or gradient norm is not finite
    counts, and changes nothing else.
    """
    tx = optimizer(config)
    graphdef = ltx2.graph(config.networks) if config.tune is None else trainable.graph(config)
    chunks = config.optim.accumulate_steps
    schedule = learning_rate(config)

    def train_step(
        state: State, batch: Batch, null_text: Batch, frozen: Any = None
    ) -> tuple[State, dict[str, Array]]:
        run = dataclasses.replace(config, flow=flow_of(config.flow, batch))

        def loss_of(trained, batch, drawn, null_text, frozen, key):
            # Every micro-batch leaves out other features: its first row says which one it is.
            dropout = jax.random.fold_in(jax.random.fold_in(key, 1), drawn["row"][0])
            params = trainable.join(trained, frozen, trainable.constants(config, dropout))
            with gradients_reduced_in(config.optim.reduce_dtype):
                return loss(nnx.merge(graphdef, params), batch, drawn, null_text, run)

        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        drawn = draw(key, batch, run, strides, clock)
        drawn["row"] = jnp.arange(drawn["drop_caption"].shape[0])
        (value, sums), grads = gradients(
            loss_of, state["params"], batch, drawn, chunks, null_text, frozen, key
        )
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
            "step": state["step"] + 1,
        }
        if "base" in state:
            new["base"] = state["base"]
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
        metrics = {
            "loss": value,
            **averages(sums, drawn["drop_caption"].shape[0]),
            "grad_norm": norm,
            "learning_rate": schedule(state["step"]),
        }
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnames="state" if donate else None,
        compiler_options=compiler_options(training=True, checked=checked),
    )


def gradients(
    loss_of: Callable[..., Any],
    params: Any,
    batch: Batch,
    drawn: dict[str, Any],
    chunks: int,
    *shared: Any,
) -> tuple[tuple[Array, dict[str, Array]], Any]:
    """((mean loss, summed log values), mean gradients) over `chunks` micro-batches, one by one.

    `loss_of(params, batch, drawn, *shared)` closes over no arrays. Gradients are summed over the
    chips of a slice as they are made, and over slices when those of all micro-batches are there.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (value, sums), grads = summed(value_and_grad, params, batch, drawn, chunks, *shared)
    count = chunks * axis_size("slices")
    if count == 1:
        return (value, sums), grads
    return (value / count, sums), jax.tree.map(lambda g: g / count, grads)


def summed(
    of: Callable[..., Any],
    params: Any,
    batch: Batch,
    drawn: dict[str, Any],
    chunks: int,
    *shared: Any,
) -> Any:
    """The sum of `of(params, batch, drawn, *shared)`, a tree, over the micro-batches of all slices.

    `of` closes over no arrays.
    """

    def total(same, rows):
        params, *shared = same
        if chunks == 1:
            return of(params, *rows, *shared)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of(params, *part, *shared)), None

        parts = jax.tree.map(
            lambda x: _split(x, jax.tree.leaves(rows[0])[0].shape[0], chunks), rows
        )
        first = jax.tree.map(lambda x: x[0], parts)
        like = jax.eval_shape(of, params, *first, *shared)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding), like)
        return jax.lax.scan(add, zeros, parts)[0]

    size = jax.tree.leaves(batch)[0].shape[0]
    return summed_over_slices(total, (params, *shared), (batch, drawn), size)


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
