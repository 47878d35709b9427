"""The vocoder: its filters against their definitions, its weights bit for bit, its limits named."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx
from golden_case import file_of, tensors_of
from ml_dtypes import bfloat16

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.bandwidth_extension import BandwidthExtension
from ltx2_jax.models.codecs.resample import resample
from ltx2_jax.models.codecs.vocoder import (
    VOCODER_2_0,
    VOCODER_2_3,
    AntiAliasedSnake,
    ExtensionConfig,
    GeneratorConfig,
    Vocoder,
    VocoderConfig,
    kaiser_sinc,
    product_of_shifted,
)
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.vocoder import create, vocoder_config

GOLDEN = Path(__file__).parents[1] / "golden"

PERIODIC = GeneratorConfig(
    channels=8,
    upsample_rates=(5,),
    upsample_kernels=(7,),
    block_kernels=(3,),
    block_dilations=((1, 3),),
    periodic=True,
    final_activation="clip",
    final_bias=False,
    bins=4,
)
# 5 samples per mel frame; then a mel frame every 2 samples, with 6 samples at the higher rate.
TINY = VocoderConfig(
    generator=PERIODIC,
    sample_rate=100,
    extension=ExtensionConfig(
        dataclasses.replace(
            PERIODIC, upsample_rates=(6,), upsample_kernels=(8,), final_activation=None
        ),
        sample_rate=300,
        n_fft=8,
        hop=2,
    ),
)
HIFI_GAN = VocoderConfig(
    generator=GeneratorConfig(
        channels=8,
        upsample_rates=(3, 2),
        upsample_kernels=(7, 4),
        block_kernels=(3, 5),
        block_dilations=((1, 3), (1, 2)),
        bins=4,
    ),
    sample_rate=600,
)

run = jax.jit(Vocoder.__call__)


def draw(create):
    """Random weights in which everything counts; no filter is symmetric."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(create), nnx.Param)[1])
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@cache
def built(config):
    return mapping.build(partial(create, config), draw(partial(create, config)))


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def held(x, before, after):
    """[T] with its ends repeated."""
    return np.concatenate([np.full(before, x[0]), x, np.full(after, x[-1])])


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["v2.3", "v2.5"])
def test_new_filters_are_those_that_released_files_hold(release):
    tensors = tensors_of(file_of(GOLDEN / release, "vocoder"), "vocoder")
    stored = [value for name, value in tensors.items() if name.endswith(".filter")]
    assert stored
    for value in stored:
        np.testing.assert_allclose(kaiser_sinc(), value[0, 0], atol=1e-7)


def test_the_filter_is_scipys_kaiser_design():
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(6, 1.2))
    expected = scipy.signal.firwin(12, 0.5, window=("kaiser", beta))
    np.testing.assert_allclose(kaiser_sinc(), expected, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_activation_is_filtering_at_twice_the_rate(length):
    """With scipy's filters on the interleaved signal, its ends held."""
    params = draw(partial(AntiAliasedSnake, 3))
    up, down = params["up_filter"][0, 0], params["down_filter"][0, 0]
    x = random(2, length, 3)
    got = mapping.build(partial(AntiAliasedSnake, 3), params)(x)
    for clip in range(2):
        for c in range(3):
            # Zero-stuffed to twice the rate, convolved, cut to the samples around the signal.
            doubled = scipy.signal.upfirdn(2 * up, held(x[clip, :, c], 5, 5), up=2)
            doubled = doubled[15 : 15 + 2 * length]
            alpha, beta = np.exp(params["log_alpha"][c]), np.exp(params["log_beta"][c])
            doubled = doubled + np.sin(alpha * doubled) ** 2 / beta
            # Correlated, not convolved, on the way down.
            expected = np.correlate(held(doubled, 5, 6), down, mode="valid")[::2]
            np.testing.assert_allclose(got[clip, :, c], expected, atol=1e-5)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (7, 5), (1, 1), (4, 3)])
def test_what_a_tpu_computes_is_the_convolution(kernel, dilation):
    x, weights = random(2, 20, 3), random(kernel, 3, 4, seed=2)
    got = product_of_shifted(x, weights, dilation)
    expected = jax.lax.conv_general_dilated(
        x, weights, (1,), "SAME", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("rate", "kernel"), [(6, 16), (5, 15), (2, 4), (3, 3), (2, 5)])
