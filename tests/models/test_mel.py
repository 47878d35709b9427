"""The log-mel front end against scipy, direct sums and published numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import mel as codec_mel
from ltx2_jax.models.codecs.mel import (
    MelConfig,
    hann_window,
    hz_to_mel,
    mel_filter_bank,
    mel_to_hz,
)

# One program instead of one for every operation and shape.
stft, log_mel = (
    jax.jit(function, static_argnames="config") for function in (codec_mel.stft, codec_mel.log_mel)
)
istft = jax.jit(codec_mel.istft, static_argnames=("config", "samples"))

CONFIG = MelConfig()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def scipy_kwargs() -> dict:
    return dict(window="hann", nperseg=CONFIG.n_fft, noverlap=CONFIG.n_fft - CONFIG.hop)


def test_mel_scale_gives_librosas_published_frequencies():
    # librosa's documentation of mel_frequencies(n_mels=40): slaney scale, 0 to 11025 Hz.
    published = {1: 85.317, 11: 938.49, 12: 1024.856, 20: 2071.84, 30: 4994.285, 38: 10096.408}
    frequencies = mel_to_hz(np.linspace(*hz_to_mel([0.0, 11025.0]), 40))
    for index, hz in published.items():
        assert frequencies[index] == pytest.approx(hz, abs=6e-4)
    np.testing.assert_allclose(hz_to_mel(frequencies), np.linspace(0, hz_to_mel(11025.0), 40))


def test_filters_are_triangles_of_equal_area():
    bank = mel_filter_bank(CONFIG)
    assert bank.shape == (513, 64)
    assert bank.dtype == np.float32
    # The edges from the definition, without our scale functions: 200/3 Hz a mel up to mel 15,
    # then a factor 6.4 every 27 mels; 8000 Hz is mel 15 + 27 log(8) / log(6.4).
    top = 15 + 27 * np.log(8) / np.log(6.4)
    mels = np.arange(66) * top / 65
    edges = [m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    frequencies = np.arange(513) * 16000 / 1024
    for m in range(64):
        low, centre, high = edges[m : m + 3]
        triangle = np.interp(frequencies, [low, centre, high], [0, 2 / (high - low), 0])
        np.testing.assert_allclose(bank[:, m], triangle, atol=1e-9)
    assert (bank.max(axis=0) > 0).all()


def test_filters_lie_between_the_frequencies_of_the_config():
    bank = mel_filter_bank(MelConfig(bins=10, f_min=1000.0, f_max=4000.0))
    frequencies = np.arange(513) * 16000 / 1024
    # Above 1 kHz mels are even in the logarithm: 12 edges, each 4^(1/11) of the one before.
    edges = 1000 * 4.0 ** (np.arange(12) / 11)
    for m in range(10):
        inside = (frequencies > edges[m]) & (frequencies < edges[m + 2])
        np.testing.assert_array_equal(bank[:, m] > 0, inside)


def test_stft_is_scipys():
    signal = noise(2, 5003)
    ours = np.asarray(stft(jnp.asarray(signal), CONFIG))
    assert ours.shape == (2, 1 + 5003 // 160, 513)
    _, _, theirs = scipy.signal.stft(signal, boundary="even", padded=False, **scipy_kwargs())
    theirs = np.moveaxis(theirs, -1, -2) * hann_window(1024).sum()  # scipy divides by the sum
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_stft_is_a_direct_sum_over_reflected_edges():
    signal = noise(700)
    window = np.sin(np.pi * np.arange(1024) / 1024) ** 2
    ours = np.asarray(stft(jnp.asarray(signal), CONFIG))
    for frame, bin_ in ((0, 0), (0, 17), (2, 512), (4, 100)):
        total = 0.0
        for n in range(1024):
            index = abs(frame * 160 + n - 512)  # reflected about the first sample
            index = index if index < 700 else 2 * 699 - index  # and about the last
            total += window[n] * signal[index] * np.exp(-2j * np.pi * bin_ * n / 1024)
        assert ours[frame, bin_] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("samples", [513, 1600, 5003])
def test_istft_undoes_stft(samples):
    signal = noise(3, samples)
    spectrum = stft(jnp.asarray(signal), CONFIG)
    np.testing.assert_allclose(istft(spectrum, CONFIG, samples), signal, atol=2e-5)
    assert istft(spectrum, CONFIG).shape == (3, samples // 160 * 160)


def test_istft_of_an_inconsistent_spectrum_is_scipys_least_squares():
    spectrum = noise(12, 513) + 1j * noise(12, 513)[::-1]
    _, theirs = scipy.signal.istft(spectrum.T / hann_window(1024).sum(), **scipy_kwargs())
    length = 11 * 160
    np.testing.assert_allclose(istft(spectrum, CONFIG), theirs[:length], atol=1e-5)


def test_istft_is_silent_where_no_window_reaches():
    spectrum = stft(jnp.asarray(noise(1600)), CONFIG)
    signal = np.asarray(istft(spectrum, CONFIG, 4000))
    assert signal.shape == (4000,)
    assert np.abs(signal[1600 + 512 :]).max() == 0.0


def test_other_sizes_work_as_well():
    config = MelConfig(sample_rate=8000, n_fft=256, hop=64, bins=20, f_max=4000.0)
    signal = noise(1000)
    spectrum = stft(jnp.asarray(signal), config)
    np.testing.assert_allclose(istft(spectrum, config, 1000), signal, atol=2e-5)
    assert log_mel(signal[None, :, None], config).shape == (1, 16, 20, 1)


def test_log_mel_is_the_log_of_filtered_magnitudes():
    audio = 0.1 * noise(2, 4000, 2)
    ours = np.asarray(log_mel(jnp.asarray(audio), CONFIG))
    assert ours.shape == (2, 26, 64, 2)
    assert ours.dtype == np.float32
    _, _, spectrum = scipy.signal.stft(
        np.moveaxis(audio, -1, 1).astype(np.float64),
        boundary="even",
        padded=False,
        **scipy_kwargs(),
    )
    magnitude = np.abs(spectrum) * hann_window(1024).sum(dtype=np.float64)
    mel = np.einsum("bcft,fm->btmc", magnitude, mel_filter_bank(CONFIG))
    np.testing.assert_allclose(ours, np.log(np.maximum(mel, 1e-5)), atol=1e-4)


def test_silence_is_the_floor():
    silent = np.asarray(log_mel(jnp.zeros((1, 1600, 2)), CONFIG))
    np.testing.assert_allclose(silent, np.log(1e-5), rtol=1e-6)
    higher = dataclasses.replace(CONFIG, floor=0.1)
    silent = np.asarray(log_mel(jnp.zeros((1, 1600, 2)), higher))
    np.testing.assert_allclose(silent, np.log(0.1), rtol=1e-6)


def test_a_tone_peaks_in_the_filter_around_its_frequency():
    seconds = np.arange(8000) / 16000
    for hz in (250.0, 1000.0, 4000.0):
        mel = log_mel(np.sin(2 * np.pi * hz * seconds)[None, :, None], CONFIG)
        bin_ = int(np.argmax(mel[0, 25, :, 0]))
        edges = mel_to_hz(np.linspace(*hz_to_mel([0.0, 8000.0]), 66))
        assert edges[bin_] < hz < edges[bin_ + 2]


def test_a_signal_too_short_to_reflect_is_refused():
    with pytest.raises(UserError, match=r"512 samples.*513 or more"):
        stft(jnp.zeros(512), CONFIG)
