"""Keys that initialisers draw with, and what they draw."""

import jax
import numpy as np
import pytest
from flax import nnx

from ltx2_jax.models.layers import AdaLayerNormSingle, FeedForward, Linear, Rngs


def test_keys_are_those_of_flax_alone_and_for_layers():
    ours, theirs = Rngs(3), nnx.Rngs(3)

    def drawn(rngs):
        first = rngs.params()
        layers = jax.vmap(lambda layer: (layer.params(), layer.params()))(rngs.split(4))
        return jax.tree.map(jax.random.key_data, (first, layers, rngs.params()))

    found, want = drawn(ours), drawn(theirs)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    traced = jax.jit(lambda: drawn(Rngs(jax.random.key(3))))()
    jax.tree.map(np.testing.assert_array_equal, traced, want)


@pytest.mark.parametrize(
    ("make", "deviation"),
    [
        (lambda: Linear(64, 400, rngs=Rngs(0)), 1 / 8),
        (lambda: FeedForward(25, 16, rngs=Rngs(0)).linear_out, 1 / 20),
        (lambda: AdaLayerNormSingle(64, 9, rngs=Rngs(0)).linear, 0.02),
    ],
    ids=["of inputs", "of many inputs", "of modulation"],
)
def test_weights_have_the_deviation_of_their_map_and_none_is_far_out(make, deviation):
    """That of a normal cut at two deviations is 0.8796 of the whole one's: Johnson and Kotz."""
    linear = make()
    weight = np.asarray(linear.weight[...])
    assert weight.size >= 9000
    np.testing.assert_allclose(
        [weight.mean() / deviation + 1, weight.std() / deviation], 1, atol=0.02
    )
    assert 2.2 < np.abs(weight).max() / deviation < 2 / 0.8796
    assert not np.asarray(linear.bias[...]).any()