def test_upsampling_is_a_cropped_transposed_convolution(rate, kernel):
    """Five samples of one channel spread the kernel out, (kernel - rate) // 2 are cut at both ends.

    When kernel - rate is odd, one sample more than rate per frame remains, as in official code.
    """
    config = GeneratorConfig(
        channels=2, upsample_rates=(rate,), upsample_kernels=(kernel,), block_kernels=(3,),
        block_dilations=((1,),), bins=1,
    )  # fmt: skip
    upsample = built(VocoderConfig(config)).generator.upsamples[0]
    x = random(1, 5, 2)
    weights = np.asarray(upsample.kernel[...])  # [kernel, out, in]
    spread = np.zeros((4 * rate + kernel, 1))
    for i in range(5):
        for k in range(kernel):
            spread[i * rate + k] += weights[k] @ x[0, i]
    crop = (kernel - rate) // 2
    expected = spread[crop : len(spread) - crop] + np.asarray(upsample.bias[...])
    np.testing.assert_allclose(upsample(x)[0], expected, atol=1e-5)


def test_the_skip_is_the_resampler_with_its_ends_held():
    extension = built(TINY).extension
    waveform = random(2, 60, 2)
    got = np.asarray(extension.interpolate(waveform))
    longer = np.pad(waveform, ((0, 0), (20, 20), (0, 0)), mode="edge")
    expected = resample(longer, 100, 300)[:, 60:-60]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("samples", "frames"), [(6, 2), (7, 3), (8, 3)])
def test_a_begun_hop_is_a_frame_of_its_own(samples, frames):
    seen = []

    def silent(mel):
        seen.append(mel.shape)
        return jnp.zeros((1, mel.shape[1] * 6, 2))

    extension = BandwidthExtension(silent, bins=5, n_fft=6, hop=3, ratio=2)
    assert jax.eval_shape(extension, jnp.zeros((1, samples, 2))).shape == (1, 2 * samples, 2)
    assert seen == [(1, frames, 5, 2)]


def test_log_mels_look_back_only_and_are_magnitudes_through_the_stored_tables():
    extension = built(TINY).extension
    extension = nnx.merge(*nnx.split(extension))
    extension.mel_filters[...] = jnp.abs(extension.mel_filters[...])
    waveform = random(1, 20, 2)
    mel = np.asarray(extension.log_mel(waveform))
    assert mel.shape == (1, 10, 4, 2)
    waves, filters = np.asarray(extension.waves[...])[:, 0], np.asarray(extension.mel_filters[...])
    for frame, channel in ((0, 0), (1, 1), (9, 0)):
        end = 2 * (frame + 1)
        window = np.concatenate([np.zeros(8), waveform[0, :end, channel]])[-8:]
        magnitude = np.hypot(waves[:5] @ window, waves[5:] @ window)
        expected = np.log(np.maximum(filters @ magnitude, 1e-5))
        np.testing.assert_allclose(mel[0, frame, :, channel], expected, atol=1e-4)
    silent = extension.log_mel(jnp.zeros((1, 20, 2)))
    np.testing.assert_allclose(silent, np.log(1e-5), rtol=1e-6)


# ---- the whole -----------------------------------------------------------------------------------


def test_hifi_gan_makes_rates_times_frames_samples_within_one():
    waveform = run(built(HIFI_GAN), 3 * random(2, 9, 4, 2))
    assert waveform.shape == (2, 54, 2)
    assert waveform.dtype == jnp.float32
    assert 0.1 < np.abs(waveform).max() < 1.0
    assert built(HIFI_GAN).output_sample_rate == 600


@pytest.mark.parametrize("frames", [1, 4])
def test_bandwidth_extension_triples_every_length(frames):
    """5 samples are not a multiple of the hop of 2: the last hop is filled up and cut off again."""
    model, mel = built(TINY), random(1, frames, 4, 2)
    waveform = run(model, mel)
    assert waveform.shape == (1, 15 * frames, 2)
    assert np.abs(waveform).max() <= 1.0
    low = jax.jit(lambda generator, x: generator(x))(model.generator, mel)
    filled = np.pad(low, ((0, 0), (0, -5 * frames % 2), (0, 0)))
    assert len(filled[0]) % 2 == 0
    residual = model.extension.generator(model.extension.log_mel(filled))
    assert np.abs(residual).max() > 1  # the sum alone is clipped
    expected = np.clip(residual + model.extension.interpolate(filled), -1, 1)
    np.testing.assert_allclose(waveform, expected[:, : 15 * frames], atol=1e-5)
    assert model.output_sample_rate == 300


