"""float32 arithmetic that rounds where the released code does.

Its tables of frequencies and of noise levels are made in float32. High frequencies and high noise
levels carry the last bit of such a number into the third decimal of what is computed from it.
"""

import numpy as np


def linspace(start: float, stop: float, count: int) -> np.ndarray:
    """float32 [count]: evenly spaced as torch does it, counted from the nearer end.

    One rounding per number: the step is float32, its multiple and the sum are exact.
    """
    if count == 1:
        return np.asarray([start], np.float32)
    step = np.float64(np.float32(stop - start) / np.float32(count - 1))
    i = np.arange(count)
    ascending, descending = start + step * i, stop - step * (count - 1 - i)
    return np.where(i < count // 2, ascending, descending).astype(np.float32)
