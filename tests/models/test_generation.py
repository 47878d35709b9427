"""The decoding loop: the cache changes nothing, tokens are chosen as asked, rows stop on time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
from flax import nnx
from scipy.stats import chisquare
from tiny_gemma import GEMMA_3, GEMMA_4

from ltx2_jax.errors import UserError
from ltx2_jax.models.text.gemma import Gemma
from ltx2_jax.models.text.generation import Decoding, draw, generate, repeated

BOTH = pytest.mark.parametrize("cfg", [GEMMA_3, GEMMA_4], ids=["gemma3", "gemma4"])
GREEDY = Decoding(max_new_tokens=8, eos=())


def run(model, tokens, mask, how, key=None):
    with jax.default_matmul_precision("highest"):
        return np.asarray(generate(model, tokens, mask, how, key))


def all_logits(model, tokens, mask):
    """Logits after every token, float32 [B, S, V], without a cache."""
    last = tiny_gemma.hidden_states(model, tokens, mask)[-1]
    batch, length, _ = last.shape
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda m, x: m.logits(x))(model, jnp.asarray(last.reshape(-1, 24)))
    return np.asarray(logits).reshape(batch, length, -1)


@BOTH
def test_greedy_decoding_takes_the_argmax_of_the_full_forward_pass(cfg):
    model = tiny_gemma.build(cfg)
    tokens, mask = tiny_gemma.prompts()
    new = run(model, tokens, mask, GREEDY)
    # The decoder is causal: one pass over the result has every step's logits.
    longer = np.concatenate([tokens, new], axis=1)
    logits = all_logits(model, longer, np.pad(mask, ((0, 0), (0, 8)), constant_values=True))
    best = np.sort(logits, axis=-1)
    assert (best[..., -1] - best[..., -2])[:, 7:-1].min() > 1e-3  # no ties that rounding decides
    np.testing.assert_array_equal(new, logits[:, 7:-1].argmax(axis=-1))
    assert len(np.unique(new)) > 4


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=["2x2x2", "1x4x2"])
def test_decoding_does_not_depend_on_the_mesh(mesh_context, sizes):
    tokens, mask = tiny_gemma.prompts()
    want = run(tiny_gemma.build(GEMMA_4), tokens, mask, GREEDY)
    with mesh_context(*sizes):
        model = tiny_gemma.build(GEMMA_4, jax.sharding.get_mesh())
        np.testing.assert_array_equal(run(model, tokens, mask, GREEDY), want)


def test_a_row_ends_at_its_end_token_and_the_loop_when_all_have():
    model = tiny_gemma.build(GEMMA_3)
    tokens, mask = tiny_gemma.prompts()
    free = run(model, tokens, mask, GREEDY)
    eos = (int(free[0, 2]), int(free[1, 0]))
    stopped = run(model, tokens, mask, dataclasses.replace(GREEDY, eos=eos, pad=7))
    for row, full in zip(stopped, free, strict=True):
        end = np.flatnonzero(np.isin(full, eos))
        length = end[0] + 1 if len(end) else 8
        np.testing.assert_array_equal(row[:length], full[:length])
        assert (row[length:] == 7).all()


def test_the_loop_ends_when_every_row_has_ended(monkeypatch):
    runs, extend = [], Gemma.extend

    def counted(self, tokens, *args):
        jax.debug.callback(lambda: runs.append(1))
        return extend(self, tokens, *args)

    monkeypatch.setattr(Gemma, "extend", counted)
    model = tiny_gemma.build(GEMMA_3)
    tokens, mask = tiny_gemma.prompts()
    free = run(model, tokens, mask, dataclasses.replace(GREEDY, max_new_tokens=6))
    jax.effects_barrier()
    assert len(runs) == 6  # the prompt, and each new token but the last
    runs.clear()
    ends = dataclasses.replace(GREEDY, max_new_tokens=6, eos=tuple(free[:, 2].tolist()), pad=7)
    steps = np.isin(free, free[:, 2]).argmax(axis=1).max() + 1
    ended = run(model, tokens, mask, ends)
    assert (ended[:, steps:] == 7).all()  # what the loop never came to is filled too
    jax.effects_barrier()
    assert len(runs) == steps <= 3


# ------------------------------------------------------------------------------------- sampling


def test_draws_follow_the_softmax_at_their_temperature():
    logits = np.asarray([2.0, 1.0, 0.0, -1.0, 0.5])
    many = jnp.broadcast_to(jnp.float32(logits), (20_000, 5))
    for temperature, top_k in ((0.7, 0), (2.0, 0), (0.7, 3)):
        drawn = np.asarray(draw(jax.random.key(5), many, temperature, top_k))
        p = np.exp(logits / temperature)
        if top_k:
            p[np.argsort(logits)[:-top_k]] = 0
        counts = np.bincount(drawn, minlength=5)
        assert (counts[p == 0] == 0).all()
        assert chisquare(counts[p > 0], 20_000 * p[p > 0] / p.sum()).pvalue > 1e-3
    # Of more than there are, all.
    some = (draw(jax.random.key(5), many[:50], 0.7, top_k) for top_k in (0, 9))
    np.testing.assert_array_equal(*some)


def test_sampling_repeats_with_its_key_and_differs_without():
    model = tiny_gemma.build(GEMMA_4)
    tokens, mask = tiny_gemma.prompts()
    how = dataclasses.replace(GREEDY, temperature=4.0, top_k=3)
    a, b, c = (run(model, tokens, mask, how, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.3
    # No token but the three likeliest follows a prompt.
    first = [run(model, tokens, mask, how, jax.random.key(seed))[:, 0] for seed in range(16)]
    assert [len(np.unique(row)) for row in np.transpose(first)] == [3, 3, 3, 3]
    # Steps have keys of their own: with flat logits a row would otherwise repeat one token.
    flat = nnx.merge(*nnx.split(model))
    flat.embedding = nnx.Param(jnp.zeros_like(model.embedding[...]))
    assert len(np.unique(run(flat, tokens, mask, how, jax.random.key(0))[0])) > 3


# --------------------------------------------------------------------------------------- n-grams


def banned_by_search(row, n):
    """What no continuation of the list may be, by comparing every n-gram."""
    if len(row) < n - 1:
        return set()
    tail = row[len(row) - n + 1 :]
    return {row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == tail}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_exactly_the_tokens_that_repeat_an_ngram_are_banned(n):
    rng = np.random.default_rng(n)
    written = rng.integers(0, 2, (12, 30))
    starts = rng.integers(0, 10, 12)
    valid = np.arange(30)[None] >= starts[:, None]
    ban = jax.jit(lambda position: repeated(jnp.asarray(written), valid, position, n, vocab=4))
    hits = 0
    for position in (10, 12, 25, 30):
        got = np.asarray(ban(position))
        for row, start, has in zip(written, starts, got, strict=True):
            want = banned_by_search(row[start:position].tolist(), n)
            assert set(np.flatnonzero(has)) == want
            hits += len(want)
    assert hits > 10


def test_no_ngram_comes_twice_in_a_continuation_that_would_loop():
    model = tiny_gemma.build(GEMMA_4)
    tokens, mask = tiny_gemma.prompts()
    how = dataclasses.replace(GREEDY, max_new_tokens=24)
    for n, repeats in ((0, True), (3, False)):
        new = run(model, tokens, mask, dataclasses.replace(how, no_repeat_ngram=n))
        doubled = False
        for prompt, real, row in zip(tokens, mask, new, strict=True):
            text = [*prompt[real], *row]
            grams = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
            doubled |= len(set(grams[max(real.sum() - 2, 0) :])) < len(row)
        assert doubled == repeats


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
        ({"top_k": -1}, "top_k=-1: must be at least 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(GREEDY, **changes)


def test_draws_without_a_key_and_prompts_padded_on_the_right_are_refused():
    model = tiny_gemma.build(GEMMA_3)
    tokens, mask = tiny_gemma.prompts()
    with pytest.raises(UserError, match="give a key"):
        generate(model, tokens, mask, dataclasses.replace(GREEDY, temperature=0.7))
    for wrong in (mask[:, ::-1], np.zeros_like(mask), mask * [1, 1, 1, 1, 0, 1, 1, 1]):
        with pytest.raises(UserError, match="padded on the left"):
            generate(model, tokens, wrong, GREEDY)
