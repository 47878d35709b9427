"""The duration head: which tokens count, weights both ways, and the way to frames."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx2_jax.diffusion.geometry import seconds_to_frames
from ltx2_jax.errors import UserError
from ltx2_jax.models.text.duration_head import DurationHeadConfig
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.duration_head import create, duration_head_config

CONFIG = DurationHeadConfig(
    video_context_dim=12, audio_context_dim=6, width=8, num_queries=3, num_heads=2, mlp_width=5
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    tree = nnx.to_pure_dict(nnx.split(nnx.eval_shape(partial(create, CONFIG)), nnx.Param)[1])
    return jax.tree.map(lambda a: rng.normal(size=a.shape, scale=0.5).astype(np.float32), tree)


@pytest.fixture(scope="module")
def seconds(params):
    head = mapping.build(partial(create, CONFIG), jax.tree.map(jnp.asarray, params))
    return partial(nnx.jit(lambda head, video, audio: head(video, audio)), head)


def tokens(batch, length, width):
    return np.random.default_rng(length).normal(size=(batch, length, width)).astype(np.float32)


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def seconds_by_loops(p, video, audio):
    """Of one clip, query by query and head by head."""
    x = np.concatenate(
        [
            linear(p["video"]["project"], video) + p["video"]["modality"],
            linear(p["audio"]["project"], audio) + p["audio"]["modality"],
        ]
    )
    q = linear(p["qkv"], p["queries"])[:, :8]
    k, v = np.split(linear(p["qkv"], x)[:, 8:], 2, axis=1)
    pooled = np.zeros((3, 8))
    for query, head in np.ndindex(3, 2):
        part = slice(4 * head, 4 * head + 4)
        weights = np.exp(k[:, part] @ q[query, part] / np.sqrt(4))
        pooled[query, part] = weights @ v[:, part] / weights.sum()
    hidden = linear(p["mlp_in"], linear(p["attention_out"], pooled).ravel())
    hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return np.exp(linear(p["mlp_out"], hidden)[0])


def test_both_contexts_are_pooled_together(params, seconds):
    video, audio = tokens(2, 7, 12), tokens(2, 4, 6)
    got = seconds(video, audio)
    assert got.shape == (2,)
    expected = [seconds_by_loops(params, *clip) for clip in zip(video, audio, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_the_order_of_tokens_does_not_count(seconds):
    video, audio = tokens(1, 7, 12), tokens(1, 4, 6)
    np.testing.assert_allclose(
        seconds(video[:, ::-1], audio), seconds(video, audio), rtol=1e-5, atol=0
    )


def test_one_context_is_enough_and_none_is_too_few(seconds):
    video, audio = tokens(1, 7, 12), tokens(1, 4, 6)
    alone = [float(seconds(video, None)[0]), float(seconds(None, audio)[0])]
    assert len({*alone, float(seconds(video, audio)[0])}) == 3
    with pytest.raises(UserError, match="video or an audio context"):
        seconds(None, None)


def test_seconds_become_legal_frames_within_the_bounds_of_a_user():
    def frames(predicted, fps, low=1.0, high=20.0):
        prediction = jnp.asarray([predicted])  # as the head returns it
        return seconds_to_frames(float(prediction[0]), fps, round(low * fps), round(high * fps))

    assert frames(5.1, 24) == 121  # 122 frames, snapped down
    assert frames(0.2, 24) == 25  # one second at least
    assert frames(99.0, 24) == 473  # twenty seconds at most
    assert frames(99.0, 24, high=3.0) == 65


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="pooler_hidden_dim=10: not a multiple of"):
        duration_head_config({"pooler_hidden_dim": 10, "num_pooler_heads": 4}, {})
    assert duration_head_config({}, {}) == DurationHeadConfig()
