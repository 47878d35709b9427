"""The denoising loop: from noise to clean latents of both streams, in one `lax.scan`.

The loop knows nothing of networks. It is given what finds clean estimates of both streams, guidance
included, and a stepper. `unguided` and `all_passes` build the former from a velocity network;
guidance is in `guide.py`.
Source: paper section 4; `ltx_pipelines/utils/{samplers,denoisers}.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion import conditioning, flow
from ltx2_jax.diffusion.conditioning import Conditions
from ltx2_jax.diffusion.steppers import Euler, Found, Memory, Row, Stepper
from ltx2_jax.sharding import Names, axis_size, pin, spec


class Latents(NamedTuple):
    """Tokens of both streams; a stream may be missing."""

    video: Array | None  # [B, T, C]
    audio: Array | None  # [B, A, C]


class Given(NamedTuple):
    """What is known of the tokens of both streams; None: nothing."""

    video: Conditions | None
    audio: Conditions | None


NOTHING = Given(None, None)
# Logical names of the axes of both after the batch.
TOKENS: tuple[Names, Names] = ("video_tokens", None), ("audio_tokens", None)

Predict = Callable[[Latents, Array], Latents]  # (latents, sigma []) -> clean estimates
# (latents, sigma [B]) -> velocities; and, where a stream is only read, (True or False) * 2 for
# whether each is `enabled`.
Velocity = Callable[..., Latents]
# Conditions, a tree of arrays with a leading batch axis -> the velocity under them. This call comes
# before the loop, so it computes what no step changes.
Network = Callable[[Any], Velocity]
Noise = Callable[[Array], Latents]  # number of a call [] -> noise of both streams


class Estimate(NamedTuple):
    """What a call of the network led to."""

    x0: Latents  # guided
    uncond: Latents | None = None  # of the pass without a prompt


class Guide(Protocol):
    """How estimates are found, by a rule that may remember some and may change with the step."""

    def rows(self, steps: np.ndarray, inner: np.ndarray) -> Row:
        """What `find` reads of a call, stacked: of steps [calls], and the numbers in them."""

    def begin(self, x: Latents) -> Memory:
        """Before the first call."""

    def find(self, x: Latents, row: Row, memory: Memory) -> tuple[Estimate, Memory]:
        """`row` has the stepper's numbers as well, "sigma" [] among them."""


@dataclass(frozen=True)
class Unchanging:
    """The same rule in every step, and nothing to remember."""

    predict: Predict

    def rows(self, steps: np.ndarray, inner: np.ndarray) -> Row:
        return {}

    def begin(self, x: Latents) -> Memory:
        return ()

    def find(self, x: Latents, row: Row, memory: Memory) -> tuple[Estimate, Memory]:
        return Estimate(self.predict(x, row["sigma"])), memory


# ---------------------------------------------------------------------------------------- the loop


def denoise(predict: Predict, noise: Latents, sigmas: Array) -> Latents:
    """Clean latents from noise (at sigmas[0] = 1), by Euler steps through sigmas [n + 1]."""
    return denoise_by(Unchanging(predict), noise, sigmas)


def denoise_by(
    guide: Guide,
    x: Latents,  # at noise level sigmas[0]
    sigmas: Array,  # [n + 1]
    stepper: Stepper = Euler(),  # noqa: B008
    *,
    noise: Noise | None = None,
    given: Given = NOTHING,
) -> Latents:
    """Clean latents. What is given comes back as it was, as far as it is given."""
    rows = stepper.rows(sigmas)
    calls = np.arange(rows["sigma"].shape[0])
    rows |= guide.rows(*np.divmod(calls, stepper.calls_per_step))
    if stepper.draws:
        rows["call"] = jnp.asarray(calls)

    def call(carry, row):
        x, memory, guide_memory = carry
        estimate, guide_memory = guide.find(x, row, guide_memory)
        fresh = noise(row["call"]) if stepper.draws else Latents(None, None)
        uncond = estimate.uncond or Latents(None, None)
        moved = []
        for stream in zip(x, estimate.x0, uncond, memory, fresh, given, strict=True):
            moved.append((None, None) if stream[0] is None else _step(stepper, row, *stream))
        moved, memory = zip(*moved, strict=True)
        return (Latents(*moved), memory, guide_memory), None

    memory = tuple(None if a is None else stepper.begin(a) for a in x)
    return jax.lax.scan(call, (x, memory, guide.begin(x)), rows)[0][0]


