"""The train state: weights, moments, their average, and the optimizer that moves them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array

from ltx2_jax import chips
from ltx2_jax.config import Config, OptimConfig
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import spec_of
from ltx2_jax.training import trainable
from ltx2_jax.weights import mapping

# "params", which are trained, "opt", "step", "ema" if the config averages weights, and "base" if it
# tunes some: what tells the frozen ones from others.
State = dict[str, Any]


def init_state(key: Array, config: Config) -> State:
    """Fresh parameters, moments, EMA copy and step 0; run it under jit, or eval_shape.

    Parameters are those that the run trains. Those of a run that tunes are not fresh: of it, this
    is for the shapes.
    """
    if config.tune is not None and config.tune.lora is not None:
        return state_of(trainable.new_adapters(key, config), config)
    return state_of(trainable.split(ltx2.init_params(key, config.networks), config)[0], config)


def state_of(params: dict[str, Any], config: Config, step: int = 0) -> State:
    """The state around given parameters after `step` steps: all else is new, but not the rate."""
    count, step = (jnp.full((), step, jnp.int32) for _ in range(2))  # no array is donated twice
    opt = optax.tree.set(optimizer(config).init(params), _of_schedule, count=count)
    state = {"params": params, "opt": opt, "step": step}
    if config.optim.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if config.tune is not None:
        state["base"] = jnp.zeros(2, jnp.uint32)  # see `initial.tied`
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
    """Step -> learning rate: linear warm-up, then what `optim.schedule` says, once per step."""
    optim = config.optim
    peak = optim.learning_rate
    decay = _decay(optim, max(config.num_steps - optim.warmup_steps, 1))
    # The first step trains at peak / warmup_steps, not at 0.
    warmup = optax.linear_schedule(peak / max(optim.warmup_steps, 1), peak, optim.warmup_steps - 1)
    return optax.join_schedules([warmup, lambda step: peak * decay(step)], [optim.warmup_steps])


def _decay(optim: OptimConfig, steps: int) -> Callable[[Array], Array]:
    """The schedules of the official trainer as shares of the rate, over `steps` steps."""
    final = optim.final_fraction

    def cosine(step: Array, period: Array | float) -> Array:
        # Not of 1 + cos(pi t), which in float32 loses its digits where the rate is low. Beyond its
        # end it rises again, as officially.
        return final + (1 - final) * jnp.square(jnp.cos(jnp.pi / 2 * (step / period)))

    def restarts(step: Array) -> Array:
        period, growth = optim.restart_after or max(steps // 4, 1), optim.restart_growth
        if growth == 1:
            return cosine(step % period, period)
        periods = period * growth ** np.arange(64 // growth.bit_length(), dtype=float)
        starts = np.concatenate([[0], np.cumsum(periods)[:-1]])
        i = jnp.sum(step >= starts) - 1
        return cosine(step - jnp.asarray(starts)[i], jnp.asarray(periods)[i])

    def stairs(step: Array) -> Array:
        return optim.step_fraction ** (step // (optim.step_every or max(steps // 2, 1)))

    return {
        "constant": lambda step: 1.0,
        "linear": optax.linear_schedule(optim.start_fraction, final, steps),
        "cosine": lambda step: cosine(step, steps),
        "cosine_with_restarts": restarts,
        "polynomial": lambda step: (jnp.maximum(steps - step, 0) / steps) ** optim.power,
        "step": stairs,
    }[optim.schedule]


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer of the config.

    Where a part is tuned, what no gradient has reached stays as it is, and every weight has the
    rate of its rule.
    """
    tx = optax.chain(
        optax.clip_by_global_norm(config.optim.clip_norm), _of_name(config.optim, config)
    )
    return tx if config.tune is None else _tuned(tx, config)


def _of_name(optim: OptimConfig, config: Config) -> optax.GradientTransformation:
    rate, decays = learning_rate(config), _matrices if optim.decays == "matrices" else None
    if optim.optimizer == "adafactor":
        return optax.adafactor(
            rate,
            # Or the rate would be one of 1e-3 times a weight of zero, as those of adapters are.
            multiply_by_parameter_scale=False,
            weight_decay_rate=lambda step: optim.weight_decay * rate(step),
            weight_decay_mask=decays,
        )
    adam = {"b1": optim.b1, "b2": optim.b2, "eps": optim.eps}
    if optim.optimizer == "muon":
        return _whole_matrices(
            optax.contrib.muon(
                rate,
                weight_decay=optim.weight_decay,
                mu_dtype=optim.first_moment_dtype,
                adam_weight_decay=0.0 if decays else optim.weight_decay,
                # Steps as large as those of AdamW, so that its rates do (arXiv 2502.16982).
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_rows_and_columns,
                **{f"adam_{name}": adam[name] for name in ("b1", "b2")},
            )
        )
    return optax.adamw(
        rate,
        weight_decay=optim.weight_decay,
        mask=decays,
        mu_dtype=optim.first_moment_dtype,
        **adam,
    )


def _of_schedule(path: Any, _: Any) -> bool:
    """The count that the learning rate follows, not that of the moments."""
    return any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)


def _matrices(params: Any) -> Any:
    """Matrices of linear maps, those of adapters too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def _is_matrix(path: Any) -> bool:
    name = path[-1].key
    return name == "weight" or (name in ("a", "b") and path[-2].key == trainable.ADAPTER)


def _rows_and_columns(params: Any) -> Any:
    """What Muon takes for a matrix: [.., out, in]."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrix if _is_matrix(path) else None, params
    )


def _whole_matrices(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Of an optimizer that multiplies matrices, which under an explicit mesh has to say where.

    Its axes are Auto inside: XLA's partitioner gathers what a product needs.
    """

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return tx.update(grads, state, params)
        homes = jax.tree.map(spec_of, jax.tree.map(jax.typeof, (params, state)))
        return jax.sharding.auto_axes(tx.update, out_sharding=homes)(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


def _tuned(tx: optax.GradientTransformation, config: Config) -> optax.GradientTransformation:
    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        on = reached(grads)

        def moved(path: Any, update: Array) -> Array:
            names = tuple(key.key for key in path)
            here = jnp.expand_dims(on[_unit(names)], range(on[_unit(names)].ndim, update.ndim))
            return jnp.where(here, trainable.rate(names, config) * update, 0)

        return jax.tree_util.tree_map_with_path(moved, updates), state

    return optax.GradientTransformation(tx.init, update)


def reached(grads: Any) -> dict[trainable.Path, Array]:
    """Where a gradient comes to: bool [], or [L] of a stack, by weight, or by adapter.

    An optimizer of PyTorch leaves alone what has no gradient; one that is fed zeros would decay it.
    An adapter whose b is zero has a gradient, though that of a is zero then.
    """
    found: dict[trainable.Path, Array] = {}
    for path, grad in mapping.leaves(grads).items():
        layers = 1 if "blocks" in path else 0
        some = jnp.any(grad != 0, axis=tuple(range(layers, grad.ndim)))
        found[_unit(path)] = found.get(_unit(path), False) | some
    return found


def _unit(path: trainable.Path) -> trainable.Path:
    return path[:-1] if trainable.ADAPTER in path else path
