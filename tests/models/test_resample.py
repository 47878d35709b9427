"""The resampler against its definition, scipy, and what a listener would notice."""

import tracemalloc

import numpy as np
import pytest
import scipy.signal

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.resample import resample


def noise(*shape):
    return np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)


def tone(hz, rate, seconds=0.25):
    time = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hz * time) * np.hanning(len(time)))[:, None].astype(np.float32)


@pytest.mark.parametrize(
    ("source", "target"), [(48000, 16000), (44100, 16000), (16000, 48000), (7, 5), (10, 11)]
)
def test_every_sample_is_the_windowed_sinc_sum(source, target):
    signal = noise(400, 1)
    ours = resample(signal, source, target)[:, 0]
    cutoff = 0.99 * min(source, target)  # twice the highest frequency that passes, in Hz
    for j in (0, 1, 2, len(ours) // 2, len(ours) - 1):
        crossings = cutoff * (j / target - np.arange(400) / source)
        window = np.where(np.abs(crossings) < 6, np.cos(np.pi * crossings / 12) ** 2, 0)
        expected = np.sum(signal[:, 0] * np.sinc(crossings) * window) * cutoff / source
        assert ours[j] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rates", [(48000, 16000), (44100, 16000), (24000, 16000), (16000, 24000)])
def test_tones_agree_with_scipy_and_time_zero_stays(rates):
    signal = sum(tone(hz, rates[0]) for hz in (440, 1000, 3000)) / 3
    ours = resample(signal, *rates)
    divisor = np.gcd(*rates)
    theirs = scipy.signal.resample_poly(signal, rates[1] // divisor, rates[0] // divisor, axis=0)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_removed():
    for hz, passes in ((1000, True), (6000, True), (11000, False), (20000, False)):
        loudness = np.abs(resample(tone(hz, 48000), 48000, 16000)).max()
        assert loudness > 0.97 if passes else loudness < 0.01


@pytest.mark.parametrize("source", [44100, 48000, 22050, 16000, 8000])
def test_the_last_begun_output_sample_is_kept(source):
    for samples in (1, 441, 1000):
        length = -(-samples * 16000 // source)
        assert resample(noise(2, samples, 3), source, 16000).shape == (2, length, 3)
    assert resample(noise(0, 2), source, 16000).shape == (0, 2)


def test_channels_and_clips_do_not_mix():
    signal = noise(2, 900, 3)
    whole = resample(signal, 44100, 16000)
    for clip in range(2):
        for channel in range(3):
            alone = resample(signal[clip, :, channel, None], 44100, 16000)
            np.testing.assert_array_equal(whole[clip, :, channel, None], alone)


def test_memory_stays_near_the_signal_itself():
    for rates in ((44100, 16000), (44100, 16001)):  # the second have no common divisor
        signal = noise(60 * 44100, 1)
        tracemalloc.start()
        result = resample(signal, *rates)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.1 * (signal.nbytes + result.nbytes) + 20e6


@pytest.mark.parametrize("rates", [(0, 16000), (16000, -1), (44100.5, 16000)])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(UserError, match=r"sample rate .*positive whole number"):
        resample(noise(10, 1), *rates)