def _step(
    stepper: Stepper,
    row: Row,
    x: Array,  # [B, T, C]
    x0: Array,  # [B, T, C]
    uncond: Array | None,  # [B, T, C]
    memory: Memory,
    noise: Array | None,  # [B, T, C]
    given: Conditions | None,
) -> tuple[Array, Memory]:
    """One stream's."""
    x0 = x0 if given is None else conditioning.keep_given(given, x0)
    return stepper.step(row, x, Found(x0, uncond), memory, noise, given)


def of_streams(f: Callable[..., Any], *streams: Sequence[Any]) -> Latents:
    """`f` of what every argument has of a stream, for the streams that the first has."""
    return Latents(*(None if x[0] is None else f(*x) for x in zip(*streams, strict=True)))


def nothing(given: Given) -> bool:
    """Whether nothing is known of either stream."""
    return all(c is None for c in given)


# ----------------------------------------------------------------------------------------- passes


def unguided(network: Network, conditions: Any, given: Given = NOTHING) -> Predict:
    """One pass: the clean estimate under `conditions`."""
    velocity = network(conditions) if nothing(given) else network(conditions, given)

    def predict(x: Latents, sigma: Array, **enabled: Any) -> Latents:
        rows = next(a for a in x if a is not None).shape[0]
        sigmas = jnp.full(rows, sigma, out_sharding=spec(rows_axis(rows)))

        def x0(x: Array, velocity: Array, given: Conditions | None) -> Array:
            levels = sigmas if given is None else conditioning.token_levels(given, sigmas)
            return flow.to_x0(x, velocity, levels)

        return of_streams(x0, x, velocity(x, sigmas, **enabled), given)

    return predict


def all_passes(
    network: Network, conditions: Sequence[Any], given: Given = NOTHING
) -> Callable[..., list[Latents]]:
    """The clean estimates under each of `conditions`, in their order.

    The passes are entries of one batch, so that they run side by side on the data axis of a mesh,
    whose size must divide the batch. `given` is the same in all of them.
    """
    count = len(conditions)

    def interleaved(*leaves: Array) -> Array:
        return _interleave(leaves, (None,) * (leaves[0].ndim - 1))

    given = Given(*of_streams(partial(_repeated, count=count), given, TOKENS))
    predict_all = unguided(network, jax.tree.map(interleaved, *conditions), given)

    def predict(x: Latents, sigma: Array, **enabled: Any) -> list[Latents]:
        inputs = of_streams(lambda a, names: _interleave([a] * count, names), x, TOKENS)
        x0 = predict_all(inputs, sigma, **enabled)
        parts = [
            [None] * count if a is None else _split(a, count, names)
            for a, names in zip(x0, TOKENS, strict=True)
        ]
        return [*map(Latents, *parts)]

    return predict


def rows_axis(rows: int) -> str | None:
    """The logical axis of so many clips: too few for the data axis are whole on every shard."""
    return "batch" if rows % axis_size("batch") == 0 else None


def _repeated(conditions: Conditions, names: Names, *, count: int) -> Conditions:
    """What a network reads of the conditions of B clips, for the rows of as many passes."""

    def repeat(x: Array | None, *names: str | None) -> Array | None:
        shared = x is None or (x.shape[0] == 1 and x.ndim > 2)  # one for all clips
        return x if shared else _interleave([x] * count, names)

    return dataclasses.replace(
        conditions,
        strength=repeat(conditions.strength, names[0]),
        positions=repeat(conditions.positions, None, None, None),
        marks=repeat(conditions.marks, names[0]),
        attention=repeat(conditions.attention, None, None),
    )


def _interleave(rows: Sequence[Array], names: Names) -> Array:
    """Rows a0, b0, a1, b1, ... of arrays [B, ...], one a pass -> [B passes, ...].

    The passes of one sample stay on one shard if there are enough samples.
    """
    size, *rest = rows[0].shape
    lead = rows_axis(size)
    x = jnp.stack([pin(a, lead, *names) for a in rows], axis=1)
    shape = (size * len(rows), *rest)
    return pin(jnp.reshape(x, shape, out_sharding=spec(lead, *names)), "batch", *names)


def _split(x: Array, count: int, names: Names) -> list[Array]:
    """The reverse of `_interleave`: [B count, ...] -> `count` arrays [B, ...]."""
    size = x.shape[0] // count
    lead = rows_axis(size)
    shape, where = (size, count, *x.shape[1:]), spec(lead, None, *names)
    x = jnp.reshape(pin(x, lead, *names), shape, out_sharding=where)
    return [x[:, i] for i in range(count)]
