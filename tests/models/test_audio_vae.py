"""The audio VAE: causal in time, exact in its weights, plain about bad input."""

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_dtypes import bfloat16

from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.audio_vae import AUDIO_VAE, Attention, AudioVAE, AudioVAEConfig
from ltx2_jax.models.codecs.mel import MelConfig
from ltx2_jax.models.layers import Rngs
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names.audio_vae import TABLE, audio_vae_config, create

TINY = AudioVAEConfig(
    channels=4,
    multipliers=(1, 2, 1),
    num_blocks=1,
    latent_channels=3,
    attention_resolutions=(),
    middle_attention=False,
    mel=MelConfig(sample_rate=1600, n_fft=64, hop=16, bins=8, f_max=800.0),
)


encode = jax.jit(AudioVAE.encode)
encode_waveform = jax.jit(AudioVAE.encode_waveform)
decode = jax.jit(AudioVAE.decode)


def draw(create):
    """Random weights in which everything counts."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(create), nnx.Param)[1])
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return params | ({"std": np.exp(params["std"])} if "std" in params else {})


@cache
def tiny():
    return mapping.build(partial(create, TINY), draw(partial(create, TINY)))


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- behaviour -----------------------------------------------------------------------------------


def test_a_longer_sound_begins_with_the_latents_of_a_shorter_one():
    mel = random(1, 30, 8, 2)
    whole, part = encode(tiny(), mel), encode(tiny(), mel[:, :17])
    assert whole.shape == (1, 8, 2, 3)
    assert part.shape == (1, 5, 2, 3)
    np.testing.assert_allclose(whole[:, :5], part, atol=1e-5)
    changed = encode(tiny(), np.concatenate([mel[:, :17], mel[:, 17:] + 1], axis=1))
    np.testing.assert_allclose(changed[:, :5], part, atol=1e-5)
    assert np.abs(changed[:, 5] - whole[:, 5]).max() > 1e-3


def test_a_longer_clip_decodes_to_a_longer_sound_with_the_same_beginning():
    latents = random(2, 6, 2, 3)
    whole, part = decode(tiny(), latents), decode(tiny(), latents[:, :4])
    assert whole.shape == (2, 21, 8, 2)
    assert part.shape == (2, 13, 8, 2)
    np.testing.assert_allclose(whole[:, :13], part, atol=1e-4)
    assert decode(tiny(), latents[:, :1]).shape == (2, 1, 8, 2)


def test_statistics_are_channel_major_and_undone_by_the_decoder():
    params = draw(partial(create, TINY))
    plain = params | {"mean": np.zeros(6, np.float32), "std": np.ones(6, np.float32)}
    build = partial(mapping.build, partial(create, TINY))
    mel = random(1, 9, 8, 2)
    raw, latents = encode(build(plain), mel), np.asarray(encode(build(params), mel))
    for channel in range(3):
        for bin_ in range(2):
            i = channel * 2 + bin_
            expected = (raw[..., bin_, channel] - params["mean"][i]) / params["std"][i]
            np.testing.assert_allclose(latents[..., bin_, channel], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        decode(build(params), latents), decode(build(plain), raw), rtol=1e-3, atol=1e-3
    )


def test_decoded_mels_have_the_official_size_whatever_the_levels_make():
    mel = dataclasses.replace(TINY.mel, bins=11)  # two latent bins make eight, three are missing
    for config, made in ((dataclasses.replace(TINY, mel=mel), (17, 8)),
                         (dataclasses.replace(TINY, multipliers=(1, 2)), (9, 8))):  # fmt: skip
        vae = mapping.build(partial(create, config), draw(partial(create, config)))
        decoded = decode(vae, random(1, 5, config.latent_bins, 3))
        assert decoded.shape == (1, 17, config.mel.bins, 2)
        assert not np.asarray(decoded[:, made[0] :]).any()
        assert not np.asarray(decoded[:, :, made[1] :]).any()
        assert np.asarray(decoded[:, : made[0], : made[1]]).all()


def test_attention_weighs_all_times_and_bins():
    def create():
        return Attention(4, rngs=Rngs(0))

    attention = mapping.build(create, draw(create))
    x = random(2, 3, 5, 4)
    y = (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)).reshape(2, 15, 4)

    def linear(conv, x):
        return x @ np.asarray(conv.kernel[...])[0, 0] + np.asarray(conv.bias[...])

    q, k, v = (linear(c, y) for c in (attention.query, attention.key, attention.value))
    expected = np.empty_like(y)
    for b in range(2):
        for i in range(15):
            weights = np.exp(k[b] @ q[b, i] / 2)
            expected[b, i] = weights @ v[b] / weights.sum()
    expected = x + linear(attention.out, expected).reshape(x.shape)
    np.testing.assert_allclose(attention(x), expected, atol=1e-4)


def test_attention_follows_the_blocks_of_the_listed_sizes_in_both_halves():
    config = dataclasses.replace(
        TINY, resolution=32, attention_resolutions=(16,), middle_attention=True
    )
    assert config.attention == (False, True, False)
    both = dataclasses.replace(config, attention_resolutions=(8, 32))
    assert both.attention == (True, False, True)
    params = mapping.abstract_params(partial(create, config))
    names = [".".join(map(str, path)) for path in params]
    found = {name.split(".attention")[0] for name in names if ".attention" in name}
    assert found == {"encoder.levels.1", "encoder.middle", "decoder.levels.1", "decoder.middle"}
    vae = mapping.build(partial(create, config), draw(partial(create, config)))
    latents = encode(vae, random(1, 9, 8, 2))
    assert decode(vae, latents).shape == (1, 9, 8, 2)


def test_silence_has_finite_latents():
    latents = encode_waveform(tiny(), jnp.zeros((1, 1600, 2)))
    assert latents.shape == (1, 26, 2, 3)
    assert np.isfinite(latents).all()


def test_a_sound_shorter_than_the_window_is_followed_by_silence():
    sound = random(1, 5, 2)
    short = encode_waveform(tiny(), sound)
    assert short.shape == (1, 1, 2, 3)
    padded = np.pad(sound, ((0, 0), (0, 28), (0, 0)))
    np.testing.assert_array_equal(short, encode_waveform(tiny(), padded))


def test_weights_stored_in_bfloat16_compute_in_float32():
    coarse = jax.tree.map(lambda x: x.astype(bfloat16), draw(partial(create, TINY)))
    fine = jax.tree.map(lambda x: x.astype(np.float32), coarse)
    mel, build = random(1, 9, 8, 2), partial(mapping.build, partial(create, TINY))
    latents = encode(build(coarse), mel)
    assert latents.dtype == jnp.float32
    np.testing.assert_array_equal(latents, encode(build(fine), mel))
    assert decode(build(coarse), latents.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 0, 8, 2), r"mel of shape \(1, 0, 8, 2\): expected \[B, T, 8, 2\]"),
        ("encode", (1, 9, 7, 2), r"expected \[B, T, 8, 2\]"),
        ("encode", (9, 8, 2), r"expected \[B, T, 8, 2\]"),
        ("encode_waveform", (1, 0, 2), r"waveform of shape .*one sample or more"),
        ("encode_waveform", (1, 100, 1), r"expected \[B, samples, 2\]"),
        ("encode_waveform", (100, 2), r"expected \[B, samples, 2\]"),
        ("decode", (1, 0, 2, 3), r"audio latents of shape .*A >= 1"),
        ("decode", (1, 4, 3, 2), r"expected \[B, A, 2, 3\]"),
    ],
)
def test_input_of_the_wrong_shape_is_named(method, shape, message):
    with pytest.raises(UserError, match=message) as caught:
        getattr(tiny(), method)(np.zeros(shape, np.float32))
    assert "\n" not in str(caught.value)


# ---- weights and config --------------------------------------------------------------------------


def test_every_form_of_the_network_has_official_names():
    config = AudioVAEConfig(attention_resolutions=(256, 64))
    names = [p.names[0] for p in mapping.parameters(partial(create, config), TABLE)]
    assert len(set(names)) == len(names)
    assert {
        "encoder.mid.attn_1.q.weight",
        "encoder.down.2.attn.1.proj_out.bias",
        "decoder.up.0.attn.2.v.weight",
        "decoder.up.2.upsample.conv.conv.weight",
        "encoder.down.1.downsample.conv.weight",
    } < set(names)


def test_released_metadata_gives_the_preset():
    released = json.loads("""{"model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "double_z": true, "mel_bins": 64, "z_channels": 8, "resolution": 256,
        "downsample_time": false, "in_channels": 2, "out_ch": 2, "ch": 128, "ch_mult": [1, 2, 4],
        "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        "mid_block_add_attention": false, "norm_type": "pixel", "causality_axis": "height"}}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "causal": true},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000}}}""")
    assert audio_vae_config(released) == AUDIO_VAE
    assert AUDIO_VAE.latent_channels * AUDIO_VAE.latent_bins == 128
    assert AUDIO_VAE.latents_per_second == 25


def test_keys_that_are_absent_have_the_official_defaults():
    assert audio_vae_config({}) == AudioVAEConfig()
    assert audio_vae_config({"variables": {"mel_bins": 32}}).mel.bins == 32
    both = {"preprocessing": {"mel": {"n_mel_channels": 48}}, "variables": {"mel_bins": 32}}
    assert audio_vae_config(both).mel.bins == 48
    other = audio_vae_config({"model": {"params": {"sampling_rate": 24000}}}).mel
    assert (other.sample_rate, other.f_max) == (24000, 12000)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_type", "group"), ("causality_axis", "width"), ("causality_axis", None),
     ("double_z", False), ("attn_type", "linear"), ("resamp_with_conv", False)],
)  # fmt: skip
def test_other_networks_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"audio VAE config: {key}={value!r} .only"):
        audio_vae_config({"model": {"params": {"ddconfig": {key: value}}}})
