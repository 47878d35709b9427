"""Band-limited resampling with a Hann-windowed sinc, between any two integer rates.

It gives the numbers of torchaudio's `resample`, which the official encoder calls
(`ltx_core/model/audio_vae/ops.py`). The sinc has its cutoff at 0.99 of the smaller Nyquist
frequency and reaches over 6 of its zero crossings to either side. All of it is numpy.
"""

from functools import lru_cache
from math import ceil, gcd

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ltx2_jax.errors import UserError

_ROLLOFF = 0.99
_ZERO_CROSSINGS = 6
_BLOCK = 1 << 15  # output samples at a time: what bounds the memory


@lru_cache(maxsize=16)
def sinc_taps(source_rate: int, target_rate: int) -> np.ndarray:
    """The filter of every phase, float32 [phases, taps] (read-only: it is cached).

    With the rates reduced to s / t, output sample j lies at j * s / t input samples. Its value is
    the sum over k of taps[j % t, k] * x[j * s // t + k - reach], where reach = taps // 2 - 1.
    """
    divisor = gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    cutoff = _ROLLOFF * min(source, target) / source  # 1 is the source's own Nyquist frequency
    reach = ceil(_ZERO_CROSSINGS / cutoff)
    fraction = (np.arange(target) * source % target) / target
    time = cutoff * (np.arange(-reach, reach + 2) - fraction[:, None])
    window = np.cos(np.clip(time / _ZERO_CROSSINGS, -1, 1) * np.pi / 2) ** 2
    taps = (cutoff * np.sinc(time) * window).astype(np.float32)
    taps.flags.writeable = False
    return taps


def resample(audio: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Another sample rate for a waveform [..., samples, channels]; float32.

    The result has ceil(samples * target_rate / source_rate) samples. Time zero stays time zero, and
    silence surrounds the signal. Beside input and output it needs a few megabytes, however long the
    signal is.

    Raises:
        UserError: a rate is not a positive whole number.
    """
    for rate in (source_rate, target_rate):
        if rate < 1 or rate != int(rate):
            raise UserError(f"sample rate {rate}: expected a positive whole number of hertz")
    source_rate, target_rate = int(source_rate), int(target_rate)
    audio = np.asarray(audio, np.float32)
    *lead, samples, channels = audio.shape
    if source_rate == target_rate or audio.size == 0:
        return audio
    divisor = gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    taps = sinc_taps(source_rate, target_rate)
    reach = taps.shape[1] // 2 - 1
    rows = np.moveaxis(audio, -1, -2).reshape(-1, samples)
    windows = sliding_window_view(np.pad(rows, ((0, 0), (reach, reach + 1))), taps.shape[1], axis=1)
    length = -(-samples * target // source)
    out = np.empty((len(rows), length), np.float32)
    for start in range(0, length, _BLOCK):
        index = np.arange(start, min(start + _BLOCK, length))
        phase_taps, begin = taps[index % target], index * source // target
        for row, window in zip(out, windows, strict=True):
            row[index] = np.einsum("jk,jk->j", window[begin], phase_taps)
    return np.moveaxis(out.reshape(*lead, channels, length), -2, -1)
