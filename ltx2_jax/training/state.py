"""The train state: weights, moments, their average, and the optimizer that moves them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ltx2_jax import chips
from ltx2_jax.config import Config, OptimConfig
from ltx2_jax.models import ltx2

State = dict[str, Any]  # "params", "opt", "step", and "ema" if the config averages weights


def init_state(key: Array, config: Config) -> State:
    """Fresh parameters, moments, EMA copy and step 0; run it under jit, or eval_shape."""
    return state_of(ltx2.init_params(key, config.networks), config)


def state_of(params: dict[str, Any], config: Config, step: int = 0) -> State:
    """The state around given parameters after `step` steps: all else is new, but not the rate."""
    count, step = (jnp.full((), step, jnp.int32) for _ in range(2))  # no array is donated twice
    opt = optax.tree.set(optimizer(config).init(params), _of_schedule, count=count)
    state = {"params": params, "opt": opt, "step": step}
    if config.optim.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def all_finite(state: State) -> Array:
    """Whether every number of a state is finite: bool []. Reads it once, where it lies."""
    return finite_program()(state)


@functools.cache
def finite_program() -> Callable[[State], Array]:
    """`all_finite`, jitted for the mesh in context."""

    def all_finite(state: State) -> Array:
        numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in numbers]))

    return jax.jit(all_finite, compiler_options=chips.one_run_options())


# --------------------------------------------------------------------------------------- optimizer


def learning_rate(config: Config) -> Callable[[Array], Array]:
    """Step -> learning rate: linear warm-up, then constant, linear or cosine decay."""
    optim = config.optim
    peak, final = optim.learning_rate, optim.learning_rate * optim.final_fraction
    steps = max(config.num_steps - optim.warmup_steps, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, alpha=optim.final_fraction),
    }[optim.schedule]()
    # The first step trains at peak / warmup_steps, not at 0.
    warmup = optax.linear_schedule(peak / max(optim.warmup_steps, 1), peak, optim.warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [optim.warmup_steps])


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    optim: OptimConfig = config.optim
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=_matrices,
            mu_dtype=optim.first_moment_dtype,
        ),
    )


def _of_schedule(path: Any, _: Any) -> bool:
    """The count that the learning rate follows, not that of the moments."""
    return any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", params)