def test_clips_of_a_batch_do_not_mix():
    mel = random(2, 3, 4, 2)
    both = run(built(TINY), mel)
    for i in range(2):
        np.testing.assert_allclose(both[i : i + 1], run(built(TINY), mel[i : i + 1]), atol=1e-6)


def test_weights_stored_in_bfloat16_compute_in_float32():
    make = partial(create, HIFI_GAN)
    coarse = jax.tree.map(lambda x: x.astype(bfloat16), draw(make))
    fine = jax.tree.map(lambda x: x.astype(np.float32), coarse)
    mel = random(1, 4, 4, 2)
    waveform = run(mapping.build(make, coarse), mel)
    assert waveform.dtype == jnp.float32
    np.testing.assert_array_equal(waveform, run(mapping.build(make, fine), mel))


@pytest.mark.parametrize("shape", [(1, 0, 4, 2), (1, 3, 5, 2), (1, 3, 4, 1), (3, 4, 2)])
def test_mels_of_the_wrong_shape_are_named(shape):
    with pytest.raises(UserError, match=r"mel of shape .*expected \[B, T, 4, 2\]") as caught:
        built(TINY)(np.zeros(shape, np.float32))
    assert "\n" not in str(caught.value)


# ---- weights and config --------------------------------------------------------------------------


def test_the_preset_has_the_1227_tensors_and_128_million_parameters_of_the_release():
    shapes = mapping.abstract_params(partial(create, VOCODER_2_3))
    assert len(shapes) + 1 == 1227  # one is read by nothing
    assert 128e6 < sum(leaf.size for leaf in shapes.values()) < 129e6


RELEASED_2_0 = {
    "upsample_initial_channel": 1024, "resblock": "1", "upsample_rates": [6, 5, 2, 2, 2],
    "resblock_kernel_sizes": [3, 7, 11], "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "stereo": True,
}  # fmt: skip
AMP = {
    "resblock": "AMP1", "resblock_kernel_sizes": [3, 7, 11], "stereo": True,
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "activation": "snakebeta",
    "use_tanh_at_final": False, "use_bias_at_final": False,
}  # fmt: skip
RELEASED_2_3 = {
    "vocoder": AMP | {
        "upsample_initial_channel": 1536, "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": AMP | {
        "upsample_initial_channel": 512, "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4], "apply_final_activation": False,
        "input_sampling_rate": 16000, "output_sampling_rate": 48000, "hop_length": 80,
        "n_fft": 512, "win_size": 512, "num_mels": 64,
    },
}  # fmt: skip


def test_released_metadata_gives_the_presets():
    assert vocoder_config(RELEASED_2_0) == VOCODER_2_0
    assert vocoder_config({}) == VOCODER_2_0
    assert vocoder_config(RELEASED_2_3) == VOCODER_2_3
    assert VOCODER_2_0.generator.samples_per_frame * 100 == VOCODER_2_0.sample_rate
    assert VOCODER_2_3.generator.samples_per_frame * 100 == VOCODER_2_3.sample_rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resblock": "2"}, "vocoder config: resblock='2' .only '1'"),
        ({"stereo": False}, "stereo=False"),
        ({"upsample_rates": [6, 5]}, "upsample_rates .* differ in length"),
        ({"upsample_kernel_sizes": [16, 15, 8, 4, 1]}, "kernel 1 is shorter than its rate 2"),
        ({"upsample_initial_channel": 16}, "channels 16 are too few"),
    ],
)
def test_hifi_gans_that_are_not_implemented_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        vocoder_config(RELEASED_2_0 | change)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vocoder", {"activation": "snake"}, "vocoder.vocoder config: activation='snake'"),
        ("bwe", {"resblock": "1"}, "vocoder.bwe config: resblock='1' .only 'AMP1'"),
        ("bwe", {"output_sampling_rate": 44100}, "44100 Hz is not a multiple of the 16000 Hz"),
        ("bwe", {"hop_length": 160}, "makes 240 samples per mel frame; hop 160 at 3 .* needs 480"),
    ],
)
def test_extensions_that_are_not_implemented_are_refused_by_name(section, change, message):
    with pytest.raises(UserError, match=message):
        vocoder_config(RELEASED_2_3 | {section: RELEASED_2_3[section] | change})


def test_an_extension_without_its_sizes_is_refused():
    short = {key: value for key, value in RELEASED_2_3["bwe"].items() if key != "n_fft"}
    with pytest.raises(UserError, match=r"vocoder\.bwe config has no n_fft"):
        vocoder_config(RELEASED_2_3 | {"bwe": short})
