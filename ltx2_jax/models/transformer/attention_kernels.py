"""Attention on one device: which kernel runs where, and the kernels. Nothing here knows of a mesh.

    xla     everywhere: softmax in float32, exact, differentiable in every way
    splash  TPU: tokamax's flash attention in Pallas, forward and backward as separate functions
    cudnn   NVIDIA GPUs: flash attention of cuDNN, differentiable (backward only)

A kernel never holds the [Tq, Tk] logits in memory; XLA holds them, a block of queries at a time
once they are large. Dims as in `transformer.py`.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ltx2_jax.errors import UserError

BACKENDS = ("auto", "splash", "cudnn", "xla")

# Below this many logits per head XLA is as fast as a kernel and keeps everything in one fusion.
# A kernel pays about 0.35 us per grid step, of which a small attention has one per head. XLA moves
# some 12 bytes per logit (float32 written and read, bfloat16 weights written and read), which in
# 0.35 us is 47 thousand logits at the 1.6 TB/s of a v6e, 80 thousand at the 2.8 TB/s of a v5p.
# Audio self-attention of 5 s (126 x 126) is below, of 20 s (501 x 501) above, as is all the rest.
SMALL_LOGITS = 2**16

# Logits that XLA holds at once, in bytes per device; if there are more, queries go in blocks.
XLA_LOGITS_BYTES = 2**30
# Partial sums of the gradient of q that splash leaves; if there are more, heads go in turns.
DQ_BYTES = 2**31

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def choose(
    wanted: str,
    target: tuple[str, str],  # platform and device kind
    queries: int,
    keys: int,
    width: int,  # of a head
    dtype: jnp.dtype,
    *,
    biased: bool,
) -> str:
    """The backend of what one device has of an attention, decided while tracing.

    Kernels take no bias: dense ones would cost them their speed, and none is left where registers
    fill the padding of the text. float32 stays with XLA, which is exact.
    """
    if biased:
        return "xla"
    if wanted != "auto":
        return wanted
    if dtype != jnp.bfloat16 or queries * keys < SMALL_LOGITS:
        return "xla"
    platform, kind = target
    if platform == "tpu":
        return "splash"
    # cuDNN wants head widths that are multiples of 8, up to 128 before Hopper, and jax refuses it
    # odd lengths in training, such as the 501 audio tokens of 20 s.
    even = queries % 2 == keys % 2 == width % 8 == 0
    return "cudnn" if "nvidia" in kind.lower() and even and width <= 128 else "xla"


# --------------------------------------------------------------------------------------------- XLA


def xla_attention(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    bias: Array | None,  # additive, broadcastable to [B, N, Tq, Tk]
) -> Array:  # [B, Tq, N, H]
    """softmax(q k^T / sqrt(H) + bias) v, by blocks of queries if the logits are many."""
    batch, queries, heads, _ = q.shape
    blocks = math.ceil(4 * batch * heads * queries * k.shape[1] / XLA_LOGITS_BYTES)
    if blocks <= 1:
        return _softmax_attention(q, k, v, bias)
    rows = math.ceil(queries / blocks)
    cut = partial(_row_blocks, rows=rows, axis=1)
    by_row = bias is not None and bias.shape[2] > 1
    block_bias = _row_blocks(bias, rows=rows, axis=2) if by_row else None

    # The logits of a block are computed again for its gradient, or all blocks would be held.
    @jax.checkpoint
    def block(
        q: Array,  # [B, rows, N, H]
        block_bias: Array | None,  # broadcastable to [B, N, rows, Tk]
    ) -> Array:  # [B, rows, N, H]
        return _softmax_attention(q, k, v, block_bias if by_row else bias)

    out = jax.lax.map(lambda x: block(*x), (cut(q), block_bias))  # [blocks, B, rows, N, H]
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :queries]


def _row_blocks(x: Array, rows: int, axis: int) -> Array:
    """[..., T, ...] -> [blocks, ..., rows, ...], the last block filled up with zeros."""
    blocks = math.ceil(x.shape[axis] / rows)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * rows - x.shape[axis])
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _softmax_attention(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
    bias: Array | None,  # additive, broadcastable to [B, N, Tq, Tk]
) -> Array:  # [B, Tq, N, H]
    weights = jax.nn.softmax(logits(q, k, bias), axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def logits(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    bias: Array | None,  # additive, broadcastable to [B, N, Tq, Tk]
) -> Array:  # float32 [B, N, Tq, Tk]
    """q k^T / sqrt(H) + bias."""
    x = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
    x = x * q.shape[-1] ** -0.5
    return x if bias is None else x + bias.astype(jnp.float32)


# ------------------------------------------------------------------------------------------- cuDNN


def cudnn_attention(
    q: Array,  # [B, Tq, N, H]
    k: Array,  # [B, Tk, N, H]
    v: Array,  # [B, Tk, N, H]
) -> Array:  # [B, Tq, N, H]
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    except RuntimeError as error:  # not installed, or too old
        raise UserError(f"attention='cudnn': {error}") from None


# ------------------------------------------------------------------------------------------ splash


@dataclass(frozen=True)
class Blocks:
    """How many queries and keys a grid step of the kernel takes, and keys per softmax update."""

    queries: int
    keys: int
    piece: int


@dataclass(frozen=True)
class Tuning:
    """The largest blocks that a chip takes; a length is cut into equal blocks not above them."""

    forward: Blocks
    backward: Blocks
    scheduler: bool = False  # the compiler's experimental scheduler
    alone: int | None = None  # the most logits of a forward block that holds all keys


# By a part of the lower-cased device kind; the first match wins. All blocks compile, forward with
# residuals or backward, within the scoped VMEM that a program gets without flags (16 MiB on v4, v5e
# and v5p, 32 MiB on v6e); 2048 x 2048 does not on v5p. One row serves all shapes: a short side is
# one block of its own length, and a head width of 64 fills the 128 lanes as 128 does. Published
# rates for 16 384 tokens of head width 128, forward: v5p 89 % of peak with 2048/2048/256, v6e 36 %
# with 2048/2048/512, v7x 34 % with 4096/4096/256 (of the 67 % that 256-wide MXUs leave to this
# width). The compiler's schedules agree with these rates, hardly change beyond 1024 x 2048, and are
# better with the experimental scheduler on v6e and v7x only. Compile time grows with the block: on
# one core, with a mask and that scheduler, 9 s for 1920/2560/512 on v7x, 52 s for 2688/2560/256.
#
# A forward block that holds all keys is a loop of one round, whose pieces the compiler lets
# overlap: it takes some 7 bytes for each logit, 26 MiB for 1408 x 2816 on v5p.
ALONE = 1408 * 1280
TUNING = (
    ("v4", Tuning(Blocks(1408, 2816, 256), Blocks(1408, 2560, 256), alone=ALONE)),
    ("v5 lite", Tuning(Blocks(1408, 2816, 256), Blocks(1408, 2816, 256), alone=ALONE)),
    ("v5", Tuning(Blocks(1408, 2816, 256), Blocks(1408, 2816, 256), alone=ALONE)),
    ("v6", Tuning(Blocks(2048, 2816, 512), Blocks(2048, 2816, 512), scheduler=True)),
    ("7x", Tuning(Blocks(2048, 2816, 512), Blocks(2048, 2816, 512), scheduler=True)),
    ("", Tuning(Blocks(1024, 1024, 256), Blocks(1024, 1024, 256))),  # a chip we do not know
)


def cut(queries: int, keys: int, most: Blocks, alone: int | None = None) -> Blocks:
    """The blocks for so many queries and keys; `alone` is of `Tuning`.

    Blocks that divide a length are taken if they are not much smaller than others. Queries that
    fill up a block are thrown away, for the price of a copy. Keys that do must also be masked, in
    every block, since one body serves all, and the mask takes room from the largest blocks. In the
    compiler's schedules a block of 1024 keys costs 13 % more per logit than one of 2048, one of 512
    queries 13 % more than one of 1024, updates by 256 keys 2 % more than by 512, masking 8 %.
    """

    def work(length, block, small, ragged):
        padded = math.ceil(length / block) * block
        return padded * (1 + small / block) * (1 + ragged * (padded > length))

    def key_work(blocks):
        block, piece = blocks
        return work(keys, block, 320, 0.08) * (1 + 12 / piece)

    pairs = [
        (block, piece)
        for piece in range(128, most.piece + 1, 128)
        for block in range(piece, most.keys + 1, piece)
        if keys % block == 0 or block <= most.keys - 256
    ]
    block, piece = min(pairs, key=key_work)
    rows = most.queries if alone is None or block < keys else min(most.queries, alone // block)
    sizes = range(128, rows + 1 - 128 * (keys % block > 0), 128)
    return Blocks(min(sizes, key=lambda n: work(queries, n, 128, 0.02)), block, piece)


def splash_forward(
    q: Array,  # [B N, Tq, H]; the batch is folded into the heads
    k: Array,  # [B N, Tk, H]
    v: Array,  # [B N, Tk, H]
    target: tuple[str, str],
    *,
    residuals: bool,
) -> tuple[Array, Array | None]:  # [B N, Tq, H], float32 [B N, Tq]
    """Attention and, with `residuals`, the log2-sum-exp2 of its logits.

    Logits count in base 2: exp2 is what the hardware has.
    """
    kernel, queries, keys = _splash(), q.shape[1], k.shape[1]
    tuning = _tuning(target)
    blocks = cut(queries, keys, tuning.forward, tuning.alone)
    q, (k, v) = _fill(_base_2(q), blocks.queries), (_fill(x, blocks.keys) for x in (k, v))
    out = kernel._splash_attention_forward(
        _no_mask(kernel), q, k, v, _segments(kernel, q, k, keys), None,
        mask_value=MASKED, is_mqa=False, save_residuals=residuals, mask_function=None,
        fwd_mask_sparsity=1.0, config=_config(kernel, blocks, target, tuning.scheduler),
    )  # fmt: skip
    if not residuals:
        return out[:, :queries], None
    return out[0][:, :queries], out[1]["logsumexp"][:, :queries]


def splash_backward(
    q: Array,  # [B N, Tq, H]
    k: Array,  # [B N, Tk, H]
    v: Array,  # [B N, Tk, H]
    logsumexp: Array,  # float32 [B N, Tq], over all keys, also those of other devices
    delta: Array,  # float32 [B N, Tq]: the attention times its gradient, summed over H
    grad: Array,  # [B N, Tq, H], of the attention
    target: tuple[str, str],
) -> tuple[Array, Array, Array]:  # [B N, Tq, H], [B N, Tk, H] twice
    """Gradients of q, k and v."""
    kernel, queries, keys = _splash(), q.shape[1], k.shape[1]
    blocks = cut(queries, keys, _tuning(target).backward)
    q, grad = (_fill(x, blocks.queries) for x in (_base_2(q), grad))
    # Rows of zeros: their gradient is 0 = p (0 - 0) with any finite p.
    logsumexp, delta = (_fill(x, blocks.queries) for x in (logsumexp, delta))
    k, v = (_fill(x, blocks.keys) for x in (k, v))
    run = partial(
        kernel._splash_attention_bwd_dkv,
        bq=blocks.queries, bkv=blocks.keys, bkv_compute=blocks.piece, is_mqa=False,
        mask_info=_no_mask(kernel), mask_value=MASKED, mask_function=None,
        config=_config(kernel, blocks, target, False), dkv_mask_sparsity=1.0,
    )  # fmt: skip
    segments = _segments(kernel, q, k, keys)
    run_some = lambda q, k, v, *rest: run(q, k, v, segments, *rest)  # noqa: E731
    # The kernel marks no dimension of its grid as parallel: a chip of two cores (v4, v5p) would
    # leave one idle. The dimension that vmap adds is parallel: each core takes half of the heads.
    cores = math.gcd(q.shape[0], 2)
    # It writes the gradient of q once per block of keys, in float32, to be summed after it.
    heads, size = q.shape[0] // cores, 4 * q.size * (k.shape[1] // blocks.keys)
    turns = next((n for n in range(1, heads) if heads % n == 0 and size / n <= DQ_BYTES), heads)
    split = lambda x: x.reshape(turns, cores, -1, *x.shape[1:])  # noqa: E731
    arrays = tuple(split(x) for x in (q, k, v, logsumexp, grad, delta))
    grads = jax.lax.map(lambda xs: jax.vmap(run_some)(*xs), arrays)
    dq, dk, dv = (x.reshape(-1, *x.shape[3:]) for x in grads)
    # The kernel takes log2(e) q for q, and knows no scale.
    dq, dk = _scaled(dq[:, :queries], q.shape[2] ** -0.5), _scaled(dk[:, :keys], math.log(2))
    return dq, dk, dv[:, :keys]


def _scaled(x: Array, factor: float) -> Array:
    """`x` of any shape, multiplied in float32."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _base_2(q: Array) -> Array:
    """Queries [B N, Tq, H] -> scaled ones, whose logits count in base 2."""
    return _scaled(q, q.shape[2] ** -0.5 * math.log2(math.e))


