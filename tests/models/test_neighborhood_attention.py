"""Neighbourhood attention against loops in numpy, scipy's box filter and ordinary attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from ltx2_jax.models.codecs.neighborhood_attention import neighborhood_attention

attend = jax.jit(neighborhood_attention, static_argnums=3)


def draw(size, heads=2, width=4, batch=1, count=3):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, *size, heads, width)).astype(np.float32) for _ in range(count)]


def by_loops(q, k, v, kernel):
    out = np.zeros_like(v)
    size = q.shape[1:4]
    for cell in itertools.product(*map(range, size)):
        box = (slice(None),)
        for i, length, window in zip(cell, size, kernel, strict=True):
            start = min(max(i - window // 2, 0), length - window)
            box += (slice(start, start + window),)
        keys, values = (x[box].reshape(len(x), -1, *x.shape[4:]) for x in (k, v))
        here = (slice(None), *cell)
        weights = np.exp(np.einsum("bnd,bknd->bnk", q[here], keys))
        weights /= weights.sum(-1, keepdims=True)
        out[here] = np.einsum("bnk,bknd->bnd", weights, values)
    return out


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((3, 7, 7), (3, 7, 7)),  # one window
        ((5, 9, 13), (3, 7, 7)),  # less than two windows; no multiple of a block
        ((9, 11, 18), (5, 3, 9)),
        ((4, 16, 16), (3, 5, 5)),
        ((1, 3, 40), (1, 1, 21)),  # a window longer than a block and its border
        ((4, 5, 10), (2, 4, 6)),  # even windows reach further back
    ],
)
def test_every_cell_sees_the_box_around_it(size, kernel):
    q, k, v = draw(size, batch=2)
    np.testing.assert_allclose(attend(q, k, v, kernel), by_loops(q, k, v, kernel), atol=1e-5)


def test_equal_keys_give_the_mean_over_the_box():
    size, kernel = (6, 12, 20), (3, 5, 7)
    q, _, v = draw(size)
    got = np.asarray(attend(q, np.zeros_like(q), v, kernel))
    want = uniform_filter(v, size=(1, *kernel, 1, 1))
    inside = (slice(None), *(slice(k // 2, n - k // 2) for k, n in zip(kernel, size, strict=True)))
    np.testing.assert_allclose(got[inside], want[inside], atol=1e-5)
    # A window is moved inwards at a border: the corner has the value of the nearest whole box.
    np.testing.assert_allclose(got[:, 0, 0, 0], want[:, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(got[:, -1, -1, -1], want[:, -2, -3, -4], atol=1e-5)


def test_a_window_over_everything_is_ordinary_attention():
    size = (2, 5, 9)
    q, k, v = draw(size)
    flat = [x.reshape(1, -1, *x.shape[4:]) for x in (q, k, v)]
    want = jax.nn.dot_product_attention(*flat, scale=1.0).reshape(v.shape)
    np.testing.assert_allclose(attend(q, k, v, size), want, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = draw((3, 6, 6))
    got = np.asarray(attend(100 * q, 100 * k, v, (3, 3, 3)))
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= np.abs(v).max() * 1.0001


def test_bfloat16_in_and_out():
    """As exact as the weights and the result are rounded: logits of 8 and more stay float32."""
    q, k, v = (np.asarray(jnp.bfloat16(x), np.float32) for x in draw((4, 8, 8)))
    got = attend(*(jnp.bfloat16(x) for x in (4 * q, k, v)), (3, 5, 5))
    assert got.dtype == jnp.bfloat16
    want = by_loops(4 * q, k, v, (3, 5, 5))
    assert np.linalg.norm(got.astype(np.float32) - want) < 2**-8 * np.linalg.norm(want)


def test_memory_does_not_grow_with_the_square_of_the_cells():
    def temporary(rows):
        x = jax.ShapeDtypeStruct((1, 8, rows, 64, 1, 16), jnp.float32)
        compiled = attend.lower(x, x, x, (3, 5, 5)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, 4 * 8 * rows * 64 * 16

    (small, volume), (large, _) = temporary(16), temporary(64)
    assert large - small < 5 * 3 * volume  # three volumes more; cells x cells are 384 volumes more


def test_a_volume_smaller_than_the_window_is_refused():
    q, k, v = draw((3, 6, 6))
    with pytest.raises(ValueError, match=r"\[3 6 6\] cells is smaller than the kernel \[3 7 7\]"):
        neighborhood_attention(q, k, v, (3, 7, 7))
