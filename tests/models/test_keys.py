"""Keys that initialisers draw with."""

import jax
import numpy as np
from flax import nnx

from ltx2_jax.models.layers import Rngs


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