@cache
def _splash() -> Any:
    """tokamax's kernels, in an instance of their module that is ours.

    The names are private ones of an experimental module, hence the exact version in pyproject.toml.
    We take it because these kernels were measured on the chips that we name. We leave out its
    ring_attention_kernel, which merges base-2 sums with base-e exponentials.
    """
    try:
        spec = importlib.util.find_spec(
            "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel"
        )
        kernel = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernel)
    except ImportError:
        raise UserError(
            "attention on TPU takes the kernels of tokamax: pip install 'ltx2-jax[tpu]', or set "
            "attention='xla' in the model's config"
        ) from None
    # To count in base 2 it multiplies q by log2(e) in the dtype of q, which in bfloat16 is 1.4453,
    # 0.2 % too much, and another rounding. `splash_forward` does it in float32 instead.
    kernel.LOG2E = 1.0
    return kernel


def _config(kernel: Any, blocks: Blocks, target: tuple[str, str], scheduler: bool) -> Any:
    return kernel.SplashConfig(
        block_q=blocks.queries,
        block_kv=blocks.keys,
        block_kv_compute=blocks.piece,
        use_base2_exp=True,
        use_experimental_scheduler=scheduler,
        interpret=target[0] != "tpu",
    )


def _tuning(target: tuple[str, str]) -> Tuning:
    kind = target[1].lower()
    return next(tuning for part, tuning in TUNING if part in kind)


def _no_mask(kernel: Any) -> Any:
    # Not FullMask: that is a mask that masks nothing, and a second body of the kernel.
    return kernel.MaskInfo(*[None] * len(kernel.MaskInfo._fields))


def _segments(
    kernel: Any,
    q: Array,  # [B N, Tq, H], filled up
    k: Array,  # [B N, Tk, H], filled up
    keys: int,
) -> Any:
    """Segment ids that hide what fills up k behind the first `keys`; None if nothing does."""
    if k.shape[1] == keys:
        return None
    hidden = (jnp.arange(k.shape[1]) >= keys).astype(jnp.int32)
    return kernel.SegmentIds(jnp.zeros(q.shape[1], jnp.int32), hidden)


def _fill(x: Array, block: int) -> Array:
    """[B N, T, ...] with zeros up to a multiple of `block` tokens."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
