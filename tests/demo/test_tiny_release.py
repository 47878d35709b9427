"""Random weights that are the same wherever they are drawn."""

import jax
import numpy as np

from ltx2_jax.demo import tiny_release
from ltx2_jax.weights.mapping import Parameter


def test_weights_are_a_function_of_their_name():
    """By CRC-32, whose check value everyone has: a process's own hash of a text is another."""
    parameter = Parameter((), ("w",), jax.ShapeDtypeStruct((2, 3), np.float32))
    drawn = tiny_release._drawn(parameter, "123456789")
    want = np.random.default_rng(0xCBF43926).normal(size=(2, 3)) / np.sqrt(3)
    np.testing.assert_array_equal(drawn, want.astype(np.float32))
