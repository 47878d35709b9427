"""Rotary embedding where the last bit of float32 counts, against numpy and torch's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.models.rope import frequency_grid, rope_tables
from ltx2_jax.rounding import linspace


def test_numbers_are_spaced_as_torch_spaces_them():
    # torch.linspace, float32, where it differs from numpy's; indices and values.
    for start, stop, count, of_torch in (
        (0.0, 1.0, 12, {6: "0x1.1745d0p-1", 10: "0x1.d1745cp-1"}),
        (1.0, 0.0, 41, {22: "0x1.cccccep-2", 27: "0x1.4ccccep-2", 31: "0x1.cccccep-3"}),
    ):
        ours = linspace(start, stop, count)
        assert {i: ours[i] for i in of_torch} == {i: float.fromhex(x) for i, x in of_torch.items()}
    for count in (1, 2, 33):
        exact = np.linspace(0.0, 1.0, count)
        np.testing.assert_allclose(linspace(0.0, 1.0, count), exact, rtol=2e-7)
        assert linspace(0.0, 1.0, count)[0] == 0


@pytest.mark.parametrize("jit", [False, True])
def test_positions_are_divided_not_multiplied_by_a_reciprocal(jit):
    """A twentieth is no float32: of 126 audio positions it would move 12."""
    middles = np.float32(0.04) * np.arange(126, dtype=np.float32) + np.float32(0.02)
    tables = lambda x: rope_tables(x, heads=1, width=64, max_pos=(20.0,), theta=1e4)  # noqa: E731
    cos, sin = (jax.jit(tables) if jit else tables)(jnp.asarray(middles)[None, None])
    fraction = np.float32(2) * middles / np.float32(20) - np.float32(1)
    angle = (fraction[:, None] * frequency_grid(64, 1, 1e4)).astype(np.float64)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=1e-6)
