"""Attention whose tokens are spread over devices: what is exchanged around the kernels.

It has three forms, by which of the two token axes are sharded:

- queries and keys (video self-attention). Devices trade tokens for heads (all-to-all, Ulysses),
  attend over whole sequences of some heads, and trade back. That needs heads to trade: of s shards,
  groups of u = gcd(N, s) neighbours exchange. Where u < s, keys and values go round the r = s / u
  groups (ring), and each step's partial softmax is merged into the last by its log-sum-exp. A
  device sends 4 T N / s numbers per head feature by exchange and 2 T N by ring, for T tokens of N
  heads, so heads are traded as far as they go.
- keys only (video to audio). Every device attends to its keys; the few rows that result are merged.
- queries only, or neither: nothing is exchanged, but the gradients of the keys are summed.

XLA and cuDNN are differentiated by jax: their ring is a gather. Splash has its own backward pass
here, which finds the attention and its log-sum-exp saved by name and runs no forward kernel again.

Dims as in `transformer.py`. Inside `on_shards` they are those of one device: tq and tk tokens of
Tq and Tk (t of either), and N heads, or n = N / u of them while tokens are traded for heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ltx2_jax.models.remat import ATTENTION, STATISTICS
from ltx2_jax.models.transformer import attention_kernels as kernels
from ltx2_jax.sharding import Names, axis_size, mesh_axes, on_shards, pin

# [devices, B n, u tq]: what each device keeps for its own backward pass, as it has it there.
SHARDS: Names = ("shards", None, None)


@dataclass(frozen=True)
class Plan:
    """How one attention runs on the mesh in context, decided from shapes alone."""

    q: Names  # logical names of [B, Tq, N, H]
    k: Names  # and of [B, Tk, N, H]
    axes: tuple[str, ...]  # mesh axes of the keys' tokens
    shared: tuple[str, ...]  # mesh axes over which queries differ and keys do not
    group: int  # u: shards that trade tokens for heads
    ring: int  # r: groups that keys go round
    merge: bool  # keys are sharded, queries are not
    target: tuple[str, str]  # platform and device kind

    @property
    def shards(self) -> int:
        return self.group * self.ring

    def within(self) -> list[list[int]]:
        """The shards of every group: neighbours."""
        return [[g * self.group + i for i in range(self.group)] for g in range(self.ring)]

    def across(self, group: int) -> list[list[int]]:
        """The shards that have the same place in their groups of `group`."""
        return [list(range(i, self.shards, group)) for i in range(group)]


def plan(heads: int, queries: str, keys: str, axis: str | None, target: tuple[str, str]) -> Plan:
    """How to attend with `heads` heads of logical name `axis`, and tokens `queries` and `keys`."""
    shards, both = axis_size(keys), axis_size(keys) > 1 and axis_size(queries) > 1
    group = math.gcd(heads // axis_size(axis), shards) if both else 1
    return Plan(
        q=("batch", queries, axis, None),
        k=("batch", keys, axis, None),
        axes=mesh_axes(keys),
        shared=tuple(a for a in mesh_axes(queries) if a not in mesh_axes(keys)),
        group=group,
        ring=shards // group if both else 1,
        merge=shards > 1 and not both,
        target=target,
    )


# ---------------------------------------------------------------------------- differentiated by jax


def attend(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    bias: Array | None,  # [B, N, Tq, Tk] or 1 where it is the same
    backend: str,
    how: Plan,
) -> Array:  # [B, Tq, N, H]
    """By XLA or cuDNN."""
    local = partial(_attend, backend=backend, how=how)
    inputs = [how.q, how.k, how.k]
    if bias is None:
        # cuDNN's backward pass claims that gradients of keys which several devices share are the
        # same on all of them (jax 0.10.2 to 0.12.0); unchecked, they are summed.
        return on_shards(local, inputs, how.q, checked=backend == "xla")(q, k, v)
    names = ("batch", how.q[2], how.q[1], how.k[1] if how.merge else None)
    names = tuple(n if size > 1 else None for n, size in zip(names, bias.shape, strict=True))
    return on_shards(local, [*inputs, names], how.q)(q, k, v, pin(bias, *names))


def _attend(
    q: Array,  # [B, tq, N, H]
    k: Array,  # [B, tk, N, H]
    v: Array,  # [B, tk, N, H]
    bias: Array | None = None,  # [B, N, tq, Tk], or [B, N, Tq, tk] to merge; or 1 for N, Tq
    *,
    backend: str,
    how: Plan,
) -> Array:  # [B, tq, N, H]
    """`attend` on one device."""
    if how.merge:
        return _merged_attention(q, k, v, bias, how.axes)
    # The rows of a bias belong to the queries of this device, so these stay.
    group = how.group if bias is None else 1
    if group > 1:
        q, k, v = (x.swapaxes(1, 2) for x in _to_heads((q, k, v), how))
    if how.shards > group:
        groups = how.across(group)
        gather = partial(jax.lax.all_gather, axis_name=how.axes, axis_index_groups=groups)
        k, v = gather(k, axis=1, tiled=True), gather(v, axis=1, tiled=True)
    if backend == "cudnn":
        out = kernels.cudnn_attention(q, k, v)
    else:
        out = kernels.xla_attention(q, k, v, bias)
    return _to_tokens((out.swapaxes(1, 2),), how)[0] if group > 1 else out


def _merged_attention(
    q: Array,  # [B, Tq, N, H], the same on every device and few
    k: Array,  # [B, tk, N, H]
    v: Array,  # [B, tk, N, H]
    bias: Array | None,  # [B, N, Tq, tk] or 1 where it is the same
    axes: tuple[str, ...],
) -> Array:  # [B, Tq, N, H]
    """The softmax over the keys of all devices along `axes`."""
    x = kernels.logits(q, k, bias)  # [B, N, Tq, tk]
    highest = jax.lax.pmax(jax.lax.stop_gradient(x.max(-1, keepdims=True)), axes)
    weights = jnp.exp(x - highest)
    total = jax.lax.psum(weights.sum(-1), axes)
    out = jnp.einsum("bnqk,bknh->bqnh", weights.astype(v.dtype), v,
                     preferred_element_type=jnp.float32)  # fmt: skip
    return (jax.lax.psum(out, axes) / total.swapaxes(1, 2)[..., None]).astype(q.dtype)


# ------------------------------------------------------------------------------------------ splash


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def splash(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    how: Plan,
) -> Array:  # [B, Tq, N, H]
    """By splash, without a bias."""
    forward = partial(_splash_forward, how=how, residuals=False)
    return on_shards(forward, [how.q, how.k, how.k], how.q, checked=False)(q, k, v)


def _splash_fwd(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    how: Plan,
) -> tuple[Array, tuple[Array, ...]]:
    """[B, Tq, N, H], and what `_splash_bwd` reads: q, k, v, the result, log2-sum-exp2 as SHARDS."""
    forward = partial(_splash_forward, how=how, residuals=True)
    out, statistics = on_shards(
        forward, [how.q, how.k, how.k], (how.q, SHARDS), checked=False
    )(q, k, v)  # fmt: skip
    # Named here, outside of shard_map and in the layout of the block: one copy serves this backward
    # pass and that of the projection behind it.
    out = checkpoint_name(out, ATTENTION)
    return out, (q, k, v, out, checkpoint_name(statistics, STATISTICS))


def _splash_bwd(
    how: Plan,
    residuals: tuple[Array, ...],  # from `_splash_fwd`
    grad: Array,  # [B, Tq, N, H]
) -> tuple[Array, Array, Array]:
    """Gradients [B, Tq, N, H] of q, [B, Tk, N, H] of k and v."""
    inputs = [how.q, how.k, how.k, how.q, SHARDS, how.q]
    backward = partial(_splash_backward, how=how)
    outputs = (how.q, how.k, how.k)
    return on_shards(backward, inputs, outputs, checked=False)(*residuals, pin(grad, *how.q))


splash.defvjp(_splash_fwd, _splash_bwd)


# Under jit, these are one call each, dropped whole when a saved result makes it useless: jax 0.10
# keeps a pallas_call in the program that it rematerialises, for XLA to find.
@partial(jax.jit, static_argnames=("how", "residuals"))
def _splash_forward(
    q: Array,  # [B, tq, N, H]
    k: Array,  # [B, tk, N, H]
    v: Array,  # [B, tk, N, H]
    *,
    how: Plan,
    residuals: bool,
) -> Array | tuple[Array, Array]:
    """[B, tq, N, H] and, with `residuals`, log2-sum-exp2 [1, B n, u tq] of the traded queries."""
    if how.group > 1:
        q, k, v = _to_heads((q, k, v), how)
    else:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    shape = q.shape
    q, k, v = (_fold(x) for x in (q, k, v))
    run = partial(kernels.splash_forward, target=how.target)
    if how.ring > 1:
        out, statistics = _ring_forward(run, q, k, v, how)
    else:
        out, statistics = run(q, k, v, residuals=residuals or how.merge)
    if how.merge:
        out, statistics = _merge_devices(out, statistics, how.axes)
    out = out.reshape(shape)
    out = _to_tokens((out,), how)[0] if how.group > 1 else out.swapaxes(1, 2)
    return (out, statistics[None]) if residuals else out


@partial(jax.jit, static_argnames="how")
def _splash_backward(
    q: Array,  # [B, tq, N, H]
    k: Array,  # [B, tk, N, H]
    v: Array,  # [B, tk, N, H]
    out: Array,  # [B, tq, N, H]
    statistics: Array,  # float32 [1, B n, u tq]
    grad: Array,  # [B, tq, N, H]
    *,
    how: Plan,
) -> tuple[Array, Array, Array]:
    """Gradients [B, tq, N, H] of q, [B, tk, N, H] of k and v."""
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)  # [B, tq, N]
    if how.group > 1:
        q, k, v, grad = _to_heads((q, k, v, grad), how)
        (delta,) = _to_heads((delta,), how)
    else:
        q, k, v, grad, delta = (x.swapaxes(1, 2) for x in (q, k, v, grad, delta))
    shapes = [x.shape for x in (q, k, v)]
    arrays = (*(_fold(x) for x in (q, k, v)), statistics[0], _fold(delta), _fold(grad))
    run = partial(kernels.splash_backward, target=how.target)
    grads = _ring_backward(run, *arrays, how) if how.ring > 1 else run(*arrays)
    dq, dk, dv = (x.reshape(shape) for x, shape in zip(grads, shapes, strict=True))
    if how.group > 1:
        dq, dk, dv = _to_tokens((dq, dk, dv), how)
    else:
        dq, dk, dv = (x.swapaxes(1, 2) for x in (dq, dk, dv))
    if how.merge:
        dq = jax.lax.psum(dq, how.axes)
    if how.shared:
        dk, dv = jax.lax.psum((dk, dv), how.shared)
    return dq, dk, dv


def _fold(x: Array) -> Array:
    """[B, N, T, ...] -> [B N, T, ...].

    A batch axis of its own would lie beside the tokens in the registers, which would be half empty.
    """
    return x.reshape(-1, *x.shape[2:])


# ------------------------------------------------------------------------------------- collectives


def _to_heads(arrays: Sequence[Array], how: Plan) -> list[Array]:
    """[B, t, N, ...] of some tokens -> [B, n, u t, ...] of some heads; all in one exchange."""
    x = jnp.stack(arrays)  # [X, B, t, N, ...]: X arrays travel together
    x = x.reshape(*x.shape[:3], how.group, -1, *x.shape[4:])  # [X, B, t, u, n, ...]
    x = jnp.moveaxis(x, (3, 4), (0, 3))  # [u, X, B, n, t, ...]
    x = jax.lax.all_to_all(x, how.axes, 0, 0, tiled=True, axis_index_groups=how.within())
    x = jnp.moveaxis(x, 0, 3)  # [X, B, n, u, t, ...]
    return list(x.reshape(*x.shape[:3], -1, *x.shape[5:]))


def _to_tokens(arrays: Sequence[Array], how: Plan) -> list[Array]:
    """[B, n, u t, ...] -> [B, t, N, ...]: back from `_to_heads`."""
    x = jnp.stack(arrays)
    x = x.reshape(*x.shape[:3], how.group, -1, *x.shape[4:])  # [X, B, n, u, t, ...]
    x = jnp.moveaxis(x, 3, 0)  # [u, X, B, n, t, ...]
    x = jax.lax.all_to_all(x, how.axes, 0, 0, tiled=True, axis_index_groups=how.within())
    x = jnp.moveaxis(x, (0, 3), (3, 4))  # [X, B, t, u, n, ...]
    return list(x.reshape(*x.shape[:3], -1, *x.shape[5:]))


# One array goes round: XLA overlaps one permute of a step with the kernel, but not three (libtpu
# 0.0.42). It joins its parts by heads: stacked, they would lie in the sublanes.
def _ring_forward(
    run: Callable[..., tuple[Array, Array]],  # `kernels.splash_forward`
    q: Array,  # [B n, u tq, H]
    k: Array,  # [B n, u tk, H]
    v: Array,  # [B n, u tk, H]
    how: Plan,
) -> tuple[Array, Array]:  # [B n, u tq, H], float32 [B n, u tq]
    """Attention and log2-sum-exp2 over the keys of all groups: keys and values go round."""

    def attend_and_merge(
        kv: Array,  # [2 B n, u tk, H]
        out: Array,  # float32 [B n, u tq, H]
        statistics: Array,  # float32 [B n, u tq]
    ) -> tuple[Array, Array]:  # as the last two
        return _merge(out, statistics, *run(q, *jnp.split(kv, 2), residuals=True))

    def step(carry, _):  # the arguments of `attend_and_merge`
        kv, out, statistics = carry
        arriving = _pass_on(kv, how)
        return (arriving, *attend_and_merge(kv, out, statistics)), None

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], kernels.MASKED))
    carry, _ = jax.lax.scan(step, (jnp.concatenate((k, v)), *nothing), length=how.ring - 1)
    out, statistics = attend_and_merge(*carry)
    return out.astype(q.dtype), statistics


def _ring_backward(
    run: Callable[..., tuple[Array, Array, Array]],  # `kernels.splash_backward`
    q: Array,  # [B n, u tq, H]
    k: Array,  # [B n, u tk, H]
    v: Array,  # [B n, u tk, H]
    statistics: Array,  # float32 [B n, u tq]
    delta: Array,  # float32 [B n, u tq]
    grad: Array,  # [B n, u tq, H]
    how: Plan,
) -> tuple[Array, Array, Array]:
    """Gradients as q, k and v. Queries and what belongs to them go round: three arrays.

    Keys, values and their gradients would be four.
    """
    rows = jnp.stack((statistics, delta))  # few bytes: every group gets all of them at once
    rows = jax.lax.all_gather(rows, how.axes, axis_index_groups=how.across(how.group))
    here = jax.lax.axis_index(how.axes) // how.group

    def gradients(
        i: Array | int,
        traveller: Array,  # [3 B n, u tq, H]: queries, gradient of the attention, of the queries
        dk: Array,  # float32 [B n, u tk, H]
        dv: Array,  # float32 [B n, u tk, H]
    ) -> tuple[Array, Array, Array]:
        """That of the queries by these keys alone; those of keys and values so far."""
        q, grad, _ = jnp.split(traveller, 3)
        statistics, delta = rows[(here - i) % how.ring]
        dq, dk_here, dv_here = run(q, k, v, statistics, delta, grad)
        return dq, dk + dk_here, dv + dv_here

    def step(carry, i):  # the arguments of `gradients`
        traveller, dk, dv = carry
        # The gradient is one step behind its queries: it can leave when it has been added to.
        arriving = _pass_on(traveller, how)
        dq, dk, dv = gradients(i, traveller, dk, dv)
        return (arriving.at[-len(dq) :].add(dq), dk, dv), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    carry = (jnp.concatenate((q, grad, jnp.zeros_like(q))), *zeros)
    (traveller, dk, dv), _ = jax.lax.scan(step, carry, jnp.arange(how.ring - 1))
    arriving = _pass_on(traveller[-len(q) :], how)
    dq, dk, dv = gradients(how.ring - 1, traveller, dk, dv)
    return _pass_on(arriving + dq, how), dk.astype(k.dtype), dv.astype(v.dtype)


def _pass_on(x: Array, how: Plan) -> Array:
    """`x` of any shape from the same place in the group before; ours goes to the next group."""
    pairs = [(i, (i + how.group) % how.shards) for i in range(how.shards)]
    return jax.lax.ppermute(x, how.axes, pairs)


def _merge(
    out: Array,  # float32 [B n, u tq, H]
    statistics: Array,  # float32 [B n, u tq]
    other: Array,  # [B n, u tq, H]
    other_statistics: Array,  # float32 [B n, u tq]
) -> tuple[Array, Array]:  # float32 [B n, u tq, H], [B n, u tq]
    """Attention and log2-sum-exp2 over two sets of keys, from those over either set."""
    total = jnp.logaddexp2(statistics, other_statistics)
    share, other_share = (jnp.exp2(x - total)[..., None] for x in (statistics, other_statistics))
    return out * share + other.astype(jnp.float32) * other_share, total


def _merge_devices(
    out: Array,  # [B N, Tq, H]
    statistics: Array,  # float32 [B N, Tq]
    axes: tuple[str, ...],
) -> tuple[Array, Array]:  # [B N, Tq, H], float32 [B N, Tq]
    """As `_merge`, over the keys of all devices along `axes`; few rows, so in float32."""
    highest = jax.lax.pmax(statistics, axes)
    share = jnp.exp2(statistics - highest)
    merged, total = jax.lax.psum((out.astype(jnp.float32) * share[..., None], share), axes)
    return (merged / total[..., None]).astype(out.dtype), highest + jnp.log2(total)
